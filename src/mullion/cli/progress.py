"""Following an operation to its end: a line that is redrawn on a terminal, one line per stage elsewhere.

^C while following asks the operation to cancel if it can be cancelled; otherwise, and at the second ^C, it leaves the
operation to itself and says how to look at it.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar

import click

from mullion.base.errors import MullionError
from mullion.base.units import format_duration
from mullion.cli.face import Face
from mullion.cli.tables import printable

if TYPE_CHECKING:
    from mullion.model.views import OperationView

_BAR_CELLS: Final = 20
_CLEAR_LINE: Final = "\r\x1b[K"
_Command = TypeVar("_Command", bound=Callable[..., None])


class InterruptedFault(MullionError):
    """The caller pressed ^C while an operation was going on."""

    code = "interrupted-by-user"
    exit_code = 130
    http_status = 499
    default_remedy = "Look at what goes on with `mullion operation list`."


def wait_option(command: _Command) -> _Command:
    return click.option(
        "--wait/--no-wait", default=True, help="Wait for the operation's end (default), or print it and return."
    )(command)


class Progress:
    """Shows how an operation gets on."""

    def __init__(self, face: Face) -> None:
        self._face = face
        self._begun = time.monotonic()
        self._shown = not face.quiet and not face.is_json
        self._redraws = self._shown and sys.stderr.isatty()
        self._last_stage = ""
        self._line_is_drawn = False

    def __call__(self, operation: OperationView) -> None:
        if self._redraws:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(_CLEAR_LINE + progress_line(operation, time.monotonic() - self._begun)[:width])
            sys.stderr.flush()
            self._line_is_drawn = True
        elif self._shown and operation.stage and operation.stage != self._last_stage:
            self._last_stage = operation.stage
            click.echo(f"{title(operation)}: {printable(operation.stage)}", err=True)

    def close(self) -> None:
        """Leave a clean line to whoever prints next."""
        if self._line_is_drawn:
            sys.stderr.write(_CLEAR_LINE)
            sys.stderr.flush()
            self._line_is_drawn = False


def title(operation: OperationView) -> str:
    """The operation in the words of the command that begins it: `partition start web`."""
    return f"{operation.kind.replace('.', ' ')} {operation.target.rpartition('/')[2]}"


def progress_line(operation: OperationView, elapsed_s: float) -> str:
    """`partition start web  [#####...............]  25 %  1.2 s  agent`."""
    share = min(max(operation.progress, 0.0), 1.0)
    filled = int(share * _BAR_CELLS)
    bar = "#" * filled + "." * (_BAR_CELLS - filled)
    return (
        f"{title(operation)}  [{bar}] {share:4.0%}  {format_duration(elapsed_s)}  {printable(operation.stage)}"
    ).rstrip()


def follow(face: Face, operation: OperationView) -> OperationView:
    """Wait for an operation's end and show how it gets on.

    Raises: the operation's error when it fails; InterruptedFault after ^C.
    """
    progress = Progress(face)
    try:
        return face.client.wait(operation, on_progress=progress)
    except KeyboardInterrupt:
        progress.close()
        _interrupted(face, operation.id, progress)
    finally:
        progress.close()


def _interrupted(face: Face, operation_id: str, progress: Progress) -> NoReturn:
    try:
        face.client.close()  # ^C came in the middle of a request: begin with a new connection
        operation = face.client.operation(operation_id)
        if operation.cancellable and not operation.state.is_final:
            face.note(f"^C: cancelling operation {operation_id} (again to leave it to itself)")
            face.client.cancel(operation_id)
            try:
                face.client.wait(operation, on_progress=progress)
            except MullionError as error:
                raise InterruptedFault(
                    f"interrupted; operation {operation_id}: {error.message}", remedy=error.remedy
                ) from error
            raise InterruptedFault(
                f"interrupted, but operation {operation_id} had ended before it could be cancelled",
                remedy=f"See what it did: {face.command('operation', 'show', operation_id)}",
            )
    except KeyboardInterrupt:
        pass
    raise InterruptedFault(
        f"interrupted; operation {operation_id} goes on without us",
        remedy=f"Look at it: {face.command('operation', 'show', operation_id)}",
    )


def conclude(
    face: Face,
    operation: OperationView,
    *,
    wait: bool,
    sentence: Callable[[OperationView], str],
    is_result: bool = False,
) -> OperationView:
    """Follow an operation unless told not to, and print how it ended: a sentence, or the view as JSON.

    `is_result`: the sentence is what was asked for, not only the news that it was done: --quiet does not keep it back.
    """
    if wait:
        operation = follow(face, operation)
    if face.is_json:
        face.emit_json(operation)
    elif wait and is_result:
        face.say(face.as_invoked(sentence(operation)))
    elif wait:
        face.note(face.as_invoked(sentence(operation)))
    else:
        face.say(operation.id)
        face.note(f"Look at it: {face.command('operation', 'show', operation.id)}")
    return operation
