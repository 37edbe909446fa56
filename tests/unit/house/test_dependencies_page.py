"""docs/dependencies.md names exactly what the project asks for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/dependencies.md").read_text()


def rows(*headings: str) -> set[str]:
    """The first cells of the tables below these headings."""
    found = set()
    for heading in headings:
        section = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
        found |= set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))
    return found


def distribution(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return match.group()


def test_python_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert rows("Python packages: the service") == {distribution(item) for item in project["dependencies"]}
    extras = {distribution(item) for group in project["optional-dependencies"].values() for item in group}
    assert rows("Python packages: building and testing") == extras


def test_debian_packages() -> None:
    script = (ROOT / "tools/setup.sh").read_text()
    listed = {name for line in re.findall(r'packages="([^"]+)"', script) for name in line.split()} - {"$packages"}
    assert rows("Debian packages: running", "Debian packages: testing") == listed


def test_every_row_says_what_for_and_under_which_licence() -> None:
    for line in PAGE.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert len(cells) == 4, line
            assert all(cells[:3]), line
