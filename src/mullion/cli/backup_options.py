"""Options that several commands of `mullion backup` share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeVar

import click

from mullion.cli import complete

_Command = TypeVar("_Command", bound=Callable[..., object])

_PERIODS: Final = {"hourly": "hours", "daily": "days", "weekly": "weeks", "monthly": "months", "yearly": "years"}


def repository_option(command: _Command) -> _Command:
    return click.option(
        "--repository",
        "-r",
        metavar="NAME",
        shell_complete=complete.repositories,
        help="Which repository; not needed when only one is known.",
    )(command)


def keep_options(command: _Command) -> _Command:
    """--keep-last and its kin; `kept_rules` reads them."""
    for rule, periods in reversed(_PERIODS.items()):
        command = _keep_option(rule, f"Keep the newest of each of the last N {periods}.")(command)
    return _keep_option("last", "Keep the N newest.")(command)


def _keep_option(rule: str, text: str) -> Callable[[_Command], _Command]:
    return click.option(f"--keep-{rule}", type=click.IntRange(min=0), default=0, metavar="N", help=text)


def kept_rules(options: Mapping[str, int]) -> dict[str, int]:
    """How many each rule keeps, of those that were given."""
    return {name.removeprefix("keep_"): count for name, count in options.items() if count}
