"""The examples of the suite are the same, whatever else is loaded."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.framework.exploring import EXPLORE

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(bool(EXPLORE), reason="MULLION_EXPLORE asks for other examples each time"),
]

NUMBERS = "NUMBERS = [7_654_321_001, 7_654_321_002]\n"


def examples() -> list[int]:
    found: list[int] = []

    @settings(max_examples=200, database=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 1 << 40))
    def draw(number: int) -> None:
        found.append(number)

    draw()
    return found


def test_what_modules_contain_does_not_choose_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = examples()
    source = tmp_path / "loaded_meanwhile.py"
    source.write_text(NUMBERS)
    module = types.ModuleType(source.stem)
    module.__file__ = str(source)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert examples() == before
