"""`python -m bench.vhd [--only NAME] [--quick] [--json FILE]`: the table of the benchmarks of `mullion vhd`."""

import sys
from typing import Final

import bench.vhd
from bench.runner import Benchmarks, run_benchmarks
from bench.vhd import check, children, convert, depth, merge, mount, nbd

BENCHMARKS: Final[Benchmarks] = {
    "convert": convert.run,
    "children": children.run,
    "depth": depth.run,
    "nbd": nbd.run,
    "mount": mount.run,
    "check": check.run,
    "merge": merge.run,
}

if __name__ == "__main__":
    sys.exit(run_benchmarks("bench.vhd", (bench.vhd.__doc__ or "").partition("\n")[0], BENCHMARKS))
