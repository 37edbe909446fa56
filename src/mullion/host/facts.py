"""What this host offers: the checks of `mullion doctor`, each with the command that mends what is missing.

Every check answers, whatever is missing or unreadable: a fact that cannot be found is a note that says so.
What there is of KVM is the accelerator's check: it comes from the hypervisor's probe, and whoever composes the checks
passes it in.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from typing import Final

from mullion.base.errors import MissingToolError, MullionError
from mullion.base.paths import OVMF_PAIRS, SOCKET_PATH_LIMIT, HostPaths, find_ovmf
from mullion.base.process import PACKAGES, find_program, run
from mullion.base.units import GIB, MIB, format_size
from mullion.host.identity import FIRST_UID, LAST_UID, isolates
from mullion.model.views import CheckView

OK: Final = "ok"
NOTE: Final = "note"
MISSING: Final = "missing"

QEMU: Final = "qemu-system-x86_64"
OLDEST_QEMU: Final = (7, 2)
IMAGE_TOOLS: Final = (
    "apt-get", "dpkg-deb", "mke2fs", "debugfs", "mkfs.vfat", "mmd", "mcopy", "syslinux",
)  # fmt: skip
"""Programs that `mullion image build demo` calls."""
_PACKAGES: Final = {**PACKAGES, "mmd": "mtools", "debugfs": "e2fsprogs"}
LEAST_DISK_BYTES: Final = 2 * GIB
LEAST_MEMORY_BYTES: Final = 512 * MIB
LONGEST_NAME: Final = 63
_LONGEST_SOCKET: Final = "/" + "d" * 16 + ".vhost"


def host_checks(
    paths: HostPaths, *, accelerator: CheckView | None = None, isolation: str = "auto"
) -> tuple[CheckView, ...]:
    """All checks, in the order in which a person mends them."""
    checks = [check_qemu(), check_qemu_img()]
    if accelerator is not None:
        checks.append(accelerator)
    checks += [
        check_processors(),
        check_memory(),
        check_disk(paths.data_dir),
        check_run_folder(paths.run_dir),
        check_cgroups(),
        check_users(isolation),
        check_uefi(),
        check_tpm(),
        check_image_tools(),
        CheckView("system", OK, f"{_distribution()}, Linux {platform.release()}, Python {platform.python_version()}"),
    ]
    return tuple(checks)


def check_qemu() -> CheckView:
    return _program("qemu", QEMU, r"version (\d+)\.(\d+)\S*", OLDEST_QEMU)


def check_qemu_img() -> CheckView:
    return _program("qemu-img", "qemu-img", r"version (\d+)\.(\d+)\S*", OLDEST_QEMU)


def check_processors() -> CheckView:
    usable = len(os.sched_getaffinity(0))
    total = os.cpu_count() or usable
    return CheckView("processors", OK, f"{usable} usable" + (f" of {total}" if total != usable else ""))


def check_memory(path: str = "/proc/meminfo") -> CheckView:
    try:
        with open(path, encoding="ascii") as file:
            values = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in file)}
        total, available = values["MemTotal"], values["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError) as error:
        return CheckView("memory", NOTE, f"{path} cannot be read: {error!r}")
    detail = f"{format_size(available)} available of {format_size(total)}"
    if available < LEAST_MEMORY_BYTES:
        return CheckView("memory", NOTE, detail, "Stop partitions or other programs: a small guest takes 256 MiB.")
    return CheckView("memory", OK, detail)


def check_disk(data_dir: str) -> CheckView:
    folder = _existing(data_dir)
    try:
        status = os.statvfs(folder)
    except OSError as error:
        return CheckView("disk", NOTE, f"{folder}: {error.strerror}")
    free = status.f_bavail * status.f_frsize
    detail = f"{format_size(free)} free in {data_dir}" + ("" if folder == data_dir else f" (not made yet, on {folder})")
    if not os.access(folder, os.W_OK):
        return CheckView("disk", MISSING, f"{detail}; we may not write there", f"chown $USER {folder}")
    if free < LEAST_DISK_BYTES:
        return CheckView("disk", NOTE, detail, "Make room, or choose another folder (setting data_dir).")
    return CheckView("disk", OK, detail)


def check_run_folder(run_dir: str) -> CheckView:
    """Sockets have short paths: how long may a partition's name be below this folder?"""
    longest = SOCKET_PATH_LIMIT - len(os.fsencode(run_dir)) - len("/p/") - len(_LONGEST_SOCKET)
    if longest >= LONGEST_NAME:
        return CheckView("sockets", OK, f"{run_dir}: short enough for every name")
    verdict = NOTE if longest > 0 else MISSING
    detail = f"{run_dir}: names of partitions may have {max(longest, 0)} characters instead of {LONGEST_NAME}"
    return CheckView("sockets", verdict, detail, "Choose a shorter folder (setting run_dir, or MULLION_HOME).")


