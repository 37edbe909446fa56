"""The service's kernel: store, operations, events. The API is in `mullion.parent.api`, imported late."""

from mullion.parent.events import EventPage, Events
from mullion.parent.operations import Operation, Operations

__all__ = ["EventPage", "Events", "Operation", "Operations"]
