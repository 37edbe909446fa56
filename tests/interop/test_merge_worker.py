"""The merge worker as a process: read beside, killed, adopted, told a rate, stopped, and out of room."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.framework.providers import Control, ZygotePeer, wait_for_end
from tests.framework.small_filesystem import small_filesystem

from mullion.base.errors import ConflictError, InvalidError, MullionError, NoSpaceError, OperationFailedError
from mullion.base.paths import PartitionPaths
from mullion.base.process import read_identity
from mullion.base.units import KIB, MIB
from mullion.provider.merge_spec import MergeSpec
from mullion.services.checkpoint.merge_link import MergeWorker
from mullion.services.checkpoint.merging import forget_merge
from mullion.services.partition.provider_link import ProviderFleet
from mullion.vhd import DiskBusyError, create_differencing, create_dynamic, open_chain
from mullion.vhd.errors import HalfMergedError, VhdDamagedError
from mullion.vhd.layer_journal import layer_journal_path, read_mark
from mullion.vhd.pending import log_path

pytestmark = pytest.mark.interop

SIZE = 32 * MIB
KILLS = 6
USER = 65534


def content(path: str) -> bytearray:
    with open_chain(path, read_only=True) as chain:
        buffer = bytearray(chain.size_bytes)
        chain.pread(0, buffer)
        return buffer


def make_layers(folder: Path) -> tuple[str, str, str]:
    """Lower, upper and top of a chain with data in each, long runs and single sectors."""
    paths = [str(folder / f"{name}.vhd") for name in ("base", "lower", "upper", "top")]
    create_dynamic(paths[0], SIZE)
    for number, path in enumerate(paths):
        if number:
            create_differencing(path, paths[number - 1])
        choose = random.Random(number)
        with open_chain(path) as chain:
            for _ in range(60):
                length = choose.choice((512, 5 * KIB, 64 * KIB, MIB))
                chain.pwrite(choose.randrange((SIZE - length) // 512) * 512, choose.randbytes(length))
    return paths[1], paths[2], paths[3]


def spec_of(folder: Path, upper: str, lower: str, rate: int, user: int | None = None) -> MergeSpec:
    return MergeSpec(
        "test",
        upper,
        lower,
        control=str(folder / "control"),
        identity=str(folder / "pid"),
        result=str(folder / "result"),
        log=str(folder / "log"),
        uid=user,
        gid=user,
        bytes_per_s=rate,
    )


@pytest.fixture
def zygote(short_tmp: Path) -> Iterator[ZygotePeer]:
    peer = ZygotePeer(short_tmp)
    yield peer
    peer.end()


def start(zygote: ZygotePeer, spec: MergeSpec) -> dict[str, object]:
    zygote.send({"id": 1, "merge": spec.to_wire()})
    return zygote.receive()


def wait_until_copied(control: Control, size_bytes: int) -> None:
    while control.ask("status")["copied_bytes"] < size_bytes:
        time.sleep(0.01)


@pytest.mark.parametrize("user", [None, USER])
def test_a_chain_is_read_while_its_layer_is_merged(user: int | None, short_tmp: Path, zygote: ZygotePeer) -> None:
    lower, upper, top = make_layers(short_tmp)
    expected, merged = content(top), content(upper)
    spec = spec_of(short_tmp, upper, lower, 8 * MIB, user)
    with open_chain(top) as writer:
        answer = start(zygote, spec)
        assert answer["ready"]
        identity = read_identity(spec.identity)
        assert identity is not None
        assert identity.pid == answer["pid"]
        if user is not None:
            assert f"Uid:\t{user}\t{user}\t{user}\t{user}\n" in Path(f"/proc/{identity.pid}/status").read_text()
        here, looks, number = bytearray(SIZE), 0, 0
        while identity.is_alive:
            writer.pread(0, here)
            assert here == expected
            sector = number % (SIZE // 512) * 512
            expected[sector : sector + 512] = number.to_bytes(4) * 128
            writer.pwrite(sector, expected[sector : sector + 512])
            looks, number = looks + 1, number + 7919
    assert zygote.receive() == {"exited": answer["pid"], "status": 0}
    assert looks
    result = json.loads(Path(spec.result).read_text())
    assert (result["state"], result["upper"], result["lower"]) == ("done", upper, lower)
    assert content(lower) == merged
    assert content(top) == expected
    assert not os.path.exists(spec.control) or user is not None
    forget_merge(lower)
    assert not [name for name in os.listdir(short_tmp) if "merging" in name]


def test_kills_at_random_until_it_is_done(short_tmp: Path, zygote: ZygotePeer) -> None:
    lower, upper, top = make_layers(short_tmp)
    before, merged, expected = content(lower), content(upper), content(top)
    choose = random.Random(4)
    refused = 0
    for number in range(KILLS):
        spec = spec_of(short_tmp, upper, lower, MIB)  # so slow that none comes to its end
        start(zygote, spec)
        identity = read_identity(spec.identity)
        assert identity is not None
        if number == KILLS - 1:  # this one has begun, however slow the machine is
            control = Control(spec.control)
            wait_until_copied(control, 1)
            control.close()
        time.sleep(choose.random() / 2)
        identity.send_signal(signal.SIGKILL)
        assert zygote.receive()["status"] == -signal.SIGKILL
        assert Path(spec.result).read_bytes() == b""
        assert content(top) == expected
        assert content(upper) == merged
        try:
            assert content(lower) == before  # killed before it began
        except HalfMergedError:
            refused += 1
    assert refused
    start(zygote, spec_of(short_tmp, upper, lower, 0))
    assert zygote.receive()["status"] == 0
    assert content(lower) == merged
    assert content(top) == expected


def test_rate_is_kept_and_changed(short_tmp: Path, zygote: ZygotePeer) -> None:
    lower, upper, _ = make_layers(short_tmp)
    rate = MIB
    spec = spec_of(short_tmp, upper, lower, rate)
    begun_s = time.monotonic()
    start(zygote, spec)
    control = Control(spec.control)
    time.sleep(1)
    wait_until_copied(control, 1)
    status = control.ask("status")
    most = rate * (time.monotonic() - begun_s + 0.2)
    assert status["copied_bytes"] <= most
    assert 0 < status["done_bytes"] < status["total_bytes"]
    assert status["bytes_per_s"] == rate
    for wrong in (1, -1, "fast", None, True):
        assert control.ask("rate", bytes_per_s=wrong)["error"]["code"] == "invalid"
    assert "error" in control.ask("nonsense")
    assert control.ask("rate", bytes_per_s=0) == {"bytes_per_s": 0}
    assert zygote.receive()["status"] == 0
    control.close()


@pytest.mark.parametrize("how", ["quit", "SIGTERM"])
def test_a_stopped_worker_leaves_the_file_well_and_the_next_goes_on(
    how: str, short_tmp: Path, zygote: ZygotePeer
) -> None:
    lower, upper, top = make_layers(short_tmp)
    expected, merged = content(top), content(upper)
    spec = spec_of(short_tmp, upper, lower, 4 * MIB)
    pid = int(str(start(zygote, spec)["pid"]))
    control = Control(spec.control)
    wait_until_copied(control, 3 * MIB)
    if how == "quit":
        assert control.ask("quit") == {"quitting": True}
    else:
        os.kill(pid, signal.SIGTERM)
    assert zygote.receive() == {"exited": pid, "status": 0}
    control.close()
    assert json.loads(Path(spec.result).read_text())["state"] == "stopped"
    mark = read_mark(layer_journal_path(lower))
    assert mark is not None
    assert mark.done_bytes
    assert content(top) == expected
    start(zygote, spec_of(short_tmp, upper, lower, 0))
    assert zygote.receive()["status"] == 0
    assert json.loads(Path(spec.result).read_text())["resumed_bytes"] == mark.done_bytes
    assert content(lower) == merged


def test_refused_with_nothing_left_behind(short_tmp: Path, zygote: ZygotePeer) -> None:
    lower, upper, _ = make_layers(short_tmp)
    spec = spec_of(short_tmp, upper, lower, 0)
    with open_chain(lower, read_only=True):
        answer = start(zygote, spec)
    assert answer["error"]["code"] == DiskBusyError.code  # type: ignore[index]
    assert zygote.receive()["status"] == 1
    before = Path(upper).read_bytes()
    Path(upper).write_bytes(bytes(512) + before[512:])
    start(zygote, spec)
    assert zygote.receive()["status"] == 1
    result = json.loads(Path(spec.result).read_text())
    assert isinstance(MullionError.from_wire(result["error"]), VhdDamagedError)
    Path(upper).write_bytes(before)
    assert not os.path.exists(layer_journal_path(lower))
    content(lower)
    for wrong in ({"upper": 5}, {"upper": "relative"}, {"bytes_per_s": 7}, {"uid": -1}, {"more": 1}):
        zygote.send({"id": 2, "merge": {**spec.to_wire(), **wrong}})
        assert zygote.receive()["error"]["code"] == InvalidError.code


def test_a_full_file_system_and_room_again(short_tmp: Path, zygote: ZygotePeer) -> None:
    with small_filesystem(short_tmp / "small", 24 * MIB) as small:
        lower, upper, top = (str(small / f"{name}.vhd") for name in ("lower", "upper", "top"))
        create_dynamic(lower, 64 * MIB)
        create_differencing(upper, lower)
        with open_chain(upper) as chain:
            chain.pwrite(0, random.Random(1).randbytes(10 * MIB))
        create_differencing(top, upper)
        expected = content(top)
        ballast = small / "ballast"
        ballast.write_bytes(bytes(8 * MIB))
        spec = spec_of(short_tmp, upper, lower, 0)
        start(zygote, spec)
        assert zygote.receive()["status"] == 1
        result = json.loads(Path(spec.result).read_text())
        assert isinstance(MullionError.from_wire(result["error"]), NoSpaceError)
        assert content(top) == expected
        ballast.unlink()
        start(zygote, spec)
        assert zygote.receive()["status"] == 0
        assert content(lower) == content(top) == expected


# ---------------------------------------------------------------------- the parent's end


def test_a_layer_that_lacks_what_was_acknowledged_waits(short_tmp: Path) -> None:
    """Of a provider that was killed right after a child was put on top: its log is carried out by the next one."""
    lower, upper, _ = make_layers(short_tmp)
    paths = PartitionPaths(str(short_tmp / "data"), str(short_tmp / "p" / "web"))
    os.makedirs(paths.pending_dir)
    for layer in (upper, lower):
        fd = os.open(layer, os.O_RDONLY)
        log = Path(log_path(paths.pending_dir, "disk0", fd))
        os.close(fd)
        log.touch()
        worker = MergeWorker("web", paths, upper, lower)
        with pytest.raises(ConflictError, match="acknowledged") as caught:
            asyncio.run(worker.start(ProviderFleet(str(short_tmp / "log")), run_as=None, bytes_per_s=0))
        assert str(log) in caught.value.message
        log.unlink()


# The zygote ends by itself when a fleet is closed; its Popen object says that it is still there.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_next_parent_adopts_what_runs(short_tmp: Path) -> None:
    lower, upper, top = make_layers(short_tmp)
    expected, merged = content(top), content(upper)
    paths = PartitionPaths(str(short_tmp / "data"), str(short_tmp / "p" / "web"))

    def make_worker() -> MergeWorker:
        return MergeWorker("web", paths, upper, lower)

    async def first_parent() -> None:
        fleet = ProviderFleet(str(short_tmp / "log"))
        worker = make_worker()
        assert not await worker.adopt()
        await worker.start(fleet, run_as=(USER, USER), bytes_per_s=2 * MIB)
        waiting = asyncio.create_task(worker.wait())
        progress = await worker.status()
        assert progress is not None
        assert progress.bytes_per_s == 2 * MIB
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await fleet.close()

    async def second_parent() -> None:
        worker = make_worker()
        assert await worker.adopt()
        assert await worker.status() is not None
        await worker.set_rate(0)
        result = await worker.wait()
        assert result.is_done
        assert result.copied_bytes
        assert not await worker.adopt()

    async def ended_while_nobody_looked() -> None:
        fleet = ProviderFleet(str(short_tmp / "log"))
        await make_worker().start(fleet, run_as=None, bytes_per_s=0)
        identity = read_identity(f"{paths.merge_dir}/pid")
        if identity is not None:
            await asyncio.to_thread(wait_for_end, identity.pid)
        worker = make_worker()
        assert await worker.adopt()
        assert (await worker.wait()).is_done
        await fleet.close()

    asyncio.run(first_parent())
    asyncio.run(second_parent())
    assert content(lower) == merged
    asyncio.run(ended_while_nobody_looked())
    forget_merge(lower)
    assert content(lower) == merged
    assert content(top) == expected


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_for_other_layers_is_stopped_and_a_killed_one_said(short_tmp: Path) -> None:
    lower, upper, top = make_layers(short_tmp)
    expected = content(top)
    paths = PartitionPaths(str(short_tmp / "data"), str(short_tmp / "p" / "web"))

    async def go() -> None:
        fleet = ProviderFleet(str(short_tmp / "log"))
        worker = MergeWorker("web", paths, upper, lower)
        await worker.start(fleet, run_as=None, bytes_per_s=MIB)
        identity = read_identity(f"{paths.merge_dir}/pid")
        assert identity is not None
        assert not await MergeWorker("web", paths, top, upper).adopt()
        assert not identity.is_alive
        await worker.start(fleet, run_as=None, bytes_per_s=MIB)
        identity = read_identity(f"{paths.merge_dir}/pid")
        assert identity is not None
        identity.send_signal(signal.SIGKILL)
        with pytest.raises(OperationFailedError, match="before it was done"):
            await worker.wait()
        await fleet.close()

    asyncio.run(go())
    assert content(top) == expected
