"""The service itself: `serve`, `stop`, `status`, `version`."""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import time
from typing import TYPE_CHECKING, Final

import click

from mullion.base.errors import DeadlineError, InvalidError, MullionError, OperationFailedError, UnavailableError
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Command

if TYPE_CHECKING:
    from collections.abc import Callable

    from mullion.base.paths import HostPaths
    from mullion.base.process import ProcessIdentity
    from mullion.model.views import StatusView

DAEMON: Final = "mullion.daemon"
_START_DEADLINE_S: Final = 30.0
_STOP_DEADLINE_S: Final = 30.0
_FIRST_PAUSE_S: Final = 0.02
_LONGEST_PAUSE_S: Final = 0.25
_EXCERPT_BYTES: Final = 4000
_DATA_DIR_MODE: Final = 0o711  # partitions of users of their own pass through it to what is theirs
_ERROR: Final = re.compile(r"^mullion: (?P<message>.*)(?:\n  → (?P<remedy>.*))?$", re.MULTILINE)


def daemon_argv(*words: str) -> list[str]:
    """The command line of the daemon. -P keeps the working folder out of Python's search path."""
    return [sys.executable, "-P", "-m", DAEMON, *words]


def daemon_environment(face: Face) -> dict[str, str]:
    """Our environment, with the settings of the command line as variables, which outrank every other source.

    Folders are absolute: the daemon does not run where we do.
    """
    from mullion.base.settings import SETTINGS

    paths = face.paths
    overrides = {**face.overrides, "data_dir": paths.data_dir, "run_dir": paths.run_dir}
    chosen = {s.variable: str(overrides[s.name]) for s in SETTINGS if s.name in overrides}
    return {**os.environ, **chosen}


def settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for every setting: `--data-dir` for `data_dir`."""
    from mullion.base.settings import SETTINGS

    for setting in reversed(SETTINGS):
        default = "two per core" if setting.name == "boot_slots" else setting.default
        choices = setting.unit.split("|")
        command = click.option(
            f"--{setting.name.replace('_', '-')}",
            setting.name,
            type=click.Choice(choices) if len(choices) > 1 else setting.kind,
            metavar=None if len(choices) > 1 else setting.unit.upper().replace(" ", "-"),
            help=f"{setting.help} Default: {default}." if not setting.name.endswith("_dir") else setting.help,
        )(command)
    return command


@click.command(cls=Command, short_help="Run the service of this host.")
@click.option(
    "--detach/--foreground", default=False, help="Start it in the background and return when it answers, or stay."
)
@settings_options
@pass_face
def serve(face: Face, /, detach: bool, **given: str | int | None) -> None:
    """Run the service of this host.

    It stays in the foreground until ^C or SIGTERM; partitions go on without it and are found again at the next start.
    Settings come from these options, from variables such as MULLION_DATA_DIR, from mullion.toml, or by default.
    """
    for name, value in given.items():
        if value is not None:
            face.overrides[name] = value
    _ = face.settings  # refuses a wrong setting here, where the reader still sees it
    if detach:
        view, started = ensure_service(face)
        if face.is_json:
            face.emit_json(view)
            return
        face.say(f"the service {'runs' if started else 'was running already'} (pid {view.pid})")
        face.say(describe_addresses(view))
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, daemon_argv("serve"), daemon_environment(face))  # noqa: S606 - becomes the daemon


def describe_addresses(view: StatusView) -> str:
    from mullion.cli.tables import fields

    return fields([("API", "\n".join(filter(None, (view.api_socket, view.api_url)))), ("files", view.data_dir)])


def ensure_service(face: Face) -> tuple[StatusView, bool]:
    """The service's status, after starting the service in the background if none answered; and whether it did so.

    Raises: UnavailableError with the end of its log when it ends at once; DeadlineError when it does not
    answer in time.
    """
    try:
        return face.client.status(), False
    except UnavailableError:
        if face.url is not None or face.socket is not None:
            raise
        face.close()
    from mullion.base.process import read_identity, spawn

    paths = face.paths
    try:
        os.makedirs(paths.data_dir, mode=_DATA_DIR_MODE, exist_ok=True)
        log_begins = os.path.getsize(paths.log) if os.path.exists(paths.log) else 0
        process = spawn(daemon_argv("serve"), log_path=paths.log, env=daemon_environment(face), cwd="/")
    except OSError as error:
        raise InvalidError(
            f"the data folder {paths.data_dir} cannot be used: {error.strerror}: {error.filename}",
            remedy="Choose one that you may write to: mullion serve --data-dir FOLDER, or MULLION_HOME=FOLDER.",
            path=paths.data_dir,
        ) from error
    try:
        return _wait_until_it_answers(face, os.pidfd_open(process.pid)), True
    except (UnavailableError, DeadlineError) as error:
        first = read_identity(paths.service_lock)
        if process.poll() is not None and first is not None and (pidfd := first.open_pidfd()) is not None:
            return _wait_until_it_answers(face, pidfd), False  # another start came first, and is not ready yet
        raise why_it_ended(process.poll(), log_excerpt(paths.log, log_begins), paths.log) from error


def why_it_ended(status: int | None, excerpt: str, log_path: str) -> MullionError:
    """The error of a service that did not come up: its own last words, if any. `status` None: it still runs."""
    spoken = list(_ERROR.finditer(excerpt))
    if status is not None and spoken:
        fields = spoken[-1].groupdict()
        return UnavailableError(
            f"the service did not start: {fields['message']}", remedy=fields["remedy"], remote_exit_code=status
        )
    ending = "does not answer" if status is None else f"ended at once with exit status {status}"
    return UnavailableError(
        f"the service {ending}{f': {excerpt}' if excerpt else ''}",
        remedy=f"Its log is {log_path}; `mullion doctor` checks the host.",
    )


def _wait_until_it_answers(face: Face, pidfd: int) -> StatusView:
    """Ask until there is an answer; wake at once when the process ends. Closes the descriptor."""
    deadline = time.monotonic() + _START_DEADLINE_S
    pause_s = _FIRST_PAUSE_S
    try:
        while True:
            ended, _, _ = select.select([pidfd], [], [], pause_s)
            try:
                return face.client.status()
            except UnavailableError:
                face.close()
                if ended:
                    raise
            if time.monotonic() > deadline:
                raise DeadlineError(f"the service did not answer within {_START_DEADLINE_S:g} s")
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    finally:
        os.close(pidfd)


def log_excerpt(path: str, begins: int) -> str:
    """The last lines that a log gained after an offset."""
    try:
        with open(path, "rb") as log:
            log.seek(max(begins, os.fstat(log.fileno()).st_size - _EXCERPT_BYTES))
            return log.read().decode(errors="replace").strip()
    except FileNotFoundError:
        return ""


@click.command(cls=Command, short_help="End the service; partitions go on without it.")
@click.option("--with-partitions", is_flag=True, help="Shut all partitions down first, each as its guest allows.")
@pass_face
def stop(face: Face, with_partitions: bool) -> None:
    """End the service; partitions go on without it.

    A service that does not run is no error.
    """
    from mullion.base.process import read_identity

    if face.url is not None:
        raise InvalidError("a service is stopped on its own host only", remedy="Leave out --url.")
    paths = face.paths
    identity = read_identity(paths.service_lock)
    if identity is None or not identity.is_alive:
        if with_partitions:
            _refuse_without_service(paths)
        _say_stopped(face, "the service does not run", stopped=())
        return
    stopped = _stop_partitions(face) if with_partitions else ()
    _end(identity)
    _say_stopped(face, "the service has ended", stopped=stopped)


def _say_stopped(face: Face, text: str, stopped: tuple[str, ...]) -> None:
    if face.is_json:
        face.emit_json({"service": "stopped", "partitions": list(stopped)})
    else:
        face.say(text)


def _refuse_without_service(paths: HostPaths) -> None:
    """Without the service nobody can shut partitions down gracefully: say so if any of them may be running."""
    from mullion.base.process import read_identity

    folder = f"{paths.run_dir}/p"
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    running = []
    for name in names:
        identity = read_identity(paths.partition(name).qemu_identity)
        if identity is not None and identity.is_alive:
            running.append(name)
    if running:
        raise UnavailableError(
            f"the service does not run, but partitions do: {', '.join(running)}",
            remedy="Start it with `mullion serve --detach`, then stop again.",
        )


def _stop_partitions(face: Face) -> tuple[str, ...]:
    """Shut down all that run, at the same time; report each, fail after all have been tried."""
    from mullion.cli.progress import follow
    from mullion.model.states import PartitionState

    names = [p.name for p in face.client.partitions() if p.state not in (PartitionState.STOPPED, PartitionState.FAILED)]
    begun = [(name, face.client.partition_action(name, "stop")) for name in names]
    failed: list[str] = []
    for name, operation in begun:
        try:
            follow(face, operation)
            face.note(f"{name}: stopped")
        except MullionError as error:
            failed.append(name)
            face.print_error(error)
    if failed:
        raise OperationFailedError(
            f"these partitions did not stop: {', '.join(failed)}",
            remedy="Turn them off with `mullion partition stop --force NAME`; the service goes on until then.",
        )
    return tuple(names)


def _end(identity: ProcessIdentity) -> None:
    """Ask a process to end and wait until it has.

    Raises: DeadlineError.
    """
    pidfd = identity.open_pidfd()
    if pidfd is None:
        return
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        ended, _, _ = select.select([pidfd], [], [], _STOP_DEADLINE_S)
    except ProcessLookupError:
        return
    finally:
        os.close(pidfd)
    if not ended:
        raise DeadlineError(
            f"the service (pid {identity.pid}) did not end within {_STOP_DEADLINE_S:g} s",
            remedy=f"Look into its log; `kill -9 {identity.pid}` ends it, and partitions go on.",
        )


@click.command(cls=Command, short_help="Show the service and its host at a glance.")
@pass_face
def status(face: Face) -> None:
    """Show the service and its host at a glance."""
    view = face.client.status()
    if face.is_json:
        face.emit_json(view)
        return
    from mullion.base.units import format_duration
    from mullion.cli.tables import fields, state_word

    counts = ", ".join(f"{count} {state_word(face, state)}" for state, count in view.partitions.items() if count)
    face.say(
        fields(
            [
                ("service", f"mullion {view.version} on {view.host_name}, pid {view.pid}"),
                ("up", f"{format_duration(view.uptime_s)}, since {view.started_at}"),
                ("accelerator", f"{view.accelerator}: {view.accelerator_reason}"),
                ("partitions", counts or "none"),
                ("API", "\n".join(filter(None, (view.api_socket, view.api_url)))),
                ("files", f"{view.data_dir}\n{view.run_dir}"),
            ]
        )
    )


@click.command(cls=Command, short_help="Print the version.")
@pass_face
def version(face: Face) -> None:
    """Print the version."""
    from mullion import __version__
    from mullion.base.implementation import describe

    if face.is_json:
        face.emit_json({"version": __version__, "python": _python_version(), "implementation": describe()})
    else:
        face.say(version_line())


def version_line() -> str:
    from mullion import __version__
    from mullion.base.implementation import describe

    return f"mullion {__version__} (Python {_python_version()}, {describe()})"


def _python_version() -> str:
    return ".".join(str(part) for part in sys.version_info[:3])
