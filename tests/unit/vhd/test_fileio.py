"""How data goes into a file: in which calls, and what becomes of short ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from mullion.base.block import Buffer
from mullion.base.units import KIB
from mullion.vhd.fileio import DATA_PIECE_BYTES, FileIO

pytestmark = pytest.mark.unit


class Calls(FileIO):
    """Remembers them, and takes at most so much in each."""

    def __init__(self, limit_bytes: int) -> None:
        self.made: list[tuple[int, int]] = []
        self._limit_bytes = limit_bytes

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        written = os.pwrite(fd, b"".join(buffers)[: self._limit_bytes], offset)
        self.made.append((offset, written))
        return written


@pytest.mark.parametrize("limit_bytes", [1 << 20, 5000], ids=["whole", "short calls"])
@pytest.mark.parametrize("offset", [0, 512, DATA_PIECE_BYTES - 512, DATA_PIECE_BYTES])
@pytest.mark.parametrize("lengths", [[512], [DATA_PIECE_BYTES], [200 * KIB], [4 * KIB] * 50, [100, 70_000, 0, 412]])
def test_data_is_written_whole_and_in_aligned_pieces(
    tmp_path: Path, lengths: list[int], offset: int, limit_bytes: int
) -> None:
    buffers = [os.urandom(length) for length in lengths]
    content = b"".join(buffers)
    io = Calls(limit_bytes)
    with open(tmp_path / "disk", "w+b") as file:
        io.write_data(file.fileno(), buffers, offset, len(content))
        assert os.pread(file.fileno(), 1 << 20, offset) == content
    assert all(count <= DATA_PIECE_BYTES for _, count in io.made)
    if len(content) > DATA_PIECE_BYTES:
        assert all(at // DATA_PIECE_BYTES == (at + count - 1) // DATA_PIECE_BYTES for at, count in io.made)
    elif limit_bytes > DATA_PIECE_BYTES:
        assert io.made == [(offset, len(content))]
