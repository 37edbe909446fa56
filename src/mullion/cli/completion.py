"""`mullion completion`: the script that teaches a shell to complete commands, options and names."""

from __future__ import annotations

import click

from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Command


@click.command(cls=Command, short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
@pass_face
def completion(face: Face, ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash   mullion completion bash > /etc/bash_completion.d/mullion
    zsh    mullion completion zsh > "${fpath[1]}/_mullion"
    fish   mullion completion fish > ~/.config/fish/completions/mullion.fish
    """
    from click.shell_completion import ShellComplete, get_completion_class

    made = get_completion_class(shell)
    assert made is not None
    # ShellComplete.source, not the bash class's own: that one runs bash to see its version.
    face.say(ShellComplete.source(made(ctx.find_root().command, {}, "mullion", "_MULLION_COMPLETE")))
