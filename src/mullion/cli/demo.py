"""`mullion demo`: from nothing to a running guest, and what to type next. Runs any number of times."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import click

from mullion.base.errors import DeadlineError, NotFoundError, OperationFailedError
from mullion.base.units import format_duration
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Command
from mullion.model.states import PartitionState

if TYPE_CHECKING:
    from mullion.model.views import PartitionView, StatusView

NAME: Final = "demo"
_AGENT_DEADLINE_S: Final = 180.0
_PAUSE_S: Final = 0.2
_NEXT: Final = (
    (("partition", "console", NAME), "log in on its console (Ctrl-] leaves)"),
    (("partition", "show", NAME), "everything about it"),
    (("partition", "stop", NAME), "shut it down"),
    (("events",), "what has happened"),
    (("stop", "--with-partitions"), "end everything"),
)


@click.command(cls=Command, short_help="Start the service and a first partition, and say what to try next.")
@pass_face
def demo(face: Face) -> None:
    """Start the service and a first partition, and say what to try next.

    Builds the image `demo` if it is not there, creates partition `demo` on a differencing disk whose parent is that
    image, starts it and waits until its agent answers. The service and the partition go on. What is there already is
    used as it is.
    """
    begun = time.monotonic()
    status, started = _service(face)
    face.note(f"service: {'started' if started else 'runs'} (pid {status.pid})")
    if all(image.name != NAME for image in face.client.images()):
        from mullion.cli.progress import follow

        face.note("image demo: building from the distribution's packages")
        follow(face, face.client.build_image(NAME))
    _run(face, _find_or_create(face))
    view = _wait_for_agent(face)
    if face.is_json:
        face.emit_json({"status": status, "partition": view})
    else:
        face.say(report(face, status, view, time.monotonic() - begun))


def _service(face: Face) -> tuple[StatusView, bool]:
    from mullion.cli.service import ensure_service

    return ensure_service(face)


def _find_or_create(face: Face) -> PartitionView:
    try:
        return face.client.partition(NAME)
    except NotFoundError:
        from mullion.cli.creation import create, definition_document
        from mullion.cli.values import parse_disk_spec

        disks = (parse_disk_spec(f"{NAME},parent=image:{NAME}"),)
        return create(face, definition_document(NAME, disks, {}), disks)


def _run(face: Face, view: PartitionView) -> None:
    """Bring the partition to run, from whatever state it is in."""
    from mullion.cli.progress import follow

    action = {
        PartitionState.STOPPED: "start",
        PartitionState.FAILED: "start",
        PartitionState.PAUSED: "resume",
    }.get(view.state)
    if action is not None:
        follow(face, face.client.partition_action(NAME, action))


def _wait_for_agent(face: Face) -> PartitionView:
    deadline = time.monotonic() + _AGENT_DEADLINE_S
    told = False
    while True:
        view = face.client.partition(NAME)
        if view.state is PartitionState.RUNNING and view.agent_answers:
            return view
        if view.state in (PartitionState.FAILED, PartitionState.STOPPED):
            raise OperationFailedError(
                f"partition {NAME} is {view.state.value}: {view.reason or 'it ended by itself'}",
                remedy=view.remedy or f"See {face.command('partition', 'show', NAME)}",
            )
        if time.monotonic() > deadline:
            raise DeadlineError(
                f"the guest's agent did not answer within {_AGENT_DEADLINE_S:g} s",
                remedy=f"See what the guest says: {face.command('partition', 'console', NAME)}",
            )
        if not told:
            face.note(f"partition {NAME}: waiting until the guest's agent answers")
            told = True
        time.sleep(_PAUSE_S)


def report(face: Face, status: StatusView, view: PartitionView, elapsed_s: float) -> str:
    from mullion.cli.partition_views import chain_line
    from mullion.cli.tables import fields, state_word

    next_commands = [(face.command(*words), meaning) for words, meaning in _NEXT]
    accelerator = view.accelerator or status.accelerator
    return "\n".join(
        [
            fields(
                [
                    ("partition", f"{NAME} is {state_word(face, view.state.value)}, its agent answers"),
                    ("accelerator", f"{accelerator}: {view.accelerator_reason or status.accelerator_reason}"),
                    ("disk", "\n".join(chain_line(disk.chain) for disk in view.disks)),
                    (
                        "boot time",
                        "" if view.boot_s is None else f"{format_duration(view.boot_s)} until the agent answered",
                    ),
                    ("all of this", format_duration(elapsed_s)),
                    ("API", "\n".join(filter(None, (status.api_socket, status.api_url)))),
                    ("files", f"{view.folder}\n{status.data_dir}"),
                ]
            ),
            "",
            "Try next:",
            *(f"  {line}" for line in fields(next_commands).splitlines()),
        ]
    )
