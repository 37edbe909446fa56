"""Schedules of checkpoints through the real service: what they make, what they keep, what they leave alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from tests.framework.missed_runs import miss_runs, outcome, rewrite
from tests.framework.service import Service

pytestmark = pytest.mark.interop


@pytest.fixture
def service(short_tmp: Path) -> Iterator[Service]:
    """A service with a stopped partition `web`."""
    made = Service(str(short_tmp))
    made.start()
    try:
        made.cli("partition", "create", "web", "--memory", "128M", "--disk", "web,size=64M")
        yield made
    finally:
        made.end()


def checkpoints(service: Service) -> list[tuple[str, str]]:
    """Name and schedule of each, oldest first."""
    with service.client() as client:
        return [(view.name, view.schedule) for view in client.checkpoints("web").checkpoints]


def test_missed_runs_are_one_and_only_what_the_schedule_made_goes(service: Service) -> None:
    service.cli("checkpoint", "create", "web", "by-hand")
    service.cli("checkpoint", "schedule", "set", "web", "--every", "1h", "--keep", "1")
    service.write("web", 0, b"one".ljust(512, b"."))
    miss_runs(service)
    assert outcome(service, "checkpoint").startswith("made ")
    ((_, _), (first, schedule)) = checkpoints(service)
    assert schedule == "default"

    miss_runs(service)  # and nothing was written
    assert outcome(service, "checkpoint") == f"nothing was written since {first}"

    service.write("web", 0, b"two".ljust(512, b"."))
    miss_runs(service)
    made = outcome(service, "checkpoint")
    assert made.endswith(f", deleted {first}"), made
    assert [name for name, _ in checkpoints(service)] == ["by-hand", made.split()[1].rstrip(",")]
    kinds = [event["kind"] for event in map(msgspec.json.decode, service.cli(
        "events", "--format", "json").stdout.splitlines())]  # fmt: skip
    assert {"schedule.set", "checkpoint.created", "checkpoint.deleted"} <= set(kinds)


def test_a_run_that_fails_says_why(service: Service) -> None:
    service.cli("checkpoint", "schedule", "set", "web", "nightly", "--daily", "02:30", "--keep-for", "30d")
    service.end()
    Path(service.paths.disks, "web.vhd").rename(Path(service.home, "web.vhd"))
    rewrite(service, lambda record: msgspec.structs.replace(record, begun_s=record.begun_s - 2 * 86_400))
    service.start()
    assert "web.vhd" in outcome(service, "checkpoint")
    shown = service.cli("checkpoint", "schedule", "list", "web").stdout
    assert "failed: " in shown
    events = service.cli("events", "--format", "json").stdout
    assert '"schedule.failed"' in events
    assert checkpoints(service) == []
    Path(service.home, "web.vhd").rename(Path(service.paths.disks, "web.vhd"))
    service.cli("checkpoint", "schedule", "remove", "web", "nightly")
    assert service.cli("checkpoint", "schedule", "remove", "web", "nightly", check=False).status == 3


@pytest.mark.parametrize(
    "words",
    [
        ("--keep", "3"),
        ("--every", "1h"),
        ("--every", "1h", "--daily", "02:30", "--keep", "3"),
        ("--every", "5s", "--keep", "3"),
        ("--keep", "0", "--every", "1h"),
    ],
)
def test_what_cannot_be_meant_is_refused(service: Service, words: tuple[str, ...]) -> None:
    assert service.cli("checkpoint", "schedule", "set", "web", *words, check=False).status == 2


def test_schedules_go_with_their_partition(service: Service) -> None:
    service.cli("checkpoint", "schedule", "set", "web", "--weekly", "sun 03:00", "--keep", "4")
    assert (
        service.cli("checkpoint", "schedule", "set", "web", "x", "--daily", "25:00", "--keep", "4", check=False).status
        == 5
    )
    service.cli("partition", "delete", "web", "--yes")
    service.cli("partition", "create", "web", "--memory", "128M", "--disk", "web")
    assert service.cli("checkpoint", "schedule", "list", "web", "--format", "json").json == []
