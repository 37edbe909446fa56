"""Documents are true as far as a program can tell: what they name exists, what they show can be typed."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import click
import pytest

from mullion.cli.face import Face
from mullion.cli.root import root
from mullion.model.parse import parse_document

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]
SOURCE = ROOT / "src/mullion"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
WITH_PATHS = ("README.md", "CONTRIBUTING.md", *(f"docs/{name}.md" for name in ("ARCHITECTURE", "SPECIFICATION", "formats/vhd", "formats/repository", "limits", "threat-model")))  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(name: str) -> str:
    """A document without its fenced blocks."""
    return FENCE.sub("", read(name))


def fenced(name: str, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(read(name)) if kind == language]


def inline(name: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`\n]+)`", prose(name))


@cache
def anchors(path: Path) -> frozenset[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


def links(name: str) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(name)):
        if not re.match(r"[a-z]+:", target):
            yield unquote(target)


@cache
def qualified_names(path: Path) -> frozenset[str]:
    """Every class, function and method of a module: `Partition`, `Partition.start`."""
    found: set[str] = set()

    def descend(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(f"{prefix}{child.name}")
                descend(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.Assign):
                found.update(f"{prefix}{one.id}" for one in child.targets if isinstance(one, ast.Name))

    descend(ast.parse(path.read_text(encoding="utf-8")), "")
    return frozenset(found)


def test_there_are_documents_to_look_at() -> None:
    assert {*WITH_PATHS, "docs/glossary.md", "docs/adr/README.md"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for target in links(name):
        path, _, anchor = target.partition("#")
        there = (ROOT / name).parent / path if path else ROOT / name
        assert there.exists(), f"{name}: {target}"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there.resolve()), f"{name}: {target}"


@pytest.mark.parametrize("name", WITH_PATHS)
def test_tests_and_benchmarks_that_are_named_exist(name: str) -> None:
    """`tests/…/test_x.py`, `tests/…/test_x.py::test_y`, `bench/x.py`, and folders of tests."""
    for text in inline(name):
        match = re.fullmatch(r"(?:[\w./]*/pytest )?((?:tests|bench|tools)/[\w./-]*)(?:::(\w+))?(?: -k \w+)?", text)
        if match is None:
            assert not text.startswith(("tests/", "bench/")), f"{name}: {text} is not a path as this test knows them"
            continue
        path, function = match.groups()
        assert (ROOT / path).exists(), f"{name}: {text}"
        if function is not None:
            known = {qualified.rpartition(".")[2] for qualified in qualified_names(ROOT / path)}
            assert function in known, f"{name}: {text}"


def test_every_decision_is_in_the_list() -> None:
    listed = set(links("docs/adr/README.md"))
    assert listed == {path.name for path in (ROOT / "docs/adr").glob("0*.md")}


@pytest.mark.parametrize("name", ["docs/ARCHITECTURE.md", "docs/limits.md"])
def test_modules_and_functions_that_are_named_exist(name: str) -> None:
    """`vhd/top.py` and `vhd/chain.py:Chain.preadv`, below src/mullion."""
    seen = 0
    for text in inline(name):
        match = re.fullmatch(r"((?!tests/|bench/|tools/|docs/)[a-z_/]+\.py)(?::([\w.]+))?", text)
        if match is not None:
            path, qualified = match.groups()
            assert (SOURCE / path).is_file(), f"{name}: {text}"
            assert qualified is None or qualified in qualified_names(SOURCE / path), f"{name}: {text}"
            seen += 1
    assert seen > 20


def test_every_package_and_only_modules_that_exist_are_on_the_floors() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| ([^|]+) \| ([^|]+) \|$", prose("docs/ARCHITECTURE.md"), re.MULTILINE)
    packages = {
        str(path.parent.relative_to(SOURCE)).replace("/", ".")
        for path in SOURCE.rglob("__init__.py")
        if path.parent != SOURCE and any(other.stem != "__init__" for other in path.parent.glob("*.py"))
    }
    assert {package for package, _, _ in rows} == packages
    for package, _purpose, cell in rows:
        for module in re.findall(r"`([a-z0-9_]+)`", cell):
            path = SOURCE / package.replace(".", "/") / f"{module}.py"
            assert path.is_file() or module == "subprocess", f"{package}: {module}"


def shell_lines(name: str) -> Iterator[list[str]]:
    """The commands in a document's shell blocks, as words."""
    for block in fenced(name, "sh"):
        for line in block.splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the first words name, and the rest of them."""
    command: click.Command = root
    while isinstance(command, click.Group) and words:
        found = command.get_command(click.Context(command), words[0])
        assert found is not None, f"there is no command {words[0]!r}"
        command, words = found, words[1:]
    return command, words


@pytest.mark.parametrize("name", NAMES)
def test_commands_in_shell_blocks_can_be_typed(name: str) -> None:
    """Each `mullion …` line: the command exists, and takes these options and arguments."""
    for words in shell_lines(name):
        if words[0].rpartition("/")[2] == "mullion":
            command, rest = command_of(words[1:])
            assert not isinstance(command, click.Group), words
            command.make_context(command.name, rest, obj=Face())


def test_the_readme_shows_commands() -> None:
    assert sum(words[0] == "mullion" for words in shell_lines("README.md")) > 8


@pytest.mark.parametrize("name", WITH_PATHS)
def test_commands_in_the_text_exist(name: str) -> None:
    """`mullion partition start NAME`: the words before the first that is not a command's name."""
    for text in inline(name):
        if text.startswith("mullion "):
            command_of([word for word in text.split()[1:] if re.fullmatch(r"[a-z]+", word)])


@pytest.mark.parametrize("name", NAMES)
def test_targets_of_make_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    typed = [words[1] for words in shell_lines(name) if words[0] == "make"]
    spoken = [match[1] for text in inline(name) if (match := re.fullmatch(r"make ([a-z-]+)", text))]
    assert set(typed + spoken) <= targets


def test_definitions_in_the_readme_are_accepted() -> None:
    blocks = fenced("README.md", "toml")
    assert blocks
    for block in blocks:
        assert parse_document(block.encode(), source="README.md")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_to_be_filled_in(name: str) -> None:
    assert not re.search(r"@[A-Z]+@|\bTODO\b|\bTBD\b|\bXXX\b", read(name))
