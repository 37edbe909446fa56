"""What is beside repositories, and goes with them: copies of an index."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mullion.base.paths import HostPaths
from mullion.parent.events import Events
from mullion.parent.operations import Operation
from mullion.parent.store import MemoryStore
from mullion.services.backup.repositories import Repositories

pytestmark = pytest.mark.unit


class Known(Repositories):
    """Repositories that are all there."""

    async def work(self, request: Mapping[str, object], operation: Operation | None = None) -> Mapping[str, Any]:
        return {"repository_id": "ab" * 16}


def test_a_repository_is_forgotten_while_a_worker_keeps_a_copy_of_its_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = HostPaths(str(tmp_path / "data"), str(tmp_path / "run"))
    copies = Path(paths.index_cache("far"))
    copies.mkdir(parents=True)
    (copies / ("0" * 32)).write_bytes(b"sealed")
    rmdir = os.rmdir

    def rmdir_too_late(path: str, **where: Any) -> None:
        (copies / ("1" * 32)).write_bytes(b"sealed meanwhile")
        rmdir(path, **where)

    async def forget() -> list[str]:
        store = MemoryStore()
        events = Events(store)
        await events.open()
        repositories = Known(store, events, paths)
        await repositories.add("far", "sftp://host/folder", "words", {}, create=False)
        monkeypatch.setattr(os, "rmdir", rmdir_too_late)
        await repositories.remove("far")
        assert repositories.views() == ()
        again = Known(store, events, paths)
        await again.open()
        assert again.views() == ()
        await events.flush()
        told = [event.kind for event in (await events.read()).events]
        await events.close()
        return told

    assert asyncio.run(forget())[-1] == "backup.repository-removed"
    assert [path.name for path in copies.iterdir()] == ["1" * 32]
    assert not os.path.exists(f"{paths.secrets}/repository-far.json")
