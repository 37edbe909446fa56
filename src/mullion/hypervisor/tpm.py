"""A partition's TPM 2.0: a process of its own (swtpm), between QEMU and the folder with what the TPM must not forget.

    QEMU (tpm-tis or tpm-crb) ── tpm.sock ──► swtpm ── DATA/tpm/tpm2-00.permall

It is started before QEMU, which connects once, and ends by itself when QEMU's connection does (`--terminate`). When it
dies first, the guest's TPM answers nothing until the partition is started again: QEMU 7.2 never connects a second time.
It runs as QEMU does, under the partition's user, and writes its own folder only.

Invariants: as with QEMU, the process's identity is on disk before the program runs, and its socket listens before it
starts: there is no instant at which the next parent could not find it, and no polling.
"""

from __future__ import annotations

from typing import Final

from mullion.base.errors import UnavailableError
from mullion.base.files import rotate_log
from mullion.base.listener import bind_listener
from mullion.base.paths import PartitionPaths
from mullion.base.process import ProcessIdentity, Spawned, boot_id, find_program, spawn
from mullion.hypervisor.launch import drop_rights

SWTPM: Final = "swtpm"

_IDENTIFY: Final = """\
identity=$1 boot=$2
shift 2
read -r pid a b c d e f g h i j k l m n o p q r s t start rest </proc/self/stat
printf '%s %s %s\\n' "$pid" "$start" "$boot" >"$identity" || exit 126
exec "$@"
"""
"""Spec of the fields: proc(5), /proc/PID/stat: 1 pid, 2 (sh), 22 start time."""


def start_tpm(paths: PartitionPaths, run_as: tuple[int, int] | None) -> tuple[ProcessIdentity, Spawned]:
    """Start the TPM; the first start makes it. Its folder is there and is its user's. The child is ours to wait for.

    Raises: MissingToolError; UnavailableError when it ends at once; OSError.
    """
    program = find_program(SWTPM)
    uid, gid = run_as if run_as is not None else (None, None)
    rotate_log(paths.tpm_log)
    with bind_listener(paths.tpm, uid=uid, gid=gid) as listener:
        argv = [*drop_rights(run_as), program, *tpm_arguments(paths, listener.fileno())]
        child = spawn(
            ["sh", "-c", _IDENTIFY, "mullion-tpm", paths.tpm_identity, boot_id(), *argv],
            log_path=paths.tpm_log,
            pass_fds=(listener.fileno(),),
        )
    identity = ProcessIdentity.of(child.pid)
    if identity is None:
        child.wait()
        raise UnavailableError(
            f"the TPM ended as soon as it was started (exit status {child.returncode})",
            remedy=f"Read {paths.tpm_log}; if its state is damaged, move {paths.tpm_state} away for a new TPM.",
        )
    return identity, child


def tpm_arguments(paths: PartitionPaths, listener: int) -> tuple[str, ...]:
    """swtpm's arguments, given a descriptor that listens."""
    return (
        "socket",
        "--tpm2",
        "--tpmstate",
        f"dir={paths.tpm_state},mode=0600",
        "--ctrl",
        f"type=unixio,fd={listener}",
        "--terminate",
        "--seccomp",
        "action=kill",
    )
