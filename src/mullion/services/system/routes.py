"""REST of the service itself: `/1.0/status`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from litestar import get

from mullion.model.views import StatusView
from mullion.parent.api import Service


@dataclass(frozen=True, slots=True)
class System:
    """What the composition root knows of the service."""

    status: Callable[[], StatusView]


@get("/1.0/status", tags=["system"])
async def show_status(system: Service[System]) -> StatusView:
    """The service and its host at a glance."""
    return system.status()


ROUTES: Final = (show_status,)
