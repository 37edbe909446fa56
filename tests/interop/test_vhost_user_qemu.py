"""QEMU as the front-end and SeaBIOS as the driver: a boot sector of ours writes and reads for ever, providers die.

No kernel is needed: the sector uses INT 13h, says `.` on the serial port for every 16 rounds, `F` when the BIOS reports
an error and `B` when it reads other bytes than it wrote.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from tests.framework.providers import LoneProvider, make_spec

from mullion.vhd import create_differencing, create_dynamic, open_chain

pytestmark = pytest.mark.interop

DEADLINE_S = 120.0
KILLS = 4
BOOT_SECTOR = """
.code16
.globl _start
_start: xor %ax, %ax
        mov %ax, %ds
        mov %ax, %es
        mov %ax, %ss
        mov $0x7c00, %sp
        xor %ebx, %ebx              # round
next:   mov %ebx, %eax              # sector 2048 + 9 * (round mod 4096)
        and $0xfff, %eax
        lea 2048(%eax,%eax,8), %eax
        mov %eax, lba
        mov %ebx, %eax              # content: the round, all over
        not %eax
        mov $0x8000, %di
        mov $128, %cx
        rep stosl
        mov $0x4300, %ax
        call disk
        xor %eax, %eax              # forget it
        mov $0x8000, %di
        mov $128, %cx
        rep stosl
        mov $0x4200, %ax
        call disk
        mov %ebx, %eax
        not %eax
        mov $0x8000, %di
        mov $128, %cx
        repe scasl
        mov $'B', %al
        jne stop
        inc %ebx
        test $15, %bl
        jnz next
        mov $'.', %al
        call say
        jmp next
disk:   mov $packet, %si
        mov $0x80, %dl
        int $0x13
        mov $'F', %al
        jc stop
        ret
say:    mov $0x3f8, %dx
        out %al, %dx
        ret
stop:   call say
1:      hlt
        jmp 1b
packet: .byte 16, 0
        .word 1, 0x8000, 0
lba:    .quad 0
        .org 510
        .word 0xaa55
"""


@pytest.fixture
def folder(short_tmp: Path) -> Path:
    return short_tmp


def assemble(folder: Path) -> bytes:
    source, linked, flat = folder / "boot.S", folder / "boot.o", folder / "boot.bin"
    source.write_text(BOOT_SECTOR)
    command = ["gcc", "-m32", "-nostdlib", "-static", "-Wl,-Ttext=0x7c00,--build-id=none", "-o", linked, source]
    subprocess.run(command, check=True, timeout=DEADLINE_S)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", linked, flat], check=True, timeout=DEADLINE_S)
    sector = flat.read_bytes()
    assert len(sector) == 512
    return sector


def wait_for_dots(serial: Path, qemu: subprocess.Popen[bytes], more: int) -> str:
    """What the guest has said, once it has said that many dots more."""
    before = serial.read_text() if serial.exists() else ""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        said = serial.read_text() if serial.exists() else ""
        if said.count(".") >= before.count(".") + more or set(said) - {"."}:
            return said
        assert qemu.poll() is None, "QEMU ended"
        assert time.monotonic() < deadline, f"the guest stands still after {said!r}"
        time.sleep(0.05)


def test_guest_goes_on_while_providers_are_killed(folder: Path) -> None:
    base, top, serial = folder / "base.vhd", folder / "top.vhd", folder / "serial"
    create_dynamic(str(base), 32 * 1024 * 1024)
    with open_chain(str(base)) as disk:
        disk.pwrite(0, assemble(folder))
    create_differencing(str(top), str(base))
    spec = make_spec(folder, [top, base])
    provider = LoneProvider(spec)
    command = [
        "qemu-system-x86_64",
        *("-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35,memory-backend=memory"),
        *("-accel", "tcg", "-m", "64M", "-object", "memory-backend-memfd,id=memory,size=64M,share=on"),
        *("-chardev", f"socket,id=disk,path={spec.disks[0].vhost_user},reconnect=1"),
        *("-device", "vhost-user-blk-pci,chardev=disk,bootindex=1,num-queues=1"),
        *("-serial", f"file:{serial}"),
    ]
    with (folder / "qemu.log").open("wb") as log, subprocess.Popen(command, stderr=log) as qemu:
        try:
            for _kill in range(KILLS):
                said = wait_for_dots(serial, qemu, 3)
                assert set(said) == {"."}, said
                provider.kill()
                provider = LoneProvider(spec)
                assert provider.ready.get("ready") is True, provider.ready
            said = wait_for_dots(serial, qemu, 3)
            assert set(said) == {"."}, said
        finally:
            qemu.kill()
            qemu.wait(DEADLINE_S)
            status = provider.terminate()
        assert status == 0
    with open_chain(str(top), read_only=True) as disk:
        buffer = bytearray(512)
        disk.pread(2048 * 512, buffer)
        assert buffer == buffer[:4] * 128
        assert ~int.from_bytes(buffer[:4], "little", signed=True) % 4096 == 0  # a round that wrote this sector
