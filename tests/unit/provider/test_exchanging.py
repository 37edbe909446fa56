"""The command `switch` where a disk's files cannot be made durable afterwards."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mullion.base.errors import OperationFailedError
from mullion.base.units import MIB
from mullion.provider.control import Command
from mullion.provider.exchanging import Exchangeable, exchange_chains
from mullion.provider.turnstile import Turnstile
from mullion.vhd import Chain, create_differencing, create_dynamic, open_chain
from mullion.vhd.fileio import FileIO

pytestmark = pytest.mark.unit


class FailingSync(FileIO):
    """Syncs fail after `is_failing` was set."""

    is_failing = False

    def fdatasync(self, fd: int) -> None:
        if self.is_failing:
            raise OSError(errno.EIO, "lost")
        super().fdatasync(fd)


def exchangeable(name: str, chain: Chain) -> Exchangeable:
    return Exchangeable(name, chain, Turnstile(name), None, "")


def is_open(path: Path) -> bool:
    return str(path) in {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}


def test_a_disk_that_fails_in_the_end_leaves_no_files_of_the_others_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, middle, top, newer = (tmp_path / f"{name}.vhd" for name in ("base", "middle", "top", "newer"))
    create_dynamic(str(base), MIB)
    create_differencing(str(middle), str(base))
    create_differencing(str(top), str(middle))
    create_dynamic(str(tmp_path / "other.vhd"), MIB)
    create_differencing(str(newer), str(tmp_path / "other.vhd"))
    failing = FailingSync()
    with open_chain(str(tmp_path / "other.vhd"), file_io=failing) as first, open_chain(str(top)) as second:
        exchange = Chain.exchange

        def exchange_and_fail(self: Chain, *arguments: object) -> None:
            exchange(self, *arguments)  # type: ignore[arg-type]
            failing.is_failing = True

        monkeypatch.setattr(Chain, "exchange", exchange_and_fail)
        disks = {"first": exchangeable("first", first), "second": exchangeable("second", second)}
        wanted = [
            {"id": "first", "chain": [str(newer), *first.paths], "new": [str(newer)]},
            {"id": "second", "chain": [str(top), str(base)], "new": [], "set_parent": True},
        ]
        with pytest.raises(OperationFailedError, match="lost"):
            exchange_chains(disks, Command({"disks": wanted}, [os.open(newer, os.O_RDWR)]))
        failing.is_failing = False
        assert second.paths == (str(top), str(base))
        assert not is_open(middle)
        with pytest.raises(OSError, match="lost"):
            first.flush()
        first.flush()
