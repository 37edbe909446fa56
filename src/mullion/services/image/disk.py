"""Assembles the guest's disk from a tree, with ordinary filesystem tools, without privileges, mounts or loop devices.

  sector      0  master boot record with our boot code (boot.S)
           2048  EFI system partition, active, FAT16 "MULLIONBOOT": kernel, initramfs; syslinux for BIOS,
                 systemd-boot for UEFI
         133120  root filesystem, ext4 "mullion-root", to the end

Each partition is made in a file of its own; only what is not zero is written to the VHD.
Not handled: Secure Boot (systemd-boot is unsigned).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from mullion.base.process import run
from mullion.base.units import MIB, SECTOR_BYTES
from mullion.services.image.boot_code import BOOT_CODE
from mullion.services.image.guest_tree import ROOT_LABEL
from mullion.services.image.partition_table import TYPE_EFI_SYSTEM, TYPE_LINUX, PartitionRecord, pack_boot_record
from mullion.services.image.tree import Kind, Tree
from mullion.vhd import create_dynamic, open_chain

KERNEL_LINE: Final = "console=tty0 console=ttyS0,115200 quiet no_timer_check memhp_default_state=online"
"""What the boot loaders pass to the kernel. `no_timer_check`: on a busy host an emulated timer may seem dead to it."""

_BOOT_START: Final = 1 * MIB
_BOOT_BYTES: Final = 64 * MIB
_ROOT_START: Final = _BOOT_START + _BOOT_BYTES
_COPY_BYTES: Final = 256 * 1024
_TIMEOUT_S: Final = 120.0

_SYSLINUX_CONFIG: Final = """\
SERIAL 0 115200
PROMPT 0
TIMEOUT 0
DEFAULT demo
LABEL demo
    LINUX /vmlinuz
    INITRD /initrd.img
    APPEND {line}
