"""Guests of one sector, which use their disk for ever, and compare.

No kernel is needed: they use INT 13h, say `.` on the serial port when they get on, `F` when the BIOS reports an error
and `B` when they find other bytes than they should.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

_DEADLINE_S = 120.0
BOOT_SECTOR = """
# Writes a sector and reads it again; a dot for every 16 rounds. It uses the disk from sector 2048 to 38911.
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
READ_PAGES = 64
READ_FROM_BYTES = 2048 * 512
READING_SECTOR = """
# Reads pages of the disk into as many pages of memory, to which the processor never writes, each time another one into
# each; a dot for every round. Before a page is read into, it must be as it was read a round ago.
.code16
.globl _start
_start: xor %ax, %ax
        mov %ax, %ds
        mov %ax, %ss
        mov $0x7c00, %sp
        xor %ebx, %ebx              # round
round:  xor %ebp, %ebp              # page
page:   mov %bp, %ax
        shl $8, %ax
        add $0x1000, %ax            # pages from 64 KiB on
        mov %ax, %es
        mov %ax, buffer
        lea (%ebx,%ebp), %edx
        test %ebx, %ebx
        jz read
        lea -1(%edx), %eax          # all over the page: its number on the disk
        and $63, %eax
        xor %di, %di
        mov $1024, %cx
        repe scasl
        mov $'B', %al
        jne stop
read:   and $63, %edx
        shl $3, %edx
        add $2048, %edx
        mov %edx, lba
        mov $packet, %si
        mov $0x80, %dl
        mov $0x42, %ah
        int $0x13
        mov $'F', %al
        jc stop
        inc %bp
        cmp $64, %bp
        jb page
        inc %ebx
        mov $'.', %al
        call say
        jmp round
say:    mov $0x3f8, %dx
        out %al, %dx
        ret
stop:   call say
1:      hlt
        jmp 1b
packet: .byte 16, 0
        .word 8, 0
buffer: .word 0
lba:    .quad 0
        .org 510
        .word 0xaa55
"""


def assemble(folder: Path, sector: str = BOOT_SECTOR) -> bytes:
    """Such a sector; the folder is for what comes between."""
    source, linked, flat = folder / "boot.S", folder / "boot.o", folder / "boot.bin"
    source.write_text(sector)
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
    assembled = flat.read_bytes()
    assert len(assembled) == 512
    return assembled
