"""What every command shares: the global options, the client, and how results, notes and errors are printed.

Results go to standard output; progress, notes and errors to standard error, so that a pipe carries results only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TextIO, TypeVar

import click

from mullion.base.errors import InvalidError, MullionError, OperationFailedError

if TYPE_CHECKING:
    from mullion.base.paths import HostPaths
    from mullion.base.settings import Settings
    from mullion.client import Client

MODULE_INVOCATION: Final = "python -m mullion.cli"
_Callback = TypeVar("_Callback", bound=Callable[..., object])


@dataclass(slots=True)
class Face:
    """The global options of one call, and what follows from them."""

    output: str = "table"
    socket: str | None = None
    url: str | None = None
    token_file: str | None = None
    quiet: bool = False
    no_color: bool = False
    patience_s: float = 60.0
    invoked: str = "mullion"
    overrides: dict[str, str | int] = field(default_factory=dict)
    connect: Callable[[Face], Client] | None = None
    _client: Client | None = None

    @property
    def is_json(self) -> bool:
        return self.output == "json"

    @property
    def settings(self) -> Settings:
        from mullion.base.settings import Settings

        return Settings.load(os.environ, **self.overrides)

    @property
    def paths(self) -> HostPaths:
        from mullion.base.paths import HostPaths

        settings = self.settings
        run_dir = settings.run_dir if self.socket is None else os.path.dirname(os.path.abspath(self.socket))
        return HostPaths(os.path.abspath(settings.data_dir), os.path.abspath(run_dir))

    @property
    def client(self) -> Client:
        """The client of the service that the options name; made at the first use.

        Raises: UnavailableError when no service answers; InvalidError when the options do not fit together.
        """
        if self._client is None:
            self._client = (self.connect or _connect)(self)
        return self._client

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def command(self, *words: str) -> str:
        """A command line that the reader can paste: the program as it was called, the same service, and the words."""
        import shlex

        chosen: list[str] = []
        for option, value in (("--socket", self.socket), ("--url", self.url), ("--token-file", self.token_file)):
            if value is not None:
                chosen += [option, value]
        return f"{self.invoked} {shlex.join([*words, *chosen])}"

    def note(self, text: str) -> None:
        """Say something that is neither result nor error; kept back by --quiet and by --format json."""
        if not self.quiet and not self.is_json:
            click.echo(text, err=True)

    def say(self, text: str = "") -> None:
        """Print a result meant for people."""
        _print(text)

    def emit_json(self, value: object) -> None:
        """Print views as JSON."""
        _print(_encoded(value, indent=2))

    def emit_json_line(self, value: object) -> None:
        """Print one view as one line of JSON."""
        _print(_encoded(value))

    def style(self, text: str, color: str, stream: TextIO | None = None) -> str:
        """The text in a colour, when the stream is a terminal whose owner wants colours."""
        if not self.has_color(stream or sys.stdout):
            return text
        return click.style(text, fg=color)

    def has_color(self, stream: TextIO) -> bool:
        return (
            not self.no_color
            and not os.environ.get("NO_COLOR")
            and os.environ.get("TERM") != "dumb"
            and stream.isatty()
        )

    def print_error(self, error: MullionError) -> None:
        """Say what happened and what to do next, or the same as an ErrorView."""
        if self.is_json:
            click.echo(_encoded(error.to_wire()), err=True)
            return
        click.echo(f"{self.style('mullion:', 'red', sys.stderr)} {error.message}", err=True)
        if error.remedy:
            click.echo(f"  → {self.as_invoked(error.remedy)}", err=True)

    def as_invoked(self, text: str) -> str:
        """The text with commands such as `mullion serve` written the way this program was called."""
        if self.invoked == "mullion":
            return text
        import re

        from mullion.cli.root import ENTRIES

        return re.sub(rf"(?<![\w/.-])mullion (?=(?:{'|'.join(ENTRIES)})\b)", lambda _: f"{self.invoked} ", text)


def _encoded(value: object, indent: int = 0) -> bytes:
    """JSON. The bytes of a path that is no UTF-8 become `\\udc80` to `\\udcff`, which Python's `json` reads back."""
    import msgspec

    try:
        encoded = msgspec.json.encode(value)
    except UnicodeEncodeError:
        import json

        return json.dumps(msgspec.to_builtins(value), indent=indent or None).encode()
    return msgspec.json.format(encoded, indent=indent) if indent else encoded


