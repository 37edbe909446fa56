"""Sockets to listen on: a unix socket only for its user, and never taken away from somebody who listens; TCP.

Source: unix(7): a path outlives its socket; connecting to one that nobody listens on gives ECONNREFUSED.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from typing import Final

from mullion.base.errors import AlreadyExistsError, DeniedError, InvalidError
from mullion.base.paths import SOCKET_PATH_LIMIT

_BACKLOG: Final = 16


def bind_listener(path: str, *, uid: int | None = None, gid: int | None = None) -> socket.socket:
    """A listening socket that only its user may connect to; what a dead process left there is removed.

    Raises: AlreadyExistsError when somebody listens there, or the path is no socket; InvalidError for a path too long;
    OSError.
    """
    if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
        raise InvalidError(
            f"the socket's path is longer than {SOCKET_PATH_LIMIT} bytes: {path}",
            remedy="Choose a shorter path; for a partition's sockets a shorter run folder (setting run_dir).",
            path=path,
        )
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.bind(path)
        os.chmod(path, 0o600)  # nobody can connect before `listen`
        if uid is not None or gid is not None:
            os.chown(path, -1 if uid is None else uid, -1 if gid is None else gid)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise _in_use(path) from error
        raise
    return listener


def bind_tcp_listener(host: str, port: int) -> socket.socket:
    """A listening TCP socket on an address or name of this host; port 0 is any that is free.

    Raises: InvalidError for what is no address of this host; AlreadyExistsError; DeniedError.
    """
    try:
        [(family, _, _, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:  # also socket.gaierror
        raise InvalidError(f"{host} is no address to listen on: {error.strerror}") from error
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        where = f"{host}, port {port}"
        if error.errno == errno.EADDRINUSE:
            raise AlreadyExistsError(f"another process listens on {where}", remedy="Choose another port.") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise DeniedError(f"{where} may not be listened on", remedy="Choose a port from 1024 on.") from error
        raise InvalidError(f"{where} cannot be listened on: {error.strerror}") from error
    return listener


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise AlreadyExistsError(f"{path} is there and is not a socket", remedy="Move the file away.", path=path)
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        code = probe.connect_ex(path)
    if code == errno.ECONNREFUSED:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    elif code != errno.ENOENT:  # EAGAIN too: its backlog is full, so it lives
        raise _in_use(path)


def _in_use(path: str) -> AlreadyExistsError:
    return AlreadyExistsError(
        f"another process listens on {path}",
        remedy="End the program that listens there first, or choose another path.",
        path=path,
    )
