"""The FUSE side of a mount: a folder of views of one disk, answered by libfuse 3 through `mfusepy`.

One thread answers all requests in turn: with the interpreter's lock several would only wait for each other. A read goes
from the disk's file straight into libfuse's buffer. Read-only views are cached by the kernel, since nobody may write
the disk meanwhile (it is locked); writable ones are not, because two views may show the same bytes.

Durability: fsync, and close after a write, return when the disk has been flushed.
Not handled: changing a view's size. Like a block device, a view ignores being truncated to nothing when it is opened.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import stat
from collections.abc import Callable, Sequence
from typing import Any, Final

from mullion.base.block import BlockDevice
from mullion.base.errors import InvalidError, MissingToolError, MullionError, NoSpaceError
from mullion.media.mount import PROCESS_ATTRIBUTE, View
from mullion.vhd.errors import DiskReadOnlyError

# mfusepy takes libfuse 2 where it finds one; its requests are an eighth as long.
os.environ.setdefault("FUSE_LIBRARY_NAME", "fuse3")
try:
    import mfusepy
except OSError as error:
    raise MissingToolError("libfuse 3 is not installed", remedy="Install it: apt-get install fuse3") from error

log = logging.getLogger(__name__)

_ATTRIBUTES_VALID_S: Final = 3600.0
_PUNCH_HOLE: Final = 0x02
_ZERO_RANGE: Final = 0x10
_WRITABLE_MEMORY: Final = 0x200
_ERRORS: Final = ((InvalidError, errno.EINVAL), (NoSpaceError, errno.ENOSPC), (DiskReadOnlyError, errno.EROFS))

_view_of_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_view_of_memory.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_view_of_memory.restype = ctypes.py_object


class Folder:
    """The folder's operations. A file handle is the number of its view."""

    use_ns = True

    def __init__(
        self,
        device: BlockDevice,
        views: Sequence[View],
        *,
        mtime_ns: int,
        identity: str,
        is_shared: bool,
        ready: Callable[[], None],
    ) -> None:
        self.device = device
        self.views = list(views)
        self._numbers = {f"/{view.name}": number for number, view in enumerate(views)}
        self._is_dirty = False
        self._identity = identity.encode()
        self._ready = ready
        self._has_logged = False
        write = 0 if device.read_only else 0o200
        owner = {"st_uid": os.getuid(), "st_gid": os.getgid()}
        times = dict.fromkeys(("st_atime", "st_mtime", "st_ctime"), mtime_ns)
        self._folder = {"st_mode": stat.S_IFDIR | (0o555 if is_shared else 0o500), "st_nlink": 2, **owner, **times}
        self._file = {
            "st_mode": stat.S_IFREG | write | (0o444 if is_shared else 0o400),
            "st_nlink": 1,
            **owner,
            **times,
        }

    def init_with_config(self, conn_info: Any, config_3: Any) -> None:
        """The mount is there; the kernel waits for this answer before it passes anything on."""
        config_3.attr_timeout = config_3.entry_timeout = _ATTRIBUTES_VALID_S
        config_3.kernel_cache = self.device.read_only
        config_3.direct_io = not self.device.read_only
        self._ready()

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        if path == "/":
            return self._folder
        view = self.views[self._number(path)]
        return {**self._file, "st_size": view.length, "st_blocks": view.length // 512, "st_blksize": 1 << 20}

    def _number(self, path: str) -> int:
        number = self._numbers.get(path)
        if number is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return number

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *(view.name for view in self.views)]

    def getxattr(self, path: str, name: str, position: int = 0) -> bytes:
        if path == "/" and name == PROCESS_ATTRIBUTE:
            return self._identity
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))

    def open(self, path: str, flags: int) -> int:
        return self._number(path)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        if length not in (0, self.views[self._number(path)].length):
            raise OSError(errno.EPERM, "a disk keeps its size")
        return 0

    def fallocate(self, path: str, mode: int, offset: int, size: int, fh: int) -> int:
        """Punching holes and zeroing: what `fstrim` and `blkdiscard` of a loop device come to."""
        if not mode & (_PUNCH_HOLE | _ZERO_RANGE):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        view = self.views[fh]
        length = min(size, view.length - offset)
        if length > 0:
            self._is_dirty = True
            self.attempt("zero", self.device.write_zeroes, view.offset + offset, length)
        return 0

    def flush(self, path: str, fh: int) -> int:
        return self.fsync(path, 0, fh)

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        if self._is_dirty:
            self.attempt("flush", self.device.flush)
            self._is_dirty = False
        return 0

    def refuse(self, *_: object) -> int:
        """There are the files of the disk, and no others."""
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    create = mknod = mkdir = unlink = rmdir = symlink = link = rename = chmod = chown = utimens = refuse

    def statfs(self, path: str) -> dict[str, int]:
        blocks = self.device.size_bytes // 4096
        return {"f_bsize": 4096, "f_frsize": 4096, "f_blocks": blocks, "f_files": len(self.views), "f_namemax": 255}

    def read(self, number: int, offset: int, target: memoryview) -> int:
        """Fill the target from the view's offset on; the bytes that there are."""
        view = self.views[number]
        count = min(len(target), view.length - offset)
        if count <= 0:
            return 0
        self.attempt("read", self.device.pread, view.offset + offset, target[:count])
        return count

    def write(self, number: int, offset: int, source: memoryview) -> int:
        """Write the source at the view's offset; the bytes that found room."""
        view = self.views[number]
        count = min(len(source), view.length - offset)
        if count <= 0:
            raise OSError(errno.ENOSPC, "past the end of the disk")
        self._is_dirty = True
        self.attempt("write", self.device.pwrite, view.offset + offset, source[:count])
        return count

    def attempt(self, what: str, operation: Callable[..., None], *arguments: object) -> None:
        """Call the device. Raises: OSError, whatever it was."""
        try:
            operation(*arguments)
        except (OSError, MullionError) as error:
            if not self._has_logged:  # the first says what is wrong; a broken disk must not fill the log
                self._has_logged = True
                log.warning("cannot %s: %s", what, error)
            if isinstance(error, OSError):
                raise
            number = next((code for kind, code in _ERRORS if isinstance(error, kind)), errno.EIO)
            raise OSError(number, str(error)) from error


class Mount(mfusepy.FUSE):  # type: ignore[misc]  # mfusepy has no types
    """The loop: it is mounted and answered until it is unmounted. Reads and writes skip mfusepy's copies."""

    def read(self, path: bytes | None, buf: Any, size: int, offset: int, fip: Any) -> int:
        target = _view_of_memory(ctypes.addressof(buf.contents), size, _WRITABLE_MEMORY)
        count: int = self.operations.read(fip.contents.fh, offset, target)
        return count

    def write(self, path: bytes | None, buf: Any, size: int, offset: int, fip: Any) -> int:
        source = _view_of_memory(ctypes.addressof(buf.contents), size, _WRITABLE_MEMORY)
        count: int = self.operations.write(fip.contents.fh, offset, source)
        return count


def serve_folder(folder: Folder, mountpoint: str, *, source: str, allow_other: bool) -> None:
    """Mount the folder and answer for it until it is unmounted, or SIGINT, SIGTERM or SIGHUP ends it.

    Raises: RuntimeError when it could not be mounted; libfuse has said why on standard error.
    """
    options: dict[str, Any] = {"default_permissions": True, "subtype": "mullion", "ro": folder.device.read_only}
    if allow_other:
        options["allow_other"] = True
    fsname = source.replace("\\", "\\\\").replace(",", "\\,")
    Mount(folder, mountpoint, foreground=True, nothreads=True, fsname=fsname, **options)
