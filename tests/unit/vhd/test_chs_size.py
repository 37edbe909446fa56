"""Reading a disk by the size of its geometry, when that is asked for."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from tests.unit.vhd import craft

from mullion.base.errors import InvalidError
from mullion.base.units import MIB
from mullion.vhd import create_differencing, create_dynamic, create_fixed, open_chain
from mullion.vhd.errors import VhdUnsupportedError
from mullion.vhd.geometry import SizeFrom

pytestmark = pytest.mark.unit

SIZE_BYTES = 40 * MIB
CHS_SIZE_BYTES = 963 * 5 * 17 * 512
"""What the specification's geometry of 40 MiB comes to."""


def size_of(path: str, size_from: SizeFrom = SizeFrom.CHS) -> int:
    with open_chain(path, read_only=True, size_from=size_from) as chain:
        last = bytearray(512)
        chain.pread(chain.size_bytes - 512, last)
        assert last[:3] == (b"chs" if chain.size_bytes == CHS_SIZE_BYTES else bytes(3))
        return chain.size_bytes


def set_geometry(path: str, cylinders: int, heads: int, sectors: int) -> None:
    craft.set_footer(path, 56, struct.pack(">HBB", cylinders, heads, sectors))


@pytest.mark.parametrize("kind", ["fixed", "dynamic", "differencing"])
def test_a_smaller_geometry(kind: str, tmp_path: Path) -> None:
    path = str(tmp_path / "disk.vhd")
    if kind == "differencing":
        create_dynamic(str(tmp_path / "parent.vhd"), SIZE_BYTES)
        create_differencing(path, str(tmp_path / "parent.vhd"))
    else:
        {"fixed": create_fixed, "dynamic": create_dynamic}[kind](path, SIZE_BYTES)
    with open_chain(path) as chain:
        chain.pwrite(CHS_SIZE_BYTES - 512, b"chs")
    assert size_of(path) == CHS_SIZE_BYTES
    assert size_of(path, SizeFrom.FOOTER) == SIZE_BYTES
    with pytest.raises(InvalidError, match="only be read"):
        open_chain(path, size_from=SizeFrom.CHS)


@pytest.mark.parametrize(("cylinders", "why"), [(0, "geometry is zero"), (2000, "would be 87040000 bytes")])
@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
def test_a_geometry_that_the_file_does_not_hold(kind: str, cylinders: int, why: str, tmp_path: Path) -> None:
    path = str(tmp_path / "disk.vhd")
    {"fixed": create_fixed, "dynamic": create_dynamic}[kind](path, SIZE_BYTES)
    set_geometry(path, cylinders, 5, 17)
    with pytest.raises(VhdUnsupportedError, match=why) as caught:
        size_of(path)
    assert "--size-from" in caught.value.remedy
    assert size_of(path, SizeFrom.FOOTER) == SIZE_BYTES


def test_a_larger_geometry_within_the_last_block(tmp_path: Path) -> None:
    path = str(tmp_path / "disk.vhd")
    create_dynamic(path, SIZE_BYTES - 512)
    set_geometry(path, SIZE_BYTES // 512 // 16 // 16, 16, 16)
    assert size_of(path) == SIZE_BYTES


def test_the_largest_geometry_says_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "disk.vhd")
    create_dynamic(path, SIZE_BYTES)
    set_geometry(path, 65535, 16, 255)
    assert size_of(path) == SIZE_BYTES
