"""REST of checkpoints: `/1.0/partitions/NAME/checkpoints`."""

from __future__ import annotations

from typing import Annotated, Final

from litestar import Response, delete, get, post
from litestar.params import JSONBody, PathParameter
from msgspec import Meta, Struct

from mullion.model.views import CheckpointTreeView, CheckpointView, OperationView
from mullion.parent.api import PathName, Service, accepted
from mullion.services.checkpoint.controller import CheckpointController

_TAGS: Final = ["checkpoints"]
_Checkpoint = Annotated[str, PathParameter(description="the checkpoint's name or id", max_length=64)]
NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}(?!\n)$"
_Name = Annotated[str, Meta(pattern=NAME_PATTERN)]


class NewCheckpoint(Struct, frozen=True, forbid_unknown_fields=True):
    """A checkpoint to be made; without a name it gets the time. `consistent` freezes the guest's filesystems."""

    name: _Name | None = None
    description: Annotated[str, Meta(max_length=1000)] = ""
    memory: bool = False
    consistent: bool = False


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


ROUTES: Final = (list_checkpoints, create_checkpoint, show_checkpoint, delete_checkpoint, apply_checkpoint)
