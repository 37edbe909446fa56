"""Can this /dev/kvm run a guest? A stand-alone program: one line of JSON on standard output, exit status 0.

Run as a subprocess (`python -I accel_probe.py`), because a KVM that misbehaves may hang its caller; standard library
only, nothing of ours is imported.

A nested or software KVM can answer every ioctl and yet emulate each guest instruction: privileged instructions then all
work, and QEMU starts, but a guest needs minutes for its first second. What tells it apart, measured on such a host:

    loop of 20000 rounds     53-55 ms there, tens of microseconds on a processor; the limit of 5 ms is 10 x from both
    pxor xmm0, xmm0          KVM_EXIT_INTERNAL_ERROR, suberror 1: its emulator does not know SSE2

So the guest is a page of long-mode code at CPL 0: the loop, the instruction, HLT.

Spec: Linux, Documentation/virt/kvm/api.rst; structures of <linux/kvm.h> for x86-64.

    guest-physical   0x1000 PML4 · 0x2000 PDPT · 0x3000 PD (one 2 MiB page, identity) · 0x4000 code
    kvm_regs         rax rbx rcx rdx rsi rdi rsp rbp r8-r15 rip rflags                                     18 x u64
    kvm_segment      base u64, limit u32, selector u16, type present dpl db s l g avl unusable padding     10 x u8
    kvm_sregs        cs ds es fs gs ss tr ldt, gdt idt (base u64, limit u16, 3 x u16), cr0 cr2 cr3 cr4 cr8 efer
                     apic_base, interrupt_bitmap 4 x u64                                                  312 bytes
    kvm_run          offset 8: exit_reason u32; offset 32: suberror u32 of KVM_EXIT_INTERNAL_ERROR

Not handled: a KVM that runs these and fails later; an administrator can force TCG. The answer "yes" was seen only on
paper so far: no machine of ours has a KVM that works.
"""

import ctypes
import fcntl
import json
import mmap
import os
import signal
import struct
import sys
import time

LOOP_ROUNDS = 20000
LOOP_LIMIT_MS = 5.0
HARD_STOP_S = 0.15

KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_GET_SUPPORTED_CPUID = 0xC008AE05
KVM_CREATE_VCPU = 0xAE41
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_SET_TSS_ADDR = 0xAE47
KVM_RUN = 0xAE80
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_SET_CPUID2 = 0x4008AE90

KVM_EXIT_HLT = 5
KVM_EXIT_INTERNAL_ERROR = 17
API_VERSION = 12
TSS_ADDRESS = 0x7FFBD000  # below 2 GiB: fcntl.ioctl takes a signed int
CPUID_ENTRIES = 256
CPUID_ENTRY_BYTES = 40

PML4, PDPT, PD, CODE = 0x1000, 0x2000, 0x3000, 0x4000
MEMORY_BYTES = 0x10000
CODE_BYTES = (
    b"\xb9" + struct.pack("<I", LOOP_ROUNDS) +  # mov ecx, rounds
    b"\xff\xc9"          # again: dec ecx
    b"\x75\xfc"          # jnz again
    b"\x66\x0f\xef\xc0"  # pxor xmm0, xmm0
    b"\xf4"              # hlt
)  # fmt: skip

CR0_PE_MP_NE_PG = 1 << 0 | 1 << 1 | 1 << 5 | 1 << 31
CR4_PAE_OSFXSR = 1 << 5 | 1 << 9
EFER_LME_LMA = 1 << 8 | 1 << 10
PAGE_PRESENT_WRITABLE, PAGE_LARGE = 0b11, 1 << 7


def segment(selector: int, kind: int, *, code: bool) -> bytes:
    """A flat descriptor: present, ring 0, granular; a code segment is a 64-bit one."""
    return struct.pack(
        "<QIH10B", 0, 0xFFFFFFFF, selector, kind, 1, 0, 0 if code else 1, 1, 1 if code else 0, 1, 0, 0, 0
    )


