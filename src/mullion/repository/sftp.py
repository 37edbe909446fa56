"""A repository in a folder of an SFTP server.

Durability: an object is written into `tmp/`, synced (`fsync@openssh.com`), its size compared, and renamed over its name
in one step (`posix-rename@openssh.com`); then the folder is synced. A server without the first of these extensions, or
that cannot sync a folder, decides by itself when objects survive a power cut of it, and is named in the log once. The
server's host key must be known: an unknown or another one is refused.

Threads: one request at a time, the connection is shared; it is made when it is needed, and again after it was lost.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import posixpath
import stat
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from mullion.base.block import Buffer
from mullion.base.units import MIB
from mullion.repository.backend import Listed, ObjectMissingError
from mullion.repository.credentials import Credentials
from mullion.repository.errors import (
    HostKeyError,
    TargetDeniedError,
    TargetFaultError,
    TargetFullError,
    TargetTimeoutError,
    TargetUnreachableError,
)

if TYPE_CHECKING:
    import paramiko

log = logging.getLogger(__name__)

PACK_BYTES: Final = 16 * MIB
CONNECT_TIMEOUT_S: Final = 15.0
SILENCE_S: Final = 60.0
"""How long the server may say nothing while it has a request of ours."""
_KEEPALIVE_S: Final = 15
_WRITE_BYTES: Final = 256 * 1024
_TMP: Final = "tmp"
_EXTENDED: Final = 200  # SSH_FXP_EXTENDED, draft-ietf-secsh-filexfer-02 section 3
_EXTENDED_REPLY: Final = 201


class SftpBackend:
    """A `Backend` of files on a server."""

    pack_bytes: Final = PACK_BYTES

    def __init__(
        self,
        host: str,
        folder: str,
        credentials: Credentials,
        *,
        user: str | None = None,
        port: int = 22,
        silence_s: float = SILENCE_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        """Connects to nothing yet."""
        self._host, self._port, self._user = host, port, user
        self._folder = folder
        self._credentials = credentials
        self._silence_s, self._connect_timeout_s = silence_s, connect_timeout_s
        at = f"{user}@" if user else ""
        self.location = f"sftp://{at}{host}" + (f":{port}" if port != 22 else "") + f"/{folder.lstrip('/')}"
        self._lock = threading.RLock()
        self._ssh: paramiko.SSHClient | None = None
        self._sftp: Any = None
        self._folders: set[str] = set()
        self._can_sync = True
        self._can_sync_folders = True

    def put(self, name: str, buffers: Iterable[Buffer], *, durable: bool = True) -> None:
        content = list(buffers)  # all of them: who makes them may need the connection for that
        size = sum(map(len, content))
        with self._session("putting", name, size) as sftp:
            for folder in (_TMP, posixpath.dirname(name)):
                self._make_folder(sftp, folder)
            temporary = self._path(f"{_TMP}/{uuid.uuid4().hex}")
            try:
                self._write(sftp, temporary, content, size, durable=durable)
                self._rename(sftp, temporary, self._path(name))
                if durable:
                    self._sync_folder(sftp, posixpath.dirname(name))
            except BaseException:
                with contextlib.suppress(Exception):  # the first error says what happened; this is tidying
                    sftp.remove(temporary)
                raise

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        with self._session("getting", name) as sftp, sftp.open(self._path(name), "rb") as file:
            size = file.stat().st_size or 0
            wanted = max(0, size - offset) if length is None else min(length, max(0, size - offset))
            return b"".join(file.readv([(offset, wanted)])) if wanted else b""

    def size(self, name: str) -> int | None:
        try:
            with self._session("looking at", name) as sftp:
                return int(sftp.lstat(self._path(name)).st_size)
        except ObjectMissingError:
            return None

    def list(self, prefix: str) -> Iterator[Listed]:
        with self._session("listing", prefix or "everything") as sftp:
            try:
                found = list(self._list(sftp, prefix))
            except FileNotFoundError:
                found = []
        return iter(found)

    def delete(self, name: str) -> None:
        with contextlib.suppress(ObjectMissingError), self._session("deleting", name) as sftp:
            sftp.remove(self._path(name))

    def settle(self, folder: str) -> None:
        with contextlib.suppress(ObjectMissingError), self._session("making durable what is in", folder) as sftp:
            self._sync_folder(sftp, folder)

    def close(self) -> None:
        with self._lock:
            if self._ssh is not None:
                self._ssh.close()
            self._ssh = self._sftp = None
            self._folders.clear()

    # ------------------------------------------------------------------ files

    def _path(self, name: str) -> str:
        return posixpath.join(self._folder, name)

    def _make_folder(self, sftp: Any, folder: str) -> None:
        """A folder below the repository's own, and that itself when its parent is there."""
        for part in ("", folder):
            if part not in self._folders:
                path = self._path(part).rstrip("/") or "."
                try:
                    sftp.stat(path)
                except FileNotFoundError:
                    sftp.mkdir(path, 0o700)
                self._folders.add(part)

    def _write(self, sftp: Any, path: str, buffers: Sequence[Buffer], size: int, *, durable: bool) -> None:
        with sftp.open(path, "wbx") as file:
            file.set_pipelined(True)
            for buffer in buffers:
                view = memoryview(buffer)
                for begin in range(0, len(view), _WRITE_BYTES):
                    file.write(view[begin : begin + _WRITE_BYTES].tobytes())
            file.set_pipelined(False)
            if durable and self._can_sync:
                self._sync(sftp, file)
        found = sftp.stat(path).st_size
        if found != size:  # an error of a pipelined write can get lost in the library
            raise OSError(f"{found} of {size} bytes were written")

    def _sync(self, sftp: Any, file: Any) -> None:
        try:
            sftp._request(_EXTENDED, "fsync@openssh.com", file.handle)
        except OSError as error:
            if error.errno is not None or "unsupported" not in str(error).lower():
                raise
            self._can_sync = False
            log.warning(
                "%s: the server cannot be told to sync: it decides itself what survives a power cut", self.location
            )

    def _sync_folder(self, sftp: Any, folder: str) -> None:
        """OpenSSH opens a folder as it does a file, and syncs it; not all servers do."""
        if not (self._can_sync and self._can_sync_folders):
            return
        path = self._path(folder).rstrip("/") or "."
        sftp.stat(path)  # a folder that is not there is something else than one that cannot be opened
        try:
            with sftp.open(path, "r") as opened:
                self._sync(sftp, opened)
        except OSError as error:
            if error.errno is not None:
                raise
            self._can_sync_folders = False
            log.warning(
                "%s: the server cannot sync folders (%s): it decides itself when names survive a power cut",
                self.location,
                error,
            )

    def _rename(self, sftp: Any, old: str, new: str) -> None:
        try:
            sftp.posix_rename(old, new)
        except OSError as error:
            if error.errno is not None or "unsupported" not in str(error).lower():
                raise
            with contextlib.suppress(FileNotFoundError):
                sftp.remove(new)
            sftp.rename(old, new)

    def _list(self, sftp: Any, folder: str) -> Iterator[Listed]:
        for found in sftp.listdir_attr(self._path(folder) or "."):
            name = posixpath.join(folder, found.filename)
            if stat.S_ISDIR(found.st_mode or 0):
                if name != _TMP:
                    yield from self._list(sftp, name)
            else:
                yield Listed(name, int(found.st_size or 0))

    # ------------------------------------------------------------------ connection

    @contextlib.contextmanager
    def _session(self, act: str, name: str, size: int = 0) -> Iterator[Any]:
        """The connection, for one operation; errors of the library and of the server as ours."""
        import paramiko

        with self._lock:
            try:
                if self._sftp is None:
                    self._connect()
                yield self._sftp
            except (FileNotFoundError, PermissionError) as error:
                if isinstance(error, FileNotFoundError):
                    raise self._missing(name) from error
                raise TargetDeniedError(
                    f"{self.location}: {act} {name} is not permitted",
                    remedy="Give the user the right to read and write the folder on the server.",
                    repository=self.location,
                ) from error
            except TimeoutError as error:
                self.close()
                raise TargetTimeoutError(
                    f"{self.location}: {act} {name}: no answer in {self._silence_s:g} s", repository=self.location
                ) from error
            except (EOFError, ConnectionError, paramiko.SSHException) as error:
                self.close()
                raise TargetUnreachableError(
                    f"{self.location}: the connection was lost while {act} {name}: {error or 'it was closed'}",
                    repository=self.location,
                ) from error
            except OSError as error:
                raise self._explain(error, f"{act} {name}", size) from error

    def _missing(self, name: str) -> Exception:
        return ObjectMissingError(f"{self.location}: {name} is missing", repository=self.location, object=name)

    def _explain(self, error: OSError, act: str, size: int) -> Exception:
        """SFTP has no code for a full storage, only "Failure": the storage is asked how much room it has."""
        text = str(error)
        if "Socket is closed" in text:
            self.close()
            return TargetUnreachableError(
                f"{self.location}: the connection was lost while {act}", repository=self.location
            )
        free_bytes = self._free_bytes() if size else None
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or (free_bytes is not None and free_bytes < size):
            return TargetFullError(
                f"{self.location}: {act}: the storage has {free_bytes or 0} bytes left, and {size} are needed",
                repository=self.location,
            )
        return TargetFaultError(
            f"{self.location}: {act} failed: the server says {text!r}",
            remedy="Look into the server's log; a quota that is used up is told in this way too.",
            repository=self.location,
        )

    def _free_bytes(self) -> int | None:
        """Room for us on the server's filesystem, if it can say that (`statvfs@openssh.com`)."""
        try:
            kind, message = self._sftp._request(_EXTENDED, "statvfs@openssh.com", self._folder)
        except Exception:  # only to explain an error better, which is raised in any case
            return None
        if kind != _EXTENDED_REPLY:
            return None
        _block, fragment, _blocks, _free, available = (message.get_int64() for _ in range(5))
        return int(fragment * available)

    def _connect(self) -> None:
        import paramiko

        ssh = paramiko.SSHClient()
        ssh.set_missing_host_key_policy(paramiko.RejectPolicy())
        known_hosts = self._credentials.known_hosts
        where = f"{self._host} port {self._port}"
        try:
            ssh.load_host_keys(known_hosts)
        except OSError as error:
            raise HostKeyError(
                f"{self.location}: {known_hosts} cannot be read: {error.strerror}", repository=self.location
            ) from error
        try:
            ssh.connect(
                self._host,
                self._port,
                username=self._user,
                password=self._credentials.sftp_password or None,
                key_filename=self._credentials.sftp_key_file or None,
                passphrase=self._credentials.sftp_key_passphrase or None,
                timeout=self._connect_timeout_s,
                banner_timeout=self._connect_timeout_s,
                auth_timeout=self._connect_timeout_s,
                channel_timeout=self._connect_timeout_s,
                allow_agent=False,
                look_for_keys=not (self._credentials.sftp_key_file or self._credentials.sftp_password),
            )
            sftp = ssh.open_sftp()
        except BaseException as error:
            ssh.close()
            raise self._connect_error(error, where) from error
        sftp.get_channel().settimeout(self._silence_s)
        transport = ssh.get_transport()
        if transport is not None:
            transport.set_keepalive(_KEEPALIVE_S)
        self._ssh, self._sftp = ssh, sftp

    def _connect_error(self, error: BaseException, where: str) -> BaseException:
        import paramiko

        text = str(error)
        known_hosts = self._credentials.known_hosts
        if isinstance(error, paramiko.BadHostKeyException):
            return HostKeyError(
                f"{self.location}: the host key of {where} is another than the one in {known_hosts}",
                remedy="Somebody may stand between: compare the key with the server's administrator first.",
                repository=self.location,
            )
        if "not found in known_hosts" in text:
            return HostKeyError(
                f"{self.location}: the host key of {where} is not in {known_hosts}", repository=self.location
            )
        if isinstance(error, paramiko.AuthenticationException):
            return TargetDeniedError(
                f"{self.location}: {where} does not accept the key: {text}", repository=self.location
            )
        if isinstance(error, TimeoutError):
            return TargetTimeoutError(f"{self.location}: {where} does not answer", repository=self.location)
        if isinstance(error, OSError | EOFError | paramiko.SSHException):
            return TargetUnreachableError(
                f"{self.location}: {where} cannot be reached: {text}", repository=self.location
            )
        return error
