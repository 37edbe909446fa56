"""What is said of a merge that a worker carries out: kept up to date for as long as it goes on."""

from __future__ import annotations

import asyncio
import logging

import pytest

from mullion.base.errors import InvalidError
from mullion.services.checkpoint import merging
from mullion.services.checkpoint.merge_link import MergeProgress
from mullion.services.checkpoint.merging import MergeStatus

pytestmark = pytest.mark.unit


class Worker:
    """Says something odd twice, refuses a rate, and then is as any other."""

    def __init__(self) -> None:
        self.looks = 0
        self.refusals = 1
        self.rate = 8

    async def status(self) -> MergeProgress | None:
        self.looks += 1
        if self.looks <= 2:
            raise KeyError("done_bytes")
        return MergeProgress("copying", self.looks, 100, self.rate, 3, None)

    async def set_rate(self, bytes_per_s: int) -> None:
        if self.refusals:
            self.refusals -= 1
            raise InvalidError("no such rate", remedy="Give another one.")
        self.rate = bytes_per_s


def test_an_error_does_not_end_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(merging, "_LOOK_S", 0)
    worker = Worker()
    status = MergeStatus(worker=worker)  # type: ignore[arg-type]  # all of it that is used here

    async def follow() -> None:
        following = asyncio.create_task(merging._follow(worker, status, lambda: 5))  # type: ignore[arg-type]
        try:
            async with asyncio.timeout(10):
                while worker.looks < 6:
                    await asyncio.sleep(0)
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    with caplog.at_level(logging.ERROR):
        asyncio.run(follow())
    assert worker.rate == status.limit_bytes_per_s == 5
    assert status.done_bytes >= 5
    told = [record.exc_info[1] for record in caplog.records if record.exc_info is not None]
    assert [type(error) for error in told] == [KeyError, InvalidError], "each once"
