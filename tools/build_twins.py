#!/usr/bin/env python3
"""Build the compiled twins of the modules in `mullion.base.implementation.TWINS`, each beside its source.

Needs the `Cython` of the lock files, a C compiler and Python's headers. A twin that was made of its present source is
left alone, unless `--force` is given; `CFLAGS` are added to ours. A new one takes the place of the old in one step: who
runs the old one keeps it.
Exit status: 0 they are there; 1 the compiler found fault; 3 there is no compiler, no Cython or no headers.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Final

from mullion.base.implementation import TWINS, source_digest

_FLAGS: Final = ("-O2", "-g0", "-fPIC", "-shared", "-fwrapv", "-fstack-protector-strong", "-Wall")


def main(argv: list[str]) -> int:
    for name in TWINS.values():
        source = _source_of(name)
        target = source.with_name(source.stem + sysconfig.get_config_var("EXT_SUFFIX"))
        digest = source_digest(source.read_bytes())
        if "--force" not in argv and _is_of(target, digest):
            continue
        missing = _missing()
        if missing:
            print(f"{name} cannot be built: {missing}", file=sys.stderr)
            return 3
        if not _build(name, source, target, digest):
            return 1
    return 0


def _source_of(name: str) -> Path:
    package, _, module = name.rpartition(".")
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is a package of ours"
    assert spec.submodule_search_locations is not None, f"{package} is a package of ours"
    return Path(spec.submodule_search_locations[0]) / f"{module}.pyx"


def _is_of(target: Path, digest: str) -> bool:
    """Whether the twin is there and was made of the source with this digest, and by this Python."""
    return target.exists() and digest.encode() in target.read_bytes()


def _missing() -> str:
    if shutil.which("gcc") is None:
        return "there is no gcc (Debian: gcc, libc6-dev)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are missing (Debian: libpython3-dev)"
    if importlib.util.find_spec("Cython") is None:
        return "Cython is missing (requirements/runtime.lock)"
    return ""


def _build(name: str, source: Path, target: Path, digest: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        c_file, made = f"{folder}/{source.stem}.c", f"{folder}/{target.name}"
        steps = (
            [sys.executable, "-m", "cython", "-3", "--module-name", name, "-o", c_file, str(source)],
            [
                *(
                    "gcc",
                    *_FLAGS,
                    *shlex.split(os.environ.get("CFLAGS", "")),
                    f'-DSOURCE_DIGEST="{digest}"',
                    f"-I{sysconfig.get_path('include')}",
                ),
                *(c_file, "-o", made),
            ],
        )
        for step in steps:
            done = subprocess.run(step, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            if done.returncode or done.stdout:
                print(done.stdout, file=sys.stderr, end="")
            if done.returncode:
                return False
        fresh = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copyfile(made, fresh)
        fresh.replace(target)
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
