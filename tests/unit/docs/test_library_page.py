"""docs/vhd-library.md is a program that works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

PAGE = Path(__file__).parents[3] / "docs/vhd-library.md"


def test_the_page_is_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) == 3
    program = ""
    for block in blocks:  # each in its own lines, so that an error names the page's
        program += "\n" * (text.count("\n", 0, block.start(1)) - program.count("\n")) + block[1]
    exec(compile(program, str(PAGE), "exec"), {"__name__": "page"})
