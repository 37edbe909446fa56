"""REST of partitions: `/1.0/partitions` and below, and the console's websocket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Annotated, Any, Final

from litestar import Response, WebSocket, delete, get, post, put, websocket
from litestar.exceptions import WebSocketDisconnect
from litestar.params import HeaderParameter, JSONBody, QueryParameter
from msgspec import Meta, Struct

from mullion.base.errors import UnavailableError
from mullion.model.definition import PartitionDefinition
from mullion.model.views import OperationView, PartitionView
from mullion.parent.api import PathName, Service, accepted, check_match
from mullion.services.partition.controller import PartitionController

_TAGS: Final = ["partitions"]
_WEBSOCKET_GOING_AWAY: Final = 1001


class StartOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """`paused`: start with the processors stopped. `discard_state`: boot, although there is a saved state."""

    paused: bool = False
    discard_state: bool = False


class StopOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """`force`: turn off at once. `timeout_s`: how long the guest is asked first."""

    force: bool = False
    timeout_s: Annotated[float, Meta(ge=0, le=3600)] | None = None


@get("/1.0/partitions", tags=_TAGS)
async def list_partitions(partitions: Service[PartitionController]) -> list[PartitionView]:
    """All partitions of this host, by name."""
    return list(await partitions.list())


@post("/1.0/partitions", tags=_TAGS)
async def create_partition(
    partitions: Service[PartitionController], data: JSONBody[PartitionDefinition]
) -> Response[PartitionView]:
    """Define a partition; one with `power: running` is started."""
    view = await partitions.create(data)
    return Response(
        view, status_code=201, headers={"location": f"/1.0/partitions/{view.name}", "etag": f'"{view.etag}"'}
    )


@get("/1.0/partitions/{name:str}", tags=_TAGS)
async def show_partition(partitions: Service[PartitionController], name: PathName) -> PartitionView:
    """One partition: what is wanted of it, and what is."""
    return await partitions.get(name)


@put("/1.0/partitions/{name:str}", tags=_TAGS)
async def update_partition(
    partitions: Service[PartitionController],
    name: PathName,
    data: JSONBody[PartitionDefinition],
    if_match: Annotated[str | None, HeaderParameter(name="If-Match")] = None,
) -> PartitionView:
    """Replace the definition; all but `power` and caps waits for the next start. If-Match takes the view's `etag`."""
    check_match(if_match, (await partitions.get(name)).etag, f"partition {name}")
    return await partitions.update(name, data)


@delete("/1.0/partitions/{name:str}", tags=_TAGS)
async def delete_partition(
    partitions: Service[PartitionController],
    name: PathName,
    with_disks: Annotated[bool, QueryParameter(description="delete its writable disks too")] = False,
    if_match: Annotated[str | None, HeaderParameter(name="If-Match")] = None,
) -> None:
    """Forget a partition that is stopped. If-Match takes the view's `etag`, or `*`."""
    check_match(if_match, (await partitions.get(name)).etag, f"partition {name}")
    await partitions.delete(name, with_disks=with_disks)


@post("/1.0/partitions/{name:str}/start", tags=_TAGS, status_code=202)
async def start_partition(
    partitions: Service[PartitionController], name: PathName, data: JSONBody[StartOptions | None] = None
) -> Response[OperationView]:
    """Start it; a saved one goes on where it was."""
    options = data or StartOptions()
    return accepted(await partitions.start(name, paused=options.paused, discard_state=options.discard_state))


@post("/1.0/partitions/{name:str}/stop", tags=_TAGS, status_code=202)
async def stop_partition(
    partitions: Service[PartitionController], name: PathName, data: JSONBody[StopOptions | None] = None
) -> Response[OperationView]:
    """Ask the guest to shut down (agent, then power button), and turn it off when time is up."""
    options = data or StopOptions()
    return accepted(await partitions.stop(name, force=options.force, timeout_s=options.timeout_s))


@post("/1.0/partitions/{name:str}/pause", tags=_TAGS, status_code=202)
async def pause_partition(partitions: Service[PartitionController], name: PathName) -> Response[OperationView]:
    """Stop its processors; memory and devices stay as they are."""
    return accepted(await partitions.pause(name))


@post("/1.0/partitions/{name:str}/resume", tags=_TAGS, status_code=202)
async def resume_partition(partitions: Service[PartitionController], name: PathName) -> Response[OperationView]:
    """Let a paused one go on."""
    return accepted(await partitions.resume(name))


@post("/1.0/partitions/{name:str}/save", tags=_TAGS, status_code=202)
async def save_partition(partitions: Service[PartitionController], name: PathName) -> Response[OperationView]:
    """Put its memory and devices into a file and end its processes: it is `saved` then."""
    return accepted(await partitions.save(name))


@post("/1.0/partitions/{name:str}/restore", tags=_TAGS, status_code=202)
async def restore_partition(partitions: Service[PartitionController], name: PathName) -> Response[OperationView]:
    """Let a saved one go on where it was."""
    return accepted(await partitions.restore(name))


@post("/1.0/partitions/{name:str}/discard-state", tags=_TAGS, status_code=202)
async def discard_partition_state(partitions: Service[PartitionController], name: PathName) -> Response[OperationView]:
    """Throw the memory of a saved one away: it is stopped then, and boots from its disks."""
    return accepted(await partitions.discard_state(name))


@post("/1.0/partitions/{name:str}/reset", tags=_TAGS, status_code=202)
async def reset_partition(partitions: Service[PartitionController], name: PathName) -> Response[OperationView]:
    """Press the reset button: unsaved work in the guest is lost."""
    return accepted(await partitions.reset(name))


@websocket("/1.0/partitions/{name:str}/console")
async def console(socket: WebSocket[Any, Any, Any], partitions: Service[PartitionController], name: PathName) -> None:
    """The serial console: binary messages both ways, the end of the log first."""
    hub = partitions.console(name)
    async with hub.attach() as stream:
        await socket.accept()

        async def type_keys() -> None:
            while True:
                await stream.write(await socket.receive_data(mode="binary"))

        async def show() -> None:
            while chunk := await stream.read():
                await socket.send_data(chunk, mode="binary")
            await socket.close(code=_WEBSOCKET_GOING_AWAY, reason="the console has ended")

        async with asyncio.TaskGroup() as tasks:
            viewer = tasks.create_task(_until_disconnect(show()))
            typist = tasks.create_task(_until_disconnect(type_keys()))
            await asyncio.wait((viewer, typist), return_when=asyncio.FIRST_COMPLETED)
            viewer.cancel()
            typist.cancel()


async def _until_disconnect(work: Coroutine[Any, Any, None]) -> None:
    """One direction of the console, until the viewer has gone or the console has ended."""
    with contextlib.suppress(WebSocketDisconnect, UnavailableError):
        await work


ROUTES: Final = (
    list_partitions,
    create_partition,
    show_partition,
    update_partition,
    delete_partition,
    start_partition,
    stop_partition,
    pause_partition,
    resume_partition,
    save_partition,
    restore_partition,
    discard_partition_state,
    reset_partition,
    console,
)
