"""`python -m bench.disk [--only NAME] [--quick] [--json FILE]`: the table of the benchmarks of disks that run."""

import sys
from typing import Final

import bench.disk
from bench.disk import backup, caps, checkpoint, files, guest, instant, memory, merge, requests
from bench.runner import Benchmarks, run_benchmarks

BENCHMARKS: Final[Benchmarks] = {
    "requests": requests.run,
    "guest": guest.run,
    "caps": caps.run,
    "checkpoint": checkpoint.run,
    "memory": memory.run,
    "merge": merge.run,
    "backup": backup.run,
    "files": files.run,
    "instant": instant.run,
}

if __name__ == "__main__":
    sys.exit(run_benchmarks("bench.disk", (bench.disk.__doc__ or "").partition("\n")[0], BENCHMARKS))
