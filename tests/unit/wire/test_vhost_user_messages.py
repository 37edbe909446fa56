"""Messages of vhost-user: what is packed is unpacked, and what is malformed is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mullion.wire.vhost_user.messages import (
    U64,
    Config,
    Header,
    Inflight,
    MemoryRegion,
    MemoryTable,
    ProtocolError,
    VringAddress,
    VringState,
)
from mullion.wire.vhost_user.virtio_blk import ConfigSpace

pytestmark = pytest.mark.unit

u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
small = st.integers(1, 2**40)
regions = st.builds(MemoryRegion, small, small, small, small)


@given(st.builds(VringState, u32, u32))
def test_vring_state(state: VringState) -> None:
    assert VringState.unpack(state.pack()) == state


@given(st.builds(VringAddress, u32, u32, u64, u64, u64, u64))
def test_vring_address(address: VringAddress) -> None:
    assert VringAddress.unpack(address.pack()) == address


@given(st.builds(MemoryTable, st.lists(regions, max_size=8).map(tuple)))
def test_memory_table(table: MemoryTable) -> None:
    assert MemoryTable.unpack(table.pack()) == table


@given(st.builds(Inflight, u64, u64, u16, u16))
def test_inflight_has_24_bytes(inflight: Inflight) -> None:
    packed = inflight.pack()
    assert len(packed) == 24
    assert Inflight.unpack(packed) == Inflight.unpack(packed[:20]) == inflight


def test_config() -> None:
    config = Config(4, 3, 0, b"abc")
    assert Config.unpack(config.pack()) == config


def test_configuration_space_is_as_long_as_the_structure() -> None:
    space = ConfigSpace(8192, 4).pack()
    assert len(space) == 60
    assert int.from_bytes(space[:8], "little") == 8192
    assert int.from_bytes(space[34:36], "little") == 4


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (U64, bytes(7)),
        (U64, bytes(9)),
        (VringState, b""),
        (VringAddress, bytes(39)),
        (MemoryTable, b""),
        (MemoryTable, bytes(7)),
        (MemoryTable, (9).to_bytes(8, "little") + bytes(9 * 32)),
        (MemoryTable, (2).to_bytes(8, "little") + MemoryRegion(0, 4096, 0, 0).pack()),
        (MemoryTable, (1).to_bytes(8, "little") + bytes(32)),  # size 0
        (MemoryTable, (1).to_bytes(8, "little") + MemoryRegion(2**64 - 1, 4096, 0, 0).pack()),
        (Config, bytes(11)),
        (Config, Config(0, 4, 0, b"abc").pack()),
        (Config, Config(255, 2, 0, b"ab").pack()),
        (Config, Config(2**32 - 1, 2, 0, b"ab").pack()),
        (Inflight, bytes(23)),
        (Header, bytes(11)),
        (Header, Header(1, 2, 0).pack()),
        (Header, Header(1, 1, 100_000).pack()),
    ],
)
def test_malformed(kind: type[U64], payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        kind.unpack(payload)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_an_error(payload: bytes) -> None:
    for kind in (Header, U64, VringState, VringAddress, MemoryTable, Config, Inflight):
        try:
            kind.unpack(payload)
        except ProtocolError:
            continue
