"""A repository in an S3 bucket, or below a prefix in one: AWS, and whatever speaks the same protocol.

Durability and wholeness are the service's: an object that was put is there for all who read after, whole (S3 has
promised this since 2020). The bucket must be there. Requests are signed (version 4), contents too; objects are
encrypted before they get here. The library's own retries are off: `backend.Persistent` tries again.
"""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from mullion.base.block import Buffer
from mullion.base.units import MIB
from mullion.repository.backend import Listed, ObjectMissingError
from mullion.repository.credentials import Credentials
from mullion.repository.errors import (
    TargetDeniedError,
    TargetFaultError,
    TargetFullError,
    TargetTimeoutError,
    TargetUnreachableError,
)

if TYPE_CHECKING:
    from obstore.store import S3Config, S3Store

PACK_BYTES: Final = 16 * MIB
CONNECT_TIMEOUT_S: Final = 10.0
REQUEST_TIMEOUT_S: Final = 300.0
"""For one request: a pack of 16 MiB needs 55 kB/s."""
_FULL: Final = ("QuotaExceeded", "EntityTooLarge", "exceeds quota", "XMinioStorageFull", "InsufficientCapacity")
_DENIED: Final = (401, 403)
_BUSY: Final = (429, 500, 502, 503, 504)


class S3Backend:
    """A `Backend` of objects in a bucket."""

    pack_bytes: Final = PACK_BYTES

    def __init__(
        self,
        bucket: str,
        prefix: str,
        credentials: Credentials,
        *,
        endpoint: str | None = None,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> None:
        """Connects to nothing yet. Raises: TargetDeniedError when there is no access key."""
        self.location = f"{endpoint or 's3:/'}/{bucket}" + (f"/{prefix}" if prefix else "")
        self._prefix = f"{prefix}/" if prefix else ""
        if not credentials.s3_access_key or not credentials.s3_secret_key:
            raise TargetDeniedError(
                f"{self.location}: there is no access key",
                remedy="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a credentials file that has them.",
                repository=self.location,
            )
        self._store = _open_store(bucket, credentials, endpoint, request_timeout_s)

    def put(self, name: str, buffers: Iterable[Buffer], *, durable: bool = True) -> None:
        import obstore

        content = b"".join(buffers)
        with self._explained("putting", name):
            obstore.put(self._store, self._prefix + name, content, use_multipart=False)

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        import obstore

        with self._explained("getting", name):
            if offset == 0 and length is None:
                return bytes(obstore.get(self._store, self._prefix + name).bytes())
            end = 1 << 62 if length is None else offset + length
            if end == offset:
                return b""
            try:
                return bytes(obstore.get_range(self._store, self._prefix + name, start=offset, end=end))
            except obstore.exceptions.BaseError as error:
                if _status(error) == 416:  # behind the object's end
                    return b""
                raise

    def size(self, name: str) -> int | None:
        import obstore

        with self._explained("looking at", name):
            try:
                return obstore.head(self._store, self._prefix + name)["size"]
            except FileNotFoundError:
                return None

    def list(self, prefix: str) -> Iterator[Listed]:
        import obstore

        with self._explained("listing", prefix or "everything"):
            for batch in obstore.list(self._store, (self._prefix + prefix) or None, chunk_size=1000):
                for found in batch:
                    yield Listed(found["path"].removeprefix(self._prefix), found["size"])

    def delete(self, name: str) -> None:
        import obstore

        with self._explained("deleting", name), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, self._prefix + name)

    def settle(self, folder: str) -> None:
        """Nothing: what S3 has answered is durable, deletions too."""

    def close(self) -> None:
        pass

    @contextlib.contextmanager
    def _explained(self, act: str, name: str) -> Iterator[None]:
        """An error of the library as one of ours. It tells kinds apart in its text only."""
        from obstore.exceptions import BaseError

        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise self._no_bucket() from error
            raise ObjectMissingError(
                f"{self.location}: {name} is missing", repository=self.location, object=name
            ) from error
        except BaseError as error:
            raise self._explain(error, f"{act} {name}") from error

    def _explain(self, error: Exception, act: str) -> Exception:
        text, status = str(error), _status(error)
        said = _said(text)
        what = f"{self.location}: {act} failed: {said}"
        if any(word in text for word in _FULL) or status == 507:
            return TargetFullError(what, repository=self.location)
        if status in _DENIED:
            return TargetDeniedError(what, repository=self.location)
        if status == 404:
            return self._no_bucket()
        if "kind: Timeout" in text:
            return TargetTimeoutError(f"{self.location}: {act}: no answer in time", repository=self.location)
        if status in _BUSY or (status is None and "HTTP error" in text):
            return TargetUnreachableError(what, repository=self.location)
        return TargetFaultError(what, repository=self.location)

    def _no_bucket(self) -> TargetFaultError:
        return TargetFaultError(
            f"{self.location}: there is no such bucket",
            remedy="Make the bucket first, or correct its name.",
            repository=self.location,
        )


def _open_store(bucket: str, credentials: Credentials, endpoint: str | None, request_timeout_s: float) -> S3Store:
    from obstore.store import S3Store

    token: S3Config = {"session_token": credentials.s3_session_token} if credentials.s3_session_token else {}
    return S3Store(
        bucket,
        config=token,
        endpoint=endpoint or f"https://s3.{credentials.s3_region}.amazonaws.com",
        region=credentials.s3_region,
        access_key_id=credentials.s3_access_key,
        secret_access_key=credentials.s3_secret_key,
        virtual_hosted_style_request=False,
        disable_bulk_delete=True,
        client_options={
            "allow_http": endpoint is not None and endpoint.startswith("http://"),
            "connect_timeout": datetime.timedelta(seconds=CONNECT_TIMEOUT_S),
            "timeout": datetime.timedelta(seconds=request_timeout_s),
        },
        retry_config={"max_retries": 0},
    )


def _status(error: Exception) -> int | None:
    match = re.search(r"status code: (\d{3})", str(error))
    return None if match is None else int(match[1])


def _said(text: str) -> str:
    """What the service said, or the library's first line."""
    match = re.search(r"<Code>([^<]{1,100})</Code><Message>([^<]{0,300})", text)
    if match is not None:
        return f"{match[1]}: {match[2]}"
    kinds = re.findall(r"kind: (\w+)", text)
    first = text.partition("\n")[0][:300]
    return f"{first} ({kinds[-1]})" if kinds else first