"""
_LOADER_CONFIG: Final = "default demo\ntimeout 0\neditor no\n"
_LOADER_ENTRY: Final = "title Mullion demo guest\nlinux /vmlinuz\ninitrd /initrd.img\noptions {line}\n"


@dataclass(frozen=True, slots=True)
class BootFiles:
    """What the boot partition holds."""

    kernel_path: str
    initrd_path: str
    efi_loader: bytes


def write_disk(path: str, size_bytes: int, boot: BootFiles, root: Tree, work_dir: str) -> None:
    """Create the VHD; `work_dir` is an empty folder for what is made on the way.

    Raises: MissingToolError; OperationFailedError from one of the tools; OSError.
    """
    boot_image, root_image = f"{work_dir}/boot.fat", f"{work_dir}/root.ext4"
    _make_boot(boot_image, boot, work_dir)
    _make_root(root_image, size_bytes - _ROOT_START, root, work_dir)
    records = (
        PartitionRecord(TYPE_EFI_SYSTEM, _BOOT_START // SECTOR_BYTES, _BOOT_BYTES // SECTOR_BYTES, is_active=True),
        PartitionRecord(TYPE_LINUX, _ROOT_START // SECTOR_BYTES, (size_bytes - _ROOT_START) // SECTOR_BYTES),
    )
    create_dynamic(path, size_bytes)
    with contextlib.closing(open_chain(path)) as disk:
        disk.pwrite(0, pack_boot_record(BOOT_CODE, int.from_bytes(b"MULN"), records))
        for image, start in ((boot_image, _BOOT_START), (root_image, _ROOT_START)):
            for offset, chunk in _nonzero_chunks(image):
                disk.pwrite(start + offset, chunk)
        disk.flush()


def _make_boot(image: str, boot: BootFiles, work_dir: str) -> None:
    """A FAT16 filesystem with both boot loaders."""
    with open(image, "xb") as file:
        file.truncate(_BOOT_BYTES)
    hidden = str(_BOOT_START // SECTOR_BYTES)  # syslinux's boot sector adds it to find itself on the disk
    run(["mkfs.vfat", "-F", "16", "-s", "8", "-h", hidden, "-n", "MULLIONBOOT", "-i", "4D554C4E", image])
    texts = {
        "syslinux.cfg": _SYSLINUX_CONFIG.format(line=KERNEL_LINE).encode(),
        "loader.conf": _LOADER_CONFIG.encode(),
        "demo.conf": _LOADER_ENTRY.format(line=KERNEL_LINE).encode(),
        "BOOTX64.EFI": boot.efi_loader,
    }
    for name, content in texts.items():
        with open(f"{work_dir}/{name}", "xb") as file:
            file.write(content)
    environment = {**os.environ, "MTOOLS_SKIP_CHECK": "1"}
    for folders in (("::/EFI", "::/loader"), ("::/EFI/BOOT", "::/loader/entries")):
        run(["mmd", "-i", image, *folders], env=environment)
    copies = (
        (boot.kernel_path, "::/vmlinuz"),
        (boot.initrd_path, "::/initrd.img"),
        (f"{work_dir}/syslinux.cfg", "::/syslinux.cfg"),
        (f"{work_dir}/BOOTX64.EFI", "::/EFI/BOOT/BOOTX64.EFI"),
        (f"{work_dir}/loader.conf", "::/loader/loader.conf"),
        (f"{work_dir}/demo.conf", "::/loader/entries/demo.conf"),
    )
    for source, target in copies:
        run(["mcopy", "-i", image, source, target], env=environment, timeout_s=_TIMEOUT_S)
    run(["syslinux", "--install", image], timeout_s=_TIMEOUT_S)


def _make_root(image: str, size_bytes: int, root: Tree, work_dir: str) -> None:
    """An ext4 filesystem that holds the tree, everything in it owned by root."""
    folder = f"{work_dir}/root"
    os.mkdir(folder)
    root.write_to(folder)
    # Inode tables and journal are made whole now, so that a guest does not fill its differencing disk with their zeros.
    extended = "root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0,nodiscard"
    mke2fs = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-N", "16384", "-L", ROOT_LABEL]
    features = "^metadata_csum_seed,^orphan_file"  # unknown to Debian 12's kernel
    mke2fs += ["-O", features, "-J", "size=16", "-E", extended, "-d", folder, image, f"{size_bytes // 1024}k"]
    done = run(mke2fs, check=False, timeout_s=_TIMEOUT_S)
    if done.returncode != 0:  # an e2fsprogs that does not know these features does not set them either
        mke2fs[mke2fs.index("-O") : mke2fs.index("-O") + 2] = []
        run(mke2fs, timeout_s=_TIMEOUT_S)
    if os.geteuid() != 0:
        _give_to_root(image, root)


def _give_to_root(image: str, root: Tree) -> None:
    """mke2fs copies the owner of each file, which is root only where root runs this."""
    paths = [path for path, entry in root.items() if entry.kind is not Kind.CHARACTER]
    commands = "".join(f'set_inode_field "/{path}" {field} 0\n' for path in paths for field in ("uid", "gid"))
    run(["debugfs", "-w", "-f", "-", image], stdin=commands.encode(), timeout_s=_TIMEOUT_S)


def _nonzero_chunks(path: str) -> Iterator[tuple[int, memoryview]]:
    """(offset, content) of a sparse file wherever it is not zero."""
    zeros = bytes(_COPY_BYTES)
    buffer = memoryview(bytearray(_COPY_BYTES))
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        end = os.fstat(fd).st_size
        offset = 0
        while offset < end:
            try:
                offset = os.lseek(fd, offset, os.SEEK_DATA) // _COPY_BYTES * _COPY_BYTES
            except OSError:  # ENXIO: nothing but a hole up to the end (lseek(2))
                return
            count = os.preadv(fd, [buffer], offset)
            if buffer[:count] != zeros[:count]:
                yield offset, buffer[:count]
            offset += count
    finally:
        os.close(fd)
