"""Creating a partition together with the disks that it names and that are not there yet."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from mullion.base.errors import AlreadyExistsError, MullionError, NotFoundError
from mullion.cli.face import Face
from mullion.cli.values import DiskSpec

if TYPE_CHECKING:
    from mullion.model.views import PartitionView


def definition_document(name: str, disks: Sequence[DiskSpec], given: Mapping[str, object]) -> dict[str, object]:
    """The definition as a document, only with what was given: the defaults are the model's."""
    document: dict[str, object] = {"name": name}
    for option, field in (
        ("vcpus", "vcpus"),
        ("memory", "memory_bytes"),
        ("machine", "machine"),
        ("firmware", "firmware"),
        ("tpm", "tpm"),
        ("accelerator", "accelerator"),
        ("description", "description"),
    ):
        if given.get(option) is not None:
            document[field] = given[option]
    if disks:
        document["disks"] = [_attachment(spec) for spec in disks]
    if labels := given.get("labels"):
        assert isinstance(labels, tuple)
        document["labels"] = dict(_label(text) for text in labels)
    if kernel := given.get("kernel"):
        document["direct_boot"] = {
            "kernel": os.path.abspath(str(kernel)),
            **({"initrd": os.path.abspath(str(given["initrd"]))} if given.get("initrd") else {}),
            "command_line": given.get("append") or "",
        }
    elif given.get("initrd") or given.get("append"):
        raise click.UsageError("--initrd and --append need --kernel")
    return document


def _attachment(spec: DiskSpec) -> dict[str, object]:
    attachment: dict[str, object] = {"path": spec.path, "bus": spec.bus.value, "read_only": spec.read_only}
    if spec.id:
        attachment["id"] = spec.id
    return attachment


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise click.UsageError(f"{text!r} is not a label: write KEY=VALUE")
    return key, value


def create(face: Face, document: dict[str, object], disks: Sequence[DiskSpec]) -> PartitionView:
    """Create the missing disks, then the partition; when that fails the new disks are deleted again.

    Raises: what the service refuses.
    """
    from mullion.model.parse import parse_partition

    definition = parse_partition(document, source="the command line")
    _check_name_is_free(face, definition.name)
    made: list[str] = []
    try:
        for spec in disks:
            made += _create_if_missing(face, spec)
        return face.client.create_partition(definition)
    except BaseException:
        for path in reversed(made):
            _delete_again(face, path)
        raise


def _check_name_is_free(face: Face, name: str) -> None:
    """Refuse a taken name before a disk is created for it; the service itself checks once more."""
    try:
        face.client.partition(name)
    except NotFoundError:
        return
    raise AlreadyExistsError(f"there is a partition named {name} already", partition=name)


def _create_if_missing(face: Face, spec: DiskSpec) -> tuple[str, ...]:
    """The path of the disk that was created; nothing when there is one already, or when nothing says what it is."""
    try:
        face.client.disk(spec.path)
    except NotFoundError:
        if not spec.may_be_created:
            face.note(f"disk {spec.path} does not exist yet; with ,size=SIZE or ,parent=DISK it is created here")
            return ()
        view = face.client.create_disk(path=spec.path, size_bytes=spec.size_bytes, parent=spec.parent)
        face.note(f"created disk {view.path}")
        return (view.path,)
    if spec.may_be_created:
        face.note(f"disk {spec.path} exists and is used as it is")
    return ()


def _delete_again(face: Face, path: str) -> None:
    try:
        face.client.delete_disk(path)
        face.note(f"deleted disk {path} again")
    except MullionError as error:
        face.print_error(error)
