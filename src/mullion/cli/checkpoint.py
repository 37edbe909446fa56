"""`mullion checkpoint`: frozen points in a partition's life."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from mullion.cli import complete
from mullion.cli.checkpoint_schedule import schedule
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Group
from mullion.cli.progress import conclude, wait_option

if TYPE_CHECKING:
    from mullion.model.views import CheckpointView, OperationView

partition_argument = click.argument("partition", shell_complete=complete.partitions)
checkpoint_argument = click.argument("name", metavar="CHECKPOINT", shell_complete=complete.checkpoints)


@click.group(cls=Group, short_help="Freeze points in a partition's life, and go back to them.")
def checkpoint() -> None:
    """Freeze points in a partition's life, and go back to them.

    A checkpoint freezes all disks of a partition at one instant, while it runs. It costs nothing but what the guest
    writes afterwards, and deleting one merges that back while the guest goes on.
    """


@checkpoint.command("create")
@partition_argument
@click.argument("name", required=False, metavar="[NAME]")
@click.option("--memory", is_flag=True, help="Keep memory and devices too: applied, the guest goes on where it was.")
@click.option("--consistent", is_flag=True, help="Freeze the guest's filesystems meanwhile, through its agent.")
@click.option("--description", metavar="TEXT", default="", help="For people.")
@wait_option
@pass_face
def create_checkpoint(
    face: Face, partition: str, name: str | None, *, memory: bool, consistent: bool, description: str, wait: bool
) -> None:
    """Make a checkpoint of a partition, running or not; without a name it gets the time.

    \b
    Examples:
      mullion checkpoint create web before-upgrade
      mullion checkpoint create web --consistent
    """
    begun = face.client.create_checkpoint(
        partition, name, memory=memory, consistent=consistent, description=description
    )
    conclude(face, begun, wait=wait, sentence=_created)


def _created(operation: OperationView) -> str:
    result = operation.result or {}
    stall_ms = result.get("stall_ms")
    waited = f"; the guest's disks waited {stall_ms} ms" if stall_ms else ""
    return f"checkpoint {result.get('checkpoint')} made{waited}"


@checkpoint.command("list")
@partition_argument
@pass_face
def list_checkpoints(face: Face, partition: str) -> None:
    """Draw the tree of a partition's checkpoints, and what is being merged."""
    tree = face.client.checkpoints(partition)
    if face.is_json:
        face.emit_json(tree)
        return
    from mullion.cli.checkpoint_views import drawn

    if not tree.checkpoints and not tree.merges:
        face.note(f"No checkpoints. Make one: {face.command('checkpoint', 'create', partition)}")
        return
    face.say(drawn(face, tree))


@checkpoint.command("show")
@partition_argument
@checkpoint_argument
@pass_face
def show_checkpoint(face: Face, partition: str, name: str) -> None:
    """Show a checkpoint: what it holds, and where."""
    view = face.client.checkpoint(partition, name)
    if face.is_json:
        face.emit_json(view)
        return
    from mullion.cli.checkpoint_views import details

    face.say(details(view))


@checkpoint.command("apply")
@partition_argument
@checkpoint_argument
@click.option("--keep-present", is_flag=True, help="Keep what is there now as a checkpoint of its own first.")
@click.option("--keep-as", metavar="NAME", help="The same, with a name for it.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@wait_option
@pass_face
def apply_checkpoint(
    face: Face, partition: str, name: str, *, keep_present: bool, keep_as: str | None, yes: bool, wait: bool
) -> None:
    """Bring a partition back to a checkpoint; one that runs is turned off and started again.

    What was written since is lost, unless it is kept. Asks first on a terminal; elsewhere it refuses without --yes.

    \b
    Examples:
      mullion checkpoint apply web before-upgrade --keep-present
      mullion checkpoint apply web before-upgrade --yes
    """
    view = face.client.checkpoint(partition, name)
    if not yes and not keep_present and keep_as is None:
        _ask(face, f"Lose everything that {partition} has written since {view.name} ({view.created_at})?")
    begun = face.client.apply_checkpoint(partition, name, keep_present=keep_present, keep_as=keep_as)
    conclude(face, begun, wait=wait, sentence=lambda operation: _applied(partition, view, operation))


def _applied(partition: str, view: CheckpointView, operation: OperationView) -> str:
    result = operation.result or {}
    kept = f"; what was there is kept as {result['kept']}" if result.get("kept") else ""
    return f"{partition} is as it was at {view.name}: {result.get('state')}{kept}"


@checkpoint.command("delete")
@partition_argument
@checkpoint_argument
@wait_option
@pass_face
def delete_checkpoint(face: Face, partition: str, name: str, wait: bool) -> None:
    """Delete a checkpoint; what only it needed is merged while the partition goes on.

    It is gone from the list at once. ^C leaves the merge to itself: it goes on, and survives restarts.
    """
    begun = face.client.delete_checkpoint(partition, name)
    conclude(face, begun, wait=wait, sentence=lambda _: f"checkpoint {name} deleted")


checkpoint.add_command(schedule)


def _ask(face: Face, question: str) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} Without a terminal to answer on, say --yes or --keep-present")
    if not click.confirm(question, err=True):
        face.note("Nothing was changed.")
        raise click.exceptions.Exit(1)
