"""REST of a partition's provider: what it serves, the trace of its requests, injected faults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

from litestar import Response, delete, get, post
from litestar.params import JSONBody, QueryParameter
from msgspec import Meta, Struct, convert

from mullion.model.views import OperationView, ProviderDiskView, ProviderView, TraceView
from mullion.parent.api import PathName, Service, accepted
from mullion.services.partition.controller import PartitionController

_TAGS: Final = ["providers"]
_Disk = Annotated[str | None, QueryParameter(description="the id of a disk; all of them without it")]


class TraceOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """`disk`: the id of a disk; all of them without it."""

    disk: str | None = None


class FaultOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """`rules` as `mullion provider fault --help` says; none takes all of the disk away."""

    disk: str
    rules: Annotated[list[dict[str, Any]], Meta(max_length=16)]


class ResizeOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """`size_bytes`: the new size, a multiple of 512."""

    size_bytes: Annotated[int, Meta(gt=0, le=1 << 41)]


@get("/1.0/partitions/{name:str}/provider", tags=_TAGS)
async def show_provider(partitions: Service[PartitionController], name: PathName) -> ProviderView:
    """The process that serves its disks: caps, and how long requests waited for them."""
    return _present(await partitions.find(name).ask_provider("status"))


@post("/1.0/partitions/{name:str}/provider/trace", tags=_TAGS, status_code=200)
async def start_trace(
    partitions: Service[PartitionController], name: PathName, data: JSONBody[TraceOptions]
) -> TraceView:
    """Begin to record requests. A trace that nobody reads for 30 s ends by itself."""
    return convert(await partitions.find(name).ask_provider("trace", do="start", disk=data.disk), TraceView)


@get("/1.0/partitions/{name:str}/provider/trace", tags=_TAGS)
async def read_trace(partitions: Service[PartitionController], name: PathName, disk: _Disk = None) -> TraceView:
    """Take what was recorded since the last look, at most 500 requests."""
    return convert(await partitions.find(name).ask_provider("trace", do="read", disk=disk), TraceView)


@delete("/1.0/partitions/{name:str}/provider/trace", tags=_TAGS)
async def stop_trace(partitions: Service[PartitionController], name: PathName, disk: _Disk = None) -> None:
    """End the recording."""
    await partitions.find(name).ask_provider("trace", do="stop", disk=disk)


@post("/1.0/partitions/{name:str}/provider/faults", tags=_TAGS, status_code=200)
async def set_faults(
    partitions: Service[PartitionController], name: PathName, data: JSONBody[FaultOptions]
) -> ProviderView:
    """Have a disk fail, for a drill; refused unless the setting `fault_injection` is on."""
    partition = partitions.find(name)
    await partition.ask_provider("fault", disk=data.disk, rules=data.rules)
    return _present(await partition.ask_provider("status"))


@post("/1.0/partitions/{name:str}/provider/upgrade", tags=_TAGS, status_code=202)
async def upgrade_provider(partitions: Service[PartitionController], name: PathName) -> Response[OperationView]:
    """Replace it, under a guest that runs, by one of the code that is installed now."""
    return accepted(await partitions.upgrade_provider(name))


@post("/1.0/partitions/{name:str}/disks/{disk:str}/resize", tags=_TAGS, status_code=202)
async def resize_disk(
    partitions: Service[PartitionController], name: PathName, disk: PathName, data: JSONBody[ResizeOptions]
) -> Response[OperationView]:
    """Make a disk larger while the guest uses it."""
    return accepted(await partitions.resize_disk(name, disk, data.size_bytes))


def _present(status: Mapping[str, Any]) -> ProviderView:
    return ProviderView(
        partition=status["partition"],
        pid=status["pid"],
        uptime_s=status["uptime_s"],
        limits=status.get("limits", {}),
        disks=tuple(_present_disk(disk) for disk in status["disks"]),
    )


def _present_disk(disk: Mapping[str, Any]) -> ProviderDiskView:
    throttle = disk.get("throttle", {})
    transports = (disk.get("vhost_user"), disk.get("nbd"))
    return ProviderDiskView(
        id=disk["id"],
        state=disk["state"],
        chain=tuple(disk.get("chain") or (disk["path"],)),
        requests=sum(one["requests"] for one in transports if one is not None),
        limits=throttle.get("limits", {}),
        waits=throttle.get("waits", 0),
        waited_s=throttle.get("waited_s", 0.0),
        waiting=throttle.get("waiting", 0),
        faults=tuple(disk.get("faults", ())),
        is_traced=disk.get("is_traced", False),
    )


ROUTES: Final = (show_provider, start_trace, read_trace, stop_trace, set_faults, upgrade_provider, resize_disk)
