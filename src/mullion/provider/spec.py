"""What a provider is told to serve: made by the parent, passed as JSON, checked here.

JSON: `{"partition": name, "control": socket path, "log": file, "pending_dir": folder or null, "uid": number or null,
"gid": number or null, "disks": [{"id": name, "chain": [paths, top first], "read_only": false, "serial": text,
"vhost_user": socket path or null, "nbd": socket path or null, "limits": {caps of `layers.limits`}, "backing": socket
path or null}, …], "limits": {caps of all disks together}, "allow_faults": false, "homecoming_rate":
bytes a second or 0 for no limit, "takes_over": false}`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final, Self

from mullion.base.errors import InvalidError
from mullion.base.paths import SOCKET_PATH_LIMIT
from mullion.provider.layers.limits import NO_LIMITS, Limits
from mullion.vhd.parents import CHAIN_LIMIT

MAX_DISKS: Final = 64


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """One disk: its files, and the sockets it is offered on."""

    id: str
    chain: tuple[str, ...]
    read_only: bool = False
    vhost_user: str | None = None
    nbd: str | None = None
    serial: str = ""
    limits: Limits = NO_LIMITS
    backing: str | None = None
    """The NBD socket that is read where no file has anything, whose export is called as the disk is."""

    @classmethod
    def from_fields(cls, fields: Mapping[str, object], where: str) -> Self:
        """Raises: InvalidError that names the field."""
        _check_names(fields, cls, where)
        chain = fields.get("chain")
        if not isinstance(chain, list) or not 0 < len(chain) <= CHAIN_LIMIT:
            raise InvalidError(f"{where}.chain: a list of 1 to {CHAIN_LIMIT} paths is needed, top first")
        return cls(
            id=_text(fields, "id", where),
            chain=tuple(_absolute(path, f"{where}.chain") for path in chain),
            read_only=_flag(fields, "read_only", where),
            vhost_user=_socket(fields, "vhost_user", where),
            nbd=_socket(fields, "nbd", where),
            serial=_text(fields, "serial", where, ""),
            limits=Limits.from_fields(fields.get("limits", {}), f"{where}.limits"),
            backing=_socket(fields, "backing", where),
        )


@dataclass(frozen=True, slots=True)
class ProviderSpec:
    """One provider: a partition's disks, where it is controlled, and as whom it runs."""

    partition: str
    disks: tuple[DiskSpec, ...]
    control: str
    log: str
    pending_dir: str | None = None
    uid: int | None = None
    gid: int | None = None
    limits: Limits = NO_LIMITS
    allow_faults: bool = False
    homecoming_rate: int = 0
    """How fast blocks come home from a disk's backing, in bytes a second; 0 is no limit."""
    takes_over: bool = False
    """From the provider that listens at `control` now (`handover`), instead of opening files and sockets."""

    @classmethod
    def from_fields(cls, fields: Mapping[str, object]) -> Self:
        """Raises: InvalidError that names the field."""
        where = "provider"
        _check_names(fields, cls, where)
        disks = fields.get("disks")
        if not isinstance(disks, list) or len(disks) > MAX_DISKS:
            raise InvalidError(f"{where}.disks: a list of at most {MAX_DISKS} disks is needed")
        control = _socket(fields, "control", where)
        if control is None:
            raise InvalidError(f"{where}.control: the path of a socket is needed")
        pending_dir = fields.get("pending_dir")
        spec = cls(
            partition=_text(fields, "partition", where),
            disks=tuple(
                DiskSpec.from_fields(_mapping(disk, f"{where}.disks[{number}]"), f"{where}.disks[{number}]")
                for number, disk in enumerate(disks)
            ),
            control=control,
            log=_absolute(fields.get("log"), f"{where}.log"),
            pending_dir=None if pending_dir is None else _absolute(pending_dir, f"{where}.pending_dir"),
            uid=_number(fields, "uid", where),
            gid=_number(fields, "gid", where),
            limits=Limits.from_fields(fields.get("limits", {}), f"{where}.limits"),
            allow_faults=_flag(fields, "allow_faults", where),
            homecoming_rate=_number(fields, "homecoming_rate", where) or 0,
            takes_over=_flag(fields, "takes_over", where),
        )
        names = [disk.id for disk in spec.disks]
        if len(set(names)) != len(names):
            raise InvalidError(f"{where}.disks: two disks have the same id")
        return spec

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Raises: InvalidError."""
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise InvalidError(f"the provider's specification is not JSON: {error}") from error
        return cls.from_fields(_mapping(fields, "provider"))

    def to_wire(self) -> dict[str, object]:
        """As JSON's values."""
        return {**asdict(self), "disks": [{**asdict(disk), "chain": list(disk.chain)} for disk in self.disks]}


def _check_names(fields: Mapping[str, object], kind: type[DiskSpec] | type[ProviderSpec], where: str) -> None:
    known = kind.__dataclass_fields__
    for name in fields:
        if name not in known:
            raise InvalidError(f"{where}: unknown field {name!r}", remedy=f"Known are: {', '.join(known)}.")


def _mapping(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise InvalidError(f"{where}: an object is needed")
    return value


def _text(fields: Mapping[str, object], name: str, where: str, default: str | None = None) -> str:
    value = fields.get(name, default)
    if not isinstance(value, str) or len(value) > 4096 or (not value and default is None):
        raise InvalidError(f"{where}.{name}: a text is needed")
    return value


def _flag(fields: Mapping[str, object], name: str, where: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise InvalidError(f"{where}.{name}: true or false is needed")
    return value


def _number(fields: Mapping[str, object], name: str, where: str) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32 - 1:
        raise InvalidError(f"{where}.{name}: a number of at least 0 is needed")
    return value


def _absolute(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value or len(value) > 4096:
        raise InvalidError(f"{where}: an absolute path is needed")
    return value


def _socket(fields: Mapping[str, object], name: str, where: str) -> str | None:
    value = fields.get(name)
    if value is None:
        return None
    path = _absolute(value, f"{where}.{name}")
    if len(path.encode()) > SOCKET_PATH_LIMIT:
        raise InvalidError(
            f"{where}.{name}: the socket's path is longer than {SOCKET_PATH_LIMIT} bytes: {path}",
            remedy="Choose a shorter run folder (setting run_dir).",
        )
    return path
