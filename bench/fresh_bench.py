"""`make run` on a fresh Debian 12 with none of the packages: from a clone to a running guest, installs included.

A minimal Debian is unpacked by `debootstrap` into a folder, with make, git and Python, and this checkout's last commit
is cloned into it; the host's ways to its package registries are copied. It runs there by `chroot`, in mount and process
namespaces of its own, so that nothing is left. Only with `--only fresh`, as root: it downloads some 200 MB.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from bench.figures import BenchFault, Measure, Row
from bench.runner import Scale

BAR_S = 300.0
PACKAGES = "ca-certificates,git,make,python3"
_DEADLINE_S = 1800
_COPIED = (
    "etc/resolv.conf",
    "etc/hosts",
    "etc/pip.conf",
    "etc/apt/apt.conf.d",
    "etc/apt/sources.list.d",
    "etc/ssl/certs",
    "root/.config/pip",
)
_ENTER = """
for folder in sys dev; do mount --rbind "/$folder" "$1/$folder"; done
mount -t proc proc "$1/proc"
mount -t tmpfs run "$1/run"
exec chroot "$1" sh -euc '
    cd /root/mullion
    begun=$(date +%s.%N)
    make run >&2
    ended=$(date +%s.%N)
    make stop >&2
    echo "$begun $ended"
'
"""
ROOT = Path(__file__).parents[1]


def run(scale: Scale) -> list[Row]:
    if os.geteuid() or shutil.which("debootstrap") is None:
        raise BenchFault("this needs root and debootstrap: apt-get install debootstrap")
    folder = Path(tempfile.mkdtemp(prefix="mullion-fresh-", dir="/var/tmp"))
    try:
        _unpack(folder)
        took = _time(folder)
    finally:
        shutil.rmtree(folder)
    return [Row("make run on a fresh machine, to the agent's answer", "s", [took], BAR_S, Measure.WORST)]


def _unpack(folder: Path) -> None:
    folder.chmod(0o755)  # the root of a system, which partitions' users pass through
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(folder)]
    if (mirror := _mirror()) is not None:
        command.append(mirror)
    _call(command)
    (folder / "etc/apt/sources.list").unlink(missing_ok=True)
    for name in _COPIED:
        if os.path.exists(f"/{name}"):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _call(["cp", "--archive", "--no-target-directory", "--remove-destination", f"/{name}", str(target)])
    _call(["git", "clone", "--quiet", str(ROOT), str(folder / "root/mullion")])


def _mirror() -> str | None:
    """Where this host gets Debian from, if its sources are in the form of deb822."""
    for path in sorted(Path("/etc/apt/sources.list.d").glob("*.sources")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("URIs:"):
                return line.split()[1]
    return None


def _time(folder: Path) -> float:
    """Seconds of `make run` in there. Whatever it starts ends with the process namespace."""
    namespaces = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    said = _call([*namespaces, "sh", "-euc", _ENTER, "sh", str(folder)])
    begun, ended = said.split()
    return float(ended) - float(begun)


def _call(command: list[str]) -> str:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_DEADLINE_S, check=False
    )
    if done.returncode:
        raise BenchFault(f"{command[0]} failed: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout
