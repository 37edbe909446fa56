"""`mullion apply`: make the partitions what a file says, and say what that changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
