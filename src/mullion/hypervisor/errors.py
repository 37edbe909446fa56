"""What can go wrong between us and a running QEMU, by consequence."""

from __future__ import annotations

from mullion.base.errors import OperationFailedError, UnavailableError


class StartFailedError(OperationFailedError):
    """QEMU ended before the partition was ready; `exit_status`, `log_excerpt` and `command` say how."""

    code = "start-failed"
    default_remedy = "Read QEMU's words in the message, correct the definition, and start the partition again."


class MachineGoneError(UnavailableError):
    """The partition's QEMU is not there any more."""

    code = "machine-gone"
    default_remedy = "Start the partition again with `mullion partition start`."


class MonitorError(UnavailableError):
    """QEMU runs, but its monitors do not answer: they are held by another client, or QEMU hangs."""

    code = "monitor-unavailable"
    default_remedy = "Disconnect other clients of the partition's qmp.sock and qmp2.sock, then try again."


class MonitorRefusedError(OperationFailedError):
    """QEMU understood a command and refused it; `command` and `reason` are in the context."""

    code = "monitor-refused"
    default_remedy = "QEMU's reason is in the message; the partition goes on as before."


class StateRefusedError(OperationFailedError):
    """QEMU does not take a saved state; its words are in the message and in `log_excerpt`."""

    code = "state-refused"
    default_remedy = (
        "Restore it on a host with the QEMU and the processor that it was saved on, or throw it away with "
        "`mullion partition discard-state` and start the partition, which boots from its disks."
    )


class AgentError(UnavailableError):
    """The guest agent does not answer."""

    code = "agent-unavailable"
    default_remedy = "Install and start qemu-guest-agent in the guest, or wait until the guest has booted."


class AgentRefusedError(OperationFailedError):
    """The guest agent answered with an error."""

    code = "agent-refused"
    default_remedy = "The guest's reason is in the message; look into the guest's own logs."
