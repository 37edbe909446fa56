"""Debian packages as raw material: which are needed, their files, fetched and verified by the host's own apt.

`apt-cache` and `apt-get download` run with the host's sources and keys and need no privilege. Where the host's package
lists are missing or too old, lists of our own are kept below the cache folder; the host's are never touched.
A package that was fetched is used again after its SHA-256 was compared with the one in the signed lists.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mullion.base.errors import InvalidError, NotFoundError, OperationFailedError, UnavailableError
from mullion.base.process import run

log = logging.getLogger(__name__)

_TIMEOUT_S: Final = 600.0
_REACH_REMEDY: Final = "Check the network and the sources in /etc/apt, try `apt-get update`, then build again."
_SYSTEM_LISTS: Final = "/var/lib/apt/lists"
_SOURCES: Final = ("/etc/apt/sources.list", "/etc/apt/sources.list.d")


@dataclass(frozen=True, slots=True)
class Package:
    """One version of a package, as the signed lists describe it. `depends` holds names, first alternatives only."""

    name: str
    version: str
    architecture: str
    section: str
    size_bytes: int
    sha256: str
    depends: tuple[str, ...]

    @property
    def file_name(self) -> str:
        """What apt-get names the downloaded file."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.architecture}.deb"


def parse_packages(text: str) -> dict[str, Package]:
    """Read what `apt-cache show` prints; of several versions of a package the first, which apt prefers.

    Raises: InvalidError for a description that lacks a field.
    """
    found: dict[str, Package] = {}
    for paragraph in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        for line in paragraph.splitlines():
            name, colon, value = line.partition(":")
            if colon and not name.startswith((" ", "\t")):
                fields[name] = value.strip()
        if "Package" not in fields or fields["Package"] in found or "SHA256" not in fields:
            continue  # without a checksum: installed here, but no longer in the lists
        try:
            found[fields["Package"]] = Package(
                name=fields["Package"],
                version=fields["Version"],
                architecture=fields["Architecture"],
                section=fields["Section"].rpartition("/")[2],
                size_bytes=int(fields["Size"]),
                sha256=fields["SHA256"],
                depends=_first_alternatives(fields.get("Depends", "")),
            )
        except (KeyError, ValueError) as error:
            raise InvalidError(f"package {fields['Package']}: apt's description has no usable {error}") from error
    return found


def _first_alternatives(depends: str) -> tuple[str, ...]:
    names = (re.match(r"[a-z0-9.+-]+", item.strip()) for item in depends.split(","))
    return tuple(match.group() for match in names if match is not None)


def plan_packages(wanted: Sequence[str], kernel: str, known: Mapping[str, Package]) -> tuple[Package, ...]:
    """The packages to fetch: those wanted, all libraries below them, and the kernel behind its meta-package.

    Raises: NotFoundError that names what the lists do not have.
    """
    chosen: dict[str, Package] = {}
    todo = list(wanted)
    while todo:
        name = todo.pop()
        package = known.get(name)
        if package is None and name not in wanted:
            continue  # a virtual package; should a library be missing in the end, its soname will be named
        if package is None:
            raise _unknown(name)
        if name in chosen or (name not in wanted and package.section != "libs"):
            continue
        chosen[name] = package
        todo += package.depends
    if kernel not in known:
        raise _unknown(kernel)
    images = [name for name in known[kernel].depends if name.startswith("linux-image-")]
    if len(images) != 1 or images[0] not in known:
        raise _unknown(f"a kernel image behind {kernel}")
    chosen[images[0]] = known[images[0]]
    return tuple(chosen[name] for name in sorted(chosen))


def _unknown(name: str) -> NotFoundError:
    return NotFoundError(
        f"the package lists do not have {name}",
        remedy=f"The demo image is made of Debian packages: use a Debian 12 host. {_REACH_REMEDY}",
        package=name,
    )


