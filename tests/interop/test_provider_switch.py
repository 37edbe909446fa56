"""Exchanging files beneath disks in use: through rings and NBD, with the provider killed at any instant."""

from __future__ import annotations

import os
import random
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.framework.providers import DEADLINE_S, WANTED, Control, LoneProvider, make_spec

from mullion.base.errors import MullionError
from mullion.base.units import KIB, MIB
from mullion.vhd import create_differencing, create_dynamic, create_fixed, inspect_chain, open_chain
from mullion.vhd.layer_merge import LayerFiles, merge_layer
from mullion.wire.nbd import NbdClient
from mullion.wire.vhost_user.client import FrontEnd
from mullion.wire.vhost_user.driver import attach
from mullion.wire.vhost_user.virtio_blk import BlkRequest, BlkStatus

pytestmark = pytest.mark.interop

DISK_BYTES = 16 * MIB


@pytest.fixture
def folder(short_tmp: Path) -> Path:
    return short_tmp


def make_child(folder: Path, name: str, parent: Path) -> Path:
    """As a checkpoint makes it: over a file that is being written."""
    path = folder / name
    create_differencing(str(path), str(parent), lock_parent=False)
    return path


def switch(control: Control, disk: str, chain: list[Path], new: list[Path] | None = None, **flags: Any) -> Any:
    fds = [os.open(path, os.O_RDWR) for path in new or ()]
    try:
        fields = {"id": disk, "chain": [str(path) for path in chain], "new": [str(path) for path in new or ()], **flags}
        return control.ask("switch", fds, disks=[fields])
    finally:
        for fd in fds:
            os.close(fd)


def read(path: Path, offset: int, length: int) -> bytes:
    with open_chain(str(path), read_only=True) as chain:
        buffer = bytearray(length)
        chain.pread(offset, buffer)
        return bytes(buffer)


@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
def test_push_under_a_ring_and_a_client(folder: Path, started: ExitStack, kind: str) -> None:
    base = folder / "d.vhd"
    create_fixed(str(base), DISK_BYTES) if kind == "fixed" else create_dynamic(str(base), DISK_BYTES)
    spec = make_spec(folder, [base])
    provider = started.enter_context(LoneProvider(spec))
    front_end = started.enter_context(FrontEnd(str(spec.disks[0].vhost_user)))
    driver = attach(front_end, wanted=WANTED)
    nbd = started.enter_context(NbdClient(str(spec.disks[0].nbd)))
    control = Control(spec.control)
    started.callback(control.close)
    driver.write(0, b"old " * 1024)
    driver.write(100, b"kept" * 128)
    nbd.pwrite(MIB, b"nbd old!" * 64)
    child = make_child(folder, "d-1.avhd", base)
    answer = switch(control, "d0", [child, base], [child])
    assert answer["disks"] == [{"id": "d0", "chain": [str(child), str(base)]}], answer
    assert 0 <= answer["stall_ms"] < 20_000
    status = control.ask("status")["disks"][0]
    assert (status["path"], status["chain"], status["chain_files"]) == (str(child), [str(child), str(base)], 2)
    driver.write(0, b"new " * 128)
    nbd.pwrite(MIB, b"nbd new!" * 32)
    assert driver.read(0, 4096) == b"new " * 128 + b"old " * (1024 - 128)
    assert driver.read(100, 512) == b"kept" * 128
    buffer = bytearray(512)
    nbd.pread(MIB, buffer)
    assert buffer == b"nbd new!" * 32 + b"nbd old!" * 32
    assert driver.request(BlkRequest.FLUSH)[0] == BlkStatus.OK
    # The frozen layer is complete, and anybody may read it.
    assert read(base, 0, 4096) == b"old " * 1024
    assert read(base, MIB, 512) == b"nbd old!" * 64
    assert not [name for name in os.listxattr(base) if name.startswith("user.mullion.")]
    driver.release()
    nbd.close()
    assert provider.terminate() == 0
    assert os.listdir(folder / "pending") == []
    assert read(child, 0, 4096) == b"new " * 128 + b"old " * (1024 - 128)
    assert read(child, 51200, 512) == b"kept" * 128


def test_refusals_change_nothing(folder: Path, started: ExitStack) -> None:
    base, other = folder / "d.vhd", folder / "o.vhd"
    for path in (base, other):
        create_dynamic(str(path), DISK_BYTES)
    spec = make_spec(folder, [base], [other])
    started.enter_context(LoneProvider(spec))
    control = Control(spec.control)
    started.callback(control.close)
    nbd = started.enter_context(NbdClient(str(spec.disks[0].nbd)))
    nbd.pwrite(0, b"a" * 512)
    child, stranger = make_child(folder, "c.avhd", base), make_child(folder, "s.avhd", other)
    descriptors = len(os.listdir(f"/proc/{control_pid(control)}/fd"))
    for chain, new, flags, code in (
        ([child, base], [], {}, "invalid"),
        ([stranger, base], [stranger], {}, "vhd-parent-mismatch"),
        ([child], [child], {}, "invalid"),
        ([child, base], [child], {"collapse": True}, "invalid"),
        ([base], [], {"set_parent": 1}, "invalid"),
        ([], [], {}, "invalid"),
        ([child, base, base], [child], {}, "invalid"),
    ):
        answer = switch(control, "d0", chain, new, **flags)
        assert answer["error"]["code"] == code, (chain, answer)
    assert "error" in switch(control, "d9", [child, base], [child])
    # Two disks, the second impossible: the first is as before too.
    fds = [os.open(path, os.O_RDWR) for path in (child, stranger)]
    disks = [
        {"id": "d0", "chain": [str(child), str(base)], "new": [str(child)]},
        {"id": "d1", "chain": [str(stranger), str(base)], "new": [str(stranger)]},
    ]
    assert "error" in control.ask("switch", fds, disks=disks)
    # More descriptors than the line says, and a command that takes none.
    assert "error" in control.ask("switch", fds, disks=disks[:1])
    assert control.ask("status", fds)["pid"]
    for fd in fds:
        os.close(fd)
    assert [disk["chain"] for disk in control.ask("status")["disks"]] == [[str(base)], [str(other)]]
    assert len(os.listdir(f"/proc/{control_pid(control)}/fd")) == descriptors
    nbd.pwrite(512, b"b" * 512)
    assert "error" not in switch(control, "d0", [child, base], [child])
    assert "error" not in switch(control, "d0", [child, base], [child])  # a command that is repeated changes nothing
    buffer = bytearray(1024)
    nbd.pread(0, buffer)
    assert buffer == b"a" * 512 + b"b" * 512
    nbd.close()


