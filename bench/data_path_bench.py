"""CPU of a provider's request against `qemu-storage-daemon`, and a deep chain against a flat one.

Runs `bench/provider_bench.py` as it stands, shows all that it prints, and takes its two bars from there.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from bench.figures import BenchFault, Row
from bench.runner import Scale

READ_BAR = 0.9
DEPTH_BAR = 1.3
_NUMBER = r"([\d.]+) \(([\d.]+) to ([\d.]+)\)"
_READ = re.compile(rf"^4K random read, depth 32: {_NUMBER} us, peer {_NUMBER} us, ratio {_NUMBER}", re.MULTILINE)
_DEEP = re.compile(rf"{_READ.pattern}\n +chain of 8: {_NUMBER} us, ratio to a chain of 1 {_NUMBER}", re.MULTILINE)


def run(scale: Scale) -> list[Row]:
    script = Path(__file__).with_name("provider_bench.py")
    options = ["--rounds", "5", "--count", "40000"] if scale.quick else []
    # Its exit status says whether its bars hold; they are judged here, from its figures.
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, check=False)
    print("".join(f"  | {line}\n" for line in done.stdout.splitlines()), end="")
    found = _DEEP.search(done.stdout)
    if found is None:
        raise BenchFault(f"{script} printed no figures (exit status {done.returncode}): {done.stderr}")
    groups = [tuple(map(float, found.groups()[start : start + 3])) for start in range(0, 15, 3)]
    ours, peer, ratio, deep, depth_ratio = groups
    return [
        Row(
            "CPU a request, 4K random read, depth 32",
            "x",
            ratio,
            READ_BAR,
            peer=(1.0,) * 3,
            peer_name="qemu-storage-daemon",
            note=f"ours {ours[0]:.2f} us, peer {peer[0]:.2f} us; median, least and greatest of its rounds",
        ),
        Row(
            "the same, chain of 8",
            "x",
            depth_ratio,
            DEPTH_BAR,
            peer=(1.0,) * 3,
            peer_name="chain of 1",
            note=f"chain of 8 {deep[0]:.2f} us, chain of 1 {ours[0]:.2f} us",
        ),
    ]
