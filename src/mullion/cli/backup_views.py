"""How backups look in print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mullion.base.units import format_size
from mullion.cli.tables import NOTHING, fields, printable, table
from mullion.model.views import BackupView


def overview(views: Sequence[BackupView]) -> str:
    """One line for each backup."""
    rows = [
        (
            view.id,
            view.partition,
            f"{view.begun_at[:19]}Z",
            view.notes.get("consistency", NOTHING),
            format_size(sum(disk.size_bytes for disk in view.disks)),
            format_size(sum(disk.data_bytes for disk in view.disks)),
            format_size(view.new_bytes),
        )
        for view in views
    ]
    header = ("BACKUP", "PARTITION", "MADE", "KIND", "DISKS", "DATA", "NEW")
    return table(header, rows, right=(4, 5, 6))


def details(view: BackupView) -> str:
    """Everything about a backup."""
    return fields(
        [
            ("backup", view.id),
            ("repository", view.repository),
            ("partition", view.partition),
            ("made", f"{view.begun_at} to {view.ended_at}"),
            ("on host", printable(view.host)),
            ("kind", view.notes.get("consistency", "")),
            ("built on", view.base or "nothing: everything was read"),
            (
                "disks",
                "\n".join(
                    f"{disk.id}: {format_size(disk.size_bytes)}, {format_size(disk.data_bytes)} of data, "
                    f"{format_size(disk.read_bytes)} read, {format_size(disk.new_bytes)} new"
                    for disk in view.disks
                ),
            ),
            ("also", ", ".join(view.blobs)),
        ]
    )


def verdict(result: Mapping[str, Any], repository: str) -> str:
    """What a verification of a repository found."""
    seen = (
        f"{result.get('backups')} backups, {result.get('packs')} packs, {format_size(int(result['read_bytes']))} read"
    )
    if result.get("is_whole"):
        return f"whole: {seen}"
    lines = [f"damaged: {seen}", *_hurt(result["damaged"]), *_listed(result["findings"])]
    lines.append(
        f"→ `mullion backup repair {repository}` leaves behind what is damaged and copies what is whole in it; then "
        "back the partitions up again with --full: what was lost is stored again. Restore what is whole."
    )
    return "\n".join(lines)


def repaired(result: Mapping[str, Any]) -> str:
    """What a repair did, and what is left to do."""
    lines = [
        f"{'whole' if result['is_whole'] else 'still hurt'}: index of {result['indexed_chunks']} chunks in "
        f"{result['indexed_packs']} packs; {result['rescued_chunks']} chunks copied out of damaged packs, "
        f"{result['lost_chunks']} lost",
        *_listed(result["found"], "was: "),
        *_hurt(result["damaged"]),
        *_listed(result["findings"]),
        *(f"  {name} is left: nothing whole is only in it" for name in result["left"]),
        *(f"  {name} is deleted" for name in result["discarded"]),
    ]
    if result["damaged"]:
        lines.append(
            "→ Back those partitions up again: `mullion backup create PARTITION --full` stores again what was lost. "
            "Then `mullion backup verify` says which of the hurt backups are whole; forget the others by name."
        )
    if result["left"]:
        lines.append(
            "→ Put copies of the damaged packs into their places, if there are any, and repair again; or delete them: "
            "`mullion backup repair --discard`."
        )
    return "\n".join(lines)


def _hurt(damaged: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"  backup {name} is hurt: {', '.join(map(printable, what))}" for name, what in damaged.items()]


def _listed(findings: Sequence[Mapping[str, Any]], lead: str = "") -> list[str]:
    """A line for each, which begins with `lead`."""
    lines = []
    for finding in findings:
        offset = "" if finding["offset"] is None else f" at byte {finding['offset']}"
        lines.append(f"  {lead}{printable(finding['name'])}{offset}: {printable(finding['message'])}")
    return lines


def pruned(result: Mapping[str, Any], *, dry_run: bool) -> str:
    """What a prune did, or would do."""
    forgotten = result["forgotten"]
    would = "would forget" if dry_run else "forgot"
    freed = format_size(int(result["freed_bytes"]))
    names = f": {', '.join(forgotten)}" if forgotten else ""
    return f"{would} {len(forgotten)} backups{names}" + ("" if dry_run else f"; {freed} freed")
