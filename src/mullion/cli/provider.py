"""`mullion provider`: the process that serves a partition's disks."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import click

from mullion.base.units import format_duration
from mullion.cli import complete
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Group
from mullion.cli.values import SizeType

if TYPE_CHECKING:
    from mullion.model.views import PartitionView, ProviderView

_LOOK_S: Final = 0.2
_KINDS: Final = ("read", "write", "flush", "discard", "write_zeroes")


@click.group(cls=Group, short_help="Look at and drill the processes that serve disks.")
def provider() -> None:
    """Look at and drill the processes that serve disks."""


@provider.command("show")
@click.argument("partition", shell_complete=complete.partitions)
@pass_face
def show_provider(face: Face, partition: str) -> None:
    """Show what a partition's provider serves, its caps, and how long requests waited for them."""
    view = face.client.provider(partition)
    if face.is_json:
        face.emit_json(view)
    else:
        face.say(_render(view))


def _render(view: ProviderView) -> str:
    import msgspec

    from mullion.cli.disk_limits import limits_words
    from mullion.cli.tables import NOTHING, fields, printable, table
    from mullion.model.definition import DiskLimits

    def words(limits: dict[str, float]) -> str:
        return limits_words(msgspec.convert(limits, DiskLimits, strict=False)) if limits else NOTHING

    facts = fields(
        [
            ("partition", view.partition),
            ("pid", str(view.pid)),
            ("up for", format_duration(view.uptime_s)),
            ("caps", words(view.limits) if view.limits else ""),
        ]
    )
    rows = [
        (
            disk.id,
            disk.state,
            str(disk.requests),
            words(disk.limits),
            f"{disk.waits}, {format_duration(disk.waited_s)}" if disk.waits else NOTHING,
            ", ".join(_fault_words(fault) for fault in disk.faults) or NOTHING,
            printable(disk.chain[0]),
        )
        for disk in view.disks
    ]
    return f"{facts}\n\n{table(('DISK', 'STATE', 'REQUESTS', 'CAPS', 'WAITED', 'FAULTS', 'TOP'), rows, right=(2,))}"


def _fault_words(fault: dict[str, object]) -> str:
    kinds = fault["kinds"]
    what = "/".join(map(str, kinds)) if isinstance(kinds, list) and kinds else "all"
    does = str(fault["error"] or f"+{fault['latency_ms']} ms")
    return f"{what} {does} ({fault['hits']} hit)"


@provider.command("upgrade")
@click.argument("partition", required=False, shell_complete=complete.partitions)
@click.option("--all", "everywhere", is_flag=True, help="Every partition that runs, one after the other.")
@pass_face
def upgrade_provider(face: Face, partition: str | None, everywhere: bool) -> None:
    """Replace a running provider by one of the code that is installed now.

    The guest goes on: its requests wait for a moment, none fails. Do it after an upgrade of Mullion.

    \b
    Examples:
      mullion provider upgrade web
      mullion provider upgrade --all
    """
    from mullion.cli.progress import follow

    if everywhere == (partition is not None):
        raise click.UsageError("Name a partition, or give --all.")
    names = [partition] if partition is not None else [view.name for view in face.client.partitions() if _is_up(view)]
    ended = []
    for name in names:
        operation = follow(face, face.client.upgrade_provider(name))
        ended.append(operation)
        result = operation.result or {}
        if not face.is_json:
            gap = f"; requests waited for {result['gap_ms']} ms" if result.get("gap_ms") is not None else ""
            face.note(f"{name}: provider {result.get('old_pid')} became {result.get('pid')}{gap}")
    if face.is_json:
        face.emit_json(ended)
    elif not names:
        face.note("No partition runs.")


def _is_up(view: PartitionView) -> bool:
    return view.state.value in ("running", "paused") and bool(view.definition.disks)


@provider.command("trace")
@click.argument("partition", shell_complete=complete.partitions)
@click.option("--disk", help="Only this disk, by its id.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="How long; without it until ^C.")
@pass_face
def trace(face: Face, *, partition: str, disk: str | None, seconds: float | None) -> None:
    """Show the requests of a partition's disks as they are answered, and a summary in the end.

    Latency is the disk's: what a request waited for a cap or in the guest is not in it. With --format json each request
    is a line of its own. While nobody looks nothing is recorded; what comes faster than it is read is counted as
    dropped.

    \b
    Examples:
      mullion provider trace web --seconds 10
      mullion --format json provider trace web --disk disk0
    """
    from mullion.cli.trace_views import TraceSummary, json_line, table_line

    client = face.client
    summary = TraceSummary()
    client.start_trace(partition, disk)
    end_s = None if seconds is None else time.monotonic() + seconds
    try:
        while True:
            is_last = end_s is not None and time.monotonic() >= end_s
            view = client.read_trace(partition, disk)
            for one in view.disks:
                summary.add(one)
                for request in one.requests:
                    face.say(json_line(one.id, request) if face.is_json else table_line(one.id, request))
            if not view.disks or (is_last and not any(one.more for one in view.disks)):
                break
            if not any(one.more for one in view.disks):
                time.sleep(_LOOK_S)
    except KeyboardInterrupt:
        face.note("")
    finally:
        client.stop_trace(partition, disk)
    if face.is_json:
        face.say(summary.json_line())
    else:
        face.say(summary.render())


@provider.command("fault")
@click.argument("partition", shell_complete=complete.partitions)
@click.argument("disk")
@click.option("--error", type=click.Choice(["EIO", "ENOSPC"]), help="What the requests are answered with.")
@click.option("--latency", "latency_ms", type=click.IntRange(1, 10_000), metavar="MS", help="How much later they end.")
@click.option("--kind", "kinds", type=click.Choice(_KINDS), multiple=True, help="Only these; may be given again.")
@click.option("--offset", type=SizeType(), default=0, metavar="SIZE", help="Only from this byte of the disk on.")
@click.option("--length", type=SizeType(), default=0, metavar="SIZE", help="And so far; to the end without it.")
@click.option("--every", type=click.IntRange(min=1), default=1, metavar="N", help="Only each Nth that fits.")
@click.option("--count", type=click.IntRange(min=0), default=0, metavar="N", help="Only N of them; all without it.")
@click.option("--none", "without", is_flag=True, help="Take the disk's faults away.")
@pass_face
def fault(
    face: Face,
    *,
    partition: str,
    disk: str,
    error: str | None,
    latency_ms: int | None,
    kinds: tuple[str, ...],
    offset: int,
    length: int,
    every: int,
    count: int,
    without: bool,
) -> None:
    """Have a disk of a partition fail or be slow on purpose, for a drill.

    It needs the setting `fault_injection` to be on, when the service and when the partition were started. A rule
    replaces those that are there; `mullion provider show` tells how often it has hit.

    \b
    Examples:
      mullion provider fault web disk0 --error EIO --kind read --offset 1G --length 64K
      mullion provider fault web disk0 --latency 200 --every 10
      mullion provider fault web disk0 --none
    """
    if without is (error is not None or latency_ms is not None):
        raise click.UsageError("give --error or --latency, or --none to take the faults away")
    rule: dict[str, object] = {
        "kinds": list(kinds),
        "offset": offset,
        "length": length,
        "error": error,
        "latency_ms": latency_ms or 0,
        "every": every,
        "count": count,
    }
    view = face.client.set_faults(partition, disk, [] if without else [rule])
    if face.is_json:
        face.emit_json(view)
    else:
        face.say(_render(view))
