"""The log: one line per record, fields from the context, no forged lines, no secrets."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mullion.base import log as logs
from mullion.base.errors import InvalidError

pytestmark = pytest.mark.unit
log = logging.getLogger("mullion.somewhere")


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Path]:
    """A log file that is set up as the service does; the loggers are put back afterwards."""
    root = logging.getLogger()
    level = root.level
    logs.set_up("debug", str(tmp_path / "mullion.log"), stderr=False)
    yield tmp_path / "mullion.log"
    for handler in [handler for handler in root.handlers if isinstance(handler.formatter, logs.LineFormatter)]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def test_a_line_has_time_level_logger_fields_and_message(written: Path) -> None:
    with logs.bind(partition="web"), logs.bind(disk="disk0", operation=17):
        log.info("the size is %d", 4096)
    log.warning("outside")
    first, second = written.read_text().splitlines()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z info mullion\.somewhere partition=web disk=disk0 operation=17 "
        r"the size is 4096",
        first,
    )
    assert second.endswith("warning mullion.somewhere outside")


def test_fields_follow_the_task_that_set_them(written: Path) -> None:
    async def work(name: str) -> None:
        with logs.bind(partition=name):
            await asyncio.sleep(0)
            log.info("here")

    async def main() -> None:
        with logs.bind(host="a"):
            await asyncio.gather(work("web"), work("db"))

    asyncio.run(main())
    lines = [line for line in written.read_text().splitlines() if line.endswith(" here")]
    assert ["host=a partition=web" in lines[0], "host=a partition=db" in lines[1]] == [True, True]


def test_inner_fields_win_and_odd_values_are_quoted(written: Path) -> None:
    with logs.bind(disk="a"), logs.bind(disk="with space"):
        assert logs.bound() == {"disk": "with space"}
        log.info("x")
    assert ' disk="with space" x' in written.read_text()
    assert logs.bound() == {}


def test_nobody_can_forge_a_line(written: Path) -> None:
    with logs.bind(partition="a\nb"):
        log.info("guest said: %s", "x\n2030-01-01T00:00:00Z info forged\x1b[2J\x85\u2028end")
    text = written.read_text()
    assert len(text.splitlines()) == 1
    assert "\x1b" not in text
    assert "partition=a\\nb guest said: x\\n2030" in text


def test_a_traceback_follows_indented(written: Path) -> None:
    try:
        raise ValueError("bad\nthing")
    except ValueError:
        log.exception("it failed")
    lines = written.read_text().splitlines()
    assert lines[0].endswith("it failed")
    assert all(line.startswith("    ") for line in lines[1:])
    assert any("ValueError: bad" in line for line in lines)


def test_secrets_never_appear(written: Path) -> None:
    logs.keep_secret("s3cr3t-t0ken-of-the-service")
    logs.keep_secret("")
    log.info("token %s", "s3cr3t-t0ken-of-the-service")
    log.info("header %s", {"Authorization": "Bearer abcdefghijklmnop"})
    try:
        raise ValueError("s3cr3t-t0ken-of-the-service")
    except ValueError:
        log.exception("failed")
    text = written.read_text()
    assert "s3cr3t" not in text
    assert "abcdefghijklmnop" not in text
    assert text.count("***") == 4, "the message, the header, the source line and the error"


def test_setting_up_again_does_not_double_lines(written: Path, tmp_path: Path) -> None:
    logs.set_up("warning", str(tmp_path / "other.log"), stderr=False)
    log.info("too quiet")
    log.warning("once")
    assert written.read_text() == ""
    assert (tmp_path / "other.log").read_text().count("once") == 1
    with pytest.raises(InvalidError, match="loud"):
        logs.set_up("loud")
