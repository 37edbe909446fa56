"""Chaos: everything dies at random while guests verify what they write, and nothing is lost.

Provider, service and QEMU are killed; checkpoints are made, applied and deleted; the filesystem fills up and empties.
After each act the guest's load has to go on, or, where the act has ended the guest, what it had flushed has to be
there: no wrong byte, no stuck state, no orphan.

In the suite for three minutes, the same acts each time; by hand for as long as `MULLION_CHAOS_S` says, from another seed
each time or from `MULLION_CHAOS_SEED`, which a failure prints: what is drawn is repeated, when exactly it hits is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from tests.framework.guest_console import INTERRUPT, GuestConsole
from tests.framework.iocheck import IocheckProgress, IocheckReport
from tests.framework.service import GUEST_S, Service
from tests.framework.small_filesystem import small_filesystem

from mullion.base.units import MIB
from mullion.model.definition import DiskAttachment, PartitionDefinition, Transport
from mullion.services.image.build import BuiltImage

SECONDS = float(os.environ.get("MULLION_CHAOS_S", "180"))
ANY_SEED = time.time_ns() % 1_000_000 if "MULLION_CHAOS_S" in os.environ else 1
SEED = int(os.environ.get("MULLION_CHAOS_SEED", str(ANY_SEED)))

pytestmark = [pytest.mark.vm, pytest.mark.timeout(SECONDS + 1200)]

ROOM_BYTES = 1024 * MIB
RANGE_BYTES = 32 * MIB
FREE_BYTES = 2 * MIB
CHECKPOINTS = 4


@dataclass
class Promise:
    """What a checkpoint has to hold: the writes of a run up to a number that was flushed."""

    seed: int
    flushed: int


@dataclass
class Guest:
    """A partition whose guest writes to its data disk and checks it, in runs of a seed each."""

    service: Service
    name: str
    console: GuestConsole | None = None
    seed: int = 0
    flushed: int = 0
    promises: dict[str, Promise] = field(default_factory=dict)

    def connect(self) -> GuestConsole:
        """The console, which ends with the service."""
        if self.console is None:
            self.console = GuestConsole(self.service, self.name)
        return self.console

    def hang_up(self) -> None:
        if self.console is not None:
            self.console.__exit__(None, None, None)
            self.console = None

    def begin(self) -> None:
        """A run of its own seed, in a guest that has just booted or whose last run has ended."""
        self.seed += 1
        self.flushed = 0
        console = self.connect()
        console.type(
            f"iocheck --device /dev/vdb --seconds 86400 --depth 2 --range {RANGE_BYTES} --seed {self.seed} --progress\n"
        )
        self.follow()

    def follow(self) -> None:
        """The load goes on: two lines of progress, with more writes in the second. Else it is stuck, or has failed."""
        console = self.connect()
        writes: int | None = None
        deadline_s = time.monotonic() + GUEST_S
        while True:
            printed = console.wait_for("iocheck: alive ", '{"writes"') + console.wait_for("\n")
            assert '{"writes"' not in printed, f"{self.name}: the load has ended: {printed[-500:]}"
            progress = IocheckProgress.find(printed)
            if progress is not None:
                self.flushed = progress.flushed
                if writes is not None and progress.writes > writes:
                    return
                writes = progress.writes
            assert time.monotonic() < deadline_s, f"{self.name} is stuck"

    def booted(self, promise: Promise) -> None:
        """The guest has booted from disks that hold what was promised; the load begins anew."""
        self.hang_up()
        self.service.wait_agent(self.name)
        console = self.connect()
        console.log_in()
        if promise.flushed:
            console.type(
                f"iocheck --device /dev/vdb --verify-only --flushed {promise.flushed} --seed {promise.seed} --depth 2 "
                f"--range {RANGE_BYTES}\n"
            )
            report = IocheckReport.find(console.wait_for("}"))
            assert report is not None
            assert (report.wrong, report.errors) == (0, 0), f"{self.name}: {report}"
        self.begin()

    def end(self) -> None:
        console = self.connect()
        console.type(INTERRUPT)
        report = IocheckReport.find(console.wait_for("}"))
        assert report is not None
        assert (report.wrong, report.errors) == (0, 0), f"{self.name}: {report}"
        self.hang_up()


@dataclass
class Chaos:
    """The acts, and how often each was done."""

    service: Service
    folder: str
    guests: list[Guest]
    rng: random.Random
    done: Counter[str] = field(default_factory=Counter)

    def run(self, seconds: float) -> None:
        acts: list[tuple[int, Callable[[Guest], None]]] = [
            (5, self.create),
            (4, self.delete),
            (1, self.apply),
            (4, self.kill_provider),
            (2, self.kill_service),
            (1, self.kill_qemu),
            (2, self.fill),
        ]
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            (act,) = self.rng.choices([act for _, act in acts], weights=[weight for weight, _ in acts])
            guest = self.rng.choice(self.guests)
            self.done[act.__name__] += 1
            act(guest)
            for each in self.guests:
                each.follow()

    def create(self, guest: Guest) -> None:
        if len(guest.promises) >= CHECKPOINTS:
            self.delete(guest)
        name = f"c{self.done.total()}"
        promise = Promise(guest.seed, guest.flushed)
        self.service.cli("checkpoint", "create", guest.name, name)
        guest.promises[name] = promise

    def delete(self, guest: Guest) -> None:
        if guest.promises:
            name = self.rng.choice(sorted(guest.promises))
            del guest.promises[name]
            self.service.cli("checkpoint", "delete", guest.name, name, "--no-wait")

    def apply(self, guest: Guest) -> None:
        if guest.promises:
            name = self.rng.choice(sorted(guest.promises))
            self.service.cli("checkpoint", "apply", guest.name, name, "--yes")
            guest.booted(guest.promises[name])

    def kill_provider(self, guest: Guest) -> None:
        identity = self.service.provider(guest.name)
        if identity is not None:
            identity.send_signal(signal.SIGKILL)

    def kill_service(self, _guest: Guest) -> None:
        self.service.kill()
        for guest in self.guests:
            guest.hang_up()
        time.sleep(self.rng.random())
        self.service.start()

    def kill_qemu(self, guest: Guest) -> None:
        promise = Promise(guest.seed, guest.flushed)
        identity = self.service.qemu(guest.name)
        assert identity is not None
        identity.send_signal(signal.SIGKILL)
        self.service.wait_state(guest.name, "failed")
        self.service.cli("partition", "start", guest.name)
        guest.booted(promise)

    def fill(self, _guest: Guest) -> None:
        status = os.statvfs(self.folder)
        room = status.f_bavail * status.f_frsize - FREE_BYTES
        if room > 0:
            filler = f"{self.folder}/filler"
            with open(filler, "wb") as file, contextlib.suppress(OSError):  # a guest may have been quicker
                os.posix_fallocate(file.fileno(), 0, room)
            time.sleep(self.rng.random() * 3)
            os.unlink(filler)


@pytest.fixture
def folder(service: Service) -> Iterator[str]:
    """A filesystem of its own for the disks."""
    with small_filesystem(f"{service.home}/small", ROOM_BYTES, 0o755) as path:
        try:
            yield path
        finally:
            service.destroy()


def test_chaos_loses_nothing(service: Service, folder: str, iocheck_image: BuiltImage) -> None:
    service.start()
    shutil.copyfile(iocheck_image.path, f"{folder}/image.vhd")
    guests = []
    for name, transport in (("calm", Transport.NBD), ("wild", Transport.VHOST_USER)):
        with service.client() as client:
            client.create_disk(path=f"{folder}/{name}.vhd", parent=f"{folder}/image.vhd")
            client.create_disk(path=f"{folder}/{name}-data.vhd", size_bytes=128 * MIB)
            disks = (
                DiskAttachment(path=f"{folder}/{name}.vhd"),
                DiskAttachment(path=f"{folder}/{name}-data.vhd", transport=transport),
            )
            client.create_partition(PartitionDefinition(name=name, memory_bytes=256 * MIB, disks=disks))
            client.wait(client.partition_action(name, "start"))
        guests.append(Guest(service, name))
    for guest in guests:
        guest.booted(Promise(0, 0))
    chaos = Chaos(service, folder, guests, random.Random(SEED))
    try:
        chaos.run(SECONDS)
        for guest in guests:
            guest.end()
    except BaseException as error:
        error.add_note(f"MULLION_CHAOS_SEED={SEED}, acts: {dict(chaos.done)}")
        raise
    finally:
        for guest in guests:
            guest.hang_up()
    print(f"chaos: seed {SEED}, {SECONDS:g} s, {dict(chaos.done)}")
    _check_nothing_is_left(service, folder, guests)


def _check_nothing_is_left(service: Service, folder: str, guests: list[Guest]) -> None:
    """All checkpoints can be deleted, every disk is one sound file again, and no other file is there."""
    for guest in guests:
        tree = json.loads(service.cli("checkpoint", "list", guest.name, "--format", "json").stdout)
        for view in tree["checkpoints"]:
            service.cli("checkpoint", "delete", guest.name, view["name"])
    expected = {"image.vhd", *(f"{guest.name}{kind}.vhd" for guest in guests for kind in ("", "-data"))}
    deadline_s = time.monotonic() + GUEST_S
    while set(os.listdir(folder)) != expected:
        assert time.monotonic() < deadline_s, sorted(set(os.listdir(folder)) ^ expected)
        time.sleep(0.1)
    for guest in guests:
        service.cli("partition", "stop", guest.name)
    for file in expected:
        service.cli("vhd", "check", f"{folder}/{file}")
