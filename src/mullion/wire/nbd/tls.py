"""TLS for NBD: the context of a server, from a folder of PEM files.

Spec: "The NBD protocol", section "TLS support". The files are called as QEMU (`tls-creds-x509,dir=`) and libnbd
(`tls-certificates=`) call them, so that one folder serves all of them:

| file | server | client |
|---|---|---|
| `ca-cert.pem` | who may have signed a client's certificate | who may have signed the server's |
| `server-cert.pem`, `server-key.pem` | its own | |
| `client-cert.pem`, `client-key.pem` | | its own |

Invariants: TLS 1.2 or newer; no connection without a certificate that the authority signed.
Not handled: our own client, revocation lists (take another authority), pre-shared keys.
"""

from __future__ import annotations

import os
import ssl
from typing import Final

from mullion.base.errors import DeniedError, InvalidError, NotFoundError

CA_CERTIFICATE: Final = "ca-cert.pem"
SERVER_CERTIFICATE: Final = "server-cert.pem"
SERVER_KEY: Final = "server-key.pem"
CLIENT_CERTIFICATE: Final = "client-cert.pem"
CLIENT_KEY: Final = "client-key.pem"
_FOLDER_REMEDY: Final = "Give the folder that has it; mullion makes a set when no folder is given."


def server_context(folder: str) -> ssl.SSLContext:
    """A server that shows its certificate and wants one. Raises: NotFoundError, DeniedError, InvalidError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load(context, folder, SERVER_CERTIFICATE, SERVER_KEY)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def _load(context: ssl.SSLContext, folder: str, certificate: str, key: str) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    for name in (CA_CERTIFICATE, certificate, key):
        _check_readable(f"{folder}/{name}")
    try:
        context.load_verify_locations(f"{folder}/{CA_CERTIFICATE}")
        # Without an answer to the question for a password, which nobody would read, an encrypted key is refused.
        context.load_cert_chain(f"{folder}/{certificate}", f"{folder}/{key}", password=_no_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise InvalidError(
            f"the certificates in {folder} cannot be used: {error}",
            remedy=f"Put an unencrypted key {key}, its certificate {certificate} and {CA_CERTIFICATE} there, as PEM.",
            path=folder,
        ) from error


def _no_password() -> bytes:
    raise ValueError("the key is encrypted")


def _check_readable(path: str) -> None:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no {path}", remedy=_FOLDER_REMEDY, path=path) from error
    except OSError as error:
        raise DeniedError(
            f"{path} cannot be read: {error.strerror}", remedy="Make it readable for the service's user.", path=path
        ) from error
