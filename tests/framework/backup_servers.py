"""Real storage for repositories, on loopback ports: OpenSSH's sshd with its sftp-server, and OpenStack Swift's S3 face."""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import select
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mullion.repository.credentials import Credentials

START_DEADLINE_S = 60
SMALL_BUCKET_BYTES = 200_000
_SSHD_CONFIG = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
"""


@dataclass(frozen=True)
class SftpServer:
    """A running sshd, and what is needed to use it."""

    port: int
    folder: Path
    credentials: Credentials
    process: subprocess.Popen[bytes]

    @property
    def user(self) -> str:
        return getpass.getuser()


@dataclass(frozen=True)
class S3Server:
    """A running Swift with the buckets `backup` and `backup-small`, which takes 200 kB."""

    port: int
    credentials: Credentials

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextlib.contextmanager
def sftp_server(folder: Path) -> Iterator[SftpServer]:
    """sshd in the foreground with keys made for it; it ends with the block, and with it all of its sessions."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "authorized_keys").write_bytes((folder / "user_key.pub").read_bytes())
    (folder / "sshd_config").write_text(_SSHD_CONFIG.format(folder=folder))
    os.makedirs("/run/sshd", exist_ok=True)  # sshd's empty folder; Debian makes it when the service starts
    port = free_port()
    kind, key = (folder / "host_key.pub").read_text().split()[:2]
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {kind} {key}\n")
    process = start_sshd(folder, port)
    try:
        credentials = Credentials(sftp_key_file=str(folder / "user_key"), known_hosts=str(folder / "known_hosts"))
        yield SftpServer(port, folder, credentials, process)
    finally:
        end_group(process)


def start_sshd(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Start it and return when it listens, which is when it says so."""
    process = subprocess.Popen(
        ["/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config"), "-o", f"ListenAddress 127.0.0.1:{port}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    _wait_for(process.stderr.fileno(), b"Server listening", process)
    return process


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Swift's servers in one process, which ends when its standard input is closed."""
    folder.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).with_name("swift_server.py")
    process = subprocess.Popen(
        ["/usr/bin/python3", str(script), str(folder), "backup", str(SMALL_BUCKET_BYTES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={"PATH": os.environ["PATH"]},
    )
    try:
        assert process.stdout is not None
        _wait_for(process.stdout.fileno(), b"ready\n", process)
        credentials = Credentials(s3_access_key="test:tester", s3_secret_key=(folder / "key").read_text())
        yield S3Server(int((folder / "port").read_text()), credentials)
    finally:
        end_group(process)


def free_port() -> int:
    """A port on which nobody listens, and which the kernel gives to nobody who asks for any: it stays free."""
    first_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(first_given // 2, first_given)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started, and close our ends of its pipes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def _wait_for(fd: int, words: bytes, process: subprocess.Popen[bytes]) -> None:
    """Read a program's output until it has said something."""
    seen = b""
    while words not in seen:
        ready, _, _ = select.select([fd], [], [], START_DEADLINE_S)
        piece = os.read(fd, 65536) if ready else b""
        assert piece, f"{process.args} did not start: {seen.decode(errors='replace')}"
        seen += piece
