"""One partition: its record, its processes, and how it gets from what it is to what is wanted of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from mullion.base.errors import DeadlineError, MullionError, StateError
from mullion.base.process import boot_id
from mullion.base.units import utc_now
from mullion.host import make_folder, prepare_partition_folders
from mullion.hypervisor import ExitReport
from mullion.hypervisor.accel import AcceleratorChoice
from mullion.hypervisor.console import ConsoleHub
from mullion.hypervisor.errors import MachineGoneError, MonitorError
from mullion.hypervisor.state_file import remove_state
from mullion.hypervisor.states import ShutdownOutcome, ShutdownStage
from mullion.model.definition import Accelerator, PartitionDefinition, PowerState
from mullion.model.states import PartitionState
from mullion.model.views import PartitionView
from mullion.parent.events import Events
from mullion.parent.store import Condition, Put, Store
from mullion.parent.store.protocol import Write
from mullion.services.partition.exchange import follow_heads, take_merged_heads
from mullion.services.partition.limits import follow_limits
from mullion.services.partition.plan import Step, plan_steps
from mullion.services.partition.preparation import (
    Preparer,
    check_direct_boot,
    machine_spec,
    provider_spec,
    take_back_disks,
)
from mullion.services.partition.presentation import present, stall_reason
from mullion.services.partition.provider_link import ProviderFleet
from mullion.services.partition.record import (
    Failure,
    GuestStatus,
    Observed,
    PartitionRecord,
    SavedState,
    key_of,
    state_of,
)
from mullion.services.partition.run_file import Run, write_run
from mullion.services.partition.runtime import Runtime
from mullion.services.partition.saving import (
    forget_saved,
    load_saved,
    prepare_saved,
    stamp_disks,
    state_path,
    sweep_states,
    write_saved,
)

log = logging.getLogger(__name__)

Say = Callable[[str], None]
SayPart = Callable[[str, float | None], None]
"""What is being done, and which part of all is done (0 to 1) where that is known."""

_ROUNDS: Final = 4
_RETRY_S: Final = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0)
"""How long to wait before a provider is started again, by how many in a row died young."""
_SHORT_LIFE_S: Final = 1.0
_BOOT_SLOT_S: Final = 60.0
"""A guest without agent gives its boot slot back after this time."""
_AGENT_POLL_S: Final = 0.25
_AGENT_WATCH_S: Final = 15.0
_VIEW_S: Final = 2.0
"""A QEMU that does not answer (stopped, or starved) must not keep the others from being listed."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all partitions of a host share."""

    preparer: Preparer
    fleet: ProviderFleet
    boot_slots: asyncio.Semaphore
    choose_accelerator: Callable[[Accelerator], AcceleratorChoice]
    allow_faults: bool = False
    """Whether administrators may have providers fail requests, for drills."""
    homecoming_rate: int = 0
    """How fast blocks come home from a backup, in bytes a second; 0 is no limit."""


