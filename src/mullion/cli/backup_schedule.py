"""`mullion backup schedule`: backups made again and again, and which of them are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mullion.cli import complete
from mullion.cli.backup_options import keep_options, kept_rules, repository_option
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Group
from mullion.cli.schedules import (
    chosen_rule,
    name_argument,
    partition_argument,
    shown_runs,
    shown_time,
    when_options,
)
from mullion.cli.tables import table

if TYPE_CHECKING:
    from mullion.model.views import BackupScheduleView


@click.group(cls=Group, short_help="Make backups again and again, and keep so many.")
def schedule() -> None:
    """Make backups again and again, and keep so many of them.

    Where something is to be kept, each run that succeeds forgets what no rule keeps of that partition's backups in that
    repository. Runs that were missed while the service was down are made up for by one.
    """


@schedule.command("set")
@partition_argument
@name_argument(complete.backup_schedules)
@repository_option
@when_options
@keep_options
@click.option("--consistent", is_flag=True, help="Freeze the guest's filesystems for an instant, where it runs.")
@pass_face
def set_schedule(
    face: Face,
    /,
    partition: str,
    name: str,
    *,
    repository: str | None,
    every: int | None,
    daily: str | None,
    weekly: str | None,
    consistent: bool,
    **keep: int,
) -> None:
    """Make a schedule for a partition's backups, or change the one of that name.

    \b
    Examples:
      mullion backup schedule set web --daily 02:30 --keep-daily 7 --keep-weekly 4
      mullion backup schedule set web hourly --repository near --every 1h --keep-last 24 --consistent
    """
    view = face.client.set_backup_schedule(
        partition,
        name,
        chosen_rule(every, daily, weekly),
        repository=repository,
        keep=kept_rules(keep),
        consistent=consistent,
    )
    if face.is_json:
        face.emit_json(view)
        return
    face.say(
        f"{partition}: schedule {view.name}: {view.rule} into {view.repository}, keeps {_kept(view)}; "
        f"next {shown_time(view.next_at)}"
    )


@schedule.command("list")
@click.argument("partition", required=False, shell_complete=complete.partitions)
@pass_face
def list_schedules(face: Face, partition: str | None) -> None:
    """List schedules of backups: when they run next, and how the last run went."""
    views = face.client.backup_schedules(partition)
    if face.is_json:
        face.emit_json(views)
        return
    if not views:
        example = ("backup", "schedule", "set", partition or "PARTITION", "--daily", "02:30", "--keep-daily", "7")
        face.note(f"No schedules. Make one: {face.command(*example)}")
        return
    rows = [
        (view.partition, view.name, view.rule, view.repository, _kept(view), *shown_runs(face, view)) for view in views
    ]
    header = ("PARTITION", "NAME", "WHEN", "REPOSITORY", "KEEPS", "CONSISTENT", "NEXT", "LAST", "OUTCOME")
    face.say(table(header, rows))


@schedule.command("remove")
@partition_argument
@name_argument(complete.backup_schedules)
@pass_face
def remove_schedule(face: Face, partition: str, name: str) -> None:
    """Remove a schedule; the backups that it made stay."""
    face.client.remove_backup_schedule(partition, name)
    face.note(f"{partition}: backup schedule {name} removed; the backups that it made stay")


def _kept(view: BackupScheduleView) -> str:
    return ", ".join(f"{count} {rule}" for rule, count in view.keep.items()) or "all"
