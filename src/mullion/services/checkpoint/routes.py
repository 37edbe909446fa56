"""REST of checkpoints: `/1.0/partitions/NAME/checkpoints`."""

from __future__ import annotations

from typing import Annotated, Final

from litestar import Response, delete, get, post, put
from litestar.params import JSONBody, PathParameter
from msgspec import Meta, Struct

from mullion.model.definition import LABEL_FORM, LABEL_PATTERN
from mullion.model.views import CheckpointTreeView, CheckpointView, ExportView, OperationView
from mullion.parent.api import PathName, Service, accepted
from mullion.services.checkpoint.controller import CheckpointController
from mullion.services.checkpoint.exports import CheckpointExports

_TAGS: Final = ["checkpoints"]
_Checkpoint = Annotated[str, PathParameter(description="the checkpoint's name or id", max_length=64)]
_Name = Annotated[str, Meta(pattern=LABEL_PATTERN, description=LABEL_FORM)]


class NewCheckpoint(Struct, frozen=True, forbid_unknown_fields=True):
    """A checkpoint to be made; without a name it gets the time. `consistent` freezes the guest's filesystems."""

    name: _Name | None = None
    description: Annotated[str, Meta(max_length=1000)] = ""
    memory: bool = False
    consistent: bool = False


class MergeRate(Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes a second; 0 is without a limit, null what the service's setting `merge_rate` says."""

    bytes_per_s: Annotated[int, Meta(ge=0)] | None


class ApplyOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """`keep_present` keeps what is there now as a checkpoint, which is named `keep_as` or gets the time."""

    keep_present: bool = False
    keep_as: _Name | None = None


@get("/1.0/partitions/{name:str}/checkpoints", tags=_TAGS)
async def list_checkpoints(checkpoints: Service[CheckpointController], name: PathName) -> CheckpointTreeView:
    """The tree of a partition's checkpoints, and the merges that go on."""
    return checkpoints.tree(name)


@post("/1.0/partitions/{name:str}/checkpoints", tags=_TAGS, status_code=202)
async def create_checkpoint(
    checkpoints: Service[CheckpointController], name: PathName, data: JSONBody[NewCheckpoint | None] = None
) -> Response[OperationView]:
    """Freeze all disks of a partition at one instant."""
    wanted = data or NewCheckpoint()
    return accepted(
        await checkpoints.create(
            name,
            checkpoint=wanted.name or "",
            memory=wanted.memory,
            consistent=wanted.consistent,
            description=wanted.description,
        )
    )


@put("/1.0/partitions/{name:str}/merge-rate", tags=_TAGS)
async def set_merge_rate(
    checkpoints: Service[CheckpointController], name: PathName, data: JSONBody[MergeRate]
) -> CheckpointTreeView:
    """How fast layers of deleted checkpoints may be merged, also the one that is being merged now."""
    return await checkpoints.set_merge_rate(name, data.bytes_per_s)


@get("/1.0/partitions/{name:str}/checkpoints/{checkpoint:str}", tags=_TAGS)
async def show_checkpoint(
    checkpoints: Service[CheckpointController], name: PathName, checkpoint: _Checkpoint
) -> CheckpointView:
    """One checkpoint."""
    return checkpoints.get(name, checkpoint)


@delete("/1.0/partitions/{name:str}/checkpoints/{checkpoint:str}", tags=_TAGS, status_code=202)
async def delete_checkpoint(
    checkpoints: Service[CheckpointController], name: PathName, checkpoint: _Checkpoint
) -> Response[OperationView]:
    """Take a checkpoint away; the operation lasts until its layers are merged."""
    return accepted(await checkpoints.delete(name, checkpoint))


@post("/1.0/partitions/{name:str}/checkpoints/{checkpoint:str}/apply", tags=_TAGS, status_code=202)
async def apply_checkpoint(
    checkpoints: Service[CheckpointController],
    name: PathName,
    checkpoint: _Checkpoint,
    data: JSONBody[ApplyOptions | None] = None,
) -> Response[OperationView]:
    """Bring a partition back to a checkpoint; what was there since is lost unless it is kept."""
    options = data or ApplyOptions()
    keep = options.keep_as or ("" if options.keep_present else None)
    return accepted(await checkpoints.apply(name, checkpoint, keep_present=keep))


class ExportOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """`since`: tell what has changed since that checkpoint. `listen`: HOST:PORT, by TLS; else a unix socket.

    `tls` is a folder of certificates on the host; without it some are made.
    """

    since: str | None = None
    listen: str | None = None
    tls: str | None = None


@post("/1.0/partitions/{name:str}/checkpoints/{checkpoint:str}/export", tags=_TAGS)
async def export_checkpoint(
    exports: Service[CheckpointExports],
    name: PathName,
    checkpoint: _Checkpoint,
    data: JSONBody[ExportOptions | None] = None,
) -> Response[ExportView]:
    """Offer a checkpoint's disks over NBD, read-only."""
    wanted = data or ExportOptions()
    view = await exports.start(name, checkpoint, since=wanted.since, listen=wanted.listen, tls=wanted.tls)
    return Response(view, status_code=201)


@get("/1.0/exports", tags=_TAGS)
async def list_exports(exports: Service[CheckpointExports]) -> list[ExportView]:
    """The checkpoints that are offered over NBD."""
    return list(await exports.list())


@delete("/1.0/partitions/{name:str}/exports/{export:str}", tags=_TAGS)
async def end_export(
    exports: Service[CheckpointExports],
    name: PathName,
    export: Annotated[str, PathParameter(description="the export's id: its checkpoint's name", max_length=64)],
) -> None:
    """End an export; its clients are hung up on."""
    await exports.stop(name, export)


ROUTES: Final = (
    export_checkpoint,
    list_exports,
    end_export,
    list_checkpoints,
    create_checkpoint,
    set_merge_rate,
    show_checkpoint,
    delete_checkpoint,
    apply_checkpoint,
)
