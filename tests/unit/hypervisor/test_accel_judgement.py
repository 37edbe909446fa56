"""What an exit of the probe's guest means, and that its code and registers are what the specification says."""

from __future__ import annotations

import struct

import pytest

from mullion.hypervisor import accel_probe

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("exit_reason", "suberror", "took_ms", "usable", "words"),
    [
        (accel_probe.KVM_EXIT_HLT, 0, 0.05, True, "ran at the processor's speed"),
        (accel_probe.KVM_EXIT_HLT, 0, 53.0, False, "emulated (loop 53 ms, limit 5 ms)"),
        (accel_probe.KVM_EXIT_INTERNAL_ERROR, 1, 0.05, False, "KVM_EXIT_INTERNAL_ERROR, suberror 1"),
        (8, 0, 0.05, False, "exit reason 8 instead of HLT"),
    ],
)
def test_judgement(exit_reason: int, suberror: int, took_ms: float, usable: bool, words: str) -> None:
    verdict, why = accel_probe.judge(exit_reason, suberror, took_ms)
    assert verdict is usable
    assert words in why


def test_the_loop_jumps_back_to_its_decrement() -> None:
    code = accel_probe.CODE_BYTES
    jump = code.index(b"\x75")
    target = jump + 2 + struct.unpack_from("b", code, jump + 1)[0]
    assert code[target : target + 2] == b"\xff\xc9"
    assert struct.unpack_from("<I", code, 1)[0] == accel_probe.LOOP_ROUNDS


def test_special_registers_put_the_processor_into_long_mode() -> None:
    sregs = accel_probe.long_mode(bytearray(312))
    assert len(sregs) == 312
    code = struct.unpack_from("<QIH10B", sregs, 0)
    assert (code[2], code[3], code[4], code[8]) == (0x08, 11, 1, 1)  # selector, executable, present, 64-bit
    cr0, _, cr3, cr4, _, efer = struct.unpack_from("<6Q", sregs, 224)
    assert cr0 & (1 << 31 | 1) == (1 << 31 | 1)  # paging, protected mode
    assert cr3 == accel_probe.PML4
    assert cr4 & (1 << 5 | 1 << 9) == 1 << 5 | 1 << 9  # PAE; OSFXSR, without which SSE faults
    assert efer & (1 << 8 | 1 << 10) == 1 << 8 | 1 << 10  # LME, LMA
