"""Builds the demo guest's image from Debian packages, once per set of versions.

Layout below the images folder:
  demo-KEY/       one build: demo.vhd (read-only), vmlinuz, initrd.img, image.json; KEY hashes all that went into it
  demo            link to the newest build; a disk made on an older build keeps its parent
  .demo.lock      held while building
  .building-*     a build under way, or one that was interrupted: the next build removes it

Durability: a build is made in its own folder, made durable, then renamed; the link is replaced after that. A crash at
any point leaves the builds that were there before, and perhaps a complete new one.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import gzip
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final, Literal

from mullion.base.errors import InvalidError, MissingToolError, UnavailableError
from mullion.base.files import replace_file
from mullion.base.units import GIB
from mullion.services.image.cpio import pack_cpio
from mullion.services.image.disk import BootFiles, write_disk
from mullion.services.image.guest_tree import build_trees, read_guest_files, read_scripts
from mullion.services.image.packages import Package, PackageSource
from mullion.services.image.tree import Entry, Kind

log = logging.getLogger(__name__)

Progress = Callable[[str, float], None]
Kernel = Literal["cloud", "generic"]

DISK_BYTES: Final = 1 * GIB
_BUILDER_MODULES: Final = ("boot_code", "build", "cpio", "disk", "guest_tree", "modules", "partition_table", "tree")
_PACKAGES: Final = ("busybox-static", "qemu-guest-agent", "systemd-boot-efi")
_KERNELS: Final[Mapping[Kernel, str]] = {"cloud": "linux-image-cloud-amd64", "generic": "linux-image-amd64"}


@dataclass(frozen=True, slots=True)
class BuiltImage:
    """An image that is ready: a bootable VHD, and the kernel and initramfs in it for booting without its loader."""

    name: str
    path: str
    kernel_path: str
    initrd_path: str
    size_bytes: int
    built_at: str
    key: str
    packages_seen: str


def build_demo_image(
    images_dir: str,
    *,
    cache_dir: str,
    extra_files: Mapping[str, str] | None = None,
    progress: Progress = lambda _stage, _done: None,
    kernel: Kernel = "cloud",
) -> BuiltImage:
    """Have the demo guest's image: the one that is there if it is made of the same things, otherwise a new one.

    `extra_files` maps paths in the guest to files of the host, which are copied with their permissions and, if they
    are programs, with the libraries that they need from the guest's packages. Builds with extra files get no name;
    the kernel `generic` (with USB and AHCI drivers) makes the image `demo-generic`. `progress` is told what is going on
    and how much is done, 0 to 1.

    Raises: MissingToolError; UnavailableError when packages are needed and the registry cannot be reached;
    NotFoundError when the host's package lists lack a package; NoSpaceError and OperationFailedError from the tools.
    """
    extra = _read_extra(extra_files or {})
    name = "demo-extra" if extra else "demo" if kernel == "cloud" else f"demo-{kernel}"
    os.makedirs(images_dir, exist_ok=True)
    with _locked(f"{images_dir}/.demo.lock"):
        for left in os.listdir(images_dir):
            if left.startswith(".building-"):
                shutil.rmtree(f"{images_dir}/{left}")
        progress("looking for packages", 0.0)
        source = PackageSource(cache_dir)
        current = _current(images_dir, name) if not extra else None
        seen = f"{_own_part({}, kernel)} {source.fingerprint()}"
        if current is not None and current.packages_seen == seen:
            progress("already built", 1.0)
            return current
        try:
            packages = source.resolve(_PACKAGES, _KERNELS[kernel])
            key = _key(packages, extra, kernel)
            folder = f"{images_dir}/demo-{key}"
            if not os.path.exists(folder):
                progress("fetching packages", 0.1)
                _build(folder, name, source.fetch(packages), extra, progress)
        except UnavailableError as error:
            if current is None or isinstance(error, MissingToolError):
                raise
            log.warning("%s: staying with the image that was built at %s", error, current.built_at)
            return current
        seen = f"{_own_part({}, kernel)} {source.fingerprint()}"  # resolving may have fetched lists
        built = replace(_load(folder), packages_seen=seen)
        _save(folder, built)
        if not extra:
            _point(f"{images_dir}/{name}", f"demo-{key}")
        progress("built", 1.0)
        return built


def find_built(images_dir: str, name: str) -> BuiltImage | None:
    """The newest build of a name, or None."""
    return _current(images_dir, name)


def _build(folder: str, name: str, debs: Mapping[str, str], extra: Mapping[str, Entry], progress: Progress) -> None:
    progress("unpacking packages", 0.4)
    files = read_guest_files(debs)
    progress("making the disk", 0.7)
    initramfs, root = build_trees(files, extra)
    work = tempfile.mkdtemp(prefix=".building-", dir=os.path.dirname(folder))
    try:
        result = f"{work}/result"
        os.mkdir(result)
        with open(f"{result}/vmlinuz", "xb") as file:
            file.write(files.kernel)
        with open(f"{result}/initrd.img", "xb") as file:
            file.write(gzip.compress(pack_cpio(initramfs), 6, mtime=0))
        boot = BootFiles(f"{result}/vmlinuz", f"{result}/initrd.img", files.efi_loader)
        write_disk(f"{result}/demo.vhd", DISK_BYTES, boot, root, work)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        image = BuiltImage(
            name=name,
            path=f"{folder}/demo.vhd",
            kernel_path=f"{folder}/vmlinuz",
            initrd_path=f"{folder}/initrd.img",
            size_bytes=DISK_BYTES,
            built_at=now,
            key=folder.rpartition("-")[2],
            packages_seen="",
        )
        _save(result, image)
        for file_name in ("demo.vhd", "vmlinuz", "initrd.img"):
            os.chmod(f"{result}/{file_name}", 0o444)
            _sync(f"{result}/{file_name}")
        _sync(result)
        os.rename(result, folder)
        _sync(os.path.dirname(folder))
    finally:
        shutil.rmtree(work)


def _read_extra(extra_files: Mapping[str, str]) -> dict[str, Entry]:
    found = {}
    for guest_path, host_path in extra_files.items():
        try:
            with open(host_path, "rb") as file:
                content, mode = file.read(), os.fstat(file.fileno()).st_mode & 0o777
        except OSError as error:
            raise InvalidError(f"extra file {host_path}: {error.strerror}", path=host_path) from error
        found[guest_path.strip("/")] = Entry(Kind.FILE, mode, content)
    return found


def _key(packages: Sequence[Package], extra: Mapping[str, Entry], kernel: Kernel) -> str:
    """Names everything that a build depends on, in 12 characters."""
    versions = "".join(f"{package.name} {package.version} {package.sha256}\n" for package in packages)
    return hashlib.sha256(f"{_own_part(extra, kernel)}\n{versions}".encode()).hexdigest()[:12]


def _own_part(extra: Mapping[str, Entry], kernel: Kernel) -> str:
    """Names what a build owes to us, not to the packages: the builder itself, the guest's scripts, extra files."""
    digest = hashlib.sha256(f"{kernel}\n".encode())
    sources = read_scripts()
    for name in _BUILDER_MODULES:
        with open(f"{os.path.dirname(__file__)}/{name}.py", "rb") as file:
            sources[f"{name}.py"] = file.read()
    for name, content in sorted(sources.items()):
        digest.update(f"{name} {len(content)}\n".encode() + content)
    for path, entry in sorted(extra.items()):
        digest.update(f"{path} {entry.mode:o} {len(entry.content)}\n".encode() + entry.content)
    return digest.hexdigest()


def _current(images_dir: str, name: str) -> BuiltImage | None:
    link = f"{images_dir}/{name}"
    if not os.path.exists(f"{link}/image.json"):
        return None
    return _load(os.path.realpath(link))


def _load(folder: str) -> BuiltImage:
    """A build as its folder describes it, with paths for where the folder is now."""
    path = f"{folder}/image.json"
    try:
        with open(path, "rb") as file:
            image = BuiltImage(**json.load(file))
    except (ValueError, TypeError) as error:
        raise InvalidError(f"{path} is damaged: {error}", remedy=f"Delete {folder} and build again.") from error
    folder = os.path.abspath(folder)
    return replace(
        image, path=f"{folder}/demo.vhd", kernel_path=f"{folder}/vmlinuz", initrd_path=f"{folder}/initrd.img"
    )


def _save(folder: str, image: BuiltImage) -> None:
    replace_file(f"{folder}/image.json", json.dumps(asdict(image), indent=1).encode(), mode=0o644)


def _point(link: str, target: str) -> None:
    temporary = f"{link}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    os.symlink(target, temporary)
    os.replace(temporary, link)


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Hold the lock file; another build in this folder waits."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
