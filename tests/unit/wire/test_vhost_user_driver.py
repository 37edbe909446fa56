"""The driver's side of a ring: it hears of every answer that it waits for."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from mullion.wire.vhost_user import driver as driver_module
from mullion.wire.vhost_user.driver import Answer, VirtqueueDriver
from mullion.wire.vhost_user.messages import DeviceFeature


@dataclass
class Shared:
    memory: memoryview = field(default_factory=lambda: memoryview(bytearray(1 << 20)))
    features: int = int(DeviceFeature.RING_EVENT_IDX | DeviceFeature.VERSION_1)


class Racing(VirtqueueDriver):
    """The device answers one request at each look but the first; that of which nobody wants to hear it says to nobody.

    The driver's wish is read at once for the first of these answers (it was published before the driver wished), and
    when it sleeps for the second (2.7.10).
    """

    looks = 0

    def collect(self) -> list[Answer]:
        self.looks += 1
        if self.looks == 2:
            self._answer(1)
        answers = super().collect()
        wanted = int(self._available[2 + self.size])
        if self.looks == 3 and wanted == 1:
            self._answer(2)
            answers += super().collect()
        return answers

    def _answer(self, used: int) -> None:
        self._used[2:4] = used.to_bytes(2, "little")


def test_after_an_answer_came_by_itself_the_next_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "ANSWER_DEADLINE_S", 0)
    driver = Racing(Shared())
    assert len(driver.wait(2)) == 2
    driver.release()