class PackageSource:
    """The host's apt, with a cache folder of ours."""

    def __init__(self, cache_dir: str) -> None:
        self._cache_dir = cache_dir
        self._debs = f"{cache_dir}/debs"
        self._lists = f"{cache_dir}/lists"
        os.makedirs(self._debs, exist_ok=True)

    def fingerprint(self) -> str:
        """Changes whenever the answer of `resolve` may change; costs no call of apt."""
        digest = hashlib.sha256()
        for folder in (_SYSTEM_LISTS, self._lists, *_SOURCES):
            for path in (folder, *(f"{folder}/{name}" for name in _names(folder))):
                try:
                    status = os.stat(path)
                except FileNotFoundError:
                    continue
                if not path.endswith(("/partial", "/lock", "/auxfiles")):
                    digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def resolve(self, wanted: Sequence[str], kernel: str) -> tuple[Package, ...]:
        """The packages to fetch, in the versions that the package lists prefer.

        Raises: UnavailableError when there are no lists and the package registry cannot be reached; NotFoundError.
        """
        try:
            return self._resolve(wanted, kernel)
        except NotFoundError as error:
            log.info("%s: fetching package lists", error)
        self._update()
        return self._resolve(wanted, kernel)

    def _resolve(self, wanted: Sequence[str], kernel: str) -> tuple[Package, ...]:
        flags = [f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")]
        listed = self._apt("apt-cache", "depends", "--recurse", *flags, *wanted, kernel, check=False)
        names = sorted({line for line in listed.splitlines() if re.fullmatch(r"[a-z0-9][a-z0-9.+-]+", line)})
        described = self._apt("apt-cache", "show", "--no-all-versions", *names, check=False) if names else ""
        return plan_packages(wanted, kernel, parse_packages(described))

    def fetch(self, packages: Sequence[Package]) -> dict[str, str]:
        """Have the packages in the cache; the path of each by name. Those of earlier builds are dropped.

        Raises: UnavailableError when the registry cannot be reached.
        """
        missing = [package for package in packages if not self._is_cached(package)]
        if missing:
            log.info("fetching %d packages, %d bytes", len(missing), sum(package.size_bytes for package in missing))
            try:
                self._download(missing)
            except UnavailableError:
                self._update()  # the lists may name versions that the registry has replaced since
                self._download(missing)
        for package in packages:
            if not self._is_cached(package):
                raise UnavailableError(
                    f"apt-get did not fetch {package.name} {package.version} whole", remedy=_REACH_REMEDY
                )
        keep = {package.file_name for package in packages}
        for name in _names(self._debs):
            if name not in keep:
                os.unlink(f"{self._debs}/{name}")
        return {package.name: f"{self._debs}/{package.file_name}" for package in packages}

    def _is_cached(self, package: Package) -> bool:
        path = f"{self._debs}/{package.file_name}"
        try:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == package.sha256:
                    return True
        except FileNotFoundError:
            return False
        os.unlink(path)  # cut off by an interrupted build
        return False

    def _download(self, packages: Iterable[Package]) -> None:
        names = [f"{package.name}={package.version}" for package in packages]
        try:
            self._apt("apt-get", "-q", "download", *names, cwd=self._debs)
        except OperationFailedError as error:
            raise UnavailableError(f"the package registry does not answer: {error}", remedy=_REACH_REMEDY) from error

    def _update(self) -> None:
        os.makedirs(f"{self._lists}/partial", exist_ok=True)
        try:
            self._apt("apt-get", "-q", "update", "-o", "APT::Update::Error-Mode=any")
        except OperationFailedError as error:
            if not any("_Packages" in name for name in _names(self._lists)):
                shutil.rmtree(self._lists)  # otherwise it would hide the host's own lists from now on
                raise UnavailableError(
                    f"the package registry does not answer: {error}", remedy=_REACH_REMEDY
                ) from error
            log.warning("some package lists could not be fetched: %s", error)

    def _apt(self, program: str, *arguments: str, cwd: str | None = None, check: bool = True) -> str:
        options = [f"Dir::Cache::pkgcache={self._cache_dir}/pkgcache.bin", "Dir::Cache::srcpkgcache="]
        if os.path.isdir(self._lists):
            options.append(f"Dir::State::Lists={self._lists}")
        line = [program, *(part for option in options for part in ("-o", option)), *arguments]
        environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
        return run(line, timeout_s=_TIMEOUT_S, cwd=cwd, env=environment, check=check).stdout.decode(errors="replace")


def read_package(path: str, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, tarfile.TarInfo, bytes]]:
    """The wanted files of a package: path without a leading `./`, its tar header, its content.

    Raises: OperationFailedError from dpkg-deb for a file that is not a package.
    """
    archive = run(["dpkg-deb", "--fsys-tarfile", path], timeout_s=_TIMEOUT_S).stdout
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if not member.isdir() and is_wanted(name):
                    content = tar.extractfile(member) if member.isreg() else None
                    yield name, member, b"" if content is None else content.read()
    except tarfile.TarError as error:
        raise OperationFailedError(
            f"{path} is damaged: {error}", remedy=f"Delete it and build again: {path}"
        ) from error


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
