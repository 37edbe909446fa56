"""The fuzz target for VHD files: opening, reading, checking and repairing one of any bytes.

A typed error or a disk that can be read; a check that agrees with it; nothing written, until a repair is asked for, and
then a disk that is what the check had promised.

Run it for long with atheris: `python tests/fuzz/vhd_target.py tests/fuzz/vhd_corpus_found tests/fuzz/vhd_corpus`; what
it finds goes into the first folder. pytest runs the same function on both and on mutations of them (`test_vhd_fuzz.py`).
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # under atheris: what is to be covered is instrumented while it is imported
    import atheris

    with atheris.instrument_imports(include=["mullion.vhd"]):
        import mullion.vhd.check
        import mullion.vhd.repair  # noqa: F401

import atexit
import contextlib
import dataclasses
import enum
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterator

from mullion.base.block import Extent
from mullion.base.errors import MullionError
from mullion.vhd import Chain, create_dynamic, inspect_chain, open_chain
from mullion.vhd.check import Report, check_disk
from mullion.vhd.findings import Verdict
from mullion.vhd.layout import Footer, checksum
from mullion.vhd.repair import repair_disk

READ_LIMIT_BYTES = 1 << 15
PARENT_ID = b"\x11" * 16
"""The children of the corpus were made on a disk of this id."""


def make_folder() -> str:
    """A folder, gone at exit, with the parent that the corpus's children name."""
    folder = tempfile.mkdtemp(prefix="vhd-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    atexit.register(shutil.rmtree, folder)
    path = f"{folder}/parent.vhd"
    create_dynamic(path, 16 * 4096, block_bytes=4096)
    with open_chain(path) as chain:
        chain.pwrite(0, b"parent" * 2000)
    with open(path, "r+b") as file:
        raw = file.read(512)
        footer = dataclasses.replace(Footer.unpack(raw), unique_id=PARENT_ID).pack()
        for place in ((0, os.SEEK_SET), (-512, os.SEEK_END)):
            file.seek(*place)
            file.write(footer)
    return folder


_FOLDER = make_folder()


class Part(enum.Enum):
    """What is done alone with most files, so that there can be many."""

    READ = enum.auto()
    CHECK = enum.auto()


def repair_checksums(raw: bytearray) -> None:
    """Make footer, copy and header believable, so that mutations reach what lies behind the checksums."""
    for at, length, field in ((0, 512, 64), (len(raw) - 512, 512, 64), (512, 1024, 36)):
        if at >= 0 and at + length <= len(raw) and raw[at : at + 8] in (b"conectix", b"cxsparse"):
            struct.pack_into(">I", raw, at + field, checksum(bytes(raw[at : at + length]), field))


def check_file(raw: bytes, part: Part | None = None) -> bool:
    """Open, read, check and inspect a file of these bytes beside a good parent, and plan its repair, or do but one of it.

    The lowest bit of the first byte makes the checksums right, the next one has the file repaired for real in the end.
    Says whether it could be read. Raises: what must never be raised.
    """
    if not raw:
        return False
    data = bytearray(raw[1:])
    if raw[0] & 1:
        repair_checksums(data)
    path = f"{_FOLDER}/child.vhd"
    with open(path, "wb") as file:
        file.write(data)
    content = None
    try:
        if part is None:
            inspect(path)
        if part is not Part.CHECK:
            content = read_all(path)
    except MullionError as error:
        complain_without_remedy(error)
    report = check_disk(path) if part is not Part.READ else None
    if report is not None and part is None:
        judge(report, content)
        check_plan(path, report)
    with open(path, "rb") as file:
        assert file.read() == data, "the file was changed"
    if report is not None and part is None and raw[0] & 2:
        repair(path, report, content)
    return content is not None


def check_plan(path: str, report: Report) -> None:
    """A repairable file has a plan; making one changes nothing."""
    planned = repair_disk(path, allow_loss=has_losses(report), dry_run=True)
    assert planned.actions or planned.before.verdict is not Verdict.REPAIRABLE


def inspect(path: str) -> None:
    for file_info in inspect_chain(path).files:
        assert file_info.size_bytes > 0


def judge(report: Report, content: list[bytes | None] | None) -> None:
    """Does the verdict agree with what reading came to?"""
    if report.verdict is Verdict.SOUND:
        assert content is not None, "a sound disk was refused"
        assert None not in content, "a sound disk could not be read"
    for problem in report.problems:
        assert problem.what
        assert problem.remedy
        assert problem.offset >= 0
    assert any(problem.severity == "error" for problem in report.problems) == (report.verdict is not Verdict.SOUND)


def has_losses(report: Report) -> bool:
    """Does the first file need consent?"""
    return any(problem.cure == "consent" for problem in report.files[0].problems)


def repair(path: str, report: Report, content: list[bytes | None] | None) -> None:
    """A repairable file is sound after its repair, and reads what could be read before."""
    backup = f"{_FOLDER}/backup"
    done = repair_disk(path, allow_loss=has_losses(report), backup=backup)
    if done.backup is not None:
        os.unlink(backup)
    if report.files[0].verdict is not Verdict.BROKEN:
        assert done.after.verdict is Verdict.SOUND, done
    if content is not None:
        for before, after in zip(content, read_all(path), strict=True):
            assert before is None or before == after, "a repair changed what the disk holds"


def read_all(path: str) -> list[bytes | None]:
    """Everything that a reader does with a disk: its start and its end in pieces, None for one that cannot be read.

    Raises: MullionError when the disk cannot be opened.
    """
    pieces: list[bytes | None] = []
    with open_chain(path, read_only=True) as chain:
        size = chain.size_bytes
        buffer = bytearray(4096)
        for offset in (*range(0, min(size, READ_LIMIT_BYTES), 4096), max(0, size - 4096)):
            part = memoryview(buffer)[: min(4096, size - offset)]
            try:
                chain.pread(offset, part)
                pieces.append(bytes(part))
            except MullionError as error:
                complain_without_remedy(error)
                pieces.append(None)
        with contextlib.suppress(MullionError):
            check_extents(chain.extents(0, min(size, READ_LIMIT_BYTES)), chain)
    return pieces


def check_extents(extents: Iterator[Extent], chain: Chain) -> None:
    at = 0
    for extent in extents:
        assert extent.offset == at
        assert 0 < extent.length <= chain.size_bytes - at
        at += extent.length


def complain_without_remedy(error: MullionError) -> None:
    if not (error.message and error.remedy):
        raise AssertionError(f"{error!r} does not say what to do") from error


def main() -> None:
    atheris.Setup(sys.argv, check_file_quietly)
    atheris.Fuzz()


def check_file_quietly(raw: bytes) -> None:
    """All of it for one input in sixteen, by its checksum, so that the same input always takes the same way."""
    number = zlib.crc32(raw) & 15
    check_file(raw, None if number == 0 else Part.READ if number & 1 else Part.CHECK)


if __name__ == "__main__":
    main()
