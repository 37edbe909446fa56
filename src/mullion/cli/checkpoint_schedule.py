"""`mullion checkpoint schedule`: checkpoints made again and again, and how many of them stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from mullion.cli import complete
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Group
from mullion.cli.tables import NOTHING, printable, table

if TYPE_CHECKING:
    from mullion.model.views import CheckpointScheduleView

_DEFAULT_NAME: Final = "default"
_partition = click.argument("partition", shell_complete=complete.partitions)


class _IntervalType(click.ParamType[int]):
    """A duration such as 15min, 6h or 30d, as seconds."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from mullion.base.errors import InvalidError
        from mullion.model.schedule import parse_interval

        try:
            return value if isinstance(value, int) else parse_interval(str(value))
        except InvalidError as error:
            self.fail(f"{error.message}: {error.remedy}", param, ctx)


@click.group(cls=Group, short_help="Make checkpoints again and again, and keep so many.")
def schedule() -> None:
    """Make checkpoints again and again, and keep so many of them.

    Only what a schedule made is deleted by it. Runs that were missed while the service was down are made up for by one.
    """


@schedule.command("set")
@_partition
@click.argument("name", default=_DEFAULT_NAME, metavar="[NAME]")
@click.option("--every", type=_IntervalType(), metavar="DURATION", help="At intervals: 15min, 6h, 2d, 1w.")
@click.option("--daily", metavar="HH:MM", help="Every day at a time of the host's clock.")
@click.option("--weekly", metavar="'DAY HH:MM'", help="Once a week, such as 'sun 03:00'.")
@click.option("--keep", type=click.IntRange(min=1), metavar="N", help="Keep the newest N that it made.")
@click.option("--keep-for", type=_IntervalType(), metavar="DURATION", help="Keep none that is older, but the newest.")
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
    from mullion.model.schedule import Every

    rules = [
        text
        for given, text in ((every, Every(every or 0)), (daily, f"daily {daily}"), (weekly, f"weekly {weekly}"))
        if given is not None
    ]
    if len(rules) != 1:
        raise click.UsageError("Say one of --every, --daily and --weekly")
    if keep is None and keep_for is None:
        raise click.UsageError("Say how many are kept: --keep N, --keep-for DURATION or both")
    view = face.client.set_checkpoint_schedule(
        partition, name, str(rules[0]), keep=keep, keep_for_s=keep_for, consistent=consistent
    )
    if face.is_json:
        face.emit_json(view)
        return
    face.say(f"{partition}: schedule {view.name}: {view.rule}, keeps {_kept(view)}; next {_shown(view.next_at)}")


@schedule.command("list")
@_partition
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
    rows = [
        (
            view.name,
            view.rule,
            _kept(view),
            "yes" if view.consistent else "no",
            _shown(view.next_at),
            _shown(view.last_at) if view.last_at else NOTHING,
            _outcome(face, view),
        )
        for view in views
    ]
    face.say(table(("NAME", "WHEN", "KEEPS", "CONSISTENT", "NEXT", "LAST", "OUTCOME"), rows))


@schedule.command("remove")
@_partition
@click.argument("name", default=_DEFAULT_NAME, metavar="[NAME]")
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


def _outcome(face: Face, view: CheckpointScheduleView) -> str:
    if view.last_error is not None:
        return face.style(f"failed: {printable(view.last_error.message)}", "red")
    return printable(view.last_result) or NOTHING


def _shown(at: str) -> str:
    return f"{at[:16].replace('T', ' ')}Z"
