"""What the commands of all schedules share: when they run, and how they and their last runs are shown."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar

import click

from mullion.cli import complete
from mullion.cli.tables import NOTHING, printable
from mullion.model.definition import LABEL_FORM, LABEL_PATTERN

if TYPE_CHECKING:
    from mullion.cli.face import Face
    from mullion.model.views import ScheduleView

_Command = TypeVar("_Command", bound=Callable[..., object])

_DEFAULT_NAME: Final = "default"
partition_argument = click.argument("partition", shell_complete=complete.partitions)


def _checked_name(_ctx: click.Context, _param: click.Parameter, name: str) -> str:
    """It becomes a part of an address, where a wrong one would be said in other words."""
    if not re.search(LABEL_PATTERN, name):
        raise click.BadParameter(LABEL_FORM)
    return name


def name_argument(known: complete.Completer) -> Callable[[_Command], _Command]:
    """A schedule's name; `known` completes it."""
    return click.argument("name", default=_DEFAULT_NAME, metavar="[NAME]", callback=_checked_name, shell_complete=known)


class IntervalType(click.ParamType[int]):
    """A duration such as 15min, 6h or 30d, as seconds."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from mullion.base.errors import InvalidError
        from mullion.model.schedule import parse_interval

        try:
            return value if isinstance(value, int) else parse_interval(str(value))
        except InvalidError as error:
            self.fail(f"{error.message}: {error.remedy}", param, ctx)


def when_options(command: _Command) -> _Command:
    """--every, --daily and --weekly; `chosen_rule` reads them."""
    every = click.option("--every", type=IntervalType(), metavar="DURATION", help="At intervals: 15min, 6h, 2d, 1w.")
    daily = click.option("--daily", metavar="HH:MM", help="Every day at a time of the host's clock.")
    weekly = click.option("--weekly", metavar="'DAY HH:MM'", help="Once a week, such as 'sun 03:00'.")
    return every(daily(weekly(command)))


def chosen_rule(every: int | None, daily: str | None, weekly: str | None) -> str:
    """The rule as `model.schedule` reads it. Raises: UsageError unless exactly one is given."""
    from mullion.model.schedule import Every

    rules = [
        str(text)
        for given, text in ((every, Every(every or 0)), (daily, f"daily {daily}"), (weekly, f"weekly {weekly}"))
        if given is not None
    ]
    if len(rules) != 1:
        raise click.UsageError("Say one of --every, --daily and --weekly")
    return rules[0]


def shown_runs(face: Face, view: ScheduleView) -> tuple[str, str, str, str]:
    """The columns CONSISTENT, NEXT, LAST and OUTCOME."""
    last = shown_time(view.last_at) if view.last_at else NOTHING
    return "yes" if view.consistent else "no", shown_time(view.next_at), last, _outcome(face, view)


def _outcome(face: Face, view: ScheduleView) -> str:
    if view.last_error is not None:
        return face.style(f"failed: {printable(view.last_error.message)}", "red")
    return printable(view.last_result) or NOTHING


def shown_time(at: str) -> str:
    """To the minute."""
    return f"{at[:16].replace('T', ' ')}Z"
