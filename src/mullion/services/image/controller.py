"""The images of this host: what there is, building one, finding the file behind `image:NAME`."""

from __future__ import annotations

import os
from typing import Final

from mullion.base.errors import InvalidError, NotFoundError
from mullion.base.paths import HostPaths
from mullion.model.views import ImageView
from mullion.services.image.build import BuiltImage, Kernel, Progress, build_demo_image, find_built

PREFIX: Final = "image:"
"""Before a name where a path could stand too: `image:demo`."""

_KERNELS: Final[dict[str, Kernel]] = {"demo": "cloud", "demo-generic": "generic"}


class ImageController:
    """Methods block; `build` for seconds, or as long as fetching 35 MB of packages takes the first time."""

    def __init__(self, paths: HostPaths) -> None:
        self._images_dir = paths.images
        self._cache_dir = f"{paths.data_dir}/cache"

    def list(self) -> tuple[ImageView, ...]:
        """The images that are built, by name."""
        found = (find_built(self._images_dir, name) for name in sorted(_KERNELS))
        return tuple(_view(built) for built in found if built is not None)

    def check_name(self, name: str) -> None:
        """Raises: NotFoundError for a name that is not known."""
        _kernel(name)

    def get(self, name: str) -> ImageView:
        """Raises: NotFoundError for a name that is not known, or not built yet."""
        return _view(self._find(name))

    def build(self, name: str, progress: Progress) -> ImageView:
        """Have the image built from the present packages; at once if it is.

        Raises: NotFoundError for a name that is not known; what `build_demo_image` raises.
        """
        kernel = _kernel(name)
        return _view(
            build_demo_image(self._images_dir, cache_dir=self._cache_dir, progress=progress, kernel=kernel),
        )

    def resolve(self, source: str) -> str:
        """The path of the VHD behind `image:NAME`, to be used as a parent; it stays when the image is built anew.

        Raises: InvalidError when it is not of this form; NotFoundError.
        """
        if not source.startswith(PREFIX):
            raise InvalidError(
                f"{source!r} does not name an image", remedy=f"Write {PREFIX}NAME, such as {PREFIX}demo."
            )
        return self._find(source.removeprefix(PREFIX)).path

    def _find(self, name: str) -> BuiltImage:
        _kernel(name)
        built = find_built(self._images_dir, name)
        if built is None:
            raise NotFoundError(
                f"image {name} is not built yet", remedy=f"Build it: mullion image build {name}", image=name
            )
        return built


def _kernel(name: str) -> Kernel:
    if name not in _KERNELS:
        raise NotFoundError(
            f"there is no image {name!r}", remedy=f"Images that can be built: {', '.join(_KERNELS)}.", image=name
        )
    return _KERNELS[name]


def _view(built: BuiltImage) -> ImageView:
    file_bytes = os.stat(built.path).st_blocks * 512  # stat(2): blocks of 512 bytes, whatever the filesystem's are
    return ImageView(built.name, built.path, built.size_bytes, file_bytes, built.built_at)
