"""`mullion operation`: work that takes longer than a second."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mullion.cli import complete
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Group

if TYPE_CHECKING:
    from mullion.model.views import OperationView


@click.group(cls=Group, short_help="Look at and cancel long-running work.")
def operation() -> None:
    """Look at and cancel long-running work."""


@operation.command("list")
@click.option("--all", "everything", is_flag=True, help="Those that have ended too.")
@pass_face
def list_operations(face: Face, everything: bool) -> None:
    """List the operations that go on."""
    views = [view for view in face.client.operations() if everything or not view.state.is_final]
    if face.is_json:
        face.emit_json(views)
        return
    from mullion.cli.tables import NOTHING, printable, state_word, table

    if not views:
        face.note("No operations." if everything else "No operations go on; --all lists the ended ones too.")
        return
    rows = [
        (
            view.id,
            view.kind,
            view.target,
            state_word(face, view.state.value),
            f"{view.progress:.0%}",
            printable(view.stage) or NOTHING,
            view.created_at,
        )
        for view in views
    ]
    face.say(table(("ID", "KIND", "TARGET", "STATE", "DONE", "STAGE", "CREATED"), rows, right=(4,)))


@operation.command("show")
@click.argument("operation_id", metavar="ID", shell_complete=complete.operations)
@pass_face
def show_operation(face: Face, operation_id: str) -> None:
    """Show an operation: how far it is, or how it ended."""
    _print(face, face.client.operation(operation_id))


@operation.command("wait")
@click.argument("operation_id", metavar="ID", shell_complete=complete.operations)
@pass_face
def wait_for_operation(face: Face, operation_id: str) -> None:
    """Wait for an operation's end; fails as the operation fails."""
    from mullion.cli.progress import follow

    _print(face, follow(face, face.client.operation(operation_id)))


@operation.command("cancel")
@click.argument("operation_id", metavar="ID", shell_complete=complete.operations)
@pass_face
def cancel_operation(face: Face, operation_id: str) -> None:
    """Ask an operation to stop and to roll back what it has begun."""
    face.client.cancel(operation_id)
    view = face.client.operation(operation_id)
    if face.is_json:
        face.emit_json(view)
    else:
        face.note(f"{view.id}: {view.state.value if view.state.is_final else 'cancelling'}")


def _print(face: Face, view: OperationView) -> None:
    if face.is_json:
        face.emit_json(view)
        return
    from mullion.cli.tables import fields, printable, state_word

    error = f"{view.error.message}\n→ {face.as_invoked(view.error.remedy)}" if view.error else ""
    result = "\n".join(f"{name}: {value}" for name, value in (view.result or {}).items())
    face.say(
        fields(
            [
                ("id", view.id),
                ("kind", view.kind),
                ("target", view.target),
                ("state", state_word(face, view.state.value)),
                ("progress", f"{view.progress:.0%}"),
                ("stage", printable(view.stage)),
                ("cancellable", "yes" if view.cancellable else ""),
                ("created", view.created_at),
                ("updated", view.updated_at),
                ("result", result),
                ("error", error),
            ]
        )
    )
