"""Schedules of a service, made to be due: time passes in its store while it does not run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec
from tests.framework.service import Service

from mullion.parent.schedules import ScheduleRecord
from mullion.parent.store import Put, SqliteStore

PATIENCE_S = 60.0


def rewrite(service: Service, change: Callable[[ScheduleRecord], ScheduleRecord]) -> None:
    """Change all schedules in the store of a service that does not run."""

    async def main() -> None:
        store = await SqliteStore.open(service.paths.database)
        for entry in await store.list("schedules/"):
            record = change(msgspec.json.decode(entry.value, type=ScheduleRecord))
            await store.transact((), [Put(entry.key, msgspec.json.encode(record))])
        await store.close()

    asyncio.run(main())


def miss_runs(service: Service) -> None:
    """Stop the service, and start it a day later as far as its schedules know."""
    service.end()
    rewrite(
        service,
        lambda record: msgspec.structs.replace(record, begun_s=record.begun_s - 86_400, last_s=None, last_result=""),
    )
    service.start()


def outcome(service: Service, kind: str) -> str:
    """How the run of the only schedule of `web` went, once it has ended."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        (view,) = service.cli(kind, "schedule", "list", "web", "--format", "json").json
        if view["last_error"] is not None:
            return f"failed: {view['last_error']['message']}"
        if view["last_result"]:
            return str(view["last_result"])
        assert time.monotonic() < deadline_s, "the run does not end"
        time.sleep(0.05)
