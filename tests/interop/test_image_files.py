"""The built image as other programs see it, and building under bad conditions."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.framework.image import CACHE, shared_image

from mullion.base.errors import InvalidError, NotFoundError, UnavailableError
from mullion.base.paths import HostPaths
from mullion.services.image import BuiltImage, ImageController, build_demo_image
from mullion.services.image.boot_code import BOOT_CODE
from mullion.vhd import create_differencing, open_chain

pytestmark = pytest.mark.interop

SECTOR = 512
BUILD = (
    "import sys; from mullion.services.image import *; print(build_demo_image(sys.argv[1], cache_dir=sys.argv[2]).key)"
)


def tool(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def image() -> BuiltImage:
    return shared_image()


@pytest.fixture(scope="module")
def raw(image: BuiltImage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The disk as qemu-img reads it."""
    path = tmp_path_factory.mktemp("raw") / "disk.raw"
    tool("qemu-img", "convert", "-f", "vpc", "-O", "raw", image.path, str(path))
    return path


@pytest.fixture(scope="module")
def root(raw: Path) -> Path:
    """The root filesystem by itself."""
    return part(raw, "root.ext4", 133120, None)


def part(raw: Path, name: str, first_sector: int, sectors: int | None) -> Path:
    path = raw.parent / name
    count = [] if sectors is None else [f"count={sectors * SECTOR}"]
    tool(
        "dd",
        f"if={raw}",
        f"of={path}",
        f"skip={first_sector * SECTOR}",
        "iflag=skip_bytes,count_bytes",
        "bs=1M",
        *count,
    )
    return path


class TestDisk:
    def test_qemu_reads_the_size_and_the_content_that_we_read(self, image: BuiltImage, raw: Path) -> None:
        assert json.loads(tool("qemu-img", "info", "--output=json", "-f", "vpc", image.path))["virtual-size"] == (
            image.size_bytes
        )
        ours = hashlib.sha256()
        buffer = bytearray(8 * 1024 * 1024)
        with contextlib.closing(open_chain(image.path, read_only=True)) as disk:
            for offset in range(0, image.size_bytes, len(buffer)):
                disk.pread(offset, buffer)
                ours.update(buffer)
        with raw.open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == ours.hexdigest()

    def test_partitions_as_sfdisk_sees_them(self, raw: Path) -> None:
        table = json.loads(tool("sfdisk", "--json", str(raw)))["partitiontable"]
        assert table["label"] == "dos"
        first, second = table["partitions"]
        assert (first["start"], first["type"], first["bootable"]) == (2048, "ef", True)
        assert (second["start"], second["type"]) == (133120, "83")
        assert second["start"] + second["size"] == raw.stat().st_size // SECTOR

    def test_7zip_lists_the_partitions_within_the_vhd(self, image: BuiltImage) -> None:
        listed = tool("7zz", "l", image.path)
        assert "0.fat" in listed or "0.img" in listed, listed

    def test_boot_partition_is_sound_and_holds_both_loaders(self, raw: Path, image: BuiltImage) -> None:
        boot = part(raw, "boot.fat", 2048, 131072)
        tool("fsck.vfat", "-n", str(boot))
        files = tool("mdir", "-a", "-/", "-b", "-i", str(boot)).lower()
        for name in (
            "vmlinuz",
            "initrd.img",
            "syslinux.cfg",
            "ldlinux.sys",
            "efi/boot/bootx64.efi",
            "entries/demo.conf",
        ):
            assert name in files
        tool("mcopy", "-i", str(boot), "::/vmlinuz", str(raw.parent / "vmlinuz"))
        assert (raw.parent / "vmlinuz").read_bytes() == Path(image.kernel_path).read_bytes()

    def test_root_filesystem_is_sound_and_roots_own(self, root: Path) -> None:
        tool("fsck.ext4", "-fn", str(root))
        for folder in ("/", "/etc", "/etc/init.d", "/usr/bin"):
            lines = tool("debugfs", "-R", f"ls -l {folder}", str(root)).splitlines()
            owners = {tuple(line.split()[3:5]) for line in lines if line.strip()}
            assert owners == {("0", "0")}, folder

    def test_initramfs_as_cpio_reads_it(self, image: BuiltImage, tmp_path: Path) -> None:
        (tmp_path / "initrd.cpio").write_bytes(gzip.decompress(Path(image.initrd_path).read_bytes()))
        listed = tool("7zz", "l", "-ba", str(tmp_path / "initrd.cpio"))
        assert "usr/bin/qemu-ga" in listed
        assert "virtio_blk.ko" in listed

    def test_image_is_a_parent_that_nobody_writes_to(self, image: BuiltImage, tmp_path: Path) -> None:
        assert Path(image.path).stat().st_mode & 0o777 == 0o444
        child = str(tmp_path / "child.vhd")
        create_differencing(child, image.path)
        folders = [str(tmp_path), str(CACHE)]
        with contextlib.closing(open_chain(child, allowed_dirs=folders)) as disk:
            disk.pwrite(0, b"changed")
        with contextlib.closing(open_chain(image.path, read_only=True)) as disk:
            first = bytearray(512)
            disk.pread(0, first)
        assert first.startswith(BOOT_CODE)

    def test_boot_code_is_what_its_source_says(self, tmp_path: Path) -> None:
        source = Path(__file__).parents[2] / "src/mullion/services/image/boot.S"
        tool("as", "--32", str(source), "-o", str(tmp_path / "boot.o"))
        line = ["-m", "elf_i386", "-Ttext", "0x600", "--oformat", "binary"]
        tool("ld", *line, str(tmp_path / "boot.o"), "-o", str(tmp_path / "boot.bin"))
        assert (tmp_path / "boot.bin").read_bytes() == BOOT_CODE


