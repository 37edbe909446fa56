"""Disks: VHD files in the pool or anywhere on the host, seen with their chains and who holds them."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Collection, Mapping
from typing import Final

import msgspec

from mullion.base.errors import ConflictError, InvalidError, MullionError, NotFoundError, PreconditionError
from mullion.base.paths import HostPaths
from mullion.base.units import MIB, SECTOR_BYTES
from mullion.model.views import ChainFileView, DiskView
from mullion.parent.store import Condition, Put, Store
from mullion.vhd import ChainInfo, create_differencing, create_dynamic, create_fixed, inspect_chain

DEFAULT_BLOCK_BYTES: Final = 2 * MIB
SUFFIXES: Final = (".vhd", ".avhd")
_FOLDERS_KEY: Final = "disks/parent-folders"


class DiskController:
    """Creates, shows and deletes disks.

    `holders` tells which partition has which file open for writing, `attached` which one's definition names it.
    A disk may name any file as its parent; opened are only parents in its own folder, in the pool, among the images,
    and in folders from which an administrator has taken a parent by name before (kept in the store).
    """

    def __init__(
        self,
        paths: HostPaths,
        store: Store,
        resolve_image: Callable[[str], str],
        *,
        holders: Callable[[], Mapping[str, str]],
        attached: Callable[[], Mapping[str, str]],
    ) -> None:
        self._paths = paths
        self._store = store
        self._parent_folders: tuple[str, ...] = ()
        self._resolve_image = resolve_image
        self._holders = holders
        self._attached = attached

    async def open(self) -> None:
        """Read the folders in which parents may lie."""
        entry = await self._store.get(_FOLDERS_KEY)
        self._parent_folders = msgspec.json.decode(entry.value, type=tuple[str, ...]) if entry is not None else ()

    async def _allow_parents_in(self, folder: str) -> None:
        """An administrator has named a parent in this folder: disks may have parents there from now on."""
        while folder not in self._parent_folders:
            entry = await self._store.get(_FOLDERS_KEY)
            known = msgspec.json.decode(entry.value, type=tuple[str, ...]) if entry is not None else ()
            folders = tuple(sorted({*known, folder}))
            condition = Condition(_FOLDERS_KEY, entry.revision if entry is not None else 0)
            with contextlib.suppress(PreconditionError):  # another request has added one: look again
                await self._store.transact([condition], [Put(_FOLDERS_KEY, msgspec.json.encode(folders))])
                self._parent_folders = folders

    def resolve(self, name_or_path: str) -> str:
        """The absolute path behind `/path/to.vhd`, `name` (of the pool) or `image:name`.

        Raises: InvalidError for a name that leaves the pool or a relative path.
        """
        if name_or_path.startswith("image:"):
            return self._resolve_image(name_or_path)
        if "\0" in name_or_path:
            raise InvalidError("a path cannot contain a zero byte", field="path")
        if name_or_path.startswith("/"):
            return os.path.normpath(name_or_path)
        if "/" in name_or_path or name_or_path in ("", ".", ".."):
            raise InvalidError(
                f"{name_or_path!r} is neither a name in the disk pool nor an absolute path",
                remedy=f"Give a plain name (a file of {self._paths.disks}) or a path that begins with /.",
                field="path",
            )
        name = name_or_path if name_or_path.endswith(SUFFIXES) else f"{name_or_path}.vhd"
        return os.path.join(self._paths.disks, name)

    async def list(self) -> tuple[DiskView, ...]:
        """The disks of the pool, by name; a damaged one is listed with its error as a warning."""
        return await asyncio.to_thread(self._list)

    def _list(self) -> tuple[DiskView, ...]:
        try:
            names = sorted(os.listdir(self._paths.disks))
        except FileNotFoundError:
            return ()
        return tuple(self._view_or_warning(f"{self._paths.disks}/{name}") for name in names if name.endswith(SUFFIXES))

    def _view_or_warning(self, path: str) -> DiskView:
        try:
            return self._view(path)
        except MullionError as error:
            size = os.path.getsize(path) if os.path.exists(path) else 0
            return DiskView(path, _name_of(path), "damaged", 0, size, 0, (), warnings=(error.message,))

    async def show(self, name_or_path: str) -> DiskView:
        """One disk with its chain.

        Raises: NotFoundError; VhdError when it is not a sound VHD.
        """
        return await asyncio.to_thread(self._view, self.resolve(name_or_path))

    async def create(
        self,
        name_or_path: str,
        *,
        size_bytes: int | None = None,
        disk_type: str = "dynamic",
        parent: str | None = None,
        block_bytes: int | None = None,
    ) -> DiskView:
        """Make a new disk: fixed or dynamic of a size, or differencing over a parent.

        Raises: InvalidError for what does not fit together; AlreadyExistsError; NotFoundError for the parent; VhdError.
        """
        path = self.resolve(name_or_path)
        parent_path = self.resolve(parent) if parent else None
        if parent_path is None and size_bytes is None:
            raise InvalidError(
                "a disk needs a size or a parent",
                remedy="Give a size such as 40G, or a parent disk.",
                field="size_bytes",
            )
        if parent_path is not None and (size_bytes is not None or disk_type == "fixed"):
            raise InvalidError(
                "a differencing disk has its parent's size and is not fixed",
                remedy="Leave size and type away when a parent is given.",
                field="parent",
            )
        if size_bytes is not None and (size_bytes <= 0 or size_bytes % SECTOR_BYTES):
            raise InvalidError(
                f"a disk's size is a positive multiple of {SECTOR_BYTES} bytes, not {size_bytes}", field="size_bytes"
            )
        if parent_path is not None:
            await self._allow_parents_in(os.path.dirname(os.path.realpath(parent_path)))
        if path.startswith(self._paths.disks + "/"):
            os.makedirs(self._paths.disks, mode=0o750, exist_ok=True)
        elif not os.path.isdir(os.path.dirname(path)):
            raise NotFoundError(
                f"the folder {os.path.dirname(path)} does not exist", remedy="Make it first, or name another one."
            )
        await asyncio.to_thread(_create, path, size_bytes, disk_type, parent_path, block_bytes or DEFAULT_BLOCK_BYTES)
        return await asyncio.to_thread(self._view, path)

    async def delete(self, name_or_path: str) -> None:
        """Remove a disk's file.

        Raises: NotFoundError; ConflictError when a partition's definition names it or a disk of the pool is its child.
        """
        path = self.resolve(name_or_path)
        await self.check_delete(path)
        await asyncio.to_thread(os.unlink, path)

    async def check_delete(self, path: str, *, owner: str | None = None, going: Collection[str] = ()) -> None:
        """Whether a disk may be deleted; `owner` is the partition that goes with it, `going` other files that do.

        Raises: as `delete`.
        """
        partition = self._attached().get(path)
        if partition not in (None, owner):
            raise ConflictError(
                f"the disk {path} belongs to partition {partition}",
                remedy=f"Take it out of the definition, or: mullion partition delete {partition} --with-disks",
                path=path,
            )
        await asyncio.to_thread(self._check_delete, path, going)

    def _check_delete(self, path: str, going: Collection[str]) -> None:
        if not os.path.exists(path):
            raise NotFoundError(f"the disk {path} does not exist", path=path)
        for view in self._list():
            if view.path not in going and path in [file.path for file in view.chain[1:]]:
                raise ConflictError(
                    f"the disk {path} is a parent of {view.path}, which would lose its content",
                    remedy=f"Delete {view.name} first, if it is not needed.",
                    path=path,
                )
        if path.startswith(self._paths.images + "/"):
            raise ConflictError(f"{path} belongs to an image", remedy="Images are kept for the disks made from them.")
        self.inspect(path)  # raises for what is not a VHD: nothing else is deleted here

    def _view(self, path: str) -> DiskView:
        info = self.inspect(path)
        files = info.files
        top = files[0]
        return DiskView(
            path=path,
            name=_name_of(path),
            type=top.type.name.lower(),
            size_bytes=top.size_bytes,
            file_bytes=top.file_bytes,
            allocated_bytes=top.allocated_bytes,
            chain=tuple(
                ChainFileView(
                    path=file.path,
                    type=file.type.name.lower(),
                    size_bytes=file.size_bytes,
                    file_bytes=file.file_bytes,
                    unique_id=file.unique_id.hex(),
                    block_bytes=file.block_bytes,
                    read_only=position > 0,
                )
                for position, file in enumerate(files)
            ),
            holder=self._holders().get(path),
            warnings=tuple(f"{file.path}: {warning}" for file in files for warning in file.warnings),
        )

    def inspect(self, path: str) -> ChainInfo:
        """The chain of a disk, read without a lock. Blocking.

        Raises: NotFoundError when the file is missing; VhdError.
        """
        if not os.path.exists(path):
            raise NotFoundError(
                f"the disk {path} does not exist",
                remedy=f"Create it: mullion disk create {path} --size 40G",
                path=path,
            )
        return inspect_chain(path, allowed_dirs=self._allowed(path))

    def _allowed(self, path: str) -> tuple[str, ...]:
        return (os.path.dirname(path), self._paths.disks, self._paths.images, *self._parent_folders)


def _name_of(path: str) -> str:
    return os.path.basename(path).removesuffix(".vhd")


def _create(path: str, size_bytes: int | None, disk_type: str, parent_path: str | None, block_bytes: int) -> None:
    if parent_path is not None:
        if not os.path.exists(parent_path):
            raise NotFoundError(f"the parent disk {parent_path} does not exist", field="parent", path=parent_path)
        create_differencing(path, parent_path)
    elif disk_type == "fixed":
        create_fixed(path, size_bytes or 0)
    elif disk_type == "dynamic":
        create_dynamic(path, size_bytes or 0, block_bytes=block_bytes)
    else:
        raise InvalidError(
            f"unknown disk type {disk_type!r}",
            remedy="Allowed: fixed, dynamic; a parent makes it differencing.",
            field="type",
        )
