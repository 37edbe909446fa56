"""Certificates for exports over a network: an authority of our own, the server's, and one for clients.

In the folder lie `ca-cert.pem`, `ca-key.pem`, `server-cert.pem` and `server-key.pem`; what a client needs lies in its
sub-folder `client` (`ca-cert.pem`, `client-cert.pem`, `client-key.pem`) and is to be copied to where it runs, by a way
that nobody reads along. The names are those that QEMU and libnbd look for:

    nbdinfo     'nbds://HOST:PORT/DISK?tls-certificates=FOLDER'
    qemu-img    info --object tls-creds-x509,id=t,dir=FOLDER,endpoint=client \
                --image-opts driver=nbd,host=HOST,port=PORT,export=DISK,tls-creds=t

Invariants: keys are ECDSA P-256, unencrypted, mode 0600; what is there is never overwritten; the authority signs for
these two alone and nothing below it. A set is complete or not there: it is made beside and renamed.
Not handled: revoking one client (make a new folder), renewal (ten years).
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import shutil
import socket
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from mullion.base.files import sync_folder
from mullion.wire.nbd.tls import (
    CA_CERTIFICATE,
    CLIENT_CERTIFICATE,
    CLIENT_KEY,
    SERVER_CERTIFICATE,
    SERVER_KEY,
)

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

CA_KEY: Final = "ca-key.pem"
CLIENT_FOLDER: Final = "client"
_VALID_DAYS: Final = 3650
_CLOCK_SKEW: Final = datetime.timedelta(days=1)


def ensure_certificates(folder: str, hosts: Sequence[str] = ()) -> bool:
    """Make a set in the folder unless one is there; True when it was made.

    The server's certificate is good for `hosts`, this host's names, and the loopback. Raises: OSError.
    """
    if os.path.exists(f"{folder}/{SERVER_CERTIFICATE}"):
        return False
    parent = os.path.dirname(os.path.abspath(folder))
    os.makedirs(parent, mode=0o700, exist_ok=True)
    beside = tempfile.mkdtemp(prefix=".tls-", dir=parent)
    try:
        _make_set(beside, hosts)
        os.rename(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    sync_folder(parent)
    return True


def _make_set(folder: str, hosts: Sequence[str]) -> None:
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    authority_key = _new_key()
    name = _name("Mullion exports")
    authority = _sign(
        _builder(name, name, authority_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(is_authority=True), critical=True),
        authority_key,
    )
    os.mkdir(f"{folder}/{CLIENT_FOLDER}", 0o700)
    _write(f"{folder}/{CA_KEY}", _pem_of_key(authority_key))
    for place in (folder, f"{folder}/{CLIENT_FOLDER}"):
        _write(f"{place}/{CA_CERTIFICATE}", authority)
    for place, certificate_file, key_file, purpose in (
        (folder, SERVER_CERTIFICATE, SERVER_KEY, ExtendedKeyUsageOID.SERVER_AUTH),
        (f"{folder}/{CLIENT_FOLDER}", CLIENT_CERTIFICATE, CLIENT_KEY, ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        key = _new_key()
        is_server = purpose == ExtendedKeyUsageOID.SERVER_AUTH
        builder = (
            _builder(_name(socket.gethostname() if is_server else "client"), name, key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(is_authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        )
        if is_server:
            builder = builder.add_extension(x509.SubjectAlternativeName(_names(hosts)), critical=False)
        _write(f"{place}/{key_file}", _pem_of_key(key))
        _write(f"{place}/{certificate_file}", _sign(builder, authority_key))


def _new_key() -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _name(common_name: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _builder(subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=_VALID_DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, is_authority: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    from cryptography import x509

    found: list[x509.GeneralName] = []
    for host in dict.fromkeys((*hosts, socket.gethostname(), socket.getfqdn(), "localhost", "127.0.0.1", "::1")):
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            found.append(x509.DNSName(host))
    return found


def _sign(builder: x509.CertificateBuilder, key: EllipticCurvePrivateKey) -> bytes:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding

    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    return builder.add_extension(issuer, critical=False).sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _pem_of_key(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: str, content: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
