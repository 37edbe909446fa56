"""Every command that a message, a remedy or a comment of the source names exists, with the options that it names."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from mullion.cli.face import GLOBAL_OPTIONS
from mullion.cli.root import root

pytestmark = pytest.mark.unit

SOURCE = Path(__file__).parents[3] / "src/mullion"
NAMED = re.compile(r"\bmullion ((?:[a-z]+ )?[a-z]+(?:-[a-z]+)*)\b((?: (?:\{\}|[A-Za-z./-]+))*)")
GLOBAL = {name for option in GLOBAL_OPTIONS for name in option.opts}


def texts(path: Path) -> Iterator[str]:
    """The strings of a module, `{}` in place of what is filled in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value.replace("{path}", "{}")
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)


def find_command(words: list[str]) -> click.Command | None:
    """The command of these words, as many of them as are one's name; None when one below a group is none."""
    command: click.Command | None = root
    ctx = click.Context(root)
    for word in words:
        if not isinstance(command, click.Group) or not word.islower():
            break
        command = command.get_command(ctx, word)
    return command


def test_commands_that_are_named_exist() -> None:
    seen = 0
    for path in sorted(SOURCE.rglob("*.py")):
        for text in texts(path):
            for words, rest in NAMED.findall(text):
                first, *more = words.split()
                group = find_command([first])
                if group is None:  # prose: "mullion is …"
                    continue
                deeper = rest.split() if isinstance(find_command([first, *more]), click.Group) else []
                command = find_command([first, *more, *itertools.takewhile(str.isalpha, deeper)])
                assert command is not None, f"{path}: mullion {words}"
                seen += 1
                known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)} | GLOBAL
                for option in re.findall(r" (--[a-z-]+)", rest):
                    assert option in known | {"--help"}, f"{path}: mullion {words} {option}"
    assert seen > 100
