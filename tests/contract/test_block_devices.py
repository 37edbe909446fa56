"""Fixed, dynamic and differencing disks and chains pass the suite of block devices; each survives being reopened."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.contract.block_device import BlockDeviceContract, all_of

from mullion.base.units import KIB, MIB
from mullion.vhd import Chain, create_differencing, create_dynamic, create_fixed, open_chain

pytestmark = pytest.mark.contract

SIZE_BYTES = 5 * MIB + 512


def build(folder: Path, kind: str) -> str:
    """Make a disk with something in its parents; returns the path of the top."""
    base = str(folder / "base.vhd")
    if kind == "fixed" or kind.endswith("fixed"):
        create_fixed(base, SIZE_BYTES)
    else:
        create_dynamic(base, SIZE_BYTES, block_bytes=64 * KIB if "small" in kind else 2 * MIB)
    if "over" not in kind:
        return base
    choose = random.Random(1)
    layers = [base]
    for number in range(7 if "deep" in kind else 0):
        layers.append(str(folder / f"layer{number}.vhd"))
        create_differencing(layers[-1], layers[-2])
    for layer in layers:
        with open_chain(layer) as chain:
            for _ in range(20):
                chain.pwrite(choose.randrange(SIZE_BYTES - 9000), choose.randbytes(choose.choice([512, 4096, 9000])))
    top = str(folder / "top.vhd")
    create_differencing(top, layers[-1], block_bytes=512 * KIB if "mixed" in kind else None)
    return top


@pytest.mark.parametrize(
    "kind",
    ["fixed", "dynamic", "small dynamic", "over fixed", "over dynamic", "mixed, over small dynamic", "over deep"],
)
class TestVhd(BlockDeviceContract):
    """Every kind of chain."""

    @pytest.fixture
    def path(self, kind: str, tmp_path: Path) -> str:
        return build(tmp_path, kind)

    @pytest.fixture
    def device(self, path: str, tmp_path: Path) -> Iterator[Chain]:
        chain = open_chain(path, pending_path=str(tmp_path / "pending"))
        yield chain
        chain.close()

    def test_what_was_written_is_there_after_reopening(self, path: str, device: Chain, tmp_path: Path) -> None:
        choose = random.Random(5)
        for _ in range(40):
            device.pwrite(choose.randrange(SIZE_BYTES - 9000), choose.randbytes(choose.choice([512, 4096, 9000])))
        content = all_of(device)
        device.close()
        assert not (tmp_path / "pending").exists()
        with open_chain(path, read_only=True) as again:
            assert all_of(again) == content
            assert again.warnings == []

    def test_scattered_buffers(self, device: Chain) -> None:
        choose = random.Random(6)
        content = choose.randbytes(200_000)
        cuts = [0, *sorted(choose.randrange(200_000) for _ in range(1500)), 200_000]
        parts = [memoryview(content)[a:b] for a, b in itertools.pairwise(cuts)]
        device.pwritev(70_001, parts)
        back = bytearray(200_000)
        device.preadv(70_001, [memoryview(back)[a:b] for a, b in itertools.pairwise(cuts)])
        assert back == content

    def test_direct_entries_lead_to_the_data(self, device: Chain) -> None:
        granule = 1 << device.block_shift
        for offset in range(0, SIZE_BYTES - granule, granule):
            device.pwrite(offset, b"%07d\n" % (offset // granule) * (granule // 8))
        for number in range(SIZE_BYTES // granule):
            buffer = bytearray(8)
            device.pread(number * granule, buffer)
            for table in (device.direct_read, device.direct_write):
                fd, at = table[number]
                assert os.pread(fd, 8, at) == buffer == b"%07d\n" % number
