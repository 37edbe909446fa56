"""Fixtures of the guest tests: the image, built once for all, and services with homes of their own."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.framework.iocheck import SOURCE, build_iocheck
from tests.framework.leftovers import Leftovers, checked_home
from tests.framework.service import Service

from mullion.services.image.build import BuiltImage, build_demo_image

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "tests"


@pytest.fixture(scope="session")
def images() -> Path:
    """The folder with the demo image; the first worker that needs it builds it, the others wait for its lock."""
    CACHE.mkdir(parents=True, exist_ok=True)
    build_demo_image(str(CACHE / "images"), cache_dir=str(CACHE / "packages"))
    return CACHE / "images"


@pytest.fixture(scope="session")
def iocheck_image(images: Path) -> BuiltImage:
    """The demo image with `iocheck` in it."""
    program = CACHE / "iocheck"
    with open(CACHE / ".iocheck.lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists() or program.stat().st_mtime < SOURCE.stat().st_mtime:
            build_iocheck(CACHE)
    return build_demo_image(
        str(images), cache_dir=str(CACHE / "packages"), extra_files={"/usr/bin/iocheck": str(program)}
    )


def _homed(leftovers: Leftovers, images: Path) -> Iterator[Service]:
    with checked_home(leftovers) as home:
        os.chmod(home, 0o711)  # the partitions' users pass through
        service = Service(str(home))
        os.makedirs(service.paths.data_dir)
        os.symlink(images, service.paths.images)
        try:
            yield service
        finally:
            service.destroy()


@pytest.fixture
def service(leftovers: Leftovers, images: Path) -> Iterator[Service]:
    """A service that is not started yet."""
    yield from _homed(leftovers, images)


@pytest.fixture(scope="module")
def shared_service(leftovers: Leftovers, images: Path) -> Iterator[Service]:
    """A running service that the tests of a module share."""
    for service in _homed(leftovers, images):
        service.start()
        yield service
