"""The command `resize`: a disk in use becomes larger.

    {"command": "resize", "disk": id, "size_bytes": n} → {"size_bytes", "old_bytes", "stall_ms", "announced"}

The top of the chain grows as `mullion.vhd.resize` does it, durably, while the disk is held; then the guest may hear of
it. A vhost-user front-end is told at once (`announced`). The NBD protocol has no word for it: a client finds the new
size when it connects again. What a guest's partition table says of the end of the disk is the guest's to change.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

from mullion.base.errors import InvalidError, StateError
from mullion.base.units import SECTOR_BYTES, format_size
from mullion.provider.turnstile import Turnstile, holding
from mullion.vhd import Chain
from mullion.vhd.offline import reload
from mullion.vhd.resize import grow_file
from mullion.vhd.storage import storage_explained

HOLD_S: Final = 20.0


def wanted_size(chain: Chain, fields: Mapping[str, object]) -> int:
    """The size that a command asks for. Raises: InvalidError; StateError for a disk that is not written."""
    size = fields.get("size_bytes")
    if not isinstance(size, int) or isinstance(size, bool) or size <= 0 or size % SECTOR_BYTES:
        raise InvalidError(f"resize: size_bytes: {size!r} is no size of a disk", remedy="Give a multiple of 512 bytes.")
    if chain.read_only:
        raise StateError(f"{chain.paths[0]} is attached read-only", state="read-only", required="writable")
    if size < chain.size_bytes:
        raise InvalidError(
            f"{chain.paths[0]} has {format_size(chain.size_bytes)} and cannot become smaller while it is used",
            remedy="Stop the partition, then use mullion vhd resize.",
        )
    return size


def grow(chain: Chain, turnstile: Turnstile, size_bytes: int) -> float:
    """Make the disk larger; the milliseconds for which requests waited. The same size again does nothing.

    Raises: InvalidError for a size that cannot be; DeadlineError; NoSpaceError, OperationFailedError: then it has its
    old size, or the new one as soon as it is opened again.
    """
    if size_bytes == chain.size_bytes:
        return 0.0
    top = chain.images[0]
    with storage_explained(top.path):
        chain.flush_ahead()  # so that little is left to be flushed while requests wait
        begun_s = time.monotonic()
        with holding([turnstile], HOLD_S):
            with chain.settled():
                try:
                    grow_file(top, size_bytes, chain.file_io)
                except OSError:
                    reload(top)
                    raise
            chain.renew()
            return (time.monotonic() - begun_s) * 1000
