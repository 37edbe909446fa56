"""Which accelerator runs the guests: KVM where a probe shows that it can, else TCG; an administrator may force either.

The probe (`accel_probe`) runs in a subprocess and its verdict is kept for this boot and this QEMU; whether the device
is there and may be opened is looked at afresh every time, since that is what an administrator mends.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from dataclasses import dataclass
from typing import Final

from mullion.base.errors import DeadlineError, MissingToolError, MullionError, UnavailableError
from mullion.base.files import replace_file
from mullion.base.process import boot_id, find_program, run
from mullion.hypervisor import accel_probe
from mullion.hypervisor.cmdline import QEMU
from mullion.model.definition import Accelerator
from mullion.model.views import CheckView

KVM_DEVICE: Final = "/dev/kvm"
PROBE_S: Final = 10.0
"""The probe stops itself after 0.15 s; this is for a host on which it cannot."""


@dataclass(frozen=True, slots=True)
class AcceleratorChoice:
    """What will be used and why. `kvm_usable` is None when nobody asked; `remedy` is empty when there is none."""

    accelerator: Accelerator
    reason: str
    took_ms: float
    kvm_usable: bool | None
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class KvmVerdict:
    usable: bool
    why: str
    remedy: str = ""


def probe_accelerator(
    cache_path: str, *, forced: Accelerator = Accelerator.AUTO, device: str = KVM_DEVICE, qemu: str = QEMU
) -> AcceleratorChoice:
    """Choose. Blocks for at most the probe's time: 0.1-0.2 s the first time after a boot, then 1 ms.

    Raises: UnavailableError when KVM is forced and cannot run a guest.
    """
    begun = time.perf_counter()

    def choice(accelerator: Accelerator, reason: str, usable: bool | None, remedy: str = "") -> AcceleratorChoice:
        return AcceleratorChoice(accelerator, reason, (time.perf_counter() - begun) * 1000, usable, remedy)

    if forced is Accelerator.TCG:
        return choice(Accelerator.TCG, "TCG was asked for", None)
    verdict = examine_kvm(cache_path, device=device, qemu=qemu)
    if verdict.usable:
        return choice(Accelerator.KVM, f"{device}: {verdict.why}; KVM is used", True)
    if forced is Accelerator.KVM:
        raise UnavailableError(
            f"KVM was asked for, but {verdict.why}",
            remedy=verdict.remedy or "Say accelerator = tcg, or auto, in the definition or the setting.",
            device=device,
        )
    return choice(Accelerator.TCG, f"{verdict.why}; TCG is used", False, verdict.remedy)


def examine_kvm(cache_path: str, *, device: str = KVM_DEVICE, qemu: str = QEMU) -> KvmVerdict:
    """Whether KVM can run a guest of ours. Never raises for what it finds."""
    try:
        mode = os.stat(device).st_mode
    except OSError:
        return KvmVerdict(
            False,
            f"{device} is not there",
            "Enable virtualization in the firmware (VT-x, AMD-V), then: modprobe kvm-intel || modprobe kvm-amd",
        )
    if not stat.S_ISCHR(mode):
        return KvmVerdict(False, f"{device} is not a device", f"Remove {device}, then: modprobe kvm")
    if not os.access(device, os.R_OK | os.W_OK):
        return KvmVerdict(
            False, f"{device} is there, but we may not open it", "Join its group, then log in anew: adduser $USER kvm"
        )
    key = _cache_key(device, qemu)
    cached = _read_cache(cache_path, key)
    if cached is not None:
        return cached
    verdict = _run_probe(device)
    text = json.dumps({"key": key, "usable": verdict.usable, "why": verdict.why, "remedy": verdict.remedy})
    os.makedirs(os.path.dirname(cache_path), mode=0o750, exist_ok=True)
    replace_file(cache_path, text.encode(), durable=False)
    return verdict


def accelerator_check(choice: AcceleratorChoice) -> CheckView:
    """The choice as a line of `mullion doctor`; TCG is slow, but nothing is missing."""
    verdict = "ok" if choice.accelerator is Accelerator.KVM else "note"
    return CheckView("accelerator", verdict, f"{choice.accelerator.value}: {choice.reason}", choice.remedy)


def kvm_groups(device: str = KVM_DEVICE) -> tuple[int, ...]:
    """The groups that a QEMU under a user id of its own needs to open the device; never root's."""
    try:
        status = os.stat(device)
    except OSError:
        return ()
    return (status.st_gid,) if status.st_gid != 0 and status.st_mode & stat.S_IWGRP else ()


def _run_probe(device: str) -> KvmVerdict:
    remedy = "Use a host whose processor runs guests itself, or say accelerator = tcg to stop asking."
    try:
        done = run([sys.executable, "-I", "-S", accel_probe.__file__, device], timeout_s=PROBE_S)
        answer = json.loads(done.stdout)
        usable, why = bool(answer["usable"]), str(answer["why"])
    except DeadlineError:
        usable, why = False, f"a test guest hung for {PROBE_S:g} s"
    except (MullionError, ValueError, KeyError, TypeError) as error:
        usable, why = False, f"the probe failed: {error}"
    return KvmVerdict(True, why) if usable else KvmVerdict(False, f"{device} is there, but {why}", remedy)


def _cache_key(device: str, qemu: str) -> str:
    try:
        path = find_program(qemu)
        program = f"{path} {os.stat(path).st_mtime_ns}"
    except (MissingToolError, OSError):
        program = "none"
    return f"{boot_id()} {device} {program}"


def _read_cache(path: str, key: str) -> KvmVerdict | None:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        if found["key"] != key:
            return None
        return KvmVerdict(bool(found["usable"]), str(found["why"]), str(found["remedy"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no cache, or not one of ours: probe again
