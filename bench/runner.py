"""Runs a table of benchmarks and prints what they say: the frame of `python -m bench` and `python -m bench.vhd`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from bench.figures import BenchFault, Row, table

from mullion.base.errors import MullionError


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured. `quick` gives a first impression in a few minutes and keeps no promise."""

    quick: bool = False

    @property
    def rounds(self) -> int:
        return 5 if self.quick else 9

    @property
    def burst_rounds(self) -> int:
        return 5

    @property
    def partitions(self) -> int:
        return 20

    @property
    def guests(self) -> int:
        return 3 if self.quick else 10

    @property
    def kills(self) -> int:
        return 5 if self.quick else 20


Benchmarks = Mapping[str, Callable[[Scale], list[Row]]]
"""A name for `--only`, and what measures; the first line of its module's docstring says what that is."""


def run_benchmarks(prog: str, what: str, benchmarks: Benchmarks, *, on_demand: Collection[str] = ()) -> int:
    """Measure what the command line asks for; the exit status: 1 when a bar is missed or could not be measured.

    `on_demand` are benchmarks that run only when they are named.
    """
    parser = argparse.ArgumentParser(prog=prog, description=what)
    parser.add_argument(
        "--only", action="append", choices=benchmarks, metavar="NAME", help=f"one of: {', '.join(benchmarks)}"
    )
    parser.add_argument("--quick", action="store_true", help="a first impression: fewer rounds and smaller amounts")
    parser.add_argument("--json", metavar="FILE", help="write all figures there too")
    options = parser.parse_args()
    scale = Scale(quick=options.quick)
    load = os.getloadavg()[0]
    print(f"{platform.python_version()}, {os.cpu_count()} cores, load {load:.1f} before the run", flush=True)
    if scale.quick:
        print("quick: fewer rounds and smaller amounts than the promises name")
    results: list[tuple[str, Row]] = []
    faults: list[str] = []
    for name in options.only or [name for name in benchmarks if name not in on_demand]:
        begun_s = time.monotonic()
        print(f"\n{name}: {(sys.modules[benchmarks[name].__module__].__doc__ or '').partition(chr(10))[0]}", flush=True)
        try:
            rows = benchmarks[name](scale)
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
