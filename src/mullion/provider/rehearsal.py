"""Serving a small disk once, in the zygote, so that its children find everything warm.

CPython fills caches while code runs: specialised instructions, method caches, imported codecs. What the zygote has
filled is shared by its children; what each fills alone is private memory (measured: 0.6 MB each) and time.
"""

from __future__ import annotations

import codecs
import logging
import os
import tempfile
from typing import Final

from mullion.base.errors import MullionError
from mullion.base.process import boot_id
from mullion.provider.main import Provider
from mullion.provider.spec import DiskSpec, ProviderSpec
from mullion.vhd import create_dynamic
from mullion.wire.vhost_user.client import FrontEnd
from mullion.wire.vhost_user.driver import attach
from mullion.wire.vhost_user.messages import DeviceFeature
from mullion.wire.vhost_user.virtio_blk import BlkFeature, BlkRequest

log = logging.getLogger(__name__)

_DISK_BYTES: Final = 8 * 1024 * 1024
_ROUNDS: Final = 40
"""Enough for the interpreter to specialise what it runs (it begins at the eighth time)."""
_WANTED: Final = (
    DeviceFeature.VERSION_1 | DeviceFeature.RING_INDIRECT_DESC | DeviceFeature.RING_EVENT_IDX | BlkFeature.FLUSH
)


def rehearse() -> None:
    """Start a provider in this process, read and write through it, end it. A failure costs warmth and nothing else."""
    boot_id()
    for name in ("ascii", "latin-1", "utf-16-be", "utf-16-le"):
        codecs.lookup(name)
    logging.disable(logging.INFO)
    try:
        with tempfile.TemporaryDirectory(prefix="mullion-") as folder:
            _serve_once(folder)
    except (MullionError, OSError) as error:
        log.warning("the rehearsal failed, providers will start cold: %s", error)
    finally:
        logging.disable(logging.NOTSET)


def _serve_once(folder: str) -> None:
    disk = DiskSpec("d", (f"{folder}/d.vhd",), vhost_user=f"{folder}/v", nbd=f"{folder}/n")
    spec = ProviderSpec("rehearsal", (disk,), f"{folder}/c", f"{folder}/log", f"{folder}/pending")
    create_dynamic(disk.chain[0], _DISK_BYTES)
    provider = Provider(ProviderSpec.from_fields(spec.to_wire()))
    provider.open()
    try:
        provider.ready()
        assert disk.vhost_user is not None, "given above"
        with FrontEnd(disk.vhost_user) as front_end:
            inflight, fd = front_end.get_inflight(1, 64)
            front_end.set_inflight(inflight, fd)
            os.close(fd)
            driver = attach(front_end, wanted=int(_WANTED))
            for number in range(_ROUNDS):
                driver.write(number * 8, bytes(4096))
                driver.read(number * 8, 4096)
            driver.request(BlkRequest.FLUSH)
            front_end.stop_vring(0)
            driver.release()
        provider.status()
    finally:
        provider.close()
