"""One partition on QEMU: accelerator, command line, machine over QMP, guest agent, console, firmware."""

from mullion.hypervisor.agent import GuestAgent
from mullion.hypervisor.cmdline import MachineSpec, ResolvedDisk, cmdline, shell_line
from mullion.hypervisor.machine import Machine
from mullion.hypervisor.states import ExitReport, MachineControl, MachineEvent, MachineStatus, ShutdownStep

__all__ = [
    "ExitReport",
    "GuestAgent",
    "Machine",
    "MachineControl",
    "MachineEvent",
    "MachineSpec",
    "MachineStatus",
    "ResolvedDisk",
    "ShutdownStep",
    "cmdline",
    "shell_line",
]
