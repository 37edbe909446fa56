"""`mullion checkpoint schedule`: checkpoints made again and again, and how many of them stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mullion.cli import complete
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Group
from mullion.cli.schedules import (
    IntervalType,
    chosen_rule,
    name_argument,
    partition_argument,
    shown_runs,
    shown_time,
    when_options,
)
from mullion.cli.tables import table

if TYPE_CHECKING:
    from mullion.model.views import CheckpointScheduleView


@click.group(cls=Group, short_help="Make checkpoints again and again, and keep so many.")
def schedule() -> None:
    """Make checkpoints again and again, and keep so many of them.

    Only what a schedule made is deleted by it. Runs that were missed while the service was down are made up for by one.
    """


@schedule.command("set")
@partition_argument
@name_argument(complete.checkpoint_schedules)
@when_options
@click.option("--keep", type=click.IntRange(min=1), metavar="N", help="Keep the newest N that it made.")
@click.option("--keep-for", type=IntervalType(), metavar="DURATION", help="Keep none that is older, but the newest.")
@click.option("--consistent", is_flag=True, help="Freeze the guest's filesystems, where it runs.")
@pass_face
def set_schedule(
    face: Face,
    *,
    partition: str,
    name: str,
    every: int | None,
    daily: str | None,
    weekly: str | None,
    keep: int | None,
    keep_for: int | None,
    consistent: bool,
) -> None:
    """Make a schedule for a partition's checkpoints, or change the one of that name.

    \b
    Examples:
      mullion checkpoint schedule set web --every 1h --keep 24
      mullion checkpoint schedule set web nightly --daily 02:30 --keep-for 30d --consistent
    """
    rule = chosen_rule(every, daily, weekly)
    if keep is None and keep_for is None:
        raise click.UsageError("Say how many are kept: --keep N, --keep-for DURATION or both")
    view = face.client.set_checkpoint_schedule(
        partition, name, rule, keep=keep, keep_for_s=keep_for, consistent=consistent
    )
    if face.is_json:
        face.emit_json(view)
        return
    face.say(f"{partition}: schedule {view.name}: {view.rule}, keeps {_kept(view)}; next {shown_time(view.next_at)}")


@schedule.command("list")
@partition_argument
@pass_face
def list_schedules(face: Face, partition: str) -> None:
    """List a partition's schedules: when they run next, and how the last run went."""
    views = face.client.checkpoint_schedules(partition)
    if face.is_json:
        face.emit_json(views)
        return
    if not views:
        example = face.command("checkpoint", "schedule", "set", partition, "--every", "1h", "--keep", "24")
        face.note(f"No schedules. Make one: {example}")
        return
    rows = [(view.name, view.rule, _kept(view), *shown_runs(face, view)) for view in views]
    face.say(table(("NAME", "WHEN", "KEEPS", "CONSISTENT", "NEXT", "LAST", "OUTCOME"), rows))


@schedule.command("remove")
@partition_argument
@name_argument(complete.checkpoint_schedules)
@pass_face
def remove_schedule(face: Face, partition: str, name: str) -> None:
    """Remove a schedule; the checkpoints that it made stay."""
    face.client.remove_checkpoint_schedule(partition, name)
    face.note(f"{partition}: schedule {name} removed; the checkpoints that it made stay")


def _kept(view: CheckpointScheduleView) -> str:
    from mullion.model.schedule import format_interval

    parts = [f"{view.keep}"] if view.keep is not None else []
    if view.keep_for_s is not None:
        parts.append(f"for {format_interval(view.keep_for_s)}")
    return ", ".join(parts)