class Partition:
    """A partition as this parent holds it. `begin` or `adopt` starts the task that reconciles it."""

    def __init__(
        self,
        record: PartitionRecord,
        revision: int,
        *,
        runtime: Runtime,
        surroundings: Surroundings,
        store: Store,
        events: Events,
    ) -> None:
        self.record = record
        self.revision = revision
        self.runtime = runtime
        self.lock = asyncio.Lock()
        self.last_state = PartitionState.STOPPED
        self._surroundings = surroundings
        self._store = store
        self._events = events
        self._observed = Observed()
        self._dirty = asyncio.Event()
        self._is_starting = False
        self._is_stopping = False
        self._is_saving = False
        self._is_shut = False
        self._provider_since_s = 0.0
        self._short_lives = 0
        self._saving = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self.console = ConsoleHub(runtime.paths.console, runtime.paths.console_log)
        runtime.wake = self._dirty.set
        runtime.on_linked = self.follow_limits

    @property
    def name(self) -> str:
        return self.record.definition.name

    def has_processes(self) -> bool:
        return self.runtime.has_machine or self.runtime.provider is not None or self.runtime.tpm is not None

    @property
    def surroundings(self) -> Surroundings:
        return self._surroundings

    def held_files(self) -> tuple[str, ...]:
        """The disk files that are open for writing here."""
        if self.runtime.provider is None:
            return ()
        return tuple(disk.chain[0] for disk in self.runtime.disks if not disk.read_only)

    # -- life in this parent -------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start the task that reconciles whenever something has changed."""
        self._task = asyncio.create_task(self._reconcile_for_ever(), name=f"reconcile {self.name}")

    async def adopt(self) -> None:
        """Connect to what runs, judge what has ended while nobody looked, and begin."""
        runtime = self.runtime
        await asyncio.to_thread(sweep_states, runtime.paths.data, self.record)
        report = await runtime.adopt(self.record.uuid)
        if self.has_processes() and runtime.started_with is None:
            await self._prepare_again()
        started_here = self.record.started_boot_id == boot_id()
        if runtime.has_machine:
            self._watch_guest()
            self._events.publish("partition.adopted", f"partition/{self.name}")
        elif (
            started_here
            and self.record.desired is not PowerState.STOPPED
            and (report is not None or self.record.failure is None)
        ):
            await self._ended(report)
        self.begin()
        self._dirty.set()

    async def _prepare_again(self) -> None:
        try:
            self.runtime.started_with = await asyncio.to_thread(self._prepare)
        except MullionError as error:
            # The guest runs on descriptors that are open; only a new provider would need the files.
            log.warning("%s: its disks cannot be read now: %s", self.name, error)

    async def release(self) -> None:
        """Let go: the processes run on."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.console.close()
        await self.runtime.release()

    async def shut(self) -> None:
        """The partition is being deleted: end what is left of it. The caller holds the lock."""
        self._is_shut = True
        await self._end_processes()

    async def save(
        self, *, conditions: Sequence[Condition] = (), writes: Sequence[Write] = (), **changes: object
    ) -> int:
        """Change the record, in the store first; `desired` changes the definition's power. Answers with the revision.

        `conditions` and `writes` are of what has to change in the same instant.
        Raises: PreconditionError when one of them does not hold, with nothing changed.
        """
        desired = changes.pop("desired", None)
        async with self._saving:
            if desired is not None:
                changes["definition"] = msgspec.structs.replace(self.record.definition, power=desired)
            record = msgspec.structs.replace(self.record, **changes)
            key = key_of(self.name)
            self.revision = await self._store.transact(
                [Condition(key, self.revision), *conditions], [Put(key, record.encode()), *writes]
            )
            self.record = record
            return self.revision

    # -- acts ----------------------------------------------------------------------------------------------------------

    async def start(self, desired: PowerState, say: Say) -> None:
        """Bring it up. On failure nothing of it is left, and the record says why.

        Raises: whatever kept it from starting.
        """
        async with self.lock:
            self._is_starting = True
            try:
                if self.runtime.machine is not None and self._observed.guest is GuestStatus.PANICKED:
                    await self._end_processes()
                booted_s = self.record.boot_s if self.record.saved is not None else None
                await self.save(
                    desired=desired, failure=None, started_at=utc_now(), started_boot_id=boot_id(), boot_s=booted_s
                )
                await self._converge(say)
            except MullionError as error:
                await self._fail(error)
                raise
            except OSError as error:
                await self._fail(MullionError(str(error), remedy="Look into the service's log."))
                raise
            finally:
                self._is_starting = False
        self._publish_state()

    async def roll_back(self) -> None:
        """A start was cancelled: nothing of it stays."""
        async with self.lock:
            await self.save(desired=PowerState.STOPPED)
            await self._end_processes()
        await self._note_state()

    async def stop(self, timeout_s: float, say: Say, commit: Callable[[], None]) -> str:
        """Go down the ladder and take everything away. Answers with the rung that brought it down.

        Without the lock while the guest shuts down: its provider must be kept alive meanwhile.
        """
        self._is_stopping = True
        how = ShutdownStage.OFF
        try:
            await self._note_state()
            machine = self.runtime.machine
            if machine is not None:
                async for step in machine.shutdown(timeout_s):
                    say(f"{step.stage.value}: {step.detail}")
                    if (
                        step.outcome is ShutdownOutcome.DONE
                        and step.stage is not ShutdownStage.RESUME
                        and how is ShutdownStage.OFF
                    ):
                        how = step.stage
                    if step.stage is ShutdownStage.OFF:
                        commit()
            commit()
            async with self.lock:
                say("flushing the disks")
                await forget_saved(self)  # it was restored and stood still until now: stopping it means its end
                await self.save(desired=PowerState.STOPPED, failure=None)
                await self._end_processes()
        finally:
            self._is_stopping = False
        await self._note_state()
        return how.value

    async def save_state(self, say: SayPart, commit: Callable[[], None]) -> SavedState:
        """Put memory and devices into a file and end the processes. On failure the guest goes on as it was.

        Without the lock while the state is written: the provider must be kept alive meanwhile.
        """
        before = self.record.saved
        self._is_saving = True
        try:
            saved = await write_saved(self, say)
            async with self.lock:
                commit()
                await self._keep_saved(saved)
                say("ending QEMU and the provider", None)
                await self._end_processes()
                await self._converge(lambda _: None)
        except BaseException:
            self._is_saving = False
            with contextlib.suppress(MullionError):  # the first error is the one to tell; the reconciler repeats it
                await self.reconcile()  # here, not later: the guest goes on also when the service is ending
            raise
        finally:
            self._is_saving = False
            self._dirty.set()
        if before is not None:  # saved again before it had run
            await asyncio.to_thread(remove_state, state_path(self, before))
        self._publish_state()
        return saved

    async def _keep_saved(self, saved: SavedState) -> None:
        """From here on the partition is saved, whatever happens; if that cannot be recorded, nothing has happened."""
        try:
            await self.save(saved=saved, desired=PowerState.STOPPED, failure=None)
        except BaseException:
            if self.record.saved != saved:
                await asyncio.to_thread(remove_state, state_path(self, saved))
            raise

    async def discard_state(self) -> None:
        """Throw a saved state away: the next start boots from the disks."""
        async with self.lock:
            await forget_saved(self)
            await self.save(failure=None)
        await self._note_state()

    async def follow_limits(self) -> None:
        """Have the provider keep the caps that the definition says now; one that is not there gets them at its start.

        Raises: what the provider answers.
        """
        if self.runtime.link is not None:
            await follow_limits(self.runtime.link, self.record.definition)

    async def ask_provider(self, command: str, **arguments: Any) -> Mapping[str, Any]:
        """Ask the provider one thing. Raises: StateError when it has none; what the provider answers."""
        if self.runtime.link is None:
            raise StateError(
                f"partition {self.name} has no provider that could be asked",
                state=self.last_state.value,
                required="running",
                remedy=f"Start it first: mullion partition start {self.name}",
            )
        return await self.runtime.link.request(command, **arguments)

    def _provider_spec(self) -> Mapping[str, Any]:
        """What a provider of the present heads is told."""
        return provider_spec(
            self.record,
            self.runtime.paths,
            self.runtime.disks,
            allow_faults=self._surroundings.allow_faults,
            homecoming_rate=self._surroundings.homecoming_rate,
        )

    async def hand_over_provider(self) -> float | None:
        """Have a new provider go on where the present one is; the caller holds the lock.

        Milliseconds for which requests waited. Raises: as `Runtime.hand_over_provider`.
        """
        try:
            await follow_heads(self)
            return await self.runtime.hand_over_provider(self._surroundings.fleet, self._provider_spec())
        finally:
            self._dirty.set()

    async def replace_provider(self) -> None:
        """End the provider cleanly and start another one at once, on the same chains; the caller holds the lock.

        Raises: what the start raises; then the reconciling goes on to try.
        """
        try:
            await self.runtime.stop_provider()
            await self._apply(Step.START_PROVIDER, lambda _text: None)
        finally:
            self._dirty.set()

    async def reset(self) -> None:
        """Press the reset button."""
        async with self.lock:
            machine = self.runtime.machine
            if machine is None:
                raise StateError(f"partition {self.name} does not run", state="stopped", required="running")
            await machine.reset()
            if self.record.failure is not None:  # a panic, which the reset has ended
                await self.save(failure=None)
        self._events.publish("partition.reset", f"partition/{self.name}")

    # -- reconciling ---------------------------------------------------------------------------------------------------

    async def reconcile(self, say: Say = lambda _: None) -> None:
        """Look, plan and act once, until nothing is to be done."""
        async with self.lock:
            if not self._is_shut:
                await self._converge(say)
        self._publish_state()

    async def _reconcile_for_ever(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            try:
                await self.reconcile()
            except Exception as error:  # the root of this task: it must outlive whatever one round met
                log.error("%s: %s", self.name, error, exc_info=not isinstance(error, MullionError))
                await self._reconcile_failed(error)

    async def _reconcile_failed(self, error: Exception) -> None:
        """Give a start up that did not succeed; try again what a running guest waits for, most often a provider."""
        if not self.runtime.has_machine:
            known = error if isinstance(error, MullionError) else MullionError(str(error))
            try:
                async with self.lock:
                    await self._fail(known)
                return
            except MullionError as again:  # the store cannot write, or a process does not end
                log.error("%s: its failure cannot be recorded yet: %s", self.name, again)
        await asyncio.sleep(_RETRY_S[-1])
        self._dirty.set()

    async def _converge(self, say: Say) -> None:
        for _ in range(_ROUNDS):
            self._observed = await self.runtime.observe(self._definition())
            if await self._note_end():
                continue
            record = self.record
            steps = plan_steps(
                record.desired, self._observed, is_failed=record.failure is not None, saved=record.saved_phase
            )
            is_held = self._is_saving and record.desired is not PowerState.STOPPED
            if self._is_stopping or is_held:  # the ladder, or the saving, has the guest; only its disks are ours
                is_up = self._observed.guest is not GuestStatus.ABSENT
                steps = tuple(step for step in steps if step is Step.START_PROVIDER and is_up)
            if not steps:
                return
            for step in steps:
                if step is not Step.RESUME:
                    say(step.value)
                await self._apply(step, say)
        self._dirty.set()

    async def _note_end(self) -> bool:
        """Record that the guest or QEMU ended by itself; True when that has changed what is wanted."""
        machine = self.runtime.machine
        if self._is_stopping:
            return False
        if machine is not None and self._observed.guest is GuestStatus.ABSENT:
            await self._ended(await self.runtime.drop_machine())
            return True
        if self._observed.guest is GuestStatus.POWERED_OFF and self.record.desired is not PowerState.STOPPED:
            self._events.publish("partition.powered-off", f"partition/{self.name}", {"by": "guest"})
            await self.save(desired=PowerState.STOPPED)
            return True
        if self._observed.guest is GuestStatus.PANICKED and self.record.failure is None:
            await self.save(
                failure=Failure(
                    "the guest's kernel panicked; it is stopped as it was",
                    f"Look at its console log, then: mullion partition start {self.name}",
                )
            )
        return False

    async def _ended(self, report: ExitReport | None) -> None:
        """QEMU ended without being asked."""
        if report is not None and report.is_clean:
            await self.save(desired=PowerState.STOPPED)
            self._events.publish("partition.powered-off", f"partition/{self.name}", {"by": "QEMU"})
            return
        reason = str(report) if report is not None else "QEMU has vanished and left no exit status"
        await self.save(
            failure=Failure(
                reason,
                f"Start it again: mullion partition start {self.name}",
                report.status if report else None,
                (report.log_excerpt or None) if report else None,
            )
        )
        self._events.publish("partition.failed", f"partition/{self.name}", {"reason": reason})

    async def _apply(self, step: Step, say: Say) -> None:
        runtime, record = self.runtime, self.record
        match step:
            case Step.CLEAN:
                runtime.clean()
            case Step.PREPARE:
                await take_merged_heads(self)
                runtime.started_with = await asyncio.to_thread(self._prepare)
            case Step.START_PROVIDER:
                await self._before_provider()
                await follow_heads(self)
                await runtime.start_provider(self._surroundings.fleet, self._provider_spec())
                self._provider_since_s = time.monotonic()
            case Step.START_QEMU:
                assert runtime.started_with is not None, "prepared in an earlier step"
                await runtime.start_machine(machine_spec(record, runtime.paths, runtime.started_with))
            case Step.START_TPM:
                make_folder(runtime.paths.tpm_state, 0o700, owner=record.run_as)
                await runtime.start_tpm(record.run_as)
            case Step.STOP_TPM:
                await runtime.stop_tpm()
            case Step.LOAD_STATE:
                await load_saved(self)
                self._watch_guest()
            case Step.FORGET_STATE:
                await forget_saved(self)
            case Step.STAMP_DISKS:
                await self._stamp_disks()
            case Step.RESUME:
                if record.saved is None and self._observed.guest in (GuestStatus.ABSENT, GuestStatus.PRELAUNCH):
                    if self._surroundings.boot_slots.locked():
                        say("waiting for a boot slot")
                    await self._surroundings.boot_slots.acquire()
                    say(step.value)
                    self._watch_guest(holds_slot=True)
                await runtime.resume()
            case Step.PAUSE:
                await runtime.pause()
            case Step.QUIT_QEMU:
                await runtime.quit_machine()
            case Step.STOP_PROVIDER:
                await self._stop_provider()

    def _prepare(self) -> Run:
        """Find what the definition needs, and keep what was found for the parent that comes after us. Blocking."""
        definition, paths, preparer = self._definition(), self.runtime.paths, self._surroundings.preparer
        prepare_partition_folders(paths, self.record.run_as)
        check_direct_boot(definition)
        if self.record.saved is not None and not self.runtime.has_machine:
            run = prepare_saved(self.record, paths.data, preparer)
        else:
            choice = self._surroundings.choose_accelerator(definition.accelerator)
            disks = preparer.find_disks(self.name, definition, choice.accelerator, self.record.heads)
            run = Run(choice.accelerator, choice.reason, disks, definition)
        write_run(paths, run)
        return run

    def _definition(self) -> PartitionDefinition:
        """What the present guest was started with or, if it was saved, will go on with; else the present one."""
        saved = self.record.saved
        run = self.runtime.started_with if self.runtime.has_machine else saved.run if saved is not None else None
        return (run.definition if run is not None else None) or self.record.definition

    async def _stamp_disks(self) -> None:
        stamps = await asyncio.to_thread(stamp_disks, self.record, self._surroundings.preparer)
        assert self.record.saved is not None
        await self.save(saved=msgspec.structs.replace(self.record.saved, disks=stamps))

    async def _before_provider(self) -> None:
        """A provider died under its guest: start another at once, unless they die as soon as they are started."""
        if not self.runtime.has_machine:
            return
        if self.runtime.started_with is None:
            await self._prepare_again()
        lived_s = time.monotonic() - self._provider_since_s
        self._short_lives = self._short_lives + 1 if lived_s < _SHORT_LIFE_S else 0
        self._events.publish("partition.provider-restarted", f"partition/{self.name}", {"in_a_row": self._short_lives})
        await asyncio.sleep(_RETRY_S[min(self._short_lives, len(_RETRY_S) - 1)])

    async def _fail(self, error: MullionError) -> None:
        log.error("%s: %s", self.name, error)
        await self._end_processes()
        await self.save(
            desired=PowerState.STOPPED,
            failure=Failure(error.message, error.remedy, log_excerpt=_text(error.context.get("log_excerpt"))),
        )
        self._events.publish(
            "partition.failed", f"partition/{self.name}", {"reason": error.message, "code": error.code}
        )
        self._dirty.set()

    async def _stop_provider(self) -> None:
        await self.runtime.stop_provider()
        if self.runtime.started_with is not None:
            take_back_disks(self.runtime.started_with, self.record.run_as)

    async def _end_processes(self) -> None:
        await self.runtime.quit_machine()
        await self.runtime.stop_tpm()
        await self._stop_provider()
        self.runtime.clean()
        self._observed = await self.runtime.observe(self._definition())

    # -- the guest -----------------------------------------------------------------------------------------------------

    def _watch_guest(self, *, holds_slot: bool = False) -> None:
        self.runtime.run(self._follow_guest(holds_slot), "guest")

    async def _follow_guest(self, holds_slot: bool) -> None:
        """Wait for the agent, note how long the boot took, and look at it now and then."""
        machine, guest = self.runtime.machine, self.runtime.guest
        slot_until_s = time.monotonic() + _BOOT_SLOT_S
        try:
            while machine is not None and self.runtime.machine is machine and machine.exit_report is None:
                answers = await machine.agent_ping()
                if answers != guest.agent_answers:
                    await self._agent_changed(answers)
                if holds_slot and (answers or time.monotonic() > slot_until_s):
                    self._surroundings.boot_slots.release()
                    holds_slot = False
                await asyncio.sleep(_AGENT_WATCH_S if answers else _AGENT_POLL_S)
        finally:
            if holds_slot:
                self._surroundings.boot_slots.release()

    async def _agent_changed(self, answers: bool) -> None:
        guest = self.runtime.guest
        if not answers:
            guest.agent_answers = False
            return
        if guest.released_s is not None and self.record.boot_s is None:
            await self.save(boot_s=round(time.monotonic() - guest.released_s, 3))
        guest.addresses = await self._guest_addresses()
        guest.agent_answers = True
        self._events.publish("partition.agent-answers", f"partition/{self.name}", {"boot_s": self.record.boot_s})

    async def _guest_addresses(self) -> tuple[str, ...]:
        """The guest's addresses, without those that only it can reach."""
        machine = self.runtime.machine
        if machine is None:
            return ()
        try:
            interfaces = await machine.agent.network_interfaces()
        except MullionError as error:
            log.info("%s: its agent does not tell addresses: %s", self.name, error)
            return ()
        return tuple(address for one in interfaces if one.name != "lo" for address in one.addresses)

    # -- seeing --------------------------------------------------------------------------------------------------------

    async def view(self) -> PartitionView:
        """The partition as it is now; what QEMU said last when its monitor does not answer."""
        try:
            async with asyncio.timeout(_VIEW_S):
                self._observed = await self.runtime.observe(self._definition())
        except (MonitorError, MachineGoneError, DeadlineError, TimeoutError) as error:
            log.warning("%s: shown as it was last seen: %s", self.name, error or "QEMU does not answer")
        return present(self.record, self.revision, self._state(), self.runtime)

    def _state(self) -> PartitionState:
        return state_of(self.record, self._observed, is_stopping=self._is_stopping, is_starting=self._is_starting)

    async def _note_state(self) -> None:
        """Look, and publish a change of state."""
        self._observed = await self.runtime.observe(self._definition())
        self._publish_state()

    def _publish_state(self) -> None:
        """Publish a change of state, as of the last look: converging ends with one."""
        state = self._state()
        if state is not self.last_state:
            data = {"from": self.last_state.value, "to": state.value}
            if (reason := stall_reason(self.runtime)) is not None:
                data["reason"] = reason
            self.last_state = state
            self._events.publish("partition.state", f"partition/{self.name}", data)


def _text(value: object) -> str | None:
    return None if value is None else str(value)
