"""`mullion backup`: partitions into repositories, and back."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from mullion.cli import complete
from mullion.cli.backup_files import get_files, list_files, print_file
from mullion.cli.backup_options import keep_options, kept_rules, repository_option
from mullion.cli.backup_schedule import schedule
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Group
from mullion.cli.progress import conclude, wait_option
from mullion.cli.values import disk_path, repository_place

if TYPE_CHECKING:
    from mullion.model.views import OperationView


@click.group(cls=Group, short_help="Back partitions up into repositories, and bring them back.")
def backup() -> None:
    """Back partitions up into repositories, and bring them back.

    A backup reads a checkpoint while the guest runs on; after the first it reads only what has changed. What several
    partitions have in common is stored once. Everything is encrypted before it leaves this host.
    """


@backup.group("repository", cls=Group, short_help="The places that backups go to.")
def repository() -> None:
    """The places that backups go to."""


@repository.command("add")
@click.argument("name")
@click.argument("place", metavar="PLACE")
@click.option("--create", is_flag=True, help="Make the repository; without it, one that is there is opened.")
@click.option(
    "--passphrase-file", metavar="FILE", help="A file whose first line is the passphrase; `-` for standard input."
)
@click.option(
    "--credentials-file", metavar="FILE", help="A TOML file of what the storage wants: s3_access_key, sftp_key_file …"
)
@pass_face
def add_repository(
    face: Face, name: str, place: str, *, create: bool, passphrase_file: str | None, credentials_file: str | None
) -> None:
    """Know a repository from now on: a folder, sftp://USER@HOST/FOLDER, s3://BUCKET/PREFIX (of AWS) or
    s3+https://HOST/BUCKET/PREFIX (of others).

    Without --passphrase-file it asks for the passphrase. Keep a copy of it elsewhere: nobody can read the backups
    without.

    \b
    Examples:
      mullion backup repository add nightly /srv/backup --create --passphrase-file /root/passphrase
    """
    place = repository_place(place)
    passphrase = _read_passphrase(passphrase_file, confirm=create)
    credentials = _read_credentials(credentials_file)
    view = face.client.add_repository(name, place, passphrase, credentials=credentials, create=create)
    if face.is_json:
        face.emit_json(view)
    else:
        face.note(f"repository {view.name}: {view.url}")
        face.note(f"Back a partition up: {face.command('backup', 'create', 'PARTITION', '--repository', view.name)}")


@repository.command("set")
@click.argument("name", shell_complete=complete.repositories)
@click.argument("place", metavar="[PLACE]", required=False)
@click.option(
    "--passphrase-file", metavar="FILE", help="A file whose first line is the passphrase from now on; or `-`."
)
@click.option("--credentials-file", metavar="FILE", help="A TOML file of what the storage wants from now on.")
@pass_face
def change_repository(
    face: Face, name: str, place: str | None, *, passphrase_file: str | None, credentials_file: str | None
) -> None:
    """Reach a known repository at another place, or with other secrets; what is not given stays.

    It is opened before anything changes, and has to be the same repository. Whatever waits for it goes on by itself.

    \b
    Examples:
      mullion backup repository set nightly /mnt/new/backup
      mullion backup repository set nightly --credentials-file /root/s3.toml
    """
    if place is None and passphrase_file is None and credentials_file is None:
        raise click.UsageError("nothing to change: give a place, --passphrase-file or --credentials-file")
    view = face.client.change_repository(
        name,
        url=None if place is None else repository_place(place),
        passphrase=None if passphrase_file is None else _read_passphrase(passphrase_file, confirm=False),
        credentials=None if credentials_file is None else _read_credentials(credentials_file),
    )
    if face.is_json:
        face.emit_json(view)
    else:
        face.note(f"repository {view.name}: {view.url}")


@repository.command("passphrase")
@click.argument("name", shell_complete=complete.repositories)
@click.option(
    "--passphrase-file", metavar="FILE", help="A file whose first line is the new passphrase; `-` for standard input."
)
@wait_option
@pass_face
def change_passphrase(face: Face, name: str, *, passphrase_file: str | None, wait: bool) -> None:
    """Change a repository's passphrase: the new one opens it, and no other does any more.

    Without --passphrase-file it asks for the new one. Keep a copy of it elsewhere: nobody can read the backups without.
    Backups go on meanwhile; interrupted, it is the old one or the new one that opens the repository, or both, and the
    change goes on by itself. Other hosts that use the repository are told the new one with `mullion backup repository
    set NAME --passphrase-file FILE`.

    Who knew the old passphrase and has a copy of the repository from before, or took its secret out of it, reads what
    they have, and what is added: make a new repository where that matters.

    \b
    Examples:
      mullion backup repository passphrase nightly --passphrase-file /root/new-passphrase
    """
    passphrase = _read_passphrase(passphrase_file, confirm=True, is_new=True)
    begun = face.client.change_repository_passphrase(name, passphrase)
    conclude(face, begun, wait=wait, sentence=lambda _: _passphrase_changed(face, name))


def _passphrase_changed(face: Face, name: str) -> str:
    told = face.command("backup", "repository", "set", name, "--passphrase-file", "FILE")
    return f"repository {name}: only the new passphrase opens it. Tell other hosts that use it, on each: {told}"


def _read_passphrase(path: str | None, *, confirm: bool, is_new: bool = False) -> str:
    """From a file, whoever sits at the terminal, or (unless it `is_new`: that has the present one) the environment."""
    from mullion.repository.credentials import PASSPHRASE_VARIABLE, find_passphrase

    if path == "-":
        return sys.stdin.readline().rstrip("\r\n")
    found = find_passphrase(path, {} if is_new else os.environ)
    if found is not None:
        return found
    if not sys.stdin.isatty():
        instead = "" if is_new else f", or set {PASSPHRASE_VARIABLE}"
        raise click.UsageError(f"without a terminal to ask on, give --passphrase-file{instead}")
    question = "New passphrase" if is_new else "Passphrase"
    return str(click.prompt(question, hide_input=True, confirmation_prompt=confirm, err=True))


def _read_credentials(path: str | None) -> dict[str, str]:
    """Those that are given, by the names of `Credentials`."""
    from dataclasses import asdict

    from mullion.repository.credentials import Credentials

    nothing = asdict(Credentials())
    return {name: value for name, value in asdict(Credentials.load(path)).items() if value != nothing[name]}


@repository.command("list")
@pass_face
def list_repositories(face: Face) -> None:
    """List the repositories that are known."""
    views = face.client.repositories()
    if face.is_json:
        face.emit_json(views)
        return
    from mullion.cli.tables import printable, table

    if not views:
        face.note(f"No repositories. Add one: {face.command('backup', 'repository', 'add', 'NAME', 'PLACE')}")
        return
    rows = [(view.name, printable(view.url), f"{view.added_at[:19]}Z") for view in views]
    face.say(table(("NAME", "PLACE", "ADDED"), rows))


@repository.command("remove")
@click.argument("name", shell_complete=complete.repositories)
@pass_face
def remove_repository(face: Face, name: str) -> None:
    """Forget a repository and its passphrase; the backups in it stay."""
    face.client.remove_repository(name)
    face.note(f"repository {name} is not known any more; what is in it stays")


@backup.command("create")
@click.argument("partition", shell_complete=complete.partitions)
@repository_option
@click.option("--consistent", is_flag=True, help="Freeze the guest's filesystems for an instant, through its agent.")
@click.option("--full", is_flag=True, help="Read everything again, not only what has changed.")
@wait_option
@pass_face
def create_backup(
    face: Face, partition: str, *, repository: str | None, consistent: bool, full: bool, wait: bool
) -> None:
    """Back a partition up, running or not.

    \b
    Examples:
      mullion backup create web --consistent
    """
    begun = face.client.create_backup(partition, repository=repository, consistent=consistent, full=full)
    conclude(face, begun, wait=wait, sentence=_backed_up)


def _backed_up(operation: OperationView) -> str:
    from mullion.base.units import format_size

    result = operation.result or {}
    read, new = result.get("read_bytes"), result.get("new_bytes")
    assert isinstance(read, int)
    assert isinstance(new, int)
    return f"backup {result['backup']}: {format_size(read)} read, {format_size(new)} new in {result['repository']}"


@backup.command("list")
@click.argument("partition", required=False, shell_complete=complete.partitions)
@repository_option
@pass_face
def list_backups(face: Face, partition: str | None, *, repository: str | None) -> None:
    """List the backups in a repository, oldest first."""
    views = face.client.backups(repository=repository, partition=partition)
    if face.is_json:
        face.emit_json(views)
        return
    if not views:
        face.note(f"No backups. Make one: {face.command('backup', 'create', partition or 'PARTITION')}")
        return
    from mullion.cli.backup_views import overview

    face.say(overview(views))


@backup.command("show")
@click.argument("name", metavar="BACKUP")
@repository_option
@pass_face
def show_backup(face: Face, name: str, *, repository: str | None) -> None:
    """Show a backup: its disks, and what it added."""
    view = face.client.backup(name, repository=repository)
    if face.is_json:
        face.emit_json(view)
        return
    from mullion.cli.backup_views import details

    face.say(details(view))


@backup.command("verify")
@repository_option
@click.option("--quick", is_flag=True, help="Do not read the content, only what leads to it.")
@click.option("--part", metavar="N/M", help="Read only that share of the content: 1/7 to 7/7 are a week's scrub.")
@wait_option
@pass_face
def verify_backups(face: Face, *, repository: str | None, quick: bool, part: str | None, wait: bool) -> None:
    """Check a repository: every byte of it. Ends with 11 when anything is damaged."""
    number, count = _part(part)
    begun = face.client.verify_backups(repository=repository, read_data=not quick, part=number, of=count)
    ended = conclude(face, begun, wait=wait, sentence=_verified, is_result=True)
    if wait and not (ended.result or {}).get("is_whole"):
        raise click.exceptions.Exit(11)


def _part(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise click.UsageError("--part takes N/M, such as 1/7")
    return int(number) - 1, int(count)


def _verified(operation: OperationView) -> str:
    from mullion.cli.backup_views import verdict

    return verdict(operation.result or {}, operation.target.removeprefix("repository/"))


@backup.command("repair")
@click.argument("name", metavar="[REPOSITORY]", required=False, shell_complete=complete.repositories)
@click.option("--quick", is_flag=True, help="Do not read the content, only what leads to it: enough for a lost index.")
@click.option("--discard", is_flag=True, help="Delete damaged packs, once what is whole in them is copied.")
@wait_option
@pass_face
def repair_backups(face: Face, name: str | None, *, quick: bool, discard: bool, wait: bool) -> None:
    """Make a repository's index again from its packs, and leave damaged packs behind.

    What is whole in a damaged pack is copied into a new one. What is lost is said, with the backups that need it; the
    next full backup (`mullion backup create PARTITION --full`) stores it again where the disk still has it. A damaged
    pack stays unless --discard is given: a copy of it from elsewhere may still bring all of it back. Nobody else may
    work on the repository meanwhile. Ends with 11 when anything is hurt after it.

    \b
    Examples:
      mullion backup repair nightly
      mullion backup repair nightly --discard
    """
    begun = face.client.repair_backups(repository=name, read_data=not quick, discard=discard)
    ended = conclude(face, begun, wait=wait, sentence=_repaired, is_result=True)
    if wait and not (ended.result or {}).get("is_whole"):
        raise click.exceptions.Exit(11)


def _repaired(operation: OperationView) -> str:
    from mullion.cli.backup_views import repaired

    return repaired(operation.result or {})


@backup.command("restore")
@click.argument("name", metavar="BACKUP")
@repository_option
@click.option("--as", "partition", metavar="NAME", help="The new partition's name; that of the old one if it is free.")
@click.option("--instant", is_flag=True, help="Make it ready to start at once; its blocks come while it runs.")
@click.option("--disk", metavar="ID", help="Only this disk, into --to.")
@click.option("--to", "path", metavar="PATH", help="The new file for --disk: a name in the pool or a path.")
@wait_option
@pass_face
def restore_backup(
    face: Face,
    name: str,
    *,
    repository: str | None,
    partition: str | None,
    instant: bool,
    disk: str | None,
    path: str | None,
    wait: bool,
) -> None:
    """Bring a backup back: as a new partition, or one disk of it into a new file.

    \b
    Examples:
      mullion backup restore 4f2a91c0 --as web-restored
      mullion backup restore 4f2a91c0 --as web-now --instant
      mullion backup restore 4f2a91c0 --disk disk0 --to rescued
    """
    if (disk is None) != (path is None):
        raise click.UsageError("--disk and --to belong together")
    if disk is not None and instant:
        raise click.UsageError("--instant is for whole partitions")
    if disk is not None and partition is not None:
        raise click.UsageError("--as names a whole partition: leave it out with --disk")
    begun = face.client.restore_backup(
        name, repository=repository, name=partition, disk=disk, path=path and disk_path(path), instant=instant
    )

    def sentence(operation: OperationView) -> str:
        result = operation.result or {}
        if disk is not None:
            return f"{disk} of backup {name} is in {result.get('path')}"
        restored = str(result.get("partition"))
        if (homecoming := result.get("homecoming")) is not None:
            return (
                f"partition {restored} can be started: {face.command('partition', 'start', restored)}. "
                f"Its blocks come while it runs: {face.command('operation', 'show', str(homecoming))}"
            )
        return f"partition {restored} is there again. Start it: {face.command('partition', 'start', restored)}"

    conclude(face, begun, wait=wait, sentence=sentence)


@backup.command("prune")
@click.argument("names", metavar="[BACKUP]...", nargs=-1)
@repository_option
@click.option("--partition", metavar="NAME", shell_complete=complete.partitions, help="Only backups of this one.")
@keep_options
@click.option("--dry-run", is_flag=True, help="Say what would be forgotten.")
@wait_option
@pass_face
def prune_backups(
    face: Face,
    /,
    names: tuple[str, ...],
    *,
    repository: str | None,
    partition: str | None,
    dry_run: bool,
    wait: bool,
    **keep: int,
) -> None:
    """Forget backups and delete what no other needs: those that are named, or those that no --keep rule keeps.

    \b
    Examples:
      mullion backup prune --keep-daily 7 --keep-weekly 4 --keep-monthly 12 --dry-run
    """
    rules = kept_rules(keep)
    if bool(names) == bool(rules):
        raise click.UsageError("name the backups to forget, or say what to keep with --keep-… rules")
    begun = face.client.prune_backups(
        repository=repository, partition=partition, keep=rules, forget=names, dry_run=dry_run
    )

    def sentence(operation: OperationView) -> str:
        from mullion.cli.backup_views import pruned

        return pruned(operation.result or {}, dry_run=dry_run)

    conclude(face, begun, wait=wait, sentence=sentence, is_result=dry_run)


backup.add_command(schedule)
for command in (list_files, print_file, get_files):
    backup.add_command(command)
