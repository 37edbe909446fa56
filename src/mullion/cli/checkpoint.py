"""`mullion checkpoint`: frozen points in a partition's life."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from mullion.cli import complete
from mullion.cli.checkpoint_schedule import schedule
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Group
from mullion.cli.progress import conclude, wait_option
from mullion.cli.values import RateType

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
    if "pause_ms" in result:
        why = result.get("stood_still_because")
        waited = f"; the guest stood still for {result['pause_ms']} ms" + (f", for {why}" if why else "")
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


@checkpoint.command("merge-rate")
@partition_argument
@click.argument("rate", metavar="[RATE|unlimited|default]", required=False, type=RateType())
@pass_face
def set_merge_rate(face: Face, partition: str, rate: int | str | None) -> None:
    """Say how fast layers of deleted checkpoints may be merged, or show it: SIZE a second, such as 20M.

    It holds at once, also for a merge that is going on, and stays with the partition. `default` is what the service's
    setting merge_rate says.

    \b
    Examples:
      mullion checkpoint merge-rate web 20M
      mullion checkpoint merge-rate web unlimited
    """
    if rate is None:
        tree = face.client.checkpoints(partition)
    else:
        tree = face.client.set_merge_rate(partition, None if isinstance(rate, str) else rate)
    if face.is_json:
        face.emit_json({"bytes_per_s": tree.merge_rate, "is_own": tree.is_merge_rate_own})
        return
    from mullion.cli.checkpoint_views import merge_line, rate_words

    whose = "" if tree.is_merge_rate_own else ", as the service is set"
    face.say("\n".join([f"{partition}: {rate_words(tree.merge_rate)}{whose}", *map(merge_line, tree.merges)]))


@checkpoint.command("export")
@partition_argument
@checkpoint_argument
@click.option(
    "--since",
    metavar="CHECKPOINT",
    shell_complete=complete.checkpoints,
    help="Tell what has changed since that one, as a dirty bitmap.",
)
@click.option("--listen", metavar="HOST:PORT", help="By TCP and TLS; port 0 is any. Without it: a unix socket.")
@click.option("--tls", metavar="FOLDER", help="Certificates for --listen; without it some are made.")
@pass_face
def export_checkpoint(
    face: Face, partition: str, name: str, *, since: str | None, listen: str | None, tls: str | None
) -> None:
    """Offer a checkpoint's disks over NBD, read-only, for backup programs and others.

    It goes on until it is ended with `mullion checkpoint unexport`, also without the service.

    \b
    Examples:
      mullion checkpoint export web monday
      mullion checkpoint export web tuesday --since monday --listen 0.0.0.0:10809
    """
    tls = None if tls is None else os.path.abspath(tls)  # the service is somewhere else
    view = face.client.export_checkpoint(partition, name, since=since, listen=listen, tls=tls)
    if face.is_json:
        face.emit_json(view)
        return
    for disk in view.disks:
        face.say(disk.uri)
        if disk.context is not None:
            face.note(f"{disk.id}: what has changed: nbdinfo --map={disk.context} '{disk.uri}'")
    if view.client_certificates is not None:
        face.note(f"A client needs the certificates in {view.client_certificates}: ?tls-certificates=FOLDER")
    face.note(f"End it: {face.command('checkpoint', 'unexport', partition, view.id)}")


@checkpoint.command("exports")
@pass_face
def list_exports(face: Face) -> None:
    """List what is offered over NBD."""
    views = face.client.exports()
    if face.is_json:
        face.emit_json(views)
        return
    from mullion.base.units import format_size
    from mullion.cli.tables import printable, table

    if not views:
        face.note(f"No exports. Make one: {face.command('checkpoint', 'export', 'PARTITION', 'CHECKPOINT')}")
        return
    rows = [
        (view.partition, view.id, printable(disk.uri), str(view.connections), format_size(view.bytes_read))
        for view in views
        for disk in view.disks
    ]
    face.say(table(("PARTITION", "EXPORT", "URI", "CLIENTS", "READ"), rows, right=(3, 4)))


@checkpoint.command("unexport")
@partition_argument
@click.argument("export", metavar="EXPORT", shell_complete=complete.exports)
@pass_face
def end_export(face: Face, partition: str, export: str) -> None:
    """End an export; its clients are hung up on."""
    face.client.end_export(partition, export)
    face.note(f"{partition}: export {export} ended")


checkpoint.add_command(schedule)


def _ask(face: Face, question: str) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} Without a terminal to answer on, say --yes or --keep-present")
    if not click.confirm(question, err=True):
        face.note("Nothing was changed.")
        raise click.exceptions.Exit(1)
