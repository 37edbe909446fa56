"""Lays out the guest: tools, agent with its libraries, kernel modules and start-up scripts, from unpacked packages.

One tree serves twice. As initramfs it can find the root filesystem, or be a rescue system when there is none; as root
filesystem it has more drivers. All programs are in `/usr/bin`; `/bin`, `/sbin` and `/usr/sbin` are links to it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from mullion.base.errors import InvalidError, NotFoundError
from mullion.services.image.elf import is_elf, needed_libraries
from mullion.services.image.modules import alias_index, dependency_index, plan_modules
from mullion.services.image.packages import read_package
from mullion.services.image.tree import Entry, Kind, Tree

ROOT_LABEL: Final = "mullion-root"

_LIBRARIES: Final = "usr/lib/x86_64-linux-gnu"
_LOADER: Final = "ld-linux-x86-64.so.2"
_SCRIPTS: Final = os.path.join(os.path.dirname(__file__), "guest")

_REQUIRED_MODULES: Final = ("virtio_pci", "virtio_blk", "virtio_console")
_EARLY_MODULES: Final = (
    *("virtio_scsi", "sd_mod", "crct10dif_generic", "crct10dif_pclmul", "ata_piix", "ata_generic", "ahci", "nvme"),
    *("ext4", "crc32c_generic", "crc32c_intel"),
    *("evdev", "button", "pvpanic_mmio", "pvpanic_pci"),
)
_ROOT_MODULES: Final = (
    *("virtio_net", "virtio_balloon", "virtio_mem", "virtio_rng", "virtiofs", "virtio_input", "virtio_pmem"),
    *("e1000", "e1000e", "8139cp", "i6300esb", "iTCO_wdt", "usb_storage", "uhci_hcd", "ehci_pci", "xhci_pci", "usbhid"),
    *("sr_mod", "sg", "isofs", "vfat", "nls_cp437", "nls_iso8859_1", "nls_ascii", "nls_utf8", "loop", "dm_mod", "nbd"),
    *("xfs", "btrfs", "overlay", "squashfs", "vsock", "vmw_vsock_virtio_transport"),
)


@dataclass(frozen=True, slots=True)
class GuestFiles:
    """What was taken from the packages: programs, libraries by soname, the kernel and its modules."""

    busybox: bytes
    agent: bytes
    efi_loader: bytes
    libraries: Mapping[str, bytes]
    kernel: bytes
    kernel_release: str
    modules: Mapping[str, bytes]
    builtin_modules: tuple[str, ...]


def read_guest_files(debs: Mapping[str, str]) -> GuestFiles:
    """Unpack, in memory, what is needed from the packages (paths by package name).

    Raises: NotFoundError when a package does not have the file it is known for.
    """
    files: dict[str, bytes] = {}
    links: dict[str, str] = {}
    for path in debs.values():
        for name, member, content in read_package(path, _is_wanted):
            base = name.rpartition("/")[2]
            if member.issym():
                links[base] = member.linkname.rpartition("/")[2]
            elif ".so" in base:
                files[base] = content
            else:
                files[name.removeprefix("usr/")] = content
    for link, target in links.items():
        if target in files:
            files[link] = files[target]
    kernel = next((name for name in files if name.startswith("boot/vmlinuz-")), None)
    if kernel is None:
        raise NotFoundError("the kernel package has no boot/vmlinuz", remedy="Report it with the package's version.")
    release = kernel.removeprefix("boot/vmlinuz-")
    folder = f"lib/modules/{release}/"
    try:
        return GuestFiles(
            busybox=files["bin/busybox"],
            agent=files["sbin/qemu-ga"],
            efi_loader=files["lib/systemd/boot/efi/systemd-bootx64.efi"],
            libraries={name: content for name, content in files.items() if ".so" in name and "/" not in name},
            kernel=files[kernel],
            kernel_release=release,
            modules={
                name.removeprefix(folder): content
                for name, content in files.items()
                if name.startswith(folder) and name.endswith(".ko")
            },
            builtin_modules=tuple(files[f"{folder}modules.builtin"].decode().split()),
        )
    except KeyError as error:
        raise NotFoundError(
            f"a package has no {error.args[0]}", remedy="Report it with the package's version."
        ) from error


def _is_wanted(name: str) -> bool:
    base = name.rpartition("/")[2]
    return (
        name in ("bin/busybox", "usr/bin/busybox", "usr/sbin/qemu-ga", "usr/lib/systemd/boot/efi/systemd-bootx64.efi")
        or name.startswith("boot/vmlinuz-")
        or (name.startswith(("lib/modules/", "usr/lib/modules/")) and base.endswith((".ko", "modules.builtin")))
        or (".so" in base and name.removeprefix("usr/").startswith(("lib/x86_64-linux-gnu/", "lib64/")))
    )


def busybox_applets(busybox: bytes) -> tuple[str, ...]:
    """The names that busybox answers to: a table of sorted, zero-terminated strings that begins with `[` and `[[`.

    Raises: InvalidError when there is no such table.
    """
    start = busybox.find(b"\0[\0[[\0")
    end = busybox.find(b"\0\0", start + 1)
    if start < 0 or end < 0:
        raise InvalidError("busybox has no table of applets")
    return tuple(busybox[start + 1 : end].decode("ascii").split("\0"))


def choose_libraries(programs: Iterable[bytes], available: Mapping[str, bytes]) -> dict[str, bytes]:
    """The libraries that the programs need, and those that these need, by soname.

    Raises: NotFoundError that names a library which no package has.
    """
    chosen: dict[str, bytes] = {}
    todo = [name for program in programs for name in needed_libraries(program)]
    while todo:
        name = todo.pop()
        if name in chosen:
            continue
        if name not in available:
            raise NotFoundError(
                f"no package has the library {name}", remedy="Report it with the output of `apt-cache policy`."
            )
        chosen[name] = available[name]
        todo += needed_libraries(available[name])
    return chosen


def build_trees(files: GuestFiles, extra: Mapping[str, Entry]) -> tuple[Tree, Tree]:
    """(initramfs, root filesystem); `extra` entries are added to both."""
    tree = Tree()
    for folder in ("dev", "proc", "sys", "run", "sysroot", "mnt", "var/log", "etc/init.d", "lib64"):
        tree.folder(folder)
    tree.folder("root", 0o700)
    tree.folder("tmp", 0o1777)
    for link, target in (("bin", "usr/bin"), ("sbin", "usr/bin"), ("usr/sbin", "bin"), ("lib", "usr/lib")):
        tree.link(link, target)
    tree.link("var/run", "../run")
    tree.link(f"lib64/{_LOADER}", f"/{_LIBRARIES}/{_LOADER}")
    for applet in busybox_applets(files.busybox):
        tree.link(f"usr/bin/{applet}", "busybox")
    tree.file("usr/bin/busybox", files.busybox, 0o755)
    tree.file("usr/bin/qemu-ga", files.agent, 0o755)
    programs = [files.agent, *(entry.content for entry in extra.values() if is_elf(entry.content))]
    for name, content in choose_libraries(programs, files.libraries).items():
        tree.file(f"{_LIBRARIES}/{name}", content, 0o755)
    _add_configuration(tree)
    for path, entry in extra.items():
        tree.add(path.lstrip("/"), entry)

    initramfs, root = tree, tree.copy()
    initramfs.file("init", _script("init").replace(b"@ROOT_LABEL@", ROOT_LABEL.encode()), 0o755)
    initramfs.add("dev/console", Entry(Kind.CHARACTER, 0o600, device=(5, 1)))
    _add_modules(initramfs, files, _EARLY_MODULES)
    _add_modules(root, files, _EARLY_MODULES + _ROOT_MODULES)
    return initramfs, root


def _add_configuration(tree: Tree) -> None:
    for name in ("start", "devices", "network", "lease", "agent", "stop"):
        tree.file(f"etc/init.d/{name}", _script(name), 0o755)
    for name in ("inittab", "mdev.conf", "issue", "issue.rescue", "motd"):
        tree.file(f"etc/{name}", _script(name))
    tree.file("usr/bin/shutdown", _script("shutdown"), 0o755)
    for name in ("poweroff", "reboot", "halt"):
        tree.file(f"usr/bin/{name}", _script("poweroff"), 0o755)  # in place of busybox's own
    tree.file("etc/acpi/PWRF/00000080", b"#!/bin/sh\nexec /sbin/poweroff\n", 0o755)
    tree.file("etc/passwd", b"root::0:0:root:/root:/bin/sh\n")
    tree.file("etc/group", b"root:x:0:\ntty:x:5:\n")
    tree.file("etc/shells", b"/bin/sh\n")
    tree.file("etc/hostname", b"demo\n")
    tree.file("etc/hosts", b"127.0.0.1 localhost\n127.0.1.1 demo\n::1 localhost\n")
    tree.file("etc/profile", b"export PATH=/usr/bin PS1='\\u@\\h:\\w# '\n")
    tree.file("etc/os-release", b'NAME="Mullion demo guest"\nID=mullion-demo\nID_LIKE=debian\nVERSION_ID=1\n')


def _add_modules(tree: Tree, files: GuestFiles, wanted: Iterable[str]) -> None:
    modules = plan_modules(wanted, _REQUIRED_MODULES, files.modules, files.builtin_modules)
    folder = f"usr/lib/modules/{files.kernel_release}"
    for module in modules.values():
        tree.file(f"{folder}/{module.path}", module.content)
    tree.file(f"{folder}/modules.dep", dependency_index(modules))
    tree.file(f"{folder}/modules.alias", alias_index(modules))


def read_scripts() -> dict[str, bytes]:
    """The guest's own files, as they lie in the package, by name."""
    return {name: _script(name) for name in os.listdir(_SCRIPTS)}


def _script(name: str) -> bytes:
    with open(f"{_SCRIPTS}/{name}", "rb") as file:
        return file.read()
