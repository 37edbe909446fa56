"""Which implementation runs: what the variable says, what is there, and what is out of date."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from mullion.base.errors import InvalidError, UnavailableError
from mullion.base.implementation import TWINS, VARIABLE, choose, describe, implementation_of, source_digest

pytestmark = pytest.mark.unit

NAME, TWIN = next(iter(TWINS.items()))


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    choose.cache_clear()
    yield
    choose.cache_clear()


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A twin, made of a source that lies beside it."""
    source = tmp_path / "_hot_loop.pyx"
    source.write_text("cdef class HotLoop: ...")
    twin = ModuleType(TWIN)
    twin.__file__ = str(tmp_path / "_hot_loop.so")
    twin.__dict__["SOURCE_DIGEST"] = source_digest(source.read_bytes())
    monkeypatch.setitem(sys.modules, TWIN, twin)
    return twin


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, TWIN, None)


def test_the_twin_runs_where_it_was_built(built: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert implementation_of(NAME) is built
    assert describe() == "compiled data path"


def test_python_runs_where_it_is_asked_for(built: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "python")
    assert implementation_of(NAME).__name__ == NAME
    assert describe() == "python data path (MULLION_IMPL says so)"


@pytest.mark.usefixtures("not_built")
def test_without_a_twin_python_runs_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert implementation_of(NAME).__name__ == NAME
    assert describe() == f"python data path ({TWIN} was not built)"


def test_a_twin_of_another_source_is_not_used(built: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    built.__dict__["SOURCE_DIGEST"] = source_digest(b"cdef class HotLoop: pass")
    assert implementation_of(NAME).__name__ == NAME
    assert describe() == f"python data path ({TWIN} is older than _hot_loop.pyx)"


@pytest.mark.usefixtures("not_built")
def test_what_is_asked_for_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "compiled")
    with pytest.raises(UnavailableError, match="was not built"):
        implementation_of(NAME)


def test_there_are_two_implementations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "rust")
    with pytest.raises(InvalidError, match="MULLION_IMPL=rust"):
        implementation_of(NAME)
