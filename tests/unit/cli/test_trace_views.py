"""What a trace amounts to: counts, sizes, percentiles, and how much of it was sequential."""

from __future__ import annotations

import json

import pytest

from mullion.cli.trace_views import TraceSummary, json_line, percentile, table_line
from mullion.model.views import TraceDiskView

pytestmark = pytest.mark.unit


def test_a_summary_of_requests() -> None:
    summary = TraceSummary()
    requests = [(number, "read", number * 4096, 4096, 100, False) for number in range(9)]
    summary.add(TraceDiskView("disk0", 0, 0, tuple(requests)))
    summary.add(TraceDiskView("disk0", 3, 0, ((9, "read", 1 << 30, 4096, 5000, True), (10, "flush", 0, 0, 20, False))))
    said = json.loads(summary.json_line())
    flush, read = said["summary"]
    assert (read["requests"], read["bytes"], read["failed"], read["sequential"]) == (10, 40960, 1, 0.8)
    assert read["latency_us"] == {"50": 128, "90": 128, "99": 8192, "100": 8192}
    assert read["median_bytes"] == 4096
    assert (flush["requests"], flush["bytes"], flush["median_bytes"]) == (1, 0, 0)
    assert said["dropped"] == {"disk0": 3}
    text = summary.render()
    assert "80%" in text
    assert "disk0: 3 requests came faster than they were read" in text


def test_a_trace_without_requests_says_so() -> None:
    assert TraceSummary().render() == "No requests."


def test_a_request_as_a_line() -> None:
    request = (1_234_567, "write", 4096, 512, 85, True)
    assert json.loads(json_line("disk0", request)) == {
        "disk": "disk0",
        "at_us": 1_234_567,
        "kind": "write",
        "offset": 4096,
        "length": 512,
        "latency_us": 85,
        "failed": True,
    }
    assert table_line("disk0", request).split() == [
        "1.234567",
        "s",
        "disk0",
        "write",
        "512",
        "B",
        "at",
        "0x000000001000",
        "85",
        "us",
        "FAILED",
    ]


def test_percentiles_of_nothing_and_of_one() -> None:
    assert percentile([0] * 64, 50) == 0
    assert percentile([0, 0, 1], 1) == percentile([0, 0, 1], 100) == 4
