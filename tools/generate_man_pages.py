"""Write a man page for every command of `mullion vhd`, from the commands themselves.

python tools/generate_man_pages.py            writes data/share/man/man1, which the wheel installs
python tools/generate_man_pages.py --check    exits with 1 when a page is out of date
"""

from __future__ import annotations

import inspect
import pathlib
import sys
from collections.abc import Iterator, Mapping

import click

from mullion import __version__
from mullion.cli.face import GLOBAL_OPTIONS
from mullion.cli.root import root

FOLDER = pathlib.Path(__file__).parent.parent / "data" / "share" / "man" / "man1"
EXAMPLES = "Examples:"
EXIT_STATUS = (
    "0 done, 2 wrong usage, 3 not found, 4 conflict (the disk is in use, the target exists), 5 invalid input, 7 a "
    "program is missing, 8 the disk is damaged or no VHD, 9 no space left, 12 not permitted, 14 failed, 130 "
    "interrupted with ^C. docs/cli.md lists the stable code of each error."
)


def escape(text: str) -> str:
    """Text as roff takes it: nothing in it is a request or an escape."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join(f"\\&{line}" if line.startswith((".", "'")) else line for line in text.splitlines())


def blocks(help_text: str) -> tuple[list[str], list[str]]:
    """The paragraphs of a help text, and the lines of its examples. What follows a \\b is kept line by line."""
    prose: list[str] = []
    examples: list[str] = []
    for part in inspect.cleandoc(help_text).split("\n\n"):
        lines = part.splitlines()
        if lines[0] == "\b" and lines[1:2] == [EXAMPLES]:
            examples += [line.strip() for line in lines[2:]]
        elif lines[0] == "\b":
            prose.append(".nf\n" + "\n".join(escape(line) for line in lines[1:]) + "\n.fi")
        else:
            prose.append(escape(" ".join(part.split())))
    return prose, examples


def options(ctx: click.Context, listed: list[click.Option]) -> Iterator[str]:
    for option in listed:
        record = option.get_help_record(ctx)
        if record is not None:
            yield f".TP\n.B {escape(record[0])}\n{escape(' '.join(record[1].split()))}"


def page(ctx: click.Context) -> str:
    """One command's page."""
    command = ctx.command
    name = ctx.command_path.replace(" ", "-")
    usage = " ".join(command.collect_usage_pieces(ctx))
    prose, examples = blocks(command.help or "")
    own = [param for param in click.Command.get_params(command, ctx) if isinstance(param, click.Option)]
    parts = [
        f'.TH {name.upper()} 1 "" "Mullion {__version__}" "Mullion"',
        f".SH NAME\n{escape(name)} \\- {escape(command.get_short_help_str(200).rstrip('.'))}",
        f".SH SYNOPSIS\n.B {escape(ctx.command_path)}\n{escape(usage)}",
        ".SH DESCRIPTION\n" + "\n.PP\n".join(prose),
    ]
    if isinstance(command, click.Group):
        rows = [
            f".TP\n.BR {escape(f'{name}-{word}')} (1)\n{escape(command.get_command(ctx, word).get_short_help_str(200))}"
            for word in command.list_commands(ctx)
        ]
        parts.append(".SH COMMANDS\n" + "\n".join(rows))
    if own:
        parts.append(".SH OPTIONS\n" + "\n".join(options(ctx, own)))
    parts.append(".SH GLOBAL OPTIONS\n" + "\n".join(options(ctx, list(GLOBAL_OPTIONS))))
    if examples:
        parts.append(".SH EXAMPLES\n.nf\n" + "\n".join(escape(line) for line in examples) + "\n.fi")
    parts.append(f".SH EXIT STATUS\n{escape(EXIT_STATUS)}")
    if not isinstance(command, click.Group):
        parts.append(".SH SEE ALSO\n.BR mullion\\-vhd (1)")
    return "\n".join(parts) + "\n"


def contexts() -> Iterator[click.Context]:
    """`mullion vhd` and its commands."""
    top = click.Context(root, info_name="mullion")
    group = root.get_command(top, "vhd")
    assert isinstance(group, click.Group)
    parent = click.Context(group, info_name="vhd", parent=top)
    yield parent
    for word in group.list_commands(parent):
        command = group.get_command(parent, word)
        assert command is not None
        yield click.Context(command, info_name=word, parent=parent)


def pages() -> Mapping[str, str]:
    """The text of every page, by file name."""
    return {f"{ctx.command_path.replace(' ', '-')}.1": page(ctx) for ctx in contexts()}


def main() -> int:
    wanted = pages()
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.1")} if FOLDER.is_dir() else {}
    if there == wanted:
        return 0
    if "--check" in sys.argv[1:]:
        print(f"{FOLDER} is out of date: run python tools/generate_man_pages.py", file=sys.stderr)
        return 1
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in there.keys() - wanted.keys():
        (FOLDER / name).unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
