"""The process behind a mount: `python -m mullion.media.mount_process FD LOG SPEC`, started by `mount.start_mount`.

FD is a pipe: a line feed goes into it when the mount is there, or an error as one line of JSON when the disk cannot be
opened. Warnings go to standard error, which is the log; a log that stayed empty is removed in the end.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable

from mullion.base import log as logs
from mullion.base.errors import MullionError
from mullion.base.process import ProcessIdentity
from mullion.media.mount import MountSpec, plan_views
from mullion.media.source import open_disk
from mullion.vhd.geometry import SizeFrom
from mullion.vhd.storage import storage_explained

log = logging.getLogger(__name__)


def serve_mount(spec: MountSpec, ready: Callable[[list[str]], None]) -> None:
    """Open a disk, mount it, and answer for the mount until it is unmounted; then flush and close the disk.

    `ready` is called with what is odd about the disk when the mount is there, and before anybody is answered.
    Raises: what `open_disk` raises; MissingToolError; RuntimeError when it could not be mounted (said on standard
    error); OSError when the last flush fails.
    """
    from mullion.media.fuse_folder import Folder, serve_folder

    with open_disk(
        spec.path,
        writable=spec.writable,
        purpose=f"vhd mount {spec.mountpoint}",
        allowed_dirs=spec.allowed_dirs,
        size_from=SizeFrom(spec.size_from),
    ) as source:
        views, problems = plan_views(source.device)
        warnings = [*source.warnings, *problems]
        is_mounted = False

        def mounted() -> None:
            nonlocal is_mounted
            is_mounted = True
            ready(warnings)

        folder = Folder(
            source.device,
            views,
            mtime_ns=os.stat(source.paths[0]).st_mtime_ns,
            identity=str(ProcessIdentity.of(os.getpid())),
            is_shared=spec.allow_other,
            ready=mounted,
        )
        try:
            serve_folder(folder, spec.mountpoint, source=os.path.abspath(spec.path), allow_other=spec.allow_other)
        except RuntimeError:
            if not is_mounted:
                raise  # later it means that a signal ended it


def main(ready_fd: int, log_path: str, spec: MountSpec) -> int:
    logs.set_up("warning")

    def answer(data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # who started us went away; the mount is there all the same
            os.write(ready_fd, data)
        os.close(ready_fd)

    def ready(warnings: list[str]) -> None:
        for warning in warnings:
            log.warning("%s", warning)
        answer(b"\n")

    try:
        with storage_explained(spec.path):
            serve_mount(spec, ready)
    except MullionError as error:
        log.error("%s", error)
        with contextlib.suppress(OSError):  # the pipe is closed when the mount was there already
            answer(json.dumps(error.to_wire()).encode() + b"\n")
        return error.exit_code
    except RuntimeError:
        return 1  # libfuse has said why
    with contextlib.suppress(OSError):
        if os.path.getsize(log_path) == 0:
            os.unlink(log_path)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], MountSpec.from_json(sys.argv[3])))
