"""Operations: their states, progress, cancelling, one per target, and what a restart makes of them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence

import msgspec
import pytest

from mullion.base.errors import ConflictError, NoSpaceError, NotFoundError, StateError, UnavailableError
from mullion.base.units import format_time
from mullion.model.states import OperationState
from mullion.model.views import OperationView
from mullion.parent.events import Events
from mullion.parent.operations import TRANSITIONS, Operation, Operations
from mullion.parent.store import Condition, MemoryStore
from mullion.parent.store.protocol import Write

pytestmark = pytest.mark.unit

Result = Mapping[str, object] | None


class Kernel:
    """A store with operations and events over it; `again` is what a restart finds."""

    def __init__(self, store: MemoryStore, keep: int = 1000, clock: Callable[[], str] | None = None) -> None:
        self.store = store
        self.events = Events(store)
        extra = {"clock": clock} if clock else {}
        self.operations = Operations(store, self.events, keep=keep, **extra)

    async def open(self) -> Kernel:
        await self.events.open()
        await self.operations.open()
        return self

    async def again(self) -> Kernel:
        """The same store after kill -9: nothing of the old kernel is closed."""
        return await Kernel(self.store).open()

    async def close(self) -> None:
        await self.operations.close(0)
        await self.events.close()

    async def stored(self, operation_id: str) -> OperationView:
        entry = await self.store.get(f"operations/{operation_id}")
        assert entry is not None
        return msgspec.json.decode(entry.value, type=OperationView)

    async def event_kinds(self) -> list[str]:
        await self.events.flush()
        return [view.kind for view in (await self.events.read(limit=1000)).events]


def run(scenario: Callable[[Kernel], Awaitable[None]], **options: object) -> None:
    async def main() -> None:
        kernel = await Kernel(MemoryStore(), **options).open()  # type: ignore[arg-type]
        await asyncio.wait_for(scenario(kernel), 60)
        await kernel.close()

    asyncio.run(main())


async def forever(_operation: Operation) -> Result:
    await asyncio.Event().wait()
    return None


async def nothing(_operation: Operation) -> Result:
    return None


def test_an_operation_is_stored_before_it_begins_and_when_it_has_ended() -> None:
    async def scenario(kernel: Kernel) -> None:
        go = asyncio.Event()
        seen: list[OperationState] = []

        async def work(operation: Operation) -> Result:
            seen.append((await kernel.stored(operation.id)).state)
            operation.stage("half way", 0.5)
            await go.wait()
            return {"answer": 42}

        view = await kernel.operations.start("disk.convert", "disk/a", work)
        assert view.state is OperationState.RUNNING
        assert (await kernel.operations.wait(view.id, 0)).state is OperationState.RUNNING
        await asyncio.sleep(0)
        go.set()
        done = await kernel.operations.wait(view.id)
        assert (done.state, done.result, done.progress) == (OperationState.SUCCEEDED, {"answer": 42}, 1.0)
        assert done.stage == "half way"
        assert seen == [OperationState.RUNNING]
        assert await kernel.stored(view.id) == done == kernel.operations.get(view.id)
        assert await kernel.event_kinds() == ["operation.started", "operation.stage", "operation.succeeded"]

    run(scenario)


def test_progress_never_falls_and_small_steps_make_no_events() -> None:
    async def scenario(kernel: Kernel) -> None:
        async def work(operation: Operation) -> Result:
            for number in range(1000):
                operation.stage("copying", number / 1000)
            operation.stage("copying", 0.1)
            assert operation.view.progress == 0.999
            operation.stage("copying", 7.0)
            assert operation.view.progress == 1.0
            return None

        view = await kernel.operations.start("disk.convert", "disk/a", work)
        assert (await kernel.operations.wait(view.id)).state is OperationState.SUCCEEDED
        assert 10 < len(await kernel.event_kinds()) < 30

    run(scenario)


def test_a_failure_keeps_its_code_message_remedy_and_context() -> None:
    async def scenario(kernel: Kernel) -> None:
        async def work(_operation: Operation) -> Result:
            raise NoSpaceError("no space left on /disks", remedy="Delete something.", path="/disks")

        view = await kernel.operations.start("disk.create", "disk/a", work)
        done = await kernel.operations.wait(view.id)
        assert done.state is OperationState.FAILED
        assert done.error is not None
        assert (done.error.code, done.error.message) == ("no-space", "no space left on /disks")
        assert (done.error.remedy, done.error.context) == ("Delete something.", {"path": "/disks"})

    run(scenario)


@pytest.mark.parametrize("fault", ["exception", "result"])
def test_a_fault_of_the_work_fails_the_operation_without_its_secrets(
    fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(kernel: Kernel) -> None:
        async def work(_operation: Operation) -> Result:
            if fault == "result":
                return {"what": object()}
            raise RuntimeError("an inner detail")

        view = await kernel.operations.start("x", "t", work)
        done = await kernel.operations.wait(view.id)
        assert done.state is OperationState.FAILED
        assert done.error is not None
        assert "an inner detail" not in msgspec.json.encode(done).decode()
        if fault == "exception":
            assert done.error.code == "internal"
            assert str(done.error.context["id"]) in caplog.text
            assert "an inner detail" in caplog.text

    run(scenario)


def test_a_cancelled_operation_rolls_back() -> None:
    async def scenario(kernel: Kernel) -> None:
        made: list[str] = []
        begun = asyncio.Event()

        async def work(operation: Operation) -> Result:
            made.append("a file")
            begun.set()
            try:
                return await forever(operation)
            except asyncio.CancelledError:
                assert operation.cancel_requested
                made.clear()
                raise

        view = await kernel.operations.start("x", "t", work, cancellable=True)
        assert view.cancellable
        await begun.wait()
        asked = await kernel.operations.cancel(view.id)
        assert asked.stage == "cancelling"
        done = await kernel.operations.wait(view.id)
        assert (done.state, made) == (OperationState.CANCELLED, [])
        assert done.error is not None
        assert done.error.code == "operation-cancelled"
        assert (await kernel.operations.cancel(view.id)).state is OperationState.CANCELLED
        assert (await kernel.stored(view.id)).state is OperationState.CANCELLED

    run(scenario)


def test_cancelled_before_its_work_began() -> None:
    async def scenario(kernel: Kernel) -> None:
        view = await kernel.operations.start("x", "t", forever, cancellable=True)
        await kernel.operations.cancel(view.id)
        assert (await kernel.operations.wait(view.id)).state is OperationState.CANCELLED

    run(scenario)


def test_a_rollback_that_fails_is_a_failure() -> None:
    async def scenario(kernel: Kernel) -> None:
        async def work(operation: Operation) -> Result:
            try:
                return await forever(operation)
            except asyncio.CancelledError:
                raise NoSpaceError("cannot roll back") from None

        view = await kernel.operations.start("x", "t", work, cancellable=True)
        await asyncio.sleep(0)
        await kernel.operations.cancel(view.id)
        done = await kernel.operations.wait(view.id)
        assert done.state is OperationState.FAILED
        assert done.error is not None
        assert done.error.code == "no-space"

    run(scenario)


def test_what_cannot_be_cancelled_says_so() -> None:
    async def scenario(kernel: Kernel) -> None:
        passed, go = asyncio.Event(), asyncio.Event()

        async def work(operation: Operation) -> Result:
            operation.point_of_no_return()
            passed.set()
            await go.wait()
            return None

        view = await kernel.operations.start("x", "t", work, cancellable=True)
        await passed.wait()
        assert not kernel.operations.get(view.id).cancellable
        with pytest.raises(StateError, match="past the point"):
            await kernel.operations.cancel(view.id)
        go.set()
        await kernel.operations.wait(view.id)
        with pytest.raises(StateError, match="succeeded"):
            await kernel.operations.cancel(view.id)
        never = await kernel.operations.start("x", "t", forever)
        with pytest.raises(StateError):
            await kernel.operations.cancel(never.id)
        with pytest.raises(NotFoundError, match="no operation 'zz'"):
            await kernel.operations.cancel("zz")

    run(scenario)


def test_work_that_gives_itself_up_has_failed() -> None:
    async def scenario(kernel: Kernel) -> None:
        async def work(_operation: Operation) -> Result:
            raise asyncio.CancelledError

        view = await kernel.operations.start("x", "t", work)
        assert (await kernel.operations.wait(view.id)).state is OperationState.FAILED

    run(scenario)


def test_one_operation_per_target_unless_both_allow_more() -> None:
    async def scenario(kernel: Kernel) -> None:
        first = await kernel.operations.start("partition.start", "partition/web", forever, cancellable=True)
        for exclusive in (True, False):
            with pytest.raises(
                ConflictError, match=f"partition.start of partition/web is going on.*{first.id}"
            ) as caught:
                await kernel.operations.start("partition.stop", "partition/web", nothing, exclusive=exclusive)
            assert first.id in caught.value.remedy
        await kernel.operations.start("partition.start", "partition/db", forever)
        await kernel.operations.cancel(first.id)
        await kernel.operations.wait(first.id)
        shared = [
            await kernel.operations.start("file.copy", "partition/web", forever, exclusive=False) for _ in range(2)
        ]
        assert len(kernel.operations.list(target="partition/web", state=OperationState.RUNNING)) == 2
        with pytest.raises(ConflictError):
            await kernel.operations.start("partition.stop", "partition/web", nothing)
        assert len(shared) == 2

    run(scenario)


def test_of_simultaneous_starts_one_wins() -> None:
    async def scenario(kernel: Kernel) -> None:
        answers = await asyncio.gather(
            *(kernel.operations.start("x", "t", forever) for _ in range(10)), return_exceptions=True
        )
        assert sum(isinstance(answer, OperationView) for answer in answers) == 1
        assert sum(isinstance(answer, ConflictError) for answer in answers) == 9

    run(scenario)


def test_after_a_crash_known_kinds_go_on_and_others_fail_honestly() -> None:
    async def scenario(kernel: Kernel) -> None:
        known = await kernel.operations.start("disk.merge", "disk/a", forever, cancellable=True)
        other = await kernel.operations.start("image.build", "image/demo", forever)
        ended = await kernel.operations.start("x", "t", nothing)
        await kernel.operations.wait(ended.id)

        async def resume(operation: Operation) -> Result:
            assert operation.id == known.id
            return {"resumed": operation.target}

        after = await kernel.again()
        after.operations.register_resume("disk.merge", resume)
        with pytest.raises(ConflictError):
            await after.operations.start("x", "disk/a", nothing)
        assert {view.id for view in await after.operations.recover()} == {known.id, other.id}
        done = await after.operations.wait(known.id)
        assert (done.state, done.result) == (OperationState.SUCCEEDED, {"resumed": "disk/a"})
        failed = await after.stored(other.id)
        assert failed.state is OperationState.FAILED
        assert failed.error is not None
        assert failed.error.code == "interrupted"
        assert "image.build of image/demo" in failed.error.message
        assert after.operations.get(ended.id).state is OperationState.SUCCEEDED
        assert await after.operations.recover() == []
        await after.close()

    run(scenario)


def test_an_orderly_end_leaves_running_work_for_the_next_start() -> None:
    async def scenario(kernel: Kernel) -> None:
        rolled_back: list[bool] = []

        async def work(operation: Operation) -> Result:
            try:
                return await forever(operation)
            except asyncio.CancelledError:
                rolled_back.append(operation.cancel_requested)
                raise

        view = await kernel.operations.start("x", "t", work, cancellable=True)
        await asyncio.sleep(0)
        await kernel.operations.close(0)
        assert rolled_back == [False]
        assert (await kernel.stored(view.id)).state is OperationState.RUNNING
        with pytest.raises(UnavailableError):
            await kernel.operations.start("x", "u", nothing)
        after = await kernel.again()
        await after.operations.recover()
        assert after.operations.get(view.id).state is OperationState.FAILED
        await after.close()

    run(scenario)


def test_an_orderly_end_waits_for_work_that_is_nearly_done() -> None:
    async def scenario(kernel: Kernel) -> None:
        go = asyncio.Event()

        async def work(_operation: Operation) -> Result:
            await go.wait()
            return {"done": True}

        view = await kernel.operations.start("x", "t", work)
        closing = asyncio.ensure_future(kernel.operations.close(60))
        await asyncio.sleep(0)
        go.set()
        await closing
        assert (await kernel.stored(view.id)).state is OperationState.SUCCEEDED

    run(scenario)


def test_only_the_last_operations_are_kept() -> None:
    async def scenario(kernel: Kernel) -> None:
        ids = []
        for number in range(12):
            view = await kernel.operations.start("x", f"t{number}", nothing)
            await kernel.operations.wait(view.id)
            ids.append(view.id)
        assert [view.id for view in kernel.operations.list()] == ids[-5:]
        assert {entry.key for entry in await kernel.store.list("operations/")} == {f"operations/{i}" for i in ids[-5:]}
        after = await kernel.again()
        assert [view.id for view in after.operations.list()] == ids[-5:], "the order survives a restart"
        await after.close()
        with pytest.raises(NotFoundError):
            kernel.operations.get(ids[0])

    run(scenario, keep=5)


def test_operations_older_than_seven_days_are_forgotten() -> None:
    days = itertools.count()

    def clock() -> str:
        return format_time((1_800_000_000 + next(days) * 86400) * 10**9)

    async def scenario(kernel: Kernel) -> None:
        first = await kernel.operations.start("x", "t", nothing)
        await kernel.operations.wait(first.id)
        for _ in range(4):
            view = await kernel.operations.start("x", "t", nothing)
            await kernel.operations.wait(view.id)
        kept = [item.id for item in kernel.operations.list()]
        assert first.id not in kept
        assert view.id in kept

    run(scenario, clock=clock)


class FragileStore(MemoryStore):
    full = False

    async def transact(self, conditions: Sequence[Condition], writes: Sequence[Write]) -> int:
        if self.full:
            raise NoSpaceError("no space left for the store")
        return await super().transact(conditions, writes)


def test_on_a_full_disk_ends_are_shown_and_stored_later_and_nothing_new_begins(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        store = FragileStore()
        kernel = await Kernel(store).open()
        go = asyncio.Event()

        async def work(_operation: Operation) -> Result:
            await go.wait()
            return None

        first = await kernel.operations.start("x", "a", work)
        await kernel.events.flush()
        store.full = True
        with pytest.raises(NoSpaceError):
            await kernel.operations.start("x", "b", work)
        assert len(kernel.operations.list()) == 1
        go.set()
        assert (await kernel.operations.wait(first.id)).state is OperationState.SUCCEEDED
        assert (await kernel.stored(first.id)).state is OperationState.RUNNING
        assert "cannot be stored yet" in caplog.text
        store.full = False
        second = await kernel.operations.start("x", "b", nothing)
        await kernel.operations.wait(second.id)
        assert (await kernel.stored(first.id)).state is OperationState.SUCCEEDED
        await kernel.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_every_state_has_its_transitions() -> None:
    assert set(TRANSITIONS) == set(OperationState)
    for state, following in TRANSITIONS.items():
        assert state.is_final == (not following)
