"""A disk that grows under a ring and under NBD clients."""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from tests.framework.providers import WANTED, Control, LoneProvider, make_spec

from mullion.base.errors import UnavailableError
from mullion.base.units import MIB
from mullion.vhd import create_differencing, create_dynamic, create_fixed, open_chain
from mullion.wire.nbd import NbdClient
from mullion.wire.vhost_user.client import FrontEnd
from mullion.wire.vhost_user.driver import attach
from mullion.wire.vhost_user.messages import BackendRequest, Header

pytestmark = pytest.mark.contract

OLD, NEW = 8 * MIB, 8 * MIB + 3 * MIB + 512


@pytest.fixture(params=["fixed", "dynamic", "differencing"])
def chain(request: pytest.FixtureRequest, short_tmp: Path) -> list[Path]:
    base, top = short_tmp / "base.vhd", short_tmp / "top.vhd"
    if request.param == "fixed":
        create_fixed(str(base), OLD)
        return [base]
    create_dynamic(str(base), OLD)
    if request.param == "dynamic":
        return [base]
    create_differencing(str(top), str(base))
    return [top, base]


def test_disk_grows_in_use(short_tmp: Path, chain: list[Path], started: ExitStack) -> None:
    spec = make_spec(short_tmp, chain)
    provider = started.enter_context(LoneProvider(spec))
    control = Control(spec.control)
    started.callback(control.close)
    with FrontEnd(str(spec.disks[0].vhost_user)) as front_end:
        driver = attach(front_end, wanted=WANTED)
        heard = front_end.hear()
        for sector in range(0, 64, 8):
            driver.write(sector * 100, bytes([sector]) * 4096)
        last = OLD // 512 - 1
        driver.write(last, b"end!" * 128)
        answer = control.ask("resize", disk="d0", size_bytes=NEW)
        assert (answer["old_bytes"], answer["size_bytes"], answer["announced"]) == (OLD, NEW, True), answer
        message = Header.unpack(heard.recv(12))
        assert (message.request, message.size) == (BackendRequest.CONFIG_CHANGE, 0)
        heard.close()
        assert int.from_bytes(front_end.config(8), "little") == NEW // 512
        assert driver.read(last, 1024) == b"end!" * 128 + bytes(512)
        driver.write(NEW // 512 - 1, b"new!" * 128)
        assert driver.read(0, 4096) == bytes(4096)
        assert driver.read(800, 4096) == bytes([8]) * 4096
        driver.release()
    assert control.ask("status")["disks"][0]["size_bytes"] == NEW
    with NbdClient(str(spec.disks[0].nbd)) as nbd:
        assert nbd.size_bytes == NEW
    assert provider.terminate() == 0
    with open_chain(str(chain[0]), read_only=True) as disk:
        assert disk.size_bytes == NEW
        buffer = bytearray(512)
        disk.pread(NEW - 512, buffer)
        assert buffer == b"new!" * 128
        assert disk.warnings == []


def test_acknowledged_writes_survive_a_kill_after_it(short_tmp: Path, started: ExitStack) -> None:
    """The pending log goes on across a change of the file's structures."""
    create_dynamic(str(short_tmp / "d.vhd"), OLD)
    spec = make_spec(short_tmp, [short_tmp / "d.vhd"])
    with LoneProvider(spec) as provider:
        nbd = NbdClient(str(spec.disks[0].nbd))
        nbd.pwrite(0, b"a" * 512)
        control = Control(spec.control)
        assert "error" not in control.ask("resize", disk="d0", size_bytes=NEW)
        control.close()
        with suppress(UnavailableError):  # it was hung up on
            nbd.close()
        with NbdClient(str(spec.disks[0].nbd)) as again:
            again.flush()
        late = NbdClient(str(spec.disks[0].nbd))
        late.pwrite(4 * MIB, b"b" * 512)
        late.pwrite(NEW - 512, b"c" * 512)
        provider.kill()
        with suppress(UnavailableError):
            late.close()
    with LoneProvider(spec) as provider:
        with NbdClient(str(spec.disks[0].nbd)) as nbd:
            for offset, letter in ((0, b"a"), (4 * MIB, b"b"), (NEW - 512, b"c")):
                buffer = bytearray(512)
                nbd.pread(offset, buffer)
                assert buffer == letter * 512
        assert provider.terminate() == 0


def test_what_cannot_be(short_tmp: Path, started: ExitStack) -> None:
    create_dynamic(str(short_tmp / "d.vhd"), OLD)
    spec = make_spec(short_tmp, [short_tmp / "d.vhd"])
    started.enter_context(LoneProvider(spec))
    control = Control(spec.control)
    started.callback(control.close)
    before = os.stat(short_tmp / "d.vhd").st_size
    for size in (OLD - 512, OLD + 1, 0, -512, "8M", True, 1 << 60):
        assert "error" in control.ask("resize", disk="d0", size_bytes=size), size
    assert "error" in control.ask("resize", disk="d1", size_bytes=NEW)
    assert control.ask("resize", disk="d0", size_bytes=OLD)["stall_ms"] == 0
    assert control.ask("status")["disks"][0]["size_bytes"] == OLD
    assert os.stat(short_tmp / "d.vhd").st_size == before
