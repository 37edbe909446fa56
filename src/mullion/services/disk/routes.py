"""REST of disks: `/1.0/disks`."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from litestar import Response, delete, get, post
from litestar.params import JSONBody, QueryParameter
from msgspec import Meta, Struct

from mullion.base.units import KIB, MIB
from mullion.model.views import DiskView
from mullion.parent.api import Service
from mullion.services.disk.controller import DiskController

_TAGS: Final = ["disks"]


class NewDisk(Struct, frozen=True, forbid_unknown_fields=True):
    """A disk to be made: `path` is absolute or a name in the pool; `parent` makes it differencing."""

    path: Annotated[str, Meta(min_length=1, max_length=4096)]
    size_bytes: Annotated[int, Meta(ge=512, le=2040 * 1024**3)] | None = None
    type: Literal["dynamic", "fixed"] = "dynamic"
    parent: str | None = None
    block_bytes: Annotated[int, Meta(ge=512 * KIB, le=2 * MIB)] | None = None


@get("/1.0/disks", tags=_TAGS)
async def list_disks(disks: Service[DiskController]) -> list[DiskView]:
    """The disks of the pool."""
    return list(await disks.list())


@post("/1.0/disks", tags=_TAGS)
async def create_disk(disks: Service[DiskController], data: JSONBody[NewDisk]) -> Response[DiskView]:
    """Make a fixed, dynamic or differencing VHD."""
    view = await disks.create(
        data.path, size_bytes=data.size_bytes, disk_type=data.type, parent=data.parent, block_bytes=data.block_bytes
    )
    return Response(view, status_code=201)


@get("/1.0/disks/show", tags=_TAGS)
async def show_disk(
    disks: Service[DiskController],
    path: Annotated[str, QueryParameter(description="a name in the pool, image:NAME or an absolute path")],
) -> DiskView:
    """One disk with its chain."""
    return await disks.show(path)


@delete("/1.0/disks", tags=_TAGS)
async def delete_disk(
    disks: Service[DiskController],
    path: Annotated[str, QueryParameter(description="a name in the pool or an absolute path")],
) -> None:
    """Delete a disk that no partition's definition names and that is no other's parent."""
    await disks.delete(path)


ROUTES: Final = (list_disks, create_disk, show_disk, delete_disk)
