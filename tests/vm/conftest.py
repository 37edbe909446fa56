"""Fixtures of the guest tests: the demo image, built once for all, and services with homes of their own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.framework.service import Service

from mullion.services.image.build import BuiltImage, build_demo_image

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "tests"


@pytest.fixture(scope="session")
def demo_image() -> BuiltImage:
    """The demo image; the first worker that needs it builds it, the others wait for its lock."""
    CACHE.mkdir(parents=True, exist_ok=True)
    return build_demo_image(str(CACHE / "images"), cache_dir=str(CACHE / "packages"))


def make_service(demo_image: BuiltImage) -> Iterator[Service]:
    home = tempfile.mkdtemp(prefix="mull-", dir="/tmp")
    os.chmod(home, 0o755)
    service = Service(home)
    os.makedirs(service.paths.data_dir)
    os.symlink(CACHE / "images", service.paths.images)
    try:
        yield service
    finally:
        service.destroy()
        shutil.rmtree(home)


@pytest.fixture
def service(demo_image: BuiltImage) -> Iterator[Service]:
    """A service that is not started yet."""
    yield from make_service(demo_image)


@pytest.fixture(scope="module")
def shared_service(demo_image: BuiltImage) -> Iterator[Service]:
    """A running service that the tests of a module share."""
    for service in make_service(demo_image):
        service.start()
        yield service
