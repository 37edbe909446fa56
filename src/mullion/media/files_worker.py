"""The process that reads files out of a partition's disks, or those of a backup, for the service; one request each.

    service ── C ──► this process ── opens the disks, starts ──► confined reader (`media.confined.file_reader`)
            ◄─ N J B Z … E ──         passes on what it says         which alone sees what the guest wrote

It speaks `media.confined.channel` on a socket that it inherits: one command (C), an answer. `E` has an error as
`MullionError.to_wire` makes it, or nothing. Whoever hangs up ends it: the next thing that it says fails.

Invariants: disks are opened for reading only; memory is bounded by a few frames, whatever is read.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import msgspec

from mullion.base.block import BlockDevice
from mullion.base.errors import InvalidError, MullionError, NotFoundError
from mullion.media.confined import channel
from mullion.media.errors import FilesystemError, VolumeChoiceError
from mullion.media.filesystems.entries import FileEntry, Hole, Piece, pack_entry
from mullion.media.filesystems.reader import ReaderProcess, VolumeReader
from mullion.media.filesystems.volumes import Volume, choose_volume, list_volumes, meant_volumes
from mullion.model.views import FileVolumeView
from mullion.vhd import open_chain
from mullion.wire.nbd import SteadyReader

LISTER: Final = "mullion files ls"
AHEAD: Final = "ahead"
_PATIENCE_S: Final = 20.0
"""How long somebody who looks at files waits for the backup that they are in: less than the service waits for us."""


class BackupSource(msgspec.Struct, frozen=True):
    """A backup in a repository: `secret` has its passphrase and the storage's credentials.

    In the folder `index_cache` are copies of its index.
    """

    url: str
    secret: dict[str, Any]
    index_cache: str
    backup: str


class FilesCommand(msgspec.Struct, frozen=True):
    """What is to be read. `label` is what messages call it all.

    `chains` are the files of each disk, top first, `backings` where to read what they lack, which is missing where they
    lack nothing; or it is the disks of a `backup`.
    """

    label: str
    chains: dict[str, tuple[str, ...]]
    operation: str
    """`volumes`, `list`, `read` (a file) or `tree` (a file, or a folder with everything in it)."""
    path: str = "/"
    disk: str | None = None
    volume: int | None = None
    recursive: bool = False
    backup: BackupSource | None = None
    backings: dict[str, str] = {}


Opener = Callable[[], BlockDevice]


@dataclass(frozen=True, slots=True)
class _OpenDisk:
    device: BlockDevice
    volumes: list[Volume]
    problems: tuple[str, ...]


def answer(command: FilesCommand, fd: int, ahead: ReaderProcess | None = None) -> None:
    """Do what the command says, and say it on the channel, but for the end. Raises: MullionError; OSError."""
    with contextlib.ExitStack() as stack:
        openers = _openers(command, stack)
        disks = {disk: _open_disk(stack, opener) for disk, opener in _chosen(command, openers).items()}
        if command.operation == "volumes":
            for disk, opened in disks.items():
                for volume in opened.volumes:
                    channel.send(fd, channel.ENTRY, msgspec.json.encode(_found(disk, volume)))
            return
        disk, volume = _chosen_volume(command, disks)
        label = f"{command.label}: {disk}" if len(openers) > 1 else command.label
        reader = stack.enter_context(VolumeReader(disks[disk].device, volume, label, LISTER, ahead=ahead))
        pieces: Iterator[Piece]
        match command.operation:
            case "list":
                pieces = reader.list(command.path, recursive=command.recursive)
            case "read":
                pieces = reader.read(command.path)
            case "tree":
                pieces = reader.tree(command.path)
            case other:
                raise InvalidError(f"there is no operation {other!r}")
        first = next(pieces, None)
        for note in (*disks[disk].problems, *reader.notes):
            channel.send(fd, channel.NOTE, f"{command.label}: {disk}: {note}".encode())
        for piece in pieces if first is None else itertools.chain((first,), pieces):
            _send_piece(fd, piece)


def _send_piece(fd: int, piece: Piece) -> None:
    if isinstance(piece, FileEntry):
        channel.send(fd, channel.ENTRY, pack_entry(piece))
    elif isinstance(piece, Hole):
        channel.send(fd, channel.HOLE, channel.HOLE_BYTES.pack(piece.length))
    else:
        channel.send(fd, channel.CONTENT, piece)


def _openers(command: FilesCommand, stack: contextlib.ExitStack) -> Mapping[str, Opener]:
    """For each disk that there is, how it is opened. Raises: what opening the repository raises."""
    if command.backup is None:
        return {disk: partial(_open_chain, disk, command, stack) for disk in command.chains}
    from mullion.repository.credentials import Credentials
    from mullion.repository.location import open_repository

    source = command.backup
    credentials = Credentials(**source.secret["credentials"])
    repository = stack.enter_context(
        open_repository(source.url, source.secret["passphrase"], credentials, index_folder=source.index_cache)
    )
    manifest = repository.backup(source.backup)
    return {disk: partial(repository.open_disk, manifest, disk) for disk in manifest.disks}


def _open_chain(disk: str, command: FilesCommand, stack: contextlib.ExitStack) -> BlockDevice:
    files = command.chains[disk]
    chain = open_chain(files[0], read_only=True, allowed_dirs=sorted({os.path.dirname(path) for path in files}))
    if disk in command.backings:
        chain.backing = SteadyReader(command.backings[disk], disk, patience_s=_PATIENCE_S)
        stack.callback(chain.backing.close)
    return chain


def _chosen(command: FilesCommand, openers: Mapping[str, Opener]) -> Mapping[str, Opener]:
    """The disks that have to be opened. Raises: NotFoundError."""
    if command.disk is None:
        return openers
    if command.disk not in openers:
        raise NotFoundError(
            f"{command.label} has no disk {command.disk!r}; it has: {', '.join(openers) or 'none'}",
            remedy="Choose one of these with --disk.",
        )
    return {command.disk: openers[command.disk]}


def _open_disk(stack: contextlib.ExitStack, opener: Opener) -> _OpenDisk:
    device = opener()
    stack.callback(device.close)
    volumes, problems = list_volumes(device)
    return _OpenDisk(device, volumes, tuple(f"partition table: {problem}" for problem in problems))


def _chosen_volume(command: FilesCommand, disks: Mapping[str, _OpenDisk]) -> tuple[str, Volume]:
    """The volume that is meant: the only one that can be read besides those of the firmware, unless one was named.

    Raises: VolumeChoiceError with all that there are; FilesystemError when none can be read; NotFoundError.
    """
    if len(disks) == 1:
        disk = next(iter(disks))
        return disk, choose_volume(f"{command.label}: {disk}", disks[disk].volumes, command.volume)
    readable = [(disk, volume) for disk, opened in disks.items() for volume in _meant(opened, command.volume)]
    if len(readable) == 1:
        return readable[0]
    listed = ", ".join(f"{disk} {volume}" for disk, opened in disks.items() for volume in opened.volumes) or "none"
    if not readable:
        raise FilesystemError(
            f"{command.label}: none of its volumes can be read: {listed}",
            remedy="Volumes that are encrypted, or of other kinds, need the system that made them.",
        )
    disk, volume = readable[0]
    raise VolumeChoiceError(
        f"{command.label} has several volumes: {listed}",
        remedy=f"Choose one with --disk and --volume, such as --disk {disk} --volume {volume.number}.",
    )


def _meant(opened: _OpenDisk, number: int | None) -> list[Volume]:
    """The volumes of a disk that can be read, and of those the ones that the request may mean."""
    readable = [volume for volume in opened.volumes if volume.holds.kind is not None]
    if number is not None:
        return [volume for volume in readable if volume.number == number]
    return meant_volumes(readable)


def _found(disk: str, volume: Volume) -> FileVolumeView:
    return FileVolumeView(
        disk=disk,
        number=volume.number,
        type=volume.kind,
        filesystem=volume.holds.title,
        label=volume.name or volume.holds.label,
        offset=volume.offset,
        size_bytes=volume.length,
        readable=volume.holds.kind is not None,
        remedy=volume.holds.remedy,
    )


def _receive_command(fd: int) -> FilesCommand | None:
    """The command; None when whoever started us is gone. Raises: InvalidError."""
    head = channel.receive_exactly(fd, channel.HEAD.size)
    if len(head) < channel.HEAD.size:
        return None
    kind, length = channel.HEAD.unpack(head)
    payload = channel.receive_exactly(fd, min(length, channel.FRAME_LIMIT_BYTES))
    try:
        if kind == channel.COMMAND:
            return msgspec.json.decode(payload, type=FilesCommand)
    except msgspec.MsgspecError as error:
        raise InvalidError(f"the command is none: {error}") from error
    raise InvalidError(f"{kind!r} is no command")


def main(arguments: list[str]) -> int:
    """The descriptor of the channel; with `ahead` the confined reader is started before there is a command."""
    fd = int(arguments[0])
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody listens any more: end without a word
    ahead = ReaderProcess() if AHEAD in arguments else None
    try:
        _answer_one(fd, ahead)
    finally:
        if ahead is not None:
            ahead.end()
    return 0


def _answer_one(fd: int, ahead: ReaderProcess | None) -> None:
    """Wait for a command, and answer it to its end."""
    end: dict[str, Any] = {}
    try:
        command = _receive_command(fd)
        if command is None:
            return
        answer(command, fd, ahead)
    except MullionError as error:
        end = error.to_wire()
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        end = FilesystemError(f"the disk cannot be read: {named}{error.strerror or error}").to_wire()
    channel.send(fd, channel.END, json.dumps(end).encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
