"""The command line's own time, with twenty partitions in the service, against Python importing `click`."""

from __future__ import annotations

import sys

from bench.figures import Measure, Row
from bench.runner import Scale
from bench.scene import MULLION, small_partitions, start_paused, time_command

HELP_BAR_MS = 150.0
LIST_BAR_MS = 250.0
PEER = "python -c 'import click'"


def run(scale: Scale) -> list[Row]:
    with small_partitions(scale.partitions) as (service, names):
        with service.client() as client:
            start_paused(client, names)
        shown, listed, peer = [], [], []
        for turn in range(scale.rounds * 2 + 1):
            figures = (
                time_command(service, sys.executable, "-c", "import click"),
                time_command(service, MULLION, "--help"),
                time_command(service, MULLION, "partition", "list"),
            )
            if turn:  # the first turn fills the caches
                for kept, figure in zip((peer, shown, listed), figures, strict=True):
                    kept.append(figure * 1e3)
    what = f"mullion partition list, {len(names)} partitions"
    return [
        Row("mullion --help", "ms", shown, HELP_BAR_MS, Measure.MEDIAN, peer, PEER),
        Row(what, "ms", listed, LIST_BAR_MS, Measure.MEDIAN, peer, PEER),
    ]
