"""`mullion doctor`: what this host offers, what is missing, what mends it. Works without the service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from mullion.base.errors import OperationFailedError, UnavailableError
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Command

if TYPE_CHECKING:
    from mullion.model.views import CheckView

_DEADLINE_S: Final = 60.0
_MISSING: Final = "missing"


@click.command(cls=Command, short_help="Check this host: what it offers, what is missing, what mends it.")
@click.pass_context
@pass_face
def doctor(face: Face, ctx: click.Context) -> None:
    """Check this host: what it offers, what is missing, what mends it.

    Says which accelerator is chosen and why. Works without the service. Exits with 7 when something is missing.
    """
    checks = host_checks(face)
    if face.is_json:
        face.emit_json(checks)
    else:
        face.say(render(face, checks))
    if any(check.verdict == _MISSING for check in checks):
        ctx.exit(UnavailableError.exit_code)


def host_checks(face: Face) -> tuple[CheckView, ...]:
    """Ask the daemon's program, which knows the host; the command line knows only the API.

    Raises: OperationFailedError when it does not print checks.
    """
    import shlex

    import msgspec

    from mullion.base.process import run
    from mullion.cli.service import daemon_argv, daemon_environment
    from mullion.model.views import CheckView

    argv = daemon_argv("doctor", "--format", "json")
    done = run(argv, timeout_s=_DEADLINE_S, env=daemon_environment(face), check=False)
    try:
        return msgspec.json.decode(done.stdout, type=tuple[CheckView, ...])
    except msgspec.MsgspecError as error:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise OperationFailedError(
            f"the host check ended with exit status {done.returncode}: {said}",
            remedy=f"Run it by hand: {shlex.join(argv)}",
        ) from error


def render(face: Face, checks: tuple[CheckView, ...]) -> str:
    from mullion.cli.tables import state_word, width_of

    names = max((width_of(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        verdict = state_word(face, check.verdict)
        lines.append(f"{verdict}{' ' * (7 - len(check.verdict))}  {check.name:{names}}  {check.detail}")
        if check.remedy and check.verdict != "ok":
            lines.append(f"{' ' * (names + 11)}→ {face.as_invoked(check.remedy)}")
    missing = sum(check.verdict == _MISSING for check in checks)
    if missing:
        lines += ["", f"{missing} missing: run the commands marked with →, then look again."]
    else:
        lines += ["", "Nothing is missing."]
    return "\n".join(lines)
