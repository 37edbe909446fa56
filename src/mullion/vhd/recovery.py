"""Making the top of a chain ready to be written, whatever the last writer's end was.

States that are mended at once, and told in the chain's warnings: a pending log of a writer that was killed (replayed);
no footer at the end (written again behind the last block); room behind the last block that belongs to nothing (given
back). The latter two wait for a later opening while a full file system has no page for the footer. A file with other
damage is refused for writing and stays readable. Each step may be repeated after a crash.
"""

from __future__ import annotations

from mullion.vhd.errors import VhdDamagedError
from mullion.vhd.fileio import SYSTEM, FileIO
from mullion.vhd.image import Image, load_image
from mullion.vhd.locking import lock_file, write_holder
from mullion.vhd.pending import PendingLog, end_session, has_session, start_session
from mullion.vhd.top import TopWriter


def open_top(
    top: Image, *, pending_path: str | None, holder: str, file_io: FileIO
) -> tuple[TopWriter | None, list[str]]:
    """Recover a top that is locked for writing: (its writer, None for a fixed disk; what was done).

    Raises: VhdDamagedError; OSError.
    """
    if top.damage:
        raise VhdDamagedError(f"{top.path} can only be read: {'; '.join(top.damage)}", path=top.path, structure="file")
    was_open = has_session(top.fd)
    if top.header is None:
        start_session(top.fd)
        write_holder(top.fd, holder)
        return None, []
    log = PendingLog(pending_path, top.fd, top.footer.unique_id) if pending_path is not None else None
    try:
        writer = TopWriter(top, file_io)
        said = _replay(writer, log, was_open=was_open)
        said += writer.mend()
        if log is not None:
            log.begin()
            writer.keep_log(log)
        else:
            start_session(top.fd)
        write_holder(top.fd, holder)
    except BaseException:
        if log is not None:
            log.close(remove=False)
        raise
    return writer, said


def recover_layer(fd: int, path: str, *, pending_path: str, holder: str, file_io: FileIO = SYSTEM) -> list[str]:
    """End what a killed writer has begun in a file that is no top any more; what was done.

    Its provider died after a child was put on top and before it heard of it. The file, open for writing, is locked for
    reading afterwards. Raises: DiskBusyError; VhdError; OSError.
    """
    lock_file(fd, path, for_writing=True)
    image = load_image(fd, path)
    writer, said = open_top(image, pending_path=pending_path, holder=holder, file_io=file_io)
    end_top(image, writer, file_io)
    lock_file(fd, path, for_writing=False)
    return [f"{path}: {text}" for text in said]


def end_top(top: Image, writer: TopWriter | None, file_io: FileIO) -> None:
    """End what `open_top` began: all durable, no room taken that is not used. The file stays open and locked.

    Raises: OSError.
    """
    if writer is not None:
        writer.flush()
        writer.close_gap()
        writer.close_log(remove=True)
    else:
        file_io.sync_file(top.fd)
    write_holder(top.fd, "")
    end_session(top.fd)


def _replay(writer: TopWriter, log: PendingLog | None, *, was_open: bool) -> list[str]:
    """Carry out what a killed writer had acknowledged, or say that it cannot be done."""
    records, is_ours = log.recover() if log is not None else ([], False)
    if log is not None and is_ours and records:
        writer.replay(records, log.path)
        writer.flush()
        return [f"{len(records)} changes of a writer that was killed were carried out"]
    said: list[str] = []
    if log is not None and records:
        said.append(f"{log.path} was of another boot, disk or session: discarded")
    if was_open and not is_ours:
        said.append("the last writer did not end cleanly: what it had not flushed may be missing")
    return said
