"""One service per run folder: the second is told who the first is, and a crash leaves nothing in the way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mullion.base.errors import ConflictError
from mullion.base.process import ProcessIdentity, boot_id
from mullion.host import ServiceLock, running_service

pytestmark = pytest.mark.unit


def test_the_second_is_told_the_pid_of_the_first(tmp_path: Path) -> None:
    path = str(tmp_path / "run" / "service.pid")
    with ServiceLock(path):
        running = running_service(path)
        assert running is not None
        assert running.pid == os.getpid()
        with pytest.raises(ConflictError, match=f"process {os.getpid()} holds") as caught:
            ServiceLock(path).acquire()
        assert caught.value.context["pid"] == os.getpid()
        assert running_service(path) == running, "the one who was refused left the file alone"
    assert running_service(path) is None
    with ServiceLock(path):
        assert running_service(path) is not None


@pytest.mark.parametrize(
    "left",
    [
        "",
        "rubbish\n",
        f"{os.getpid()} 1 {boot_id()}\n",  # a pid that is another process now
        f"{os.getpid()} 1 00000000-0000-0000-0000-000000000000\n",  # of another boot
        "x" * 100_000,
    ],
    ids=["empty", "rubbish", "reused pid", "another boot", "too long"],
)
def test_a_stale_file_is_taken_over(tmp_path: Path, left: str) -> None:
    path = tmp_path / "service.pid"
    path.write_text(left)
    assert running_service(str(path)) is None
    with ServiceLock(str(path)):
        assert ProcessIdentity.parse(path.read_text()) == ProcessIdentity.of(os.getpid())
    assert path.read_text() == ""


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("content")
    (tmp_path / "service.pid").symlink_to(target)
    with pytest.raises(OSError, match="symbolic link"):
        ServiceLock(str(tmp_path / "service.pid")).acquire()
    assert target.read_text() == "content"


def test_release_may_be_repeated(tmp_path: Path) -> None:
    lock = ServiceLock(str(tmp_path / "service.pid"))
    lock.acquire()
    lock.release()
    lock.release()
