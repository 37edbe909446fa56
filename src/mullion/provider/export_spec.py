"""What an exporter is told to serve: made by the parent, passed as JSON, checked here.

JSON: `{"partition": name, "disks": [{"id": name, "chain": [paths, top first], "since": [paths, top first] or null,
"bitmap": name or null, "backing": socket path or null}, …], "unix": socket path or null, "host": address or null,
"port": number, "tls": folder or null, "control": socket path, "identity": file, "log": file, "uid": number or null,
"gid": number or null}`.

Invariants: either `unix`, or `host` with `tls`: nothing leaves the host unencrypted; `since` and `bitmap` go together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

from mullion.base.errors import InvalidError
from mullion.base.paths import SOCKET_PATH_LIMIT
from mullion.vhd.parents import CHAIN_LIMIT

MAX_DISKS: Final = 64
_PATH_LIMIT: Final = 4096
_NAME_LIMIT: Final = 255


@dataclass(frozen=True, slots=True)
class ExportedDisk:
    """One disk: the frozen files of it, and of the point that its bitmap tells the changes since."""

    id: str
    chain: tuple[str, ...]
    since: tuple[str, ...] | None = None
    bitmap: str | None = None
    backing: str | None = None
    """The NBD socket that is read where no file has anything, whose export is called as the disk is."""

    @classmethod
    def from_fields(cls, given: object, where: str) -> Self:
        """Raises: InvalidError that names the field."""
        fields = _object(given, where, cls)
        since = None if fields.get("since") is None else _chain(fields.get("since"), f"{where}.since")
        bitmap = None if fields.get("bitmap") is None else _name(fields.get("bitmap"), f"{where}.bitmap")
        if (since is None) is not (bitmap is None):
            raise InvalidError(f"{where}: since and bitmap go together")
        backing = fields.get("backing")
        if backing is not None:
            _socket(backing, f"{where}.backing")
        chain = _chain(fields.get("chain"), f"{where}.chain")
        return cls(_name(fields.get("id"), f"{where}.id"), chain, since, bitmap, backing)


@dataclass(frozen=True, slots=True)
class ExportSpec:
    """One exporter: disks of a checkpoint, where clients connect, where it is controlled, and as whom it runs."""

    partition: str
    disks: tuple[ExportedDisk, ...]
    control: str
    identity: str
    """The file that gets the exporter's process identity, by which the next parent finds it."""
    log: str
    unix: str | None = None
    host: str | None = None
    port: int = 0
    """0 is any that is free; the status says which."""
    tls: str | None = None
    uid: int | None = None
    gid: int | None = None

    @classmethod
    def from_fields(cls, given: object) -> Self:
        """Raises: InvalidError that names the field."""
        fields = _object(given, "export", cls)
        disks = fields.get("disks")
        if not isinstance(disks, list) or not 0 < len(disks) <= MAX_DISKS:
            raise InvalidError(f"export.disks: a list of 1 to {MAX_DISKS} disks is needed")
        values = {
            **fields,
            "partition": _name(fields.get("partition"), "export.partition"),
            "disks": tuple(ExportedDisk.from_fields(disk, f"export.disks[{n}]") for n, disk in enumerate(disks)),
        }
        for name in ("control", "identity", "log"):
            _path(fields.get(name), f"export.{name}")
        for name in ("uid", "gid", "port"):
            _number(fields.get(name), f"export.{name}", is_optional=name != "port")
        spec = cls(**values)
        if len({disk.id for disk in spec.disks}) != len(spec.disks):
            raise InvalidError("export.disks: two disks have the same id")
        spec._check_listener()
        return spec

    def _check_listener(self) -> None:
        _socket(self.control, "export.control")
        if self.unix is not None:
            _socket(self.unix, "export.unix")
        if self.tls is not None:
            _path(self.tls, "export.tls")
        if self.port > 65535:
            raise InvalidError("export.port: a port is at most 65535")
        if (self.unix is None) is (self.host is None):
            raise InvalidError("export: either a unix socket or a host to listen on is needed")
        if self.host is not None:
            _name(self.host, "export.host")
            if self.tls is None:
                raise InvalidError(
                    f"an export on {self.host} without TLS: whoever reaches the port could read the disks",
                    remedy="Give a folder of certificates, or listen on a unix socket.",
                )

    def to_wire(self) -> dict[str, object]:
        """As JSON's values."""
        disks = [
            {**asdict(disk), "chain": list(disk.chain), "since": disk.since and list(disk.since)} for disk in self.disks
        ]
        return {**asdict(self), "disks": disks}


def _object(given: object, where: str, kind: type[ExportedDisk] | type[ExportSpec]) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        raise InvalidError(f"{where}: an object is needed")
    known = kind.__dataclass_fields__
    for name in given:
        if name not in known:
            raise InvalidError(f"{where}: unknown field {name!r}", remedy=f"Known are: {', '.join(known)}.")
    return given


def _name(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value.encode()) <= _NAME_LIMIT:
        raise InvalidError(f"{where}: a printable text of at most {_NAME_LIMIT} bytes is needed")
    return value


def _chain(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= CHAIN_LIMIT:
        raise InvalidError(f"{where}: a list of 1 to {CHAIN_LIMIT} paths is needed, top first")
    return tuple(_path(path, where) for path in value)


def _path(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value or len(value) > _PATH_LIMIT:
        raise InvalidError(f"{where}: an absolute path is needed")
    return value


def _socket(value: str, where: str) -> None:
    if len(_path(value, where).encode(errors="surrogateescape")) > SOCKET_PATH_LIMIT:
        raise InvalidError(
            f"{where}: the socket's path is longer than {SOCKET_PATH_LIMIT} bytes: {value}",
            remedy="Choose a shorter run folder (setting run_dir).",
        )


def _number(value: object, where: str, *, is_optional: bool) -> None:
    if value is None and is_optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32 - 1:
        raise InvalidError(f"{where}: a number is needed")
