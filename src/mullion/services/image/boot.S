# The boot code in the first sector of the demo disk: starts the boot sector of the active partition.
#
# It reads that sector aside and copies it to 0x7C00 itself. Reading it there in one go, as others do, would do on real
# hardware, but an emulating QEMU goes on running what it translated of 0x7C00 before when a vhost-user back end, another
# process, has written the sector. A store of the processor it notices.
#
# In: DL = BIOS drive. Out, to the boot sector: DL, and DS:SI = the partition's record. Needs INT 13h extensions (EDD).
# Build: as --32 boot.S -o boot.o && ld -m elf_i386 -Ttext 0x600 --oformat binary boot.o -o boot.bin (boot_code.py has it)

        .intel_syntax noprefix
        .code16
        .globl  _start
_start:
        cli
        xor     ax, ax
        mov     ss, ax
        mov     sp, 0x7c00
        mov     ds, ax
        mov     es, ax
        sti
        cld
        mov     si, 0x7c00              # out of the boot sector's way: to 0x600
        mov     di, 0x600
        mov     cx, 256
        rep     movsw
        ljmp    0, offset moved
moved:
        mov     si, 0x600 + 446
        mov     cx, 4
look:
        test    byte ptr [si], 0x80
        jnz     found
        add     si, 16
        loop    look
        mov     bx, offset no_active
        jmp     fail
found:
        push    dx
        push    si
        mov     eax, 0                  # INT 13h AH=42h: packet of 16 bytes on the stack
        push    eax
        push    dword ptr [si + 8]      # first sector of the partition
        push    ax                      # to 0000:1000
        push    0x1000
        push    1
        push    16
        mov     si, sp
        mov     ah, 0x42
        int     0x13
        lea     sp, [si + 16]
        pop     si
        pop     dx
        mov     bx, offset no_read
        jc      fail
        push    si
        mov     si, 0x1000
        mov     di, 0x7c00
        mov     cx, 256
        rep     movsw
        pop     si
        mov     bx, offset no_loader
        cmp     word ptr [0x7dfe], 0xaa55
        jne     fail
        ljmp    0, 0x7c00
fail:
        mov     al, [bx]
        inc     bx
        test    al, al
        jz      stop
        push    bx
        mov     ah, 0x0e
        mov     bx, 7
        int     0x10
        pop     bx
        jmp     fail
stop:
        hlt
        jmp     stop

no_active:      .asciz  "No active partition\r\n"
no_read:        .asciz  "The boot sector cannot be read\r\n"
no_loader:      .asciz  "The partition has no boot sector\r\n"
