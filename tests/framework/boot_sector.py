"""A guest of one sector: it writes and reads its disk for ever, and compares.

No kernel is needed: the sector uses INT 13h, says `.` on the serial port for every 16 rounds, `F` when the BIOS reports
an error and `B` when it reads other bytes than it wrote.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

_DEADLINE_S = 120.0
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


def assemble(folder: Path) -> bytes:
    """The sector; the folder is for what comes between. It uses the disk from sector 2048 to 38911."""
    source, linked, flat = folder / "boot.S", folder / "boot.o", folder / "boot.bin"
    source.write_text(BOOT_SECTOR)
    command: list[str | Path] = [
        "gcc",
        "-m32",
        "-nostdlib",
        "-static",
        "-Wl,-Ttext=0x7c00,--build-id=none",
        "-o",
        linked,
        source,
    ]
    subprocess.run(command, check=True, timeout=_DEADLINE_S)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", linked, flat], check=True, timeout=_DEADLINE_S)
    sector = flat.read_bytes()
    assert len(sector) == 512
    return sector
