"""Where each file of the service and of a partition lives, and the firmware of the host.

The data folder survives a reboot; the run folder holds sockets and process identities and may vanish with it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mullion.base.errors import InvalidError

SOCKET_PATH_LIMIT: Final = 107
"""Longest path of a unix socket: sun_path is 108 bytes with its terminating zero (unix(7))."""

OVMF_PAIRS: Final = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
)
"""UEFI firmware: code and template of the variables, of one build: Debian's 4 MiB and 2 MiB builds, Fedora's."""


def find_ovmf(pairs: Sequence[tuple[str, str]] = OVMF_PAIRS) -> tuple[str, str] | None:
    """The first pair of which both files are there."""
    return next((pair for pair in pairs if all(map(os.path.exists, pair))), None)


@dataclass(frozen=True, slots=True)
class HostPaths:
    """Files of the service on one host."""

    data_dir: str
    run_dir: str

    @property
    def database(self) -> str:
        return f"{self.data_dir}/mullion.db"

    @property
    def disks(self) -> str:
        """The default disk pool."""
        return f"{self.data_dir}/disks"

    @property
    def images(self) -> str:
        return f"{self.data_dir}/images"

    @property
    def secrets(self) -> str:
        """Passphrases and credentials, for the service's own user only."""
        return f"{self.data_dir}/secrets"

    def index_cache(self, repository: str) -> str:
        """The folder of the copies of a backup repository's index; it may go at any time."""
        return f"{self.data_dir}/cache/index-{repository}"

    @property
    def log(self) -> str:
        return f"{self.data_dir}/mullion.log"

    @property
    def api_socket(self) -> str:
        return f"{self.run_dir}/api.sock"

    @property
    def api_url_file(self) -> str:
        """Holds the URL of the TCP listener while the service runs."""
        return f"{self.run_dir}/api.url"

    @property
    def token_file(self) -> str:
        return f"{self.data_dir}/token"

    @property
    def service_lock(self) -> str:
        """Locked by the running service; holds its process identity."""
        return f"{self.run_dir}/service.pid"

    @property
    def accelerator_cache(self) -> str:
        return f"{self.run_dir}/accelerator.json"

    def partition(self, name: str) -> PartitionPaths:
        return PartitionPaths(f"{self.data_dir}/partitions/{name}", f"{self.run_dir}/p/{name}")


@dataclass(frozen=True, slots=True)
class PartitionPaths:
    """Files of one partition: `data` holds logs and firmware variables, `run` sockets and identities."""

    data: str
    run: str

    @property
    def console_log(self) -> str:
        return f"{self.data}/console.log"

    @property
    def qemu_log(self) -> str:
        return f"{self.data}/qemu.log"

    @property
    def provider_log(self) -> str:
        return f"{self.data}/provider.log"

    @property
    def firmware_vars(self) -> str:
        return f"{self.data}/firmware-vars.fd"

    @property
    def tpm_state(self) -> str:
        """The folder in which the partition's TPM keeps what survives a power-off."""
        return f"{self.data}/tpm"

    @property
    def tpm_identity(self) -> str:
        return f"{self.run}/tpm.pid"

    @property
    def tpm_log(self) -> str:
        return f"{self.data}/tpm.log"

    @property
    def tpm(self) -> str:
        """The TPM's control socket, which QEMU connects to."""
        return self._socket("tpm.sock")

    @property
    def exit_file(self) -> str:
        """QEMU's exit status, written by its wrapper: one decimal number, 128 + n for signal n."""
        return f"{self.run}/qemu.exit"

    @property
    def qemu_identity(self) -> str:
        return f"{self.run}/qemu.pid"

    @property
    def provider_identity(self) -> str:
        return f"{self.run}/provider.pid"

    @property
    def qmp(self) -> str:
        return self._socket("qmp.sock")

    @property
    def qmp_rescue(self) -> str:
        return self._socket("qmp2.sock")

    @property
    def agent(self) -> str:
        return self._socket("agent.sock")

    @property
    def console(self) -> str:
        return self._socket("console.sock")

    @property
    def provider_control(self) -> str:
        return self._socket("provider.sock")

    @property
    def merge_dir(self) -> str:
        """What a merge worker leaves for the next parent; it may run while the partition does not."""
        return f"{os.path.dirname(os.path.dirname(self.run))}/m/{os.path.basename(self.run)}"

    @property
    def export_dir(self) -> str:
        """What exporters of checkpoints leave for the next parent; they may run while the partition does not."""
        return f"{os.path.dirname(os.path.dirname(self.run))}/x/{os.path.basename(self.run)}"

    @property
    def export_log(self) -> str:
        return f"{self.data}/export.log"

    @property
    def merge_log(self) -> str:
        return f"{self.data}/merge.log"

    @property
    def run_file(self) -> str:
        """What the partition was started with: disks, transports, accelerator."""
        return f"{self.run}/run.json"

    @property
    def pending_dir(self) -> str:
        """Pending logs of the disks: metadata that is acknowledged, but not flushed yet."""
        return f"{self.run}/pending"

    def vhost_user(self, disk_id: str) -> str:
        return self._socket(f"{disk_id}.vhost")

    def nbd(self, disk_id: str) -> str:
        return self._socket(f"{disk_id}.nbd")

    @property
    def backing_dir(self) -> str:
        """What leads to the server of a backup that is coming home; it may run while the partition does not."""
        return f"{os.path.dirname(os.path.dirname(self.run))}/b/{os.path.basename(self.run)}"

    def backing(self, disk_id: str) -> str:
        """Where the blocks of a disk are read that are not home from its backup yet."""
        return _checked(f"{self.backing_dir}/{disk_id}.home")

    @property
    def backup_server_identity(self) -> str:
        return f"{self.backing_dir}/pid"

    def _socket(self, name: str) -> str:
        return _checked(f"{self.run}/{name}")


def _checked(path: str) -> str:
    """A socket's path. Raises: InvalidError when it is too long for the kernel."""
    if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
        raise InvalidError(
            f"the socket's path is longer than {SOCKET_PATH_LIMIT} bytes: {path}",
            remedy="Choose a shorter run folder (setting run_dir) or a shorter name for the partition.",
            path=path,
        )
    return path
