"""What every level of the tests shares: the header, homes that are checked for leftovers, the logs of a failed guest."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from tests.framework.exploring import load_profile
from tests.framework.leftovers import Leftovers, checked_home
from tests.framework.logs import log_tails

from mullion.base.implementation import choose, describe

load_profile()  # before the modules that build on it are imported

LEFTOVERS = pytest.StashKey[Leftovers]()
REAPED = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """End what sessions left behind that died, before anything of this one starts."""
    config.stash[LEFTOVERS] = Leftovers()
    config.stash[REAPED] = config.stash[LEFTOVERS].reap_dead_sessions()


def pytest_report_header(config: pytest.Config) -> list[str]:
    try:
        printed = subprocess.run(
            ["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=False
        ).stdout
        qemu = printed.splitlines()[0].removeprefix("QEMU emulator version ") if printed else "does not start"
    except FileNotFoundError:
        qemu = "not installed"
    kvm = "there" if os.path.exists("/dev/kvm") else "not there"
    python = f"{platform.python_implementation()} {platform.python_version()}"
    machine = f"{os.cpu_count()} cores, kernel {platform.release()}, /dev/kvm {kvm}"
    return [
        f"mullion: {python}, {describe()}, QEMU {qemu}, {machine}",
        *(f"mullion: {line}" for line in config.stash[REAPED]),
    ]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failing guest test shows what its service and guests wrote, while it is still there."""
    report = yield
    if report.failed and item.get_closest_marker("vm") is not None:
        for home in _homes(item):
            report.sections += [(f"end of {path}", text) for path, text in log_tails(home)]
    return report


def _homes(item: pytest.Item) -> list[str]:
    """Homes of this session, and those of the test's fixtures that have one of their own."""
    values = getattr(item, "funcargs", {}).values()
    of_fixtures = [str(value.home) for value in values if isinstance(getattr(value, "home", None), str | Path)]
    return list(dict.fromkeys([*item.config.stash[LEFTOVERS].homes, *of_fixtures]))


@pytest.fixture(scope="session", autouse=True)
def leftovers(request: pytest.FixtureRequest) -> Iterator[Leftovers]:
    """Where a fixture of any scope gets a home (`with checked_home(leftovers) as home`); the session fails on the rest."""
    session = request.config.stash[LEFTOVERS]
    yield session
    survivors = session.finish()
    if survivors:
        pytest.fail("the session left behind: " + "; ".join(map(str, survivors)), pytrace=False)


@pytest.fixture
def short_tmp(leftovers: Leftovers) -> Iterator[Path]:
    """A folder with a path short enough for sockets. Nothing that names it may run when the test is over."""
    with checked_home(leftovers) as home:
        yield home


@pytest.fixture
def started() -> Iterator[contextlib.ExitStack]:
    """Ends what a test has started, however the test ends."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module", params=["python", "compiled"])
def each_implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The module's tests run on rings with a hot loop in Python, and again with its compiled twin, which must be there."""
    with pytest.MonkeyPatch.context() as patch:
        chosen = choose("mullion.provider.hot_loop", request.param).module
        patch.setattr("mullion.provider.ring.HotLoop", chosen.HotLoop)
        yield request.param