class TestBuild:
    def test_what_is_built_is_found_without_any_program(
        self, image: BuiltImage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr("mullion.services.image.packages.run", None)  # calling a program would be a TypeError
        again = build_demo_image(str(CACHE / "images"), cache_dir=str(CACHE / "packages"))
        assert again == image

    def test_extra_files_come_with_their_permissions_and_leave_the_demo_image_alone(self, tmp_path: Path) -> None:
        script = tmp_path / "hello"
        script.write_text("#!/bin/sh\necho hello\n")
        script.chmod(0o755)
        images = str(tmp_path / "images")
        built = build_demo_image(images, cache_dir=str(CACHE / "packages"), extra_files={"/opt/hello": str(script)})
        assert not os.path.lexists(f"{images}/demo")
        tool("qemu-img", "convert", "-f", "vpc", "-O", "raw", built.path, str(tmp_path / "raw"))
        root = part(tmp_path / "raw", "root", 133120, None)
        assert tool("debugfs", "-R", "cat /opt/hello", str(root)) == script.read_text()
        assert "0755" in tool("debugfs", "-R", "stat /opt/hello", str(root))

    def test_missing_extra_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidError, match="/nowhere/file: No such file"):
            build_demo_image(str(tmp_path), cache_dir=str(tmp_path), extra_files={"/a": "/nowhere/file"})

    def test_two_at_once_build_once_and_an_interrupted_one_leaves_nothing(self, tmp_path: Path) -> None:
        images, packages = tmp_path / "images", str(CACHE / "packages")
        line = [sys.executable, "-c", BUILD, str(images), packages]
        broken = subprocess.Popen(line, stdout=subprocess.DEVNULL)
        deadline_s = time.monotonic() + 120
        while not list(images.glob(".building-*")):
            assert broken.poll() is None, "the build ended before it could be interrupted"
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        broken.send_signal(signal.SIGKILL)
        broken.wait()
        assert not list(images.glob("demo*"))

        both = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        keys = {process.communicate(timeout=240)[0].strip() for process in both}
        assert [process.returncode for process in both] == [0, 0]
        assert len(keys) == 1
        assert sorted(path.name for path in images.iterdir()) == [".demo.lock", "demo", f"demo-{keys.pop()}"]

    def test_registry_that_does_not_answer_is_told_and_does_not_matter_once_built(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: BuiltImage
    ) -> None:
        (tmp_path / "lists").mkdir()
        (tmp_path / "apt.conf").write_text(
            f'Dir::State::Lists "{tmp_path}/lists";\nAcquire::http::Proxy "http://127.0.0.1:9";\nAcquire::Retries "0";\n'
        )
        monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
        with pytest.raises(UnavailableError, match="the package registry does not answer") as caught:
            build_demo_image(str(tmp_path / "images"), cache_dir=str(tmp_path / "packages"))
        assert "apt-get update" in caught.value.remedy
        assert not list((tmp_path / "images").glob("demo*"))

        under_way = shutil.ignore_patterns(".building-*", "*.new")  # by another test
        shutil.copytree(CACHE / "images", tmp_path / "images", symlinks=True, dirs_exist_ok=True, ignore=under_way)
        kept = build_demo_image(str(tmp_path / "images"), cache_dir=str(tmp_path / "packages"))
        assert kept.key == image.key

    def test_damaged_package_in_the_cache_is_fetched_again(self, tmp_path: Path) -> None:
        packages = tmp_path / "packages"
        shutil.copytree(CACHE / "packages", packages)
        (victim,) = (packages / "debs").glob("busybox-static_*")
        content = bytearray(victim.read_bytes())
        content[1000] ^= 1
        victim.write_bytes(content)
        build_demo_image(str(tmp_path / "images"), cache_dir=str(packages))
        content[1000] ^= 1
        assert victim.read_bytes() == content


class TestController:
    @pytest.fixture
    def images(self, tmp_path: Path) -> ImageController:
        return ImageController(HostPaths(str(tmp_path), str(tmp_path / "run")))

    def test_before_anything_is_built(self, images: ImageController) -> None:
        assert images.list() == ()
        with pytest.raises(NotFoundError, match="image demo is not built yet") as caught:
            images.resolve("image:demo")
        assert caught.value.remedy == "Build it: mullion image build demo"
        with pytest.raises(NotFoundError, match="there is no image 'windows'"):
            images.get("windows")
        with pytest.raises(InvalidError, match="does not name an image"):
            images.resolve("/some/disk.vhd")

    def test_what_is_built_is_listed_and_found(
        self, images: ImageController, image: BuiltImage, tmp_path: Path
    ) -> None:
        os.symlink(CACHE / "images", tmp_path / "images")
        view = images.get("demo")
        assert view in images.list()
        assert view.size_bytes == image.size_bytes
        assert 0 < view.file_bytes < view.size_bytes
        assert images.resolve("image:demo") == image.path
