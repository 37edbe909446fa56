"""The verifier that runs in guests must find what it is there to find: tried here on files of the host."""

from __future__ import annotations

import os
import resource
import shutil
import struct
import subprocess
import threading
from pathlib import Path

import pytest
from tests.framework.iocheck import (
    STATUS_IO_ERRORS,
    STATUS_USAGE,
    STATUS_WRONG_DATA,
    IocheckProgress,
    IocheckReport,
    build_iocheck,
    iocheck_argv,
)

pytestmark = pytest.mark.interop

BLOCK_BYTES = 4096
SIZE_BYTES = 4 << 20


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_iocheck(tmp_path_factory.mktemp("iocheck"))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(SIZE_BYTES)
    return path


def run(argv: tuple[str, ...], status: int = 0) -> tuple[IocheckReport, str]:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == status, f"{argv}: {done.stdout}{done.stderr}"
    report = IocheckReport.find(done.stdout)
    assert report is not None
    return report, done.stderr


def blocks_of(disk: Path) -> dict[int, int]:
    """Block → generation of all blocks that were written."""
    content = disk.read_bytes()
    found = {}
    for block in range(len(content) // BLOCK_BYTES):
        magic, number, generation = struct.unpack_from("<QQQ", content, block * BLOCK_BYTES)
        if magic:
            assert number == block
            found[block] = generation
    return found


def replace(disk: Path, block: int, content: bytes, start: int = 0) -> None:
    with disk.open("r+b") as file:
        file.seek(block * BLOCK_BYTES + start)
        file.write(content)


@pytest.mark.parametrize("depth", [1, 4])
def test_a_good_disk_passes_while_running_and_after(program: Path, disk: Path, tmp_path: Path, depth: int) -> None:
    report_file = tmp_path / "report.json"
    report, _ = run(iocheck_argv(program, disk, writes=800, depth=depth, seed=7, report_file=report_file))
    assert (report.writes, report.wrong, report.errors, report.flushed) == (800, 0, 0, 800)
    assert report.reads >= len(blocks_of(disk))
    assert IocheckReport.find(report_file.read_text()) is not None
    verified, _ = run(iocheck_argv(program, disk, verify_flushed=800, depth=depth, seed=7))
    assert verified.reads == len(blocks_of(disk))
    assert (verified.wrong, verified.torn) == (0, 0)
    # Later writes than the last flush are allowed to be there.
    run(iocheck_argv(program, disk, verify_flushed=500, depth=depth, seed=7))


def test_the_same_seed_writes_the_same_blocks(program: Path, disk: Path, tmp_path: Path) -> None:
    run(iocheck_argv(program, disk, writes=300, seed=5))
    first = disk.read_bytes()
    run(iocheck_argv(program, disk, writes=300, seed=5))
    assert disk.read_bytes() == first


def test_the_range_is_kept(program: Path, disk: Path) -> None:
    report, _ = run(iocheck_argv(program, disk, writes=200, range_bytes=64 * BLOCK_BYTES))
    assert report.range == 64 * BLOCK_BYTES
    assert max(blocks_of(disk)) < 64


def test_it_says_that_it_is_alive_and_ends_when_told_to(program: Path, disk: Path) -> None:
    argv = iocheck_argv(program, disk, seconds=600, depth=2, progress=True)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while (alive := IocheckProgress.find(process.stdout.readline())) is not None and not alive.writes:
            pass  # the disk is slow today
        process.terminate()
        rest = process.stdout.read()
    report = IocheckReport.find(rest)
    assert alive is not None
    assert report is not None
    assert process.returncode == 0
    assert report.writes >= alive.writes > 0
    assert report.flushed >= alive.flushed


@pytest.mark.parametrize("byte", [0, 16, 40, 4095])
def test_one_wrong_bit_is_found_and_named(program: Path, disk: Path, byte: int) -> None:
    run(iocheck_argv(program, disk, writes=100, seed=3))
    block = max(blocks_of(disk))
    old = disk.read_bytes()[block * BLOCK_BYTES + byte]
    replace(disk, block, bytes([old ^ 0x10]), byte)
    report, message = run(iocheck_argv(program, disk, verify_flushed=100, seed=3), STATUS_WRONG_DATA)
    assert report.wrong == 1
    assert (
        f"WRONG DATA in block {block} (byte {block * BLOCK_BYTES + byte} of the disk, {byte} of the block)" in message
    )


def test_a_lost_write_is_found_and_called_older(program: Path, disk: Path, tmp_path: Path) -> None:
    run(iocheck_argv(program, disk, writes=200, seed=3, range_bytes=50 * BLOCK_BYTES))
    earlier = blocks_of(disk)
    shutil.copy(disk, tmp_path / "earlier")
    run(iocheck_argv(program, disk, writes=400, seed=3, range_bytes=50 * BLOCK_BYTES))
    lost = next(block for block, generation in blocks_of(disk).items() if generation > earlier[block])
    start = lost * BLOCK_BYTES
    replace(disk, lost, (tmp_path / "earlier").read_bytes()[start : start + BLOCK_BYTES])
    at_200 = iocheck_argv(program, disk, verify_flushed=200, seed=3, range_bytes=50 * BLOCK_BYTES)
    at_400 = iocheck_argv(program, disk, verify_flushed=400, seed=3, range_bytes=50 * BLOCK_BYTES)
    run(at_200)
    _, message = run(at_400, STATUS_WRONG_DATA)
    assert f"found write {earlier[lost]} of block {lost}, seed 3, checksum right" in message


def test_a_misplaced_write_and_lost_contents_are_found(program: Path, disk: Path) -> None:
    run(iocheck_argv(program, disk, writes=100, seed=3))
    first, second, *_ = sorted(blocks_of(disk))
    whole = disk.read_bytes()
    verify = iocheck_argv(program, disk, verify_flushed=100, seed=3)
    replace(disk, first, whole[second * BLOCK_BYTES :][:BLOCK_BYTES])
    assert f"of block {second}" in run(verify, STATUS_WRONG_DATA)[1]
    replace(disk, first, bytes(BLOCK_BYTES))
    assert "found zeros" in run(verify, STATUS_WRONG_DATA)[1]
    replace(disk, first, os.urandom(BLOCK_BYTES))
    assert "not ours" in run(verify, STATUS_WRONG_DATA)[1]


def test_a_torn_write_is_allowed_after_the_last_flush_and_not_before(program: Path, disk: Path, tmp_path: Path) -> None:
    run(iocheck_argv(program, disk, writes=200, seed=3, range_bytes=50 * BLOCK_BYTES))
    earlier = blocks_of(disk)
    shutil.copy(disk, tmp_path / "earlier")
    run(iocheck_argv(program, disk, writes=210, seed=3, range_bytes=50 * BLOCK_BYTES))
    torn = next(block for block, generation in blocks_of(disk).items() if generation > earlier[block])
    start = torn * BLOCK_BYTES
    replace(disk, torn, (tmp_path / "earlier").read_bytes()[start : start + 1024])
    at_200 = iocheck_argv(program, disk, verify_flushed=200, seed=3, range_bytes=50 * BLOCK_BYTES)
    at_210 = iocheck_argv(program, disk, verify_flushed=210, seed=3, range_bytes=50 * BLOCK_BYTES)
    assert run(at_200)[0].torn == 1
    run(at_210, STATUS_WRONG_DATA)
    replace(disk, torn, b"x", 600)
    run(at_200, STATUS_WRONG_DATA)


def test_wrong_bytes_end_it_in_the_middle_of_a_run(program: Path, disk: Path) -> None:
    argv = iocheck_argv(program, disk, seconds=600, range_bytes=64 * BLOCK_BYTES)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        ended = threading.Event()

        def spoil() -> None:
            while not ended.is_set():
                for block in range(64):
                    replace(disk, block, b"?", 2000)

        spoiler = threading.Thread(target=spoil)
        spoiler.start()
        try:
            printed, message = process.communicate(timeout=240)
        finally:
            ended.set()
            spoiler.join()
    assert process.returncode == STATUS_WRONG_DATA
    assert "2000 of the block" in message
    report = IocheckReport.find(printed)
    assert report is not None
    assert report.wrong == 1


def test_io_errors_are_counted_and_hold_back_what_counts_as_flushed(program: Path, disk: Path) -> None:
    limit_bytes = SIZE_BYTES // 2

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    # restore_signals: SIGXFSZ stays ignored, as Python has it, so that the write fails with EFBIG instead.
    done = subprocess.run(
        iocheck_argv(program, disk, writes=400, seed=3),
        capture_output=True,
        text=True,
        preexec_fn=limit_file_size,
        restore_signals=False,
        check=False,
    )
    assert done.returncode == STATUS_IO_ERRORS, done.stderr
    report = IocheckReport.find(done.stdout)
    assert report is not None
    assert report.errors + report.writes == 400
    assert report.wrong == 0
    assert report.flushed < 400
    assert "cannot write block" in done.stderr
    run(iocheck_argv(program, disk, verify_flushed=report.flushed, seed=3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--device: is missing"),
        (("--device", "DISK"), "one of"),
        (("--device", "DISK", "--writes", "1", "--seconds", "1"), "one of"),
        (("--device", "DISK", "--verify-only"), "one of"),
        (("--device", "DISK", "--writes", "-1"), "whole number"),
        (("--device", "DISK", "--writes", "1", "--depth", "65"), "1 to 64"),
        (("--device", "DISK", "--writes", "1", "--range", "5000000"), "more than the device has"),
        (("--device", "/none", "--writes", "1"), "No such file"),
        (("--what",), "is not known"),
    ],
)
def test_wrong_usage_is_said(program: Path, disk: Path, arguments: tuple[str, ...], message: str) -> None:
    argv = [str(program), *(str(disk) if argument == "DISK" else argument for argument in arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == STATUS_USAGE
    assert message in done.stderr