def long_mode(sregs: bytearray) -> bytearray:
    """The special registers of a processor that is in long mode already; tr, ldt and apic_base stay as they were."""
    data = segment(0x10, 3, code=False)
    sregs[0:144] = segment(0x08, 11, code=True) + 5 * data
    struct.pack_into("<QQQQQQ", sregs, 224, CR0_PE_MP_NE_PG, 0, PML4, CR4_PAE_OSFXSR, 0, EFER_LME_LMA)
    return sregs


def fill(memory: mmap.mmap) -> None:
    """Page tables and code."""
    for table, entry in (
        (PML4, PDPT | PAGE_PRESENT_WRITABLE),
        (PDPT, PD | PAGE_PRESENT_WRITABLE),
        (PD, PAGE_PRESENT_WRITABLE | PAGE_LARGE),
    ):
        struct.pack_into("<Q", memory, table, entry)
    memory[CODE : CODE + len(CODE_BYTES)] = CODE_BYTES


def run_guest(kvm: int) -> tuple[int, int, float]:
    """Run the page of code once. Returns exit reason, suberror, milliseconds of processor time in the guest."""
    vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    fcntl.ioctl(vm, KVM_SET_TSS_ADDR, TSS_ADDRESS)
    memory = mmap.mmap(-1, MEMORY_BYTES)
    fill(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", 0, 0, 0, MEMORY_BYTES, address))
    vcpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
    run = mmap.mmap(vcpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE))
    cpuid = bytearray(struct.pack("<II", CPUID_ENTRIES, 0) + bytes(CPUID_ENTRIES * CPUID_ENTRY_BYTES))
    fcntl.ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid)
    fcntl.ioctl(vcpu, KVM_SET_CPUID2, cpuid)
    sregs = bytearray(312)
    fcntl.ioctl(vcpu, KVM_GET_SREGS, sregs)
    fcntl.ioctl(vcpu, KVM_SET_SREGS, long_mode(sregs))
    fcntl.ioctl(vcpu, KVM_SET_REGS, struct.pack("<18Q", *([0] * 16), CODE, 2))
    begun = time.thread_time()  # processor time, guest's included: a busy host must not look like an emulation
    fcntl.ioctl(vcpu, KVM_RUN, 0)
    took_ms = (time.thread_time() - begun) * 1000
    reason, suberror = struct.unpack_from("<I", run, 8)[0], struct.unpack_from("<I", run, 32)[0]
    return reason, suberror, took_ms


def judge(reason: int, suberror: int, took_ms: float) -> tuple[bool, str]:
    """What an exit says: usable or not, and why."""
    if took_ms > LOOP_LIMIT_MS:
        return False, f"guest instructions are emulated (loop {took_ms:.0f} ms, limit {LOOP_LIMIT_MS:.0f} ms)"
    if reason == KVM_EXIT_INTERNAL_ERROR:
        return False, f"an ordinary instruction cannot be run (KVM_EXIT_INTERNAL_ERROR, suberror {suberror})"
    if reason != KVM_EXIT_HLT:
        return False, f"a test guest ended with exit reason {reason} instead of HLT"
    return True, f"a test guest ran at the processor's speed (loop {took_ms:.2f} ms)"


def probe(device: str) -> tuple[bool, str]:
    """Whether the device can run a guest, and why (not)."""
    kvm = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    version = fcntl.ioctl(kvm, KVM_GET_API_VERSION)
    if version != API_VERSION:
        return False, f"its API version is {version}, not {API_VERSION}"
    # SIGALRM interrupts KVM_RUN with EINTR; Python does not restart an ioctl.
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, HARD_STOP_S)
    try:
        return judge(*run_guest(kvm))
    except InterruptedError:
        return False, f"a test guest of {LOOP_ROUNDS} rounds did not end within {HARD_STOP_S * 1000:.0f} ms"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> None:
    try:
        usable, why = probe(sys.argv[1] if len(sys.argv) > 1 else "/dev/kvm")
    except OSError as error:
        usable, why = False, f"it refuses a test guest ({error})"
    print(json.dumps({"usable": usable, "why": why}))


if __name__ == "__main__":
    main()
