"""`mullion vhd info` and `mullion vhd tree`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import click

from mullion.base.errors import MullionError
from mullion.base.units import format_size
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Command
from mullion.cli.vhd.options import DISK, allow_option, allowed_dirs

if TYPE_CHECKING:
    from mullion.vhd.check import FileReport, Problem
    from mullion.vhd.facts import BlockFacts, Facts, ParentFacts
    from mullion.vhd.forest import Node

_TEXT_CHARS: Final = 200
_BOXES: Final = ("├── ", "└── ", "│   ", "    ")
_PLAIN_BOXES: Final = ("|-- ", "`-- ", "|   ", "    ")
_INDENT_LIMIT: Final = 40
"""Levels that are indented; a deeper chain goes on straight down, with its depth in figures."""


@click.command("info", cls=Command, short_help="Show what a disk says about itself: sizes, creator, blocks, parents.")
@click.argument("path", type=DISK)
@click.option("--chain", is_flag=True, help="Show the parents too, one after the other.")
@allow_option
@pass_face
def info(face: Face, *, path: str, chain: bool, allow: Sequence[str]) -> None:
    """Show what a disk says about itself: sizes, creator, blocks, parents, and what is wrong with it.

    Works on damaged files too, as long as footer and header can be made out. A disk that is in use is shown as it is at
    the moment, with who holds it. For a file of another format it says which, and how to convert it.

    With --format json: the fields that docs/formats/vhd.md lists, and in `files` those of the parents.

    \b
    Examples:
      mullion vhd info base.vhd
      mullion vhd info grandchild.vhd --chain
      mullion vhd info damaged.vhd --format json
    """
    from mullion.vhd.check import check_disk

    report = check_disk(path, facts=True, allowed_dirs=allowed_dirs(path, allow))
    if report.files[0].facts is None:
        raise _refusal(report.files[0].problems[-1])
    parent_paths = [*(file.path for file in report.files[1:]), None]
    if face.is_json:
        plain = [_plain(file, path) for file, path in zip(report.files, parent_paths, strict=True)]
        face.emit_json({**plain[0], "verdict_of_chain": report.verdict.value, "files": plain})
        return
    shown = list(zip(report.files, parent_paths, strict=True))[: None if chain else 1]
    face.say("\n\n".join(_file_text(face, file, parent_path) for file, parent_path in shown))
    if not chain and len(report.files) > 1:
        face.say(f"chain      {len(report.files)} files, {report.verdict.value}: --chain shows them all")


@click.command("tree", cls=Command, short_help="Draw a chain, or all disks of a folder, with what is wrong.")
@click.argument("path", type=DISK, metavar="PATH|FOLDER")
@allow_option
@pass_face
def tree(face: Face, *, path: str, allow: Sequence[str]) -> None:
    """Draw a chain, or all disks of a folder, parents above their children, with sizes and what is wrong.

    Of a file its chain is drawn, of a folder every disk in it. Missing parents, mismatched ids, damage and who has a
    disk open are said below the disk. Where the locale has no line-drawing characters, plain ones are used.

    With --format json: a list of disks, each with `path`, `type`, `size_bytes`, `file_bytes`, `verdict` (null where the
    file may not be read), `holder`, `problems` as those of `mullion vhd check`, and `children`.

    \b
    Examples:
      mullion vhd tree grandchild.vhd
      mullion vhd tree .
    """
    import os

    from mullion.vhd.forest import plant

    is_folder = os.path.isdir(path)
    folders = None if not allow else [path, *allow] if is_folder else allowed_dirs(path, allow)
    roots = plant(path, allowed_dirs=folders)
    if face.is_json:
        face.emit_json([_plain_node(root) for root in roots])
        return
    if not roots:
        face.note(f"no VHD in {path}")
    for root in roots:
        for line in _tree_lines(face, root, boxes=_boxes(), base=path if is_folder else None):
            face.say(line)


# ---------------------------------------------------------------------- info


def _refusal(problem: Problem) -> MullionError:
    """The error for a file of which nothing can be shown; the same as opening it gives."""
    from mullion.vhd.errors import NotVhdError, VhdDamagedError

    kind, says = (NotVhdError, " ") if problem.code == "not-a-vhd" else (VhdDamagedError, ": ")
    return kind(
        f"{problem.path}{says}{problem.what}",
        path=problem.path,
        structure=problem.structure,
        offset=problem.offset,
        remedy=problem.remedy,
    )


def _plain(file: FileReport, parent_path: str | None) -> dict[str, object]:
    import dataclasses

    facts = dataclasses.asdict(file.facts) if file.facts is not None else {"path": file.path}
    return facts | {
        "parent_path": parent_path,
        "verdict": file.verdict.value,
        "problems": [dataclasses.asdict(problem) for problem in file.problems],
    }


def _file_text(face: Face, file: FileReport, parent_path: str | None) -> str:
    from mullion.cli.tables import fields, printable

    facts = file.facts
    if facts is None:
        return "\n".join([f"{printable(file.path)}: {file.verdict.value}", *_problem_lines(face, file, "  ")])
    features = [
        word for word, is_set in (("temporary", facts.is_temporary), ("saved state", facts.saved_state)) if is_set
    ]
    rows = [
        ("disk", printable(facts.path)),
        ("type", facts.type),
        ("size", _size_text(facts)),
        ("geometry", f"{facts.cylinders} cylinders, {facts.heads} heads, {facts.sectors_per_track} sectors a track"),
        (
            "file",
            f"{format_size(facts.file_bytes)} ({facts.file_bytes} bytes), {format_size(facts.stored_bytes)} stored",
        ),
        ("unique id", facts.unique_id),
        ("created", f"{facts.created[:19]}Z"),
        ("creator", _creator_text(facts)),
        ("features", ", ".join(features)),
    ]
    if facts.blocks is not None:
        rows += _block_rows(facts, facts.blocks)
    if facts.parent is not None:
        rows += _parent_rows(facts.parent, parent_path)
    rows += [
        ("held by", printable(facts.holder) if facts.holder else ""),
        ("writer", "the last one did not end cleanly" if facts.was_killed else ""),
        ("verdict", file.verdict.value),
    ]
    return "\n".join([fields(rows), *_problem_lines(face, file, "  ")])


def _size_text(facts: Facts) -> str:
    lines = [f"{format_size(facts.size_bytes)} ({facts.size_bytes} bytes)"]
    if facts.chs_size_bytes != facts.size_bytes:
        lines.append(
            f"{facts.chs_size_bytes} bytes by its geometry, which does not count (--size-from chs reads it so)"
        )
    if facts.qemu_size_bytes != facts.size_bytes:
        lines.append("QEMU before 10.0 counts it all the same: give it force_size_calc=current_size")
    if facts.original_size_bytes != facts.size_bytes:
        lines.append(f"originally {format_size(facts.original_size_bytes)} ({facts.original_size_bytes} bytes)")
    return "\n".join(lines)


def _creator_text(facts: Facts) -> str:
    from mullion.cli.tables import printable

    mark, system = printable(facts.creator_application), printable(facts.creator_host_os)
    host = f"host OS {facts.creator_host_os_name}" + (f" (`{system}`)" if system else "")
    return f"{facts.creator_name} (`{mark}`) {facts.creator_version}, {host}"


def _block_rows(facts: Facts, blocks: BlockFacts) -> list[tuple[str, str]]:
    share = f"{blocks.allocated} of {blocks.total} blocks of {format_size(blocks.block_bytes)}"
    rows = [("allocated", f"{format_size(facts.allocated_bytes)}: {share}")]
    if blocks.allocated:
        rows.append(("runs", f"{blocks.runs}" + (" (not fragmented)" if blocks.runs == 1 else "")))
        rows.append(("alignment", f"data at multiples of {format_size(blocks.data_alignment_bytes)}"))
    entries = f"{blocks.bat_entries} BAT entries at byte {blocks.bat_offset}"
    rows.append(
        ("structures", f"header at byte {blocks.header_offset}, {entries}, footer at byte {facts.footer_offset}")
    )
    return rows


def _parent_rows(parent: ParentFacts, path: str | None) -> list[tuple[str, str]]:
    from mullion.cli.tables import printable

    lines = [
        printable(path) if path is not None else "(not found)",
        f"id {parent.unique_id}",
        f"name {_cut(parent.name) if parent.name is not None else '(not UTF-16)'}",
    ]
    if parent.timestamp is not None:
        lines.append(f"changed {parent.timestamp[:19]}Z")
    for locator in parent.locators:
        says = _cut(locator.text) if locator.text is not None else f"({locator.complaint})"
        lines.append(f"{printable(locator.platform)} {says}")
    return [("parent", "\n".join(lines))]


def _cut(text: str) -> str:
    from mullion.cli.tables import printable

    return printable(text if len(text) <= _TEXT_CHARS else f"{text[:_TEXT_CHARS]}…")


def _problem_lines(face: Face, file: FileReport, indent: str) -> Iterator[str]:
    from mullion.cli.tables import printable

    for problem in file.problems:
        color = "yellow" if problem.severity == "warning" else "red"
        yield f"{indent}{face.style('!', color)} {problem.structure}, byte {problem.offset}: {printable(problem.what)}"


# ---------------------------------------------------------------------- tree


def _boxes() -> Sequence[str]:
    """Line-drawing characters, where the locale has them."""
    try:
        "".join(_BOXES).encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return _PLAIN_BOXES
    return _BOXES


def _tree_lines(face: Face, root: Node, *, boxes: Sequence[str], base: str | None) -> Iterator[str]:
    """A tree, a line for each disk and one for each thing that is wrong with it; without recursion, chains are deep."""
    branch, last_branch, through, blank = boxes
    left: list[tuple[Node, str, str, int]] = [(root, "", "", 0)]
    while left:
        node, lead, below, depth = left.pop()
        yield lead + _node_text(face, node, base)
        stem = below + (through if node.children else blank)
        if not node.is_denied:
            yield from _problem_lines(face, node.report, stem)
        for number, child in enumerate(reversed(node.children)):
            is_last = number == 0
            if depth < _INDENT_LIMIT:
                left.append((child, below + (last_branch if is_last else branch),
                             below + (blank if is_last else through), depth + 1))  # fmt: skip
            else:
                left.append((child, f"{below}{last_branch}({depth + 1}) ", below, depth + 1))


def _node_text(face: Face, node: Node, base: str | None) -> str:
    import os

    from mullion.cli.tables import printable

    report = node.report
    here = os.path.realpath(base) if base is not None else None
    is_here = here is not None and os.path.dirname(os.path.realpath(report.path)) == here
    name = os.path.basename(report.path) if is_here else report.path
    words = [printable(name)]
    if report.type is not None and report.size_bytes is not None:
        words += [report.type, format_size(report.size_bytes), f"file {format_size(node.file_bytes)}"]
    if report.facts is not None and report.facts.holder is not None:
        words.append(f"held by {printable(report.facts.holder)}")
    if node.is_denied:
        words.append(face.style("may not be read", "yellow"))
    elif report.verdict.value != "sound":
        words.append(face.style(report.verdict.value, "red"))
    return "  ".join(words)


def _plain_node(root: Node) -> dict[str, object]:
    """A tree as JSON values; without recursion."""
    made = {id(node): _plain_disk(node) for node in root.walk()}
    for node in root.walk():
        made[id(node)]["children"] = [made[id(child)] for child in node.children]
    return made[id(root)]


def _plain_disk(node: Node) -> dict[str, object]:
    import dataclasses

    report = node.report
    return {
        "path": report.path,
        "type": report.type,
        "size_bytes": report.size_bytes,
        "file_bytes": node.file_bytes,
        "verdict": None if node.is_denied else report.verdict.value,
        "holder": report.facts.holder if report.facts is not None else None,
        "problems": [dataclasses.asdict(problem) for problem in report.problems],
        "children": [],
    }