def check_cgroups(mounts: str = "/proc/self/mounts") -> CheckView:
    """Which control groups are mounted; what they enforce is found by trying, when a partition has limits."""
    try:
        with open(mounts, encoding="utf-8", errors="replace") as file:
            rows = [line.split() for line in file]
    except OSError as error:
        return CheckView("cgroups", NOTE, f"{mounts}: {error.strerror}")
    v1 = {option for row in rows if row[2] == "cgroup" for option in row[3].split(",")} & {"cpu", "cpuset", "blkio"}
    v2 = [row[1] for row in rows if row[2] == "cgroup2"]
    if v1:
        return CheckView("cgroups", OK, f"version 1 ({', '.join(sorted(v1))})")
    if v2:
        return CheckView("cgroups", OK, f"version 2, on {v2[0]}")
    return CheckView("cgroups", NOTE, "none: limits of processor and disk time are not enforced")


def check_users(isolation: str) -> CheckView:
    if isolates(isolation):
        return CheckView("users", OK, f"root: each partition runs under a user id of its own, {FIRST_UID}-{LAST_UID}")
    if os.geteuid() == 0:
        return CheckView("users", NOTE, "root, isolation is off: every QEMU runs as root", "Set isolation = auto.")
    return CheckView("users", OK, f"user id {os.geteuid()}: every partition runs under it")


def check_uefi(pairs: Sequence[tuple[str, str]] = OVMF_PAIRS) -> CheckView:
    found = find_ovmf(pairs)
    if found is not None:
        return CheckView("uefi", OK, found[0])
    return CheckView("uefi", NOTE, "no UEFI firmware: partitions boot by BIOS only", "apt-get install ovmf")


def check_tpm() -> CheckView:
    try:
        return CheckView("tpm", OK, find_program("swtpm"))
    except MissingToolError as error:
        return CheckView(
            "tpm", NOTE, "no swtpm: partitions cannot have a TPM", error.remedy.removeprefix("Install it: ")
        )


def check_image_tools() -> CheckView:
    """What `mullion image build demo` needs."""
    packages: list[str] = []
    lacking: list[str] = []

    def lack(what: str, package: str) -> None:
        lacking.append(what)
        if package not in packages:
            packages.append(package)

    for tool in IMAGE_TOOLS:
        if not _is_installed(tool):
            lack(tool, _PACKAGES.get(tool, tool))
    if lacking:
        return CheckView(
            "image tools",
            MISSING,
            f"`mullion image build demo` lacks {', '.join(lacking)}",
            f"apt-get install {' '.join(packages)}",
        )
    return CheckView("image tools", OK, ", ".join(IMAGE_TOOLS))


def _program(name: str, program: str, pattern: str, oldest: tuple[int, int]) -> CheckView:
    package = _PACKAGES.get(program, program)
    try:
        path = find_program(program)
        answer = run([program, "--version"], timeout_s=10).stdout.decode(errors="replace")
    except MissingToolError as error:
        return CheckView(name, MISSING, error.message, f"apt-get install {package}")
    except (MullionError, OSError) as error:
        return CheckView(name, MISSING, f"{program} cannot be run: {error}", f"apt-get install --reinstall {package}")
    match = re.search(pattern, answer)
    if match is None:
        return CheckView(name, NOTE, f"{path}: its version is not known: {answer[:100]!r}")
    detail = f"{path}, {match.group(0)}"
    if (int(match.group(1)), int(match.group(2))) < oldest:
        return CheckView(name, NOTE, f"{detail}: older than {oldest[0]}.{oldest[1]}", f"apt-get install {package}")
    return CheckView(name, OK, detail)


def _is_installed(program: str) -> bool:
    try:
        find_program(program)
    except MissingToolError:
        return False
    return True


def _existing(path: str) -> str:
    """The path, or the nearest folder above it that exists."""
    while not os.path.isdir(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return path


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return "an unknown distribution"
