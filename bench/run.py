"""All promises that are figures, measured by one command: `make bench`, or `python -m bench [--only NAME] [--quick]`.

Each benchmark prints ratios against a named peer that was measured in the same run, in turns with ours: the median of
the rounds with the spread. A last table sums up. Exit status 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Final

from bench import (
    adoption_bench,
    cli_bench,
    data_path_bench,
    demo_bench,
    memory_bench,
    partition_start_bench,
    provider_kill_bench,
)
from bench.figures import BenchFault, Row, table
from bench.scene import Scale

from mullion.base.errors import MullionError

BENCHMARKS: Final[dict[str, Callable[[Scale], list[Row]]]] = {
    "demo": demo_bench.run,
    "start": partition_start_bench.run,
    "data-path": data_path_bench.run,
    "adoption": adoption_bench.run,
    "provider-kill": provider_kill_bench.run,
    "cli": cli_bench.run,
    "memory": memory_bench.run,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", action="append", choices=BENCHMARKS, metavar="NAME", help=f"one of: {', '.join(BENCHMARKS)}"
    )
    parser.add_argument("--quick", action="store_true", help="a first impression: fewer rounds, guests and kills")
    parser.add_argument("--json", metavar="FILE", help="write all figures there too")
    options = parser.parse_args()
    scale = Scale(quick=options.quick)
    load = os.getloadavg()[0]
    print(f"{platform.python_version()}, {os.cpu_count()} cores, load {load:.1f} before the run", flush=True)
    if scale.quick:
        print("quick: fewer rounds, guests and kills than the promises name")
    results: list[tuple[str, Row]] = []
    faults: list[str] = []
    for name in options.only or BENCHMARKS:
        begun_s = time.monotonic()
        print(f"\n{name}: {(sys.modules[BENCHMARKS[name].__module__].__doc__ or '').partition(chr(10))[0]}", flush=True)
        try:
            rows = BENCHMARKS[name](scale)
        except (BenchFault, AssertionError, MullionError) as fault:
            faults.append(f"{name}: {fault or fault!r}")
            print(f"  FAILED: {fault or repr(fault)}", flush=True)
            continue
        for row in rows:
            results.append((name, row))
            print(f"  {row.lines().replace(chr(10), chr(10) + '  ')}", flush=True)
        print(f"  (took {time.monotonic() - begun_s:.0f} s)", flush=True)
    print(f"\n{table(results)}")
    bars = [row for _, row in results if row.limit is not None]
    missed = sum(not row.is_met for row in bars)
    print(f"\n{len(bars) - missed} of {len(bars)} bars are met")
    for fault in faults:
        print(f"NOT MEASURED: {fault}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump([{"benchmark": name, **row.to_json()} for name, row in results], file, indent=2)
    return int(missed > 0 or bool(faults))


if __name__ == "__main__":
    sys.exit(main())
