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


def verdict(result: Mapping[str, Any]) -> str:
    """What a verification found."""
    seen = (
        f"{result.get('backups')} backups, {result.get('packs')} packs, {format_size(int(result['read_bytes']))} read"
    )
    if result.get("is_whole"):
        return f"whole: {seen}"
    lines = [f"damaged: {seen}"]
    lines += [f"  backup {name} is hurt: {', '.join(map(printable, what))}" for name, what in result["damaged"].items()]
    for finding in result["findings"]:
        offset = "" if finding["offset"] is None else f" at byte {finding['offset']}"
        lines.append(f"  {printable(finding['name'])}{offset}: {printable(finding['message'])}")
    lines.append(
        "→ Back the partitions up again with --full; restore what is whole; keep the damaged place to look into."
    )
    return "\n".join(lines)


def pruned(result: Mapping[str, Any], *, dry_run: bool) -> str:
    """What a prune did, or would do."""
    forgotten = result["forgotten"]
    would = "would forget" if dry_run else "forgot"
    freed = format_size(int(result["freed_bytes"]))
    names = f": {', '.join(forgotten)}" if forgotten else ""
    return f"{would} {len(forgotten)} backups{names}" + ("" if dry_run else f"; {freed} freed")
