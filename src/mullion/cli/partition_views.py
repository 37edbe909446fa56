"""How partitions look in print."""

from __future__ import annotations

from collections.abc import Sequence

from mullion.base.units import format_duration, format_size
from mullion.cli.disk_limits import limits_words
from mullion.cli.face import Face
from mullion.cli.tables import NOTHING, fields, printable, state_word, table
from mullion.model.states import PartitionState
from mullion.model.views import PartitionView


def overview(face: Face, views: Sequence[PartitionView]) -> str:
    """One line for each partition."""
    rows = [
        (
            view.name,
            state_word(face, view.state.value),
            str(view.definition.vcpus),
            format_size(view.definition.memory_bytes),
            view.accelerator or NOTHING,
            "answers" if view.agent_answers else NOTHING,
            printable(view.reason or ", ".join(view.guest_addresses)) or NOTHING,
        )
        for view in views
    ]
    return table(("NAME", "STATE", "VCPUS", "MEMORY", "ACCEL", "AGENT", "NOTE"), rows, right=(2, 3))


def details(face: Face, view: PartitionView) -> str:
    """Everything about a partition, the most asked for first."""
    wanted = view.definition
    state = state_word(face, view.state.value)
    disks = _disks(view)
    boot = wanted.direct_boot
    return fields(
        [
            ("name", view.name),
            ("description", printable(wanted.description)),
            ("state", state if not view.reason else f"{state}: {printable(view.reason)}"),
            ("", f"→ {face.as_invoked(view.remedy)}" if view.remedy else ""),
            ("exit status", "" if view.exit_status is None else str(view.exit_status)),
            ("log", _lines(view.log_excerpt)),
            (
                "saved",
                f"{view.saved.saved_at}, {format_size(view.saved.file_bytes)} in {view.saved.path}"
                if view.saved
                else "",
            ),
            ("accelerator", _with_reason(view.accelerator, view.accelerator_reason)),
            ("started", view.started_at or ""),
            ("boot time", "" if view.boot_s is None else f"{format_duration(view.boot_s)} until the agent answered"),
            ("agent", ("answers" if view.agent_answers else "does not answer") if _is_up(view) else ""),
            ("addresses", ", ".join(view.guest_addresses)),
            (
                "machine",
                f"{wanted.vcpus} vCPU, {format_size(wanted.memory_bytes)}, "
                f"{wanted.machine.value}, {wanted.firmware.value}{', TPM' if wanted.tpm else ''}",
            ),
            ("kernel", f"{boot.kernel} {boot.command_line}".rstrip() if boot else ""),
            ("disks", disks),
            ("labels", ", ".join(f"{key}={value}" for key, value in sorted(wanted.labels.items()))),
            ("uuid", view.uuid),
            ("processes", _processes(view)),
            ("folder", view.folder),
            ("console log", view.console_log),
        ]
    )


def _disks(view: PartitionView) -> str:
    """Each disk with its chain or, while the partition is off, with what the definition names."""
    attached = {disk.id: disk for disk in view.disks}
    lines = []
    for disk in view.definition.disks:
        present = attached.get(disk.id)
        facts = [disk.bus.value, *([present.transport] if present else []), *(["read only"] if disk.read_only else [])]
        lines.append(f"{disk.id} ({', '.join(facts)}): {chain_line(present.chain if present else (disk.path,))}")
        if disk.limits is not None:
            lines.append(f"  capped at {limits_words(disk.limits)}")
    if view.definition.disk_limits is not None:
        lines.append(f"all together capped at {limits_words(view.definition.disk_limits)}")
    return "\n".join(lines)


def chain_line(chain: Sequence[str]) -> str:
    """`/pool/web.vhd ← /images/demo.vhd`: the top, then what it differs from."""
    return " ← ".join(printable(path) for path in chain)


def outcome(face: Face, view: PartitionView) -> str:
    """What an action led to, in one line."""
    facts = [state_word(face, view.state.value)]
    if view.reason:
        facts.append(printable(view.reason))
    elif view.state is PartitionState.RUNNING and view.accelerator:
        facts.append(view.accelerator)
    return f"{view.name}: {', '.join(facts)}"


def _is_up(view: PartitionView) -> bool:
    return view.state in (PartitionState.RUNNING, PartitionState.PAUSED)


def _with_reason(accelerator: str | None, reason: str | None) -> str:
    if accelerator is None:
        return ""
    return f"{accelerator}: {reason}" if reason else accelerator


def _processes(view: PartitionView) -> str:
    known = (("qemu", view.qemu_pid), ("provider", view.provider_pid))
    return ", ".join(f"{name} {pid}" for name, pid in known if pid is not None)


def _lines(text: str | None) -> str:
    return "\n".join(printable(line) for line in (text or "").strip().splitlines())
