"""The root command: the table of all commands, and the one place where errors become exit codes.

Exit codes are those of `mullion.base.errors`, and: 0 done · 2 wrong usage · 130 interrupted with ^C · 141 the reader of
our output went away.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final, NoReturn

import click

from mullion.base.errors import MullionError
from mullion.cli.face import Face, exit_code_of, how_invoked
from mullion.cli.lazy import Entry, LazyGroup

USAGE_EXIT_CODE: Final = 2
INTERRUPTED_EXIT_CODE: Final = 128 + signal.SIGINT
BROKEN_PIPE_EXIT_CODE: Final = 128 + signal.SIGPIPE


class UsageFault(MullionError):
    """The command line itself is wrong: an unknown command or option, or a value missing."""

    code = "usage"
    exit_code = USAGE_EXIT_CODE
    http_status = 400
    default_remedy = "See the command's --help."


class Root(LazyGroup):
    """The root group. It ends the process, with the exit code that fits what happened."""

    def main(  # type: ignore[override]  # click's version may return; ours never does, in either of its modes
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: object
    ) -> NoReturn:
        arguments = list(sys.argv[1:] if args is None else args)
        given = extra.pop("obj", None)
        face = given if isinstance(given, Face) else Face(invoked=how_invoked(sys.argv[0], os.environ.get("PATH", "")))
        name = prog_name or "mullion"
        self._main_shell_completion({"obj": face}, name)
        code = self._run(arguments, name, face)
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            code = _reader_is_gone()
        sys.exit(code)

    def _run(self, arguments: list[str], name: str, face: Face) -> int:
        try:
            with self.make_context(name, arguments, obj=face) as ctx:
                ctx.call_on_close(face.close)
                result = self.invoke(ctx)
                return result if isinstance(result, int) else 0
        except click.exceptions.Exit as error:
            return error.exit_code
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.ctx.get_help() if error.ctx else error.format_message(), err=True)
            return USAGE_EXIT_CODE
        except click.ClickException as error:
            if _wants_json(arguments):
                face.output = "json"
            face.print_error(_usage_fault(error, face))
            return USAGE_EXIT_CODE
        except (KeyboardInterrupt, click.Abort):
            click.echo("", err=True)  # ^C stands on the line
            face.note(f"{' '.join(_command_words(arguments))} was interrupted")
            return INTERRUPTED_EXIT_CODE
        except BrokenPipeError:
            return _reader_is_gone()
        except MullionError as error:
            face.print_error(error)
            return exit_code_of(error)
        except Exception as error:
            import traceback

            traceback.print_exception(error)
            face.print_error(MullionError(f"internal fault: {type(error).__name__}: {error}"))
            return MullionError.exit_code


def _wants_json(arguments: Sequence[str]) -> bool:
    """What --format would have said, had the command line been right up to there."""
    return "--format=json" in arguments or ("--format", "json") in itertools.pairwise(arguments)


def _command_words(arguments: list[str]) -> list[str]:
    """The command that was asked for, without what it was given."""
    words: list[str] = []
    command: click.Command | None = root
    for word in arguments:
        command = command.get_command(click.Context(command), word) if isinstance(command, click.Group) else None
        if command is None:
            break
        words.append(word)
    return words or ["mullion"]


def _usage_fault(error: click.ClickException, face: Face) -> UsageFault:
    message = error.format_message()
    message = message[:1].lower() + message[1:].rstrip(".")
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    if ctx is None:
        return UsageFault(message)
    words = " ".join(ctx.command_path.split()[1:])
    return UsageFault(message, remedy=f"See: {face.invoked}{' ' if words else ''}{words} --help")


def _reader_is_gone() -> int:
    """Point standard output at nothing, so that the interpreter's last flush stays silent."""
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())
    return BROKEN_PIPE_EXIT_CODE


ENTRIES: Final = {
    "serve": Entry("mullion.cli.service:serve", "Run the service of this host."),
    "stop": Entry("mullion.cli.service:stop", "End the service; partitions go on without it."),
    "status": Entry("mullion.cli.service:status", "Show the service and its host at a glance."),
    "doctor": Entry("mullion.cli.doctor:doctor", "Check this host: what it offers, what is missing, what mends it."),
    "demo": Entry("mullion.cli.demo:demo", "Start the service and a first partition, and say what to try next."),
    "partition": Entry("mullion.cli.partition:partition", "Create, run and look at partitions."),
    "checkpoint": Entry(
        "mullion.cli.checkpoint:checkpoint", "Freeze points in a partition's life, and go back to them."
    ),
    "files": Entry("mullion.cli.files:files", "List and fetch files inside partitions, running or not."),
    "backup": Entry("mullion.cli.backup:backup", "Back partitions up into repositories, and bring them back."),
    "disk": Entry("mullion.cli.disk:disk", "Create and look at virtual hard disks (VHD)."),
    "provider": Entry("mullion.cli.provider:provider", "Look at and drill the processes that serve disks."),
    "vhd": Entry("mullion.cli.vhd:vhd", "Work on virtual hard disk files, without the service."),
    "image": Entry("mullion.cli.image:image", "Build and list disk images that partitions start from."),
    "apply": Entry("mullion.cli.apply:apply", "Create or update partitions as a file defines them."),
    "operation": Entry("mullion.cli.operation:operation", "Look at and cancel long-running work."),
    "events": Entry("mullion.cli.events:events", "Print what happened, in order."),
    "completion": Entry("mullion.cli.completion:completion", "Print the completion script of a shell."),
    "version": Entry("mullion.cli.service:version", "Print the version."),
}


def _print_version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from mullion.cli.service import version_line

        click.echo(version_line())
        ctx.exit()


@click.command(
    "mullion",
    cls=Root,
    entries=ENTRIES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version."
)
def root() -> None:
    """Run unmodified operating systems in isolated partitions, from VHD files.

    Start with `mullion demo`, or with `mullion doctor`, which says what this host offers and lacks.
    """


def _fill_standard_streams() -> None:
    """Open /dev/null for standard streams that the caller closed: else a disk would get such a stream's number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # for the life of the process


def main() -> NoReturn:
    """The entry point of the installed program."""
    _fill_standard_streams()
    root.main()
