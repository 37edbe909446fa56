"""Settings: one table of name, type, default, unit and help, from which TOML, environment and documents are made.

Order of precedence: command line, environment (`MULLION_` + NAME), file (`mullion.toml`), default.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from mullion.base.errors import InvalidError


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table. `default` may name an earlier setting in braces."""

    name: str
    kind: type[str] | type[int]
    default: str
    unit: str
    help: str

    @property
    def variable(self) -> str:
        return f"MULLION_{self.name.upper()}"


_ROOT: Final = os.geteuid() == 0
_USER_DATA: Final = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
_USER_RUN: Final = os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/mullion-{os.getuid()}"  # noqa: S108 - per user, checked when made

SETTINGS: Final = (
    Setting(
        "data_dir",
        str,
        "/var/lib/mullion" if _ROOT else f"{_USER_DATA}/mullion",
        "folder",
        "Definitions, disks, images and logs; survives a reboot.",
    ),
    Setting(
        "run_dir",
        str,
        "/run/mullion" if _ROOT else f"{_USER_RUN}/mullion",
        "folder",
        "Sockets and process identities; may vanish with a reboot. Keep the path short: sockets allow 107 characters.",
    ),
    Setting(
        "listen", str, "127.0.0.1:8440", "address:port", "Where the REST API listens for tokens; `none` for nowhere."
    ),
    Setting(
        "accelerator", str, "auto", "auto|kvm|tcg", "Overrides the probe for partitions whose definition says auto."
    ),
    Setting("boot_slots", int, "0", "partitions", "How many partitions may boot at once; 0 means two per core."),
    Setting("merge_slots", int, "2", "merges", "How many layers of deleted checkpoints may be merged at once."),
    Setting(
        "merge_rate",
        int,
        "67108864",
        "bytes per second",
        "How fast one layer may be merged while its partition runs; 0 for no limit.",
    ),
    Setting(
        "homecoming_rate",
        int,
        "67108864",
        "bytes per second",
        "How fast blocks of an instantly restored disk come home while its guest runs; 0 for no limit.",
    ),
    Setting("log_level", str, "info", "debug|info|warning|error", "How much the service writes to its log."),
    Setting(
        "fault_injection",
        str,
        "off",
        "off|on",
        "For drills: let administrators have disks of partitions fail (mullion provider fault).",
    ),
    Setting("isolation", str, "auto", "auto|off", "As root: run each QEMU and provider under a user id of its own."),
)


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings in force."""

    data_dir: str
    run_dir: str
    listen: str
    accelerator: str
    boot_slots: int
    merge_slots: int
    merge_rate: int
    homecoming_rate: int
    log_level: str
    fault_injection: str
    isolation: str

    @classmethod
    def load(cls, environ: Mapping[str, str] = os.environ, **overrides: str | int | None) -> Settings:
        """Read them from every source. `MULLION_HOME=DIR` puts data and run folders below one DIR.

        Raises: InvalidError that names the setting, its source and what it takes.
        """
        home = environ.get("MULLION_HOME")
        config_path = environ.get("MULLION_CONFIG") or (
            f"{home}/mullion.toml"
            if home
            else "/etc/mullion/mullion.toml"
            if _ROOT
            else f"{_USER_DATA}/mullion/mullion.toml"
        )
        from_file = _read_file(config_path)
        values: dict[str, str | int] = {}
        for setting in SETTINGS:
            default = setting.default
            if home and setting.name in ("data_dir", "run_dir"):
                default = f"{os.path.abspath(home)}/{setting.name.removesuffix('_dir')}"
            given: object = overrides.get(setting.name)
            source = "the command line"
            if given is None and setting.variable in environ:
                given, source = environ[setting.variable], setting.variable
            if given is None and setting.name in from_file:
                given, source = from_file[setting.name], config_path
            values[setting.name] = _convert(setting, default if given is None else given, source)
        return cls(**values)  # type: ignore[arg-type]  # the table's kinds are the fields' types, which a test holds


def _read_file(path: str) -> dict[str, object]:
    try:
        with open(path, "rb") as file:
            found = tomllib.load(file)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InvalidError(
            f"the settings cannot be read: {path}: {error.strerror}",
            remedy="Make the file readable, or name another with MULLION_CONFIG.",
            path=path,
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidError(f"{path} is not TOML: {error}", path=path) from error
    known = {setting.name for setting in SETTINGS}
    for name in found:
        if name not in known:
            raise InvalidError(f"{path}: unknown setting {name!r}", remedy=f"Known are: {', '.join(sorted(known))}.")
    return found


def _convert(setting: Setting, given: object, source: str) -> str | int:
    if setting.kind is int:
        try:
            return int(str(given))
        except ValueError:
            raise InvalidError(
                f"{source}: {setting.name} = {given!r} is not a whole number", remedy=f"{setting.name}: {setting.help}"
            ) from None
    text = str(given)
    choices = setting.unit.split("|")
    if len(choices) > 1 and text not in choices:
        raise InvalidError(f"{source}: {setting.name} = {text!r}", remedy=f"Allowed: {', '.join(choices)}.")
    return text
