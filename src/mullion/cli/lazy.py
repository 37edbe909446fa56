"""Groups and commands of click that know the global options and import a command's module when it is called.

The table of a lazy group repeats the first line of each command's help, so that `mullion --help` imports none of them;
a test holds the two together.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

import click

from mullion.cli.face import GLOBAL_OPTIONS

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class GlobalOptions(click.Command):
    """A command that takes the global options beside its own, and lists them last."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), *self._global_options(ctx)]

    def _global_options(self, ctx: click.Context) -> list[click.Option]:
        """All but those whose name the command uses for something of its own, as `vhd serve` does `--socket`."""
        taken = {name for param in click.Command.get_params(self, ctx) for name in param.opts}
        return [option for option in GLOBAL_OPTIONS if taken.isdisjoint(option.opts)]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own = [param for param in click.Command.get_params(self, ctx) if isinstance(param, click.Option)]
        for title, options in (("Options", own), ("Global options", self._global_options(ctx))):
            records = [record for option in options if (record := option.get_help_record(ctx))]
            with formatter.section(title):
                formatter.write_dl(records)


class Command(GlobalOptions):
    """A command of the command line."""


class Group(GlobalOptions, click.Group):
    """A noun and its verbs."""

    command_class = Command

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.format_commands(ctx, formatter)
        GlobalOptions.format_options(self, ctx, formatter)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of their definition: by use, not by alphabet."""
        return list(self.commands)


class Entry(NamedTuple):
    """Where a command is (`module:attribute`) and the first line of its help."""

    target: str
    help: str


class LazyGroup(Group):
    """A group whose commands are known by a table."""

    def __init__(self, *args: object, entries: Mapping[str, Entry], **attributes: object) -> None:
        super().__init__(*args, **attributes)  # type: ignore[arg-type]  # click's own parameters, passed through
        self.entries = entries

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = self.entries.get(cmd_name)
        if entry is None:
            return None
        module, _, attribute = entry.target.partition(":")
        return cast(click.Command, getattr(importlib.import_module(module), attribute))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in self.entries.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        own = [
            CompletionItem(name, help=entry.help) for name, entry in self.entries.items() if name.startswith(incomplete)
        ]
        return own or click.Command.shell_complete(self, ctx, incomplete)
