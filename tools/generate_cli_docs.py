"""Write docs/cli.md from the commands themselves, so that the page cannot differ from the program.

python tools/generate_cli_docs.py            writes the page
python tools/generate_cli_docs.py --check    exits with 1 when the page is out of date
"""

from __future__ import annotations

import inspect
import pathlib
import sys
from collections.abc import Iterator

import click

from mullion.base import errors
from mullion.cli.face import GLOBAL_OPTIONS
from mullion.cli.progress import InterruptedFault
from mullion.cli.root import BROKEN_PIPE_EXIT_CODE, UsageFault, root

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "cli.md"
HEAD = """# Command line

*Made by `tools/generate_cli_docs.py` from the commands themselves: change those, not this page.*

Results go to standard output; progress, notes and errors go to standard error. An error reads

    mullion: what happened
      → what to do next

and with `--format json` it is one line of JSON with `code`, `message`, `remedy` and `context`. Sizes in JSON are
bytes, durations seconds, times RFC 3339 in UTC; the shapes are those of the API. Lists are arrays; `events` prints one
object a line.

Work that takes longer is an *operation*: commands follow it to its end, unless `--no-wait` is given. ^C cancels the
operation if it can be cancelled; a second ^C leaves it to itself.

The service is found at its usual socket, at `--socket`, or at `--url` with a token. `MULLION_HOME=DIR` puts everything
below one folder.
"""


def commands(ctx: click.Context) -> Iterator[click.Context]:
    """The contexts of all commands, depth first, in the order of `--help`."""
    yield ctx
    if isinstance(ctx.command, click.Group):
        for name in ctx.command.list_commands(ctx):
            command = ctx.command.get_command(ctx, name)
            assert command is not None, name
            yield from commands(click.Context(command, info_name=name, parent=ctx))


def paragraphs(help_text: str) -> str:
    """Help as Markdown: what follows a \\b is shown as it stands."""
    parts = []
    for part in inspect.cleandoc(help_text).split("\n\n"):
        if part.startswith("\b"):
            parts.append("\n".join(f"    {line}" for line in part.splitlines()[1:]))
        else:
            parts.append(" ".join(part.split()))
    return "\n\n".join(parts)


def option_line(ctx: click.Context, option: click.Option) -> str:
    record = option.get_help_record(ctx)
    assert record is not None, option.name
    return f"- `{record[0]}`: {' '.join(record[1].split())}"


def section(ctx: click.Context) -> str:
    command = ctx.command
    own = [p for p in command.params if isinstance(p, click.Option)]
    usage = " ".join(command.collect_usage_pieces(ctx))
    lines = [f"## {ctx.command_path}", f"    {ctx.command_path} {usage}", paragraphs(command.help or "")]
    if own:
        lines.append("\n".join(option_line(ctx, option) for option in own))
    return "\n\n".join(lines)


def error_classes(cls: type[errors.MullionError]) -> Iterator[type[errors.MullionError]]:
    yield cls
    for child in cls.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from error_classes(child)


def exit_codes() -> str:
    """A table of exit codes, each with the error codes that end in it."""
    meanings: dict[int, list[str]] = {0: ["done"], 1: ["`internal`: A fault of Mullion's own"]}
    for cls in (*error_classes(errors.MullionError), UsageFault, InterruptedFault):
        if cls is errors.MullionError:
            continue
        line = (cls.__doc__ or "").strip().splitlines()[0].rstrip(".")
        meanings.setdefault(cls.exit_code, []).append(f"`{cls.code}`: {line}")
    meanings[8] = ["`vhd`, `vhd-…`, `not-a-vhd`: A disk file is not what it should be"]
    meanings[BROKEN_PIPE_EXIT_CODE] = ["the reader of our output went away"]
    rows = [f"| {code} | {'<br>'.join(texts)} |" for code, texts in sorted(meanings.items())]
    return "\n".join(["| exit code | meaning |", "|---:|---|", *rows])


def page() -> str:
    ctx = click.Context(root, info_name="mullion")
    every = list(commands(ctx))
    contents = [
        f"- [`{c.command_path}`](#{c.command_path.replace(' ', '-')}): {c.command.get_short_help_str(200)}"
        for c in every[1:]
    ]
    parts = [
        HEAD.strip(),
        "\n".join(contents),
        "## Global options",
        "Accepted by every command, before and after its name.",
        "\n".join(option_line(ctx, option) for option in GLOBAL_OPTIONS),
        "## Exit codes",
        exit_codes(),
        *(section(c) for c in every[1:]),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print(f"{PAGE} is out of date: run python tools/generate_cli_docs.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