def _print(text: str | bytes) -> None:
    """A result, on standard output. Raises: BrokenPipeError; OperationFailedError when it cannot be written there."""
    try:
        click.echo(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OperationFailedError(
            f"standard output cannot be written: {error.strerror or error}",
            remedy="See where the output goes: that file, or its filesystem, refuses it.",
        ) from error


def exit_code_of(error: MullionError) -> int:
    """The exit code, of an error of a kind that only the service knows as well."""
    code = error.to_wire()["exit_code"]
    assert isinstance(code, int)
    return code


pass_face: Final = click.make_pass_decorator(Face, ensure=True)


def _connect(face: Face) -> Client:
    from mullion.client import Client

    if face.url is not None:
        if face.socket is not None:
            raise InvalidError("--socket and --url exclude each other", remedy="Give one of the two.")
        return Client(face.url, token=read_token(face), timeout_s=face.patience_s)
    if face.token_file is not None:
        raise InvalidError("--token-file without --url", remedy="Tokens are for --url; a socket knows its caller.")
    return Client(socket_path=face.socket or face.paths.api_socket, timeout_s=face.patience_s)


def read_token(face: Face) -> str:
    """The token for --url, from --token-file or from where the service of this host keeps its own."""
    path = face.token_file or face.paths.token_file
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError as error:
        raise InvalidError(
            f"the token cannot be read: {path}: {error.strerror}",
            remedy="Name a file that holds a token with --token-file.",
            path=path,
        ) from error


def how_invoked(argv0: str, search_path: str) -> str:
    """The program as its caller has to type it: `mullion` when the search path leads to it, else its path."""
    import shlex

    if os.path.basename(argv0) == "__main__.py":
        return MODULE_INVOCATION
    path = os.path.abspath(argv0)
    for folder in search_path.split(os.pathsep):
        candidate = os.path.abspath(os.path.join(folder, "mullion"))
        if os.access(candidate, os.X_OK):
            if candidate == path:
                return "mullion"
            break
    here = os.getcwd()
    if not path.startswith(f"{here}/"):
        return shlex.quote(path)
    relative = os.path.relpath(path, here)
    return shlex.quote(relative if "/" in relative else f"./{relative}")


def _store(ctx: click.Context, param: click.Parameter, value: object) -> None:
    if value is None or value is False:
        return
    assert param.name is not None
    setattr(ctx.ensure_object(Face), param.name.removeprefix("global_"), value)


def _option(*names: str, **attributes: object) -> click.Option:
    return click.Option(names, expose_value=False, callback=_store, **attributes)  # type: ignore[arg-type]


GLOBAL_OPTIONS: Final[Sequence[click.Option]] = (
    _option(
        "--format",
        "global_output",
        type=click.Choice(["table", "json"]),
        help="Print for people (table, the default) or for programs (json).",
    ),
    _option("--socket", "global_socket", metavar="PATH", help="The service's unix socket, if not the usual one."),
    _option("--url", "global_url", metavar="URL", help="The service's address, for instance http://127.0.0.1:8440."),
    _option("--token-file", "global_token_file", metavar="PATH", help="The file with the token for --url."),
    _option("--quiet", "-q", "global_quiet", is_flag=True, help="No progress and no notes: results and errors only."),
    _option("--no-color", "global_no_color", is_flag=True, help="No colours; the variable NO_COLOR does the same."),
)
"""Accepted by every command, before and after its name."""
