"""Which implementation of a module runs where there are two of the same names: plain Python, or its compiled twin.

`MULLION_IMPL=python` or `compiled` decides; without it the twin runs where it was built (`tools/build_twins.py`, which
`tools/setup.sh` calls), else Python ([ADR 0015]). A twin knows of which source it was made; one that is older than its
source is not used. `mullion version` and the header of the tests say which it is.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Final, NamedTuple

from mullion.base.errors import InvalidError, UnavailableError

VARIABLE: Final = "MULLION_IMPL"
TWINS: Final = {"mullion.provider.hot_loop": "mullion.provider._hot_loop"}
"""Modules in Python, and their twins; the source of a twin lies beside it and ends in `.pyx`."""


class Choice(NamedTuple):
    """What runs for a module, and why it is not the twin."""

    module: ModuleType
    reason: str

    @property
    def name(self) -> str:
        return "python" if self.reason else "compiled"


def implementation_of(name: str) -> ModuleType:
    """The module to use for one of `TWINS`.

    Raises: InvalidError; UnavailableError when what the environment asks for is not there.
    """
    return choose(name, os.environ.get(VARIABLE, "")).module


@functools.cache
def choose(name: str, wanted: str) -> Choice:
    """For a value of the variable; an empty one leaves it to what is there. Raises: as `implementation_of`."""
    if wanted not in ("", "python", "compiled"):
        raise InvalidError(
            f"{VARIABLE}={wanted}: there is no such implementation",
            remedy=f"Set {VARIABLE} to python or compiled, or leave it out.",
        )
    reason = f"{VARIABLE} says so" if wanted == "python" else ""
    if not reason:
        try:
            return Choice(_import_twin(TWINS[name]), "")
        except ImportError as error:
            if wanted:
                raise UnavailableError(
                    f"{VARIABLE}={wanted}, and {error}",
                    remedy=f"Build it: tools/setup.sh runtime says what is missing. Or leave {VARIABLE} out.",
                ) from error
            reason = str(error)
    return Choice(importlib.import_module(name), reason)


def describe() -> str:
    """For people: which implementation of the data path runs, and why if it is the slower one."""
    choices = [choose(name, os.environ.get(VARIABLE, "")) for name in TWINS]
    reasons = ", ".join(dict.fromkeys(choice.reason for choice in choices if choice.reason))
    names = " and ".join(dict.fromkeys(choice.name for choice in choices))
    return f"{names} data path" + (f" ({reasons})" if reasons else "")


def source_digest(source: bytes) -> str:
    """By which a twin knows its source; whoever builds it compiles this into it."""
    return hashlib.sha256(source).hexdigest()


def _import_twin(name: str) -> ModuleType:
    """Raises: ImportError when it was not built, or of another source than the one that lies beside it."""
    try:
        twin = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} was not built") from error
    source = Path(str(twin.__file__)).parent / f"{name.rpartition('.')[2]}.pyx"
    if source_digest(source.read_bytes()) != twin.SOURCE_DIGEST:
        raise ImportError(f"{name} is older than {source.name}")
    return twin
