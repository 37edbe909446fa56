"""Values of options: sizes, paths of disks, and the `--disk` specification."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

import click

from mullion.base.errors import InvalidError
from mullion.base.units import parse_size
from mullion.model.definition import Bus

IMAGE_PREFIX: Final = "image:"
DISK_SYNTAX: Final = "PATH[,parent=PARENT][,size=SIZE][,bus=virtio|sata|ide][,ro][,id=ID]"
_LITERAL_COMMA: Final = "\0"  # stands for a doubled comma while splitting: no argument can hold it


class SizeType(click.ParamType[int]):
    """A size such as 512M or 40G, as int bytes."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except InvalidError as error:
            self.fail(f"{error.message}: {error.remedy}", param, ctx)


class RateType(click.ParamType[int | str]):
    """Bytes a second, such as 20M; 0 for `unlimited`; `default` as it is."""

    name = "rate"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "default":
            return "default"
        return 0 if value == "unlimited" else SizeType().convert(value, param, ctx)


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """A `--disk`: the disk to attach and, with `parent` or `size_bytes`, how to create it when it is not there."""

    path: str
    parent: str | None = None
    size_bytes: int | None = None
    bus: Bus = Bus.VIRTIO
    read_only: bool = False
    id: str = ""

    @property
    def may_be_created(self) -> bool:
        return self.parent is not None or self.size_bytes is not None


class DiskType(click.ParamType[DiskSpec]):
    """The `--disk` specification."""

    name = "disk"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> DiskSpec:
        if isinstance(value, DiskSpec):
            return value
        try:
            return parse_disk_spec(str(value))
        except InvalidError as error:
            self.fail(f"{error.message}: {error.remedy}", param, ctx)


def parse_disk_spec(text: str) -> DiskSpec:
    """Read a `--disk` value. A comma within a path is written twice.

    Raises: InvalidError that names the part that is wrong.
    """
    path, *rest = (part.replace(_LITERAL_COMMA, ",") for part in text.replace(",,", _LITERAL_COMMA).split(","))
    if not path:
        raise InvalidError(f"{text!r} names no disk", remedy=f"Write {DISK_SYNTAX}.")
    given: dict[str, str] = {}
    for part in rest:
        name, equals, value = part.partition("=")
        if (
            name not in ("parent", "size", "bus", "ro", "id")
            or bool(equals) != (name != "ro")
            or (equals and not value)
        ):
            raise InvalidError(f"{part!r} is not a part of a disk", remedy=f"Write {DISK_SYNTAX}.")
        if name in given:
            raise InvalidError(f"{name} is given twice", remedy=f"Write {DISK_SYNTAX}.")
        given[name] = value
    buses = [bus.value for bus in Bus]
    if given.get("bus", buses[0]) not in buses:
        raise InvalidError(f"there is no bus {given['bus']!r}", remedy=f"Allowed: {', '.join(buses)}.")
    return DiskSpec(
        path=disk_path(path),
        parent=parent_path(given["parent"]) if "parent" in given else None,
        size_bytes=parse_size(given["size"]) if "size" in given else None,
        bus=Bus(given.get("bus", buses[0])),
        read_only="ro" in given,
        id=given.get("id", ""),
    )


def disk_path(text: str) -> str:
    """A disk as the service knows it: a name without a slash is one of its pool, anything else a path made absolute."""
    return os.path.abspath(text) if "/" in text else text


def repository_place(text: str) -> str:
    """A repository's place as the service knows it: an address as it is, a folder by its absolute path.

    Raises: InvalidError for what looks like an address and is none: it would become a folder of that name.
    """
    if "://" in text or text.startswith("/"):
        return text
    if not text or ":" in text.partition("/")[0]:
        raise InvalidError(
            f"{text!r} is neither a folder nor an address",
            remedy="Write /folder, sftp://user@host/folder, s3://bucket/prefix or s3+https://host/bucket/prefix.",
        )
    return os.path.abspath(text)


def parent_path(text: str) -> str:
    """A parent as the service knows it: `image:NAME`, a name in the pool, or an absolute path."""
    return text if text.startswith(IMAGE_PREFIX) else disk_path(text)
