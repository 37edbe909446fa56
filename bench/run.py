"""All promises that are figures, measured by one command: `make bench`, or `python -m bench [--only NAME] [--quick]`.

Each benchmark prints ratios against a named peer that was measured in the same run, in turns with ours: the median of
the rounds with the spread. A last table sums up. Exit status 1 when a bar is missed. Those of `mullion vhd` have a
table of their own, `bench.vhd`.
"""

from __future__ import annotations

import sys
from typing import Final

from bench import (
    adoption_bench,
    cli_bench,
    data_path_bench,
    demo_bench,
    fresh_bench,
    memory_bench,
    partition_start_bench,
    provider_kill_bench,
)
from bench.runner import Benchmarks, run_benchmarks

BENCHMARKS: Final[Benchmarks] = {
    "demo": demo_bench.run,
    "start": partition_start_bench.run,
    "data-path": data_path_bench.run,
    "adoption": adoption_bench.run,
    "provider-kill": provider_kill_bench.run,
    "cli": cli_bench.run,
    "memory": memory_bench.run,
    "fresh": fresh_bench.run,
}


def main() -> int:
    return run_benchmarks("bench", __doc__.partition("\n")[0], BENCHMARKS, on_demand=("fresh",))


if __name__ == "__main__":
    sys.exit(main())
