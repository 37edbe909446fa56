"""`mullion partition`: create, run and look at partitions."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from mullion.base.errors import MullionError
from mullion.cli import complete
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Group
from mullion.cli.progress import conclude, wait_option
from mullion.cli.values import DISK_SYNTAX, DiskSpec, DiskType, SizeType
from mullion.model.definition import Accelerator, Firmware, Machine

if TYPE_CHECKING:
    from collections.abc import Callable

    from mullion.model.views import OperationView, PartitionView

name_argument = click.argument("name", shell_complete=complete.partitions)


@click.group(cls=Group, short_help="Create, run and look at partitions.")
def partition() -> None:
    """Create, run and look at partitions."""


@partition.command("create")
@click.argument("name")
@click.option("--vcpus", type=int, metavar="N", help="Virtual processors. Default: 1.")
@click.option("--memory", type=SizeType(), metavar="SIZE", help="Memory, such as 2G. Default: 512M.")
@click.option("--disk", "disks", type=DiskType(), multiple=True, metavar="SPEC", help=f"A disk: {DISK_SYNTAX}.")
@click.option("--machine", type=click.Choice([m.value for m in Machine]), help="Default: q35; pc for old guests.")
@click.option("--firmware", type=click.Choice([f.value for f in Firmware]), help="Default: bios.")
@click.option("--tpm", is_flag=True, default=None, help="Give it a TPM 2.0.")
@click.option("--accelerator", type=click.Choice([a.value for a in Accelerator]), help="Default: auto.")
@click.option("--kernel", metavar="PATH", help="Boot this kernel of the host instead of the disk's boot loader.")
@click.option("--initrd", metavar="PATH", help="The initial file system for --kernel.")
@click.option("--append", metavar="TEXT", help="The command line for --kernel.")
@click.option("--description", metavar="TEXT", help="For people.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="For programs; may be repeated.")
@click.option("--start", is_flag=True, help="Start it at once.")
@wait_option
@pass_face
def create_partition(
    face: Face, /, name: str, disks: tuple[DiskSpec, ...], start: bool, wait: bool, **given: object
) -> None:
    """Create a partition.

    \b
    A disk that is not there is created when its parent or its size is given:
      mullion partition create web --disk web,size=40G
      mullion partition create web --disk web,parent=image:demo --start
    A name without a slash is a disk in the pool. A comma within a path is written twice.
    """
    from mullion.cli.creation import create, definition_document

    view = create(face, definition_document(name, disks, given), disks)
    if start:
        try:
            operation = face.client.partition_action(name, "start")
            if wait:
                from mullion.cli.progress import follow

                follow(face, operation)
        except MullionError:
            face.note(f"{name}: created, but not started")
            raise
        view = face.client.partition(name)
    if face.is_json:
        face.emit_json(view)
    else:
        _show(face, view)
        if not start:
            face.note(f"Start it: {face.command('partition', 'start', name)}")


@partition.command("list")
@pass_face
def list_partitions(face: Face) -> None:
    """List the partitions of this service."""
    views = face.client.partitions()
    if face.is_json:
        face.emit_json(views)
        return
    from mullion.cli.partition_views import overview

    if not views:
        face.note(
            f"No partitions. Create the first: {face.command('partition', 'create', 'web', '--disk', 'web,size=40G')}"
        )
        return
    face.say(overview(face, views))


@partition.command("show")
@name_argument
@pass_face
def show_partition(face: Face, name: str) -> None:
    """Show a partition: what is wanted of it and what it does."""
    view = face.client.partition(name)
    if face.is_json:
        face.emit_json(view)
    else:
        _show(face, view)


def _show(face: Face, view: PartitionView) -> None:
    from mullion.cli.partition_views import details

    face.say(details(face, view))


def _act(face: Face, name: str, action: str, *, wait: bool, **options: object) -> None:
    begun = face.client.partition_action(name, action, **options)

    def sentence(operation: OperationView) -> str:
        from mullion.cli.partition_views import outcome

        note = (operation.result or {}).get("note")
        return outcome(face, face.client.partition(name)) + (f"\n{note}" if note else "")

    conclude(face, begun, wait=wait, sentence=sentence)


def _simple_action(action: str, help_text: str) -> Callable[..., None]:
    @partition.command(action, help=help_text)
    @name_argument
    @wait_option
    @pass_face
    def act(face: Face, name: str, wait: bool) -> None:
        _act(face, name, action, wait=wait)

    return act


@partition.command("start")
@name_argument
@click.option("--discard-state", is_flag=True, help="Boot from the disks, although a saved state is there.")
@wait_option
@pass_face
def start_partition(face: Face, name: str, discard_state: bool, wait: bool) -> None:
    """Start a partition; a saved one goes on where it was."""
    _act(face, name, "start", wait=wait, **({"discard_state": True} if discard_state else {}))


@partition.command("stop")
@name_argument
@click.option("--force", is_flag=True, help="Turn it off at once, as if by pulling the plug.")
@click.option(
    "--timeout", type=click.IntRange(min=0), metavar="S", help="Seconds for the guest before it is turned off."
)
@wait_option
@pass_face
def stop_partition(face: Face, name: str, force: bool, timeout: int | None, wait: bool) -> None:
    """Shut a partition down: ask its agent, then its power button, then turn it off.

    The partition's definition says how long the guest may take (60 s if it says nothing); --timeout overrides it.
    """
    if force and timeout is not None:
        raise click.UsageError("--force and --timeout exclude each other")
    options: dict[str, object] = {}
    if force:
        options["force"] = True
    if timeout is not None:
        options["timeout_s"] = timeout
    _act(face, name, "stop", wait=wait, **options)


pause_partition = _simple_action("pause", "Pause a partition: its processors stand still, its memory stays.")
resume_partition = _simple_action("resume", "Let a paused partition go on.")
save_partition = _simple_action(
    "save", "Save a partition: its memory goes into a file, its processes end; also over a restart of the host."
)
restore_partition = _simple_action("restore", "Let a saved partition go on where it was.")
discard_state = _simple_action(
    "discard-state", "Throw the memory of a saved partition away: it boots from its disks at the next start."
)
reset_partition = _simple_action("reset", "Reset a partition, as if by its reset button.")


@partition.command("delete")
@name_argument
@click.option("--with-disks", is_flag=True, help="Delete its disks too, though not the parents they differ from.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@pass_face
def delete_partition(face: Face, name: str, with_disks: bool, yes: bool) -> None:
    """Delete a stopped partition; its disks stay unless --with-disks.

    Asks first on a terminal; elsewhere it refuses without --yes. With --format json it prints what was deleted.
    """
    view = face.client.partition(name)
    lost = [disk.path for disk in view.definition.disks if not disk.read_only] if with_disks else []
    if not yes:
        question = f"Delete partition {name}" + (f" and its disks {', '.join(lost)}" if lost else "") + "?"
        if not sys.stdin.isatty():
            raise click.UsageError(f"{question} Without a terminal to answer on, say --yes")
        if not click.confirm(question, err=True):
            face.note("Nothing was deleted.")
            return
    face.client.delete_partition(name, with_disks=with_disks)
    if face.is_json:
        face.emit_json(view)
    else:
        face.note(f"{name}: deleted")


@partition.command("console")
@name_argument
@pass_face
def console(face: Face, name: str) -> None:
    """Connect this terminal to a partition's serial console; Ctrl-] leaves it.

    Works in a pipe too: standard input goes to the guest, its output to standard output, until the input ends.
    """
    from mullion.cli.console import attach

    attach(face, name)
