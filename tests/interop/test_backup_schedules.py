"""Schedules of backups through the real service: what they make, what they forget, what they leave alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from tests.framework.missed_runs import miss_runs, outcome
from tests.framework.service import Service

pytestmark = pytest.mark.interop


@pytest.fixture
def service(short_tmp: Path) -> Iterator[Service]:
    """A service with a stopped partition `web` and a repository `near`."""
    made = Service(str(short_tmp))
    made.start()
    try:
        made.cli("partition", "create", "web", "--memory", "128M", "--disk", "web,size=64M")
        place = str(short_tmp / "repository")
        made.cli(
            "backup", "repository", "add", "near", place, "--create", "--passphrase-file", "-", stdin=b"a passphrase\n"
        )
        yield made
    finally:
        made.end()


def backups(service: Service) -> list[str]:
    return [view["id"] for view in service.cli("backup", "list", "--format", "json").json]


def test_only_that_partition_s_backups_are_forgotten(service: Service) -> None:
    service.cli("backup", "create", "web")
    service.cli("partition", "delete", "web", "--with-disks", "--yes")
    service.cli("partition", "create", "web", "--memory", "128M", "--disk", "web,size=64M")  # another one of that name
    (of_the_first,) = backups(service)

    said = service.cli("backup", "schedule", "set", "web", "--every", "1h", "--keep-last", "1").stdout
    assert "every 1h into near, keeps 1 last" in said
    miss_runs(service)
    made = outcome(service, "backup")
    assert made.startswith("made ")
    assert "forgot" not in made
    assert backups(service) == [of_the_first, made.split()[1]]

    miss_runs(service)
    again = outcome(service, "backup")
    assert again.endswith(f", forgot {made.split()[1]}"), again
    assert backups(service) == [of_the_first, again.split()[1]]
    assert again in service.cli("backup", "schedule", "list").stdout
    needed = service.cli("backup", "repository", "remove", "near", check=False)
    assert (needed.status, " backup schedule remove web default" in needed.stderr) == (4, True), needed.stderr
    service.cli("backup", "schedule", "remove", "web")
    assert service.cli("backup", "schedule", "list", "web", "--format", "json").json == []


def test_a_run_that_fails_says_why(service: Service) -> None:
    service.cli("backup", "schedule", "set", "web", "nightly", "--daily", "02:30", "--repository", "near")
    shutil.rmtree(Path(service.home, "repository"))
    miss_runs(service)
    assert str(Path(service.home, "repository")) in outcome(service, "backup")
    assert "failed: " in service.cli("backup", "schedule", "list", "web").stdout
    events = [msgspec.json.decode(line) for line in service.cli("events", "--format", "json").stdout.splitlines()]
    failed = [event for event in events if event["kind"] == "schedule.failed"]
    assert failed[-1]["data"]["code"] == "target-unreachable"
    assert service.cli("checkpoint", "list", "web", "--format", "json").json["checkpoints"] == []


def test_what_cannot_be_meant_is_refused_and_schedules_go_with_their_partition(service: Service) -> None:
    for words, status in (
        (("web", "--keep-last", "3"), 2),
        (("web", "--every", "1h", "--daily", "02:30"), 2),
        (("web", "--daily", "25:00"), 5),
        (("web", "--every", "1h", "--repository", "far"), 3),
        (("mail", "--every", "1h"), 3),
    ):
        assert service.cli("backup", "schedule", "set", *words, check=False).status == status, words
    service.cli("backup", "schedule", "set", "web", "--weekly", "sun 03:00")
    service.cli("partition", "delete", "web", "--yes")
    assert service.cli("backup", "schedule", "list", "--format", "json").json == []
