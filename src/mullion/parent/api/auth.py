"""Who may call: local administrators through the unix socket, holders of the token through TCP.

Unix socket: the kernel says who is on the other side (SO_PEERCRED, unix(7)); allowed are root, the user the service
runs as, and members of the group `mullion`. TCP: `Authorization: Bearer TOKEN`, compared in constant time; the token
is made at the first start (256 random bits, file mode 0600).

A web page in the administrator's browser can reach a loopback port, directly or after its name was made to point
there (DNS rebinding). It cannot send the token, for there are no cookies; and a `Host` or an `Origin` that is not this
machine is refused before anything else is looked at.
"""

from __future__ import annotations

import contextlib
import grp
import hmac
import logging
import os
import pwd
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from mullion.base import log as logs
from mullion.base.errors import DeniedError, UnavailableError
from mullion.base.peer import Peer
from mullion.parent.api.errors import UnauthenticatedError

log = logging.getLogger(__name__)
GROUP: Final = "mullion"
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "[::1]"})


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request, for the log: `uid 0 (pid 4711)` or `token`."""

    name: str
    uid: int | None = None


class Authority:
    """Decides about each request from its peer (unix socket) or its headers (TCP)."""

    def __init__(self, token: str, hosts: Iterable[str] = ()) -> None:
        self._token = token.encode()
        self._hosts = _LOOPBACK | frozenset(host.lower() for host in hosts)
        logs.keep_secret(token)

    def check(self, peer: Peer | None, headers: Mapping[bytes, bytes]) -> Caller:
        """The caller. Raises: UnauthenticatedError; DeniedError."""
        if peer is not None:
            return self._check_peer(peer)
        self._check_host(headers)
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        if not token:
            raise UnauthenticatedError("the request carries no token")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._token):
            raise UnauthenticatedError("the token is not the service's")
        return Caller("token")

    def _check_peer(self, peer: Peer) -> Caller:
        if peer.uid in (0, os.geteuid()) or is_member(peer):
            return Caller(f"uid {peer.uid} (pid {peer.pid})", peer.uid)
        raise DeniedError(
            f"user id {peer.uid} may not use Mullion",
            remedy=f"Run it as root, or add the user to the group: usermod -aG {GROUP} USER",
            uid=peer.uid,
        )

    def _check_host(self, headers: Mapping[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        if _name(host) not in self._hosts:
            raise DeniedError(
                f"the request is for the host {host!r}, which is not this service",
                remedy="Use the address in the file `api.url` of the service's run folder.",
            )
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and _name(origin.partition("://")[2]) not in self._hosts:
            raise DeniedError(
                f"requests from web pages of {origin} are refused", remedy="Use the service's own pages or a program."
            )


def is_member(peer: Peer) -> bool:
    """Whether a peer belongs to the group `mullion`, by its own group or by the group's list."""
    try:
        group = grp.getgrnam(GROUP)
        if peer.gid == group.gr_gid:
            return True
        user = pwd.getpwuid(peer.uid)
    except KeyError:
        return False
    return user.pw_gid == group.gr_gid or user.pw_name in group.gr_mem


def group_id() -> int | None:
    """The id of the group `mullion`, where there is one."""
    with contextlib.suppress(KeyError):
        return grp.getgrnam(GROUP).gr_gid
    return None


def load_token(path: str) -> str:
    """The service's token, made at first use. A file that others can read is closed to them, with a warning.

    Raises: UnavailableError when the file can be neither read nor made, or holds no token.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return _read_token(path)
    except OSError as error:
        raise UnavailableError(
            f"the token cannot be written to {path}: {error.strerror}", remedy="Check the data folder's rights."
        ) from error
    token = secrets.token_urlsafe(32)
    with os.fdopen(fd, "w", encoding="ascii") as file:
        file.write(f"{token}\n")
        file.flush()
        os.fsync(file.fileno())
    return token


def _read_token(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            token = file.read(1000).strip()
            if os.fstat(file.fileno()).st_mode & 0o077:
                os.fchmod(file.fileno(), 0o600)
                log.warning("%s could be read by other users, now it cannot; delete it to get a new token", path)
    except (OSError, UnicodeDecodeError) as error:
        raise UnavailableError(
            f"the token cannot be read from {path}: {error}", remedy="Delete the file: the next start makes a new one."
        ) from error
    if len(token) < 32:
        raise UnavailableError(f"{path} holds no token", remedy="Delete the file: the next start makes a new one.")
    return token


def _name(host: str) -> str:
    """The host of `host:port`, lower case; an IPv6 address keeps its brackets."""
    if host.startswith("["):
        return host[: host.find("]") + 1].lower()
    return host.partition(":")[0].lower()