def control_pid(control: Control) -> int:
    return int(control.ask("status")["pid"])


def test_layers_below_go_away(folder: Path, started: ExitStack) -> None:
    """A checkpoint is deleted while the disk is used: merged by another process, then out of the chain."""
    base = folder / "d.vhd"
    create_dynamic(str(base), DISK_BYTES)
    spec = make_spec(folder, [base])
    provider = started.enter_context(LoneProvider(spec))
    control = Control(spec.control)
    started.callback(control.close)
    nbd = started.enter_context(NbdClient(str(spec.disks[0].nbd)))
    rng = random.Random(5)
    model = bytearray(DISK_BYTES)

    def scribble() -> None:
        for _ in range(40):
            offset, data = rng.randrange(DISK_BYTES // 512 - 16) * 512, rng.randbytes(512 * rng.randrange(1, 16))
            nbd.pwrite(offset, data)
            model[offset : offset + len(data)] = data

    def check() -> None:
        buffer = bytearray(DISK_BYTES)
        nbd.pread(0, buffer)
        assert buffer == model

    scribble()
    upper = make_child(folder, "u.avhd", base)
    assert "error" not in switch(control, "d0", [upper, base], [upper])
    scribble()
    top = make_child(folder, "t.avhd", upper)
    assert "error" not in switch(control, "d0", [top, upper, base], [top])
    scribble()
    with LayerFiles.open(str(upper), str(base)) as files:
        merge_layer(files)
    check()
    answer = switch(control, "d0", [top, base], set_parent=True)
    assert "error" not in answer, answer
    os.unlink(upper)
    check()
    scribble()
    check()
    # What is left is small: into the base, in one pause.
    answer = switch(control, "d0", [base], [base], collapse=True, limit_bytes=4 * KIB)
    assert answer["error"]["code"] == "layer-too-large"
    assert answer["error"]["context"]["held_bytes"] > 4 * KIB
    check()
    answer = switch(control, "d0", [base], [base], collapse=True, limit_bytes=4 * MIB)
    assert "error" not in answer, answer
    assert os.stat(top).st_size == 0
    check()
    scribble()
    check()
    nbd.close()
    assert provider.terminate() == 0
    assert inspect_chain(str(base)).paths == (str(base),)
    assert read(base, 0, DISK_BYTES) == model


def test_killed_at_any_instant(folder: Path, started: ExitStack) -> None:
    """`kill -9` around a switch: the next provider, on the new chain as the record says, has all that was answered."""
    rng = random.Random(11)
    base = folder / "d.vhd"
    create_dynamic(str(base), DISK_BYTES)
    chain, model = [base], bytearray(DISK_BYTES)
    for round_ in range(12):
        spec = make_spec(folder, chain)
        with LoneProvider(spec) as provider:
            nbd = NbdClient(str(spec.disks[0].nbd))
            buffer = bytearray(DISK_BYTES)
            nbd.pread(0, buffer)
            assert buffer == model, f"round {round_}"
            for _ in range(30):
                offset, data = rng.randrange(DISK_BYTES // 512 - 16) * 512, rng.randbytes(512 * rng.randrange(1, 16))
                nbd.pwrite(offset, data)
                model[offset : offset + len(data)] = data
            child = make_child(folder, f"c{round_}.avhd", chain[0])
            chain = [child, *chain]
            control = Control(spec.control)
            killer = threading.Timer(rng.random() * 0.01, provider.process.kill)
            killer.start()
            try:
                switch(control, "d0", chain, [child])
                for _ in range(50):
                    offset, data = rng.randrange(DISK_BYTES // 512) * 512, rng.randbytes(512)
                    before = bytes(model[offset : offset + 512])
                    nbd.pwrite(offset, data)
                    model[offset : offset + 512] = data
            except (OSError, ValueError, MullionError):
                assert provider.process.wait(DEADLINE_S) == -9
            killer.join()
            control.close()
            with suppress(MullionError):
                nbd.close()
            provider.kill()
        # The one write under way may have been done or not.
        content = read_back(folder, chain)
        if content != model:
            model[offset : offset + 512] = content[offset : offset + 512]
            assert bytes(content[offset : offset + 512]) in (before, data)
        assert content == model, f"round {round_}"


def read_back(folder: Path, chain: list[Path]) -> bytes:
    spec = make_spec(folder, chain)
    with LoneProvider(spec) as provider:
        with NbdClient(str(spec.disks[0].nbd)) as nbd:
            buffer = bytearray(DISK_BYTES)
            nbd.pread(0, buffer)
        assert provider.terminate() == 0
    return bytes(buffer)
