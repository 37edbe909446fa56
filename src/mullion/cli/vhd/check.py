"""`mullion vhd check` and `mullion vhd repair`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from mullion.base.errors import InvalidError
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Command
from mullion.cli.vhd.options import DISK, allow_option, allowed_dirs

if TYPE_CHECKING:
    from mullion.vhd.check import FileReport, Report
    from mullion.vhd.repair import Repaired


@click.command("check", cls=Command, short_help="Check every structure of a disk and of its parents.")
@click.argument("path", type=DISK)
@click.option("--no-parents", is_flag=True, help="Check this file only, not the chain below it.")
@click.option("--azure", is_flag=True, help="Say too what Azure would refuse, and count it as a problem.")
@allow_option
@pass_face
def check(face: Face, *, path: str, no_parents: bool, azure: bool, allow: Sequence[str]) -> None:
    """Check every structure of a disk and of its parents: footers, header, BAT, locators, chain.

    Nothing is changed. The exit status says the verdict: 0 sound (there may be warnings), 10 repairable (`mullion vhd
    repair` makes it sound and takes nothing away that is still in the file), 11 broken. With --azure, what Azure would
    refuse of a sound disk makes it 10, and the remedy is the command that helps.

    With --format json: `path`, `verdict`, `problems` and `files`, one for each file of the chain with its own
    `verdict`, `type` and `size_bytes`. A problem has `path`, `code`, `severity` (error or warning), `structure`,
    `offset` (in the file, bytes), `what`, `remedy` and `cure` (repair, consent, loss, command, none, or nothing for a
    warning).

    \b
    Examples:
      mullion vhd check grandchild.vhd
      mullion vhd check base.vhd --format json
      mullion vhd check fixed.vhd --azure
    """
    from mullion.vhd.check import check_disk

    report = check_disk(path, parents=not no_parents, azure=azure, allowed_dirs=allowed_dirs(path, allow))
    if face.is_json:
        face.emit_json(_plain(report))
    else:
        face.say("\n".join(_report_lines(face, report)))
    sys.exit(report.verdict.exit_code)


@click.command("repair", cls=Command, short_help="Mend a damaged disk file, without loss unless it is allowed.")
@click.argument("path", type=DISK)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and change nothing.")
@click.option(
    "--allow-loss",
    is_flag=True,
    help="Give up what is lost: the end that was cut off reads zeros, BAT entries that cannot be believed are cleared.",
)
@click.option(
    "--undo",
    type=click.Path(path_type=str),
    metavar="BACKUP",
    help="Put back what an earlier repair changed: BACKUP is the file that it named.",
)
@allow_option
@pass_face
def repair(face: Face, *, path: str, dry_run: bool, allow_loss: bool, undo: str | None, allow: Sequence[str]) -> None:
    """Mend a damaged disk file, without loss unless it is allowed.

    Mended without loss: a footer that is missing or damaged at one end, footers that disagree, wrong checksums where
    everything else proves a structure right, bytes behind the footer, a footer of 511 bytes, BAT entries past the end
    of the disk; room behind the last block is given back. Blocks are never touched.

    Every byte that changes is first kept in PATH.mullion-repair-TIME, which --undo puts back. A repair that was
    interrupted is just repeated. The exit status is that of `mullion vhd check` afterwards: 0 when the disk is sound.

    \b
    Examples:
      mullion vhd repair damaged.vhd --dry-run
      mullion vhd repair damaged.vhd
    """
    from mullion.vhd.check import check_disk
    from mullion.vhd.repair import repair_disk

    if undo is not None:
        if dry_run or allow_loss:
            raise InvalidError("--undo goes alone", remedy="Leave --dry-run and --allow-loss out.")
        _undo(face, undo, path)
        return
    done = repair_disk(path, allow_loss=allow_loss, dry_run=dry_run)
    report = check_disk(path, allowed_dirs=allowed_dirs(path, allow))
    if face.is_json:
        face.emit_json(_plain_repair(done, report, dry_run=dry_run))
    else:
        face.say("\n".join([*_repair_lines(done, dry_run=dry_run), *_report_lines(face, report)]))
    sys.exit(0 if dry_run else report.verdict.exit_code)


def _undo(face: Face, backup: str, path: str) -> None:
    from mullion.cli.tables import printable
    from mullion.vhd.undo import undo_repair

    said = undo_repair(backup, path)
    if face.is_json:
        face.emit_json({"path": path, "backup": backup, "actions": said})
    else:
        face.say("\n".join(f"{printable(path)}: {line}" for line in said))


def _report_lines(face: Face, report: Report) -> list[str]:
    from mullion.base.units import format_size
    from mullion.cli.tables import printable

    lines: list[str] = []
    for file in report.files:
        size = f" ({file.type}, {format_size(file.size_bytes)})" if file.type and file.size_bytes is not None else ""
        lines.append(f"{printable(file.path)}: {_verdict_word(face, file)}{size}")
        for problem in file.problems:
            color = "yellow" if problem.severity == "warning" else "red"
            mark = face.style(f"{problem.severity:<7}", color)
            lines.append(f"  {mark}  {problem.structure}, byte {problem.offset}: {printable(problem.what)}")
            if problem.severity != "warning" or "mullion" in problem.remedy:
                lines.append(f"           → {printable(face.as_invoked(problem.remedy))}")
    if len(report.files) > 1:
        lines.append(f"the chain of {len(report.files)} files is {report.verdict.value}")
    return lines


def _verdict_word(face: Face, file: FileReport) -> str:
    color = {"sound": "green", "repairable": "yellow", "broken": "red"}[file.verdict.value]
    return face.style(file.verdict.value, color)


def _repair_lines(done: Repaired, *, dry_run: bool) -> list[str]:
    from mullion.cli.tables import printable

    path = printable(done.path)
    if not done.actions:
        what = "needs no repair" if done.before.verdict.exit_code == 0 else "nothing can be mended without loss"
        return [f"{path}: {what}"]
    lines = [f"{path}: {'would be done' if dry_run else 'done'}: {action}" for action in done.actions]
    if done.backup is not None:
        command = f"mullion vhd repair --undo {shlex.quote(done.backup)} {shlex.quote(done.path)}"
        lines.append(f"what was changed is kept in {printable(done.backup)}; put it back with: {printable(command)}")
    return lines


def _plain(report: Report) -> dict[str, object]:
    import dataclasses

    return {
        "path": report.path,
        "verdict": report.verdict.value,
        "problems": [dataclasses.asdict(problem) for problem in report.problems],
        "files": [
            {"path": file.path, "verdict": file.verdict.value, "type": file.type, "size_bytes": file.size_bytes}
            for file in report.files
        ],
    }


def _plain_repair(done: Repaired, report: Report, *, dry_run: bool) -> dict[str, object]:
    return {
        "dry_run": dry_run,
        "actions": list(done.actions),
        "backup": done.backup,
        "verdict_before": done.before.verdict.value,
        **_plain(report),
    }
