"""`mullion events`: what happened, in order, with a cursor to resume from."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from mullion.base.errors import UnavailableError
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Command

if TYPE_CHECKING:
    from mullion.model.views import EventView


@click.command(cls=Command, short_help="Print what happened, in order.")
@click.option("--follow", "-f", is_flag=True, help="Go on with what happens from now on, until ^C.")
@click.option("--after", type=click.IntRange(min=0), metavar="CURSOR", help="Begin after this event.")
@click.option("--last", type=click.IntRange(min=1), metavar="N", help="Begin with the last N events.")
@pass_face
def events(face: Face, follow: bool, after: int | None, last: int | None) -> None:
    """Print what happened, in order.

    The first column is the event's cursor: --after CURSOR resumes there. With --format json each line is one event.
    """
    if after is not None and last is not None:
        raise click.UsageError("--after and --last exclude each other")
    cursor = after or 0
    for view in face.client.events(after=cursor if last is None else -last, follow=follow):
        cursor = view.cursor
        if face.is_json:
            face.emit_json_line(view)
        else:
            face.say(event_line(view))
        if follow:
            sys.stdout.flush()
    if follow:
        raise UnavailableError(
            "the service has ended, and the events with it",
            remedy=f"Resume when it runs: {face.command('events', '--follow', '--after', str(cursor))}",
        )


def event_line(view: EventView) -> str:
    """`17  2025-01-31T10:00:00Z  partition.started  web  pid=4711`."""
    from mullion.cli.tables import printable

    data = " ".join(f"{name}={value}" for name, value in view.data.items() if value is not None)
    return printable(f"{view.cursor:>6}  {view.at}  {view.kind:24}  {view.target}  {data}").rstrip()
