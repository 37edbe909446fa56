"""`mullion apply`: make the partitions what a file says, and say what that changes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import click
import msgspec

from mullion.base.errors import InvalidError, NotFoundError
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Command

if TYPE_CHECKING:
    from mullion.model.definition import PartitionDefinition
    from mullion.model.views import PartitionView


class AppliedView(msgspec.Struct, frozen=True):
    """What became of one partition; `outcome` is created, updated or unchanged."""

    name: str
    outcome: str
    changes: tuple[str, ...] = ()


@click.command(cls=Command, short_help="Create or update partitions as a file defines them.")
@click.option("-f", "--file", "path", required=True, metavar="FILE|-", help="TOML or JSON; - is standard input.")
@click.option("--dry-run", is_flag=True, help="Say what would change, and change nothing.")
@pass_face
def apply(face: Face, path: str, dry_run: bool) -> None:
    """Create or update partitions as a file defines them.

    A file holds the fields of one partition, or several, each under [[partition]]. What it leaves out takes its
    default, except power: a file that does not speak of it neither starts nor stops anything. Partitions that the file
    does not name are left alone.

    \b
      name = "web"
      memory = "2G"
      vcpus = 2
      [[disks]]
      path = "web"
    """
    applied = [
        _apply_one(face, definition, says_power=says_power, dry_run=dry_run)
        for definition, says_power in read_definitions(path)
    ]
    if face.is_json:
        face.emit_json(applied)
        return
    if dry_run:
        face.note("Nothing was changed (--dry-run).")


def _apply_one(face: Face, wanted: PartitionDefinition, *, says_power: bool, dry_run: bool) -> AppliedView:
    from mullion.cli.changes import adopt, changes

    try:
        present: PartitionView | None = face.client.partition(wanted.name)
    except NotFoundError:
        present = None
    if present is None:
        if not dry_run:
            face.client.create_partition(wanted)
        applied = AppliedView(wanted.name, "created")
    else:
        wanted = adopt(wanted, present.definition, says_power=says_power)
        lines = tuple(changes(present.definition, wanted))
        if lines and not dry_run:
            face.client.update_partition(wanted.name, wanted, present.etag)
        applied = AppliedView(wanted.name, "updated" if lines else "unchanged", lines)
    if not face.is_json:
        _say(face, applied, dry_run=dry_run)
    return applied


def _say(face: Face, applied: AppliedView, *, dry_run: bool) -> None:
    would_be = "would be " if dry_run and applied.outcome != "unchanged" else ""
    face.say(f"{applied.name}: {would_be}{applied.outcome}")
    for line in applied.changes:
        face.say(f"  {line}")


def read_definitions(path: str) -> list[tuple[PartitionDefinition, bool]]:
    """The definitions in a file (`-`: standard input), each with whether it speaks of power.

    Raises: InvalidError when the file cannot be read or says something wrong.
    """
    from mullion.model.parse import load, parse_document

    source = "standard input" if path == "-" else path
    data = _read(path, source)
    document = load(data, source=source, format=_format_of(path, data))
    definitions = parse_document(document, source=source)
    if not definitions:
        raise InvalidError(f"{source}: no partition is defined", remedy="Write [[partition]] and its fields below it.")
    items = _items(document)
    assert len(items) == len(definitions)
    return [(definition, "power" in item) for definition, item in zip(definitions, items, strict=True)]


def _items(document: Mapping[str, object]) -> Sequence[Mapping[str, object]]:
    several = document.get("partition")
    return several if isinstance(several, list) else [document]


def _read(path: str, source: str) -> bytes:
    if path == "-":
        return sys.stdin.buffer.read()
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise InvalidError(
            f"{source} cannot be read: {error.strerror}", remedy="Name a file of TOML or JSON with -f.", path=path
        ) from error


def _format_of(path: str, data: bytes) -> Literal["toml", "json"]:
    if path.endswith((".json", ".toml")):
        return "json" if path.endswith(".json") else "toml"
    return "json" if data.lstrip()[:1] == b"{" else "toml"
