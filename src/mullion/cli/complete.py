"""What the shell completes after a command: names that the service knows, fetched quickly, and in silence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from mullion.cli.face import Face

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from click.shell_completion import CompletionItem

    from mullion.client import Client

    Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


_PATIENCE_S: Final = 1.0


def _completer(fetch: Callable[[Client, click.Context], Iterable[tuple[str, str]]]) -> Completer:
    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        from mullion.base.errors import MullionError

        face = ctx.ensure_object(Face)
        face.patience_s = _PATIENCE_S
        try:
            found = fetch(face.client, ctx)
            return [CompletionItem(word, help=note) for word, note in found if word.startswith(incomplete)]
        except (MullionError, KeyError):
            return []  # a prompt is no place for an error; the command itself will say it
        finally:
            face.close()

    return complete


partitions = _completer(lambda client, _: [(view.name, view.state.value) for view in client.partitions()])
disks = _completer(lambda client, _: [(view.name, view.type) for view in client.disks()])
operations = _completer(lambda client, _: [(view.id, f"{view.kind} {view.target}") for view in client.operations()])
repositories = _completer(lambda client, _: [(view.name, view.url) for view in client.repositories()])
checkpoints = _completer(
    lambda client, ctx: [
        (view.name, view.created_at) for view in client.checkpoints(str(ctx.params["partition"])).checkpoints
    ]
)
exports = _completer(
    lambda client, ctx: [
        (view.id, view.disks[0].uri if view.disks else "")
        for view in client.exports()
        if view.partition == ctx.params["partition"]
    ]
)
checkpoint_schedules = _completer(
    lambda client, ctx: [(view.name, view.rule) for view in client.checkpoint_schedules(str(ctx.params["partition"]))]
)
backup_schedules = _completer(
    lambda client, ctx: [(view.name, view.rule) for view in client.backup_schedules(str(ctx.params["partition"]))]
)
images = _completer(lambda client, _: [(view.name, view.path) for view in client.images()])
