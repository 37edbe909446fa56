"""REST of images: `/1.0/images`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

import msgspec
from litestar import Response, get, post
from litestar.params import JSONBody
from msgspec import Struct

from mullion.model.definition import Name
from mullion.model.views import ImageView, OperationView
from mullion.parent.api import Service, accepted
from mullion.parent.operations import Operation, Operations
from mullion.services.image.controller import ImageController

_TAGS: Final = ["images"]


class NewImage(Struct, frozen=True, forbid_unknown_fields=True):
    """The image to be built, by its name."""

    name: Name


@get("/1.0/images", tags=_TAGS)
async def list_images(images: Service[ImageController]) -> list[ImageView]:
    """The images that are built."""
    return list(await asyncio.to_thread(images.list))


@post("/1.0/images", tags=_TAGS, status_code=202)
async def build_image(
    images: Service[ImageController], operations: Service[Operations], data: JSONBody[NewImage]
) -> Response[OperationView]:
    """Build an image from the distribution's packages; at once when the present packages are built already."""
    images.check_name(data.name)

    async def work(operation: Operation) -> Mapping[str, object]:
        loop = asyncio.get_running_loop()

        def progress(stage: str, done: float) -> None:
            loop.call_soon_threadsafe(operation.stage, stage, done)

        view = await asyncio.to_thread(images.build, data.name, progress)
        return dict(msgspec.to_builtins(view))

    return accepted(await operations.start("image.build", f"image/{data.name}", work))


ROUTES: Final = (list_images, build_image)
