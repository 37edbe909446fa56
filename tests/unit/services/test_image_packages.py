"""Which packages, libraries and kernel modules go into the guest."""

from __future__ import annotations

from typing import ClassVar

import pytest

from mullion.base.errors import InvalidError, NotFoundError
from mullion.services.image.guest_tree import busybox_applets, choose_libraries, read_scripts
from mullion.services.image.modules import alias_index, dependency_index, plan_modules
from mullion.services.image.packages import parse_packages, plan_packages

from .test_image_formats import dynamic_program, kernel_module

pytestmark = pytest.mark.unit

SHOWN = """\
Package: qemu-guest-agent
Version: 1:7.2+dfsg-7
Architecture: amd64
Depends: libc6 (>= 2.34), libglib2.0-0 (>= 2.63.3), init-system-helpers | sysvinit
Description: Guest-side agent
 with a second line: not a field
Section: otherosfs
Size: 346272
SHA256: aa

Package: qemu-guest-agent
Version: 1:7.2+dfsg-6
Architecture: amd64
Section: otherosfs
Size: 1
SHA256: old

Package: libc6
Version: 2.36-9
Architecture: amd64
Depends: libgcc-s1, libcrypt1 (>= 1:4.4)
Section: libs
Size: 100
SHA256: bb

Package: libglib2.0-0
Version: 2.74.6-2
Architecture: amd64
Depends: libc6 (>= 2.34), virtual-thing
Section: contrib/libs
Size: 100
SHA256: cc

Package: libgcc-s1
Version: 12.2.0-14
Architecture: amd64
Depends: libc6
Section: libs
Size: 100
SHA256: dd

Package: libcrypt1
Version: 1:4.4.33-2
Architecture: amd64
Section: libs
Size: 100
SHA256: ee

Package: init-system-helpers
Version: 1.65
Architecture: all
Depends: perl-base
Section: admin
Size: 100
SHA256: ff

Package: linux-image-cloud-amd64
Version: 6.1.192-2
Architecture: amd64
Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)
Section: kernel
Size: 100
SHA256: 01

Package: linux-image-6.1.0-56-cloud-amd64
Version: 6.1.192-2
Architecture: amd64
Depends: kmod, linux-base (>= 4.3~)
Section: kernel
Size: 26713492
SHA256: 02

Package: locally-installed
Version: 1
Status: install ok installed
"""


class TestPackages:
    def test_first_version_counts_and_lines_of_a_description_do_not(self) -> None:
        agent = parse_packages(SHOWN)["qemu-guest-agent"]
        assert agent.version == "1:7.2+dfsg-7"
        assert agent.depends == ("libc6", "libglib2.0-0", "init-system-helpers")
        assert agent.file_name == "qemu-guest-agent_1%3a7.2+dfsg-7_amd64.deb"

    def test_package_that_is_in_no_list_is_left_out(self) -> None:
        assert "locally-installed" not in parse_packages(SHOWN)

    def test_description_without_a_size_is_refused(self) -> None:
        with pytest.raises(InvalidError, match="package x"):
            parse_packages("Package: x\nVersion: 1\nArchitecture: all\nSection: libs\nSHA256: aa\n")

    def test_libraries_are_followed_tools_are_not_and_the_kernel_is_the_one_behind_the_meta_package(self) -> None:
        planned = plan_packages(("qemu-guest-agent",), "linux-image-cloud-amd64", parse_packages(SHOWN))
        assert [package.name for package in planned] == [
            "libc6",
            "libcrypt1",
            "libgcc-s1",
            "libglib2.0-0",
            "linux-image-6.1.0-56-cloud-amd64",
            "qemu-guest-agent",
        ]

    @pytest.mark.parametrize(
        ("wanted", "kernel", "named"),
        [
            ("busybox-static", "linux-image-cloud-amd64", "busybox-static"),
            ("libc6", "linux-image-amd64", "linux-image"),
        ],
    )
    def test_what_the_lists_lack_is_named(self, wanted: str, kernel: str, named: str) -> None:
        with pytest.raises(NotFoundError, match=named) as caught:
            plan_packages((wanted,), kernel, parse_packages(SHOWN))
        assert "apt-get update" in caught.value.remedy


class TestLibraries:
    def test_what_libraries_need_is_followed_and_the_rest_left_out(self) -> None:
        available = {
            "libglib.so": dynamic_program("libc.so.6", "libpcre.so"),
            "libpcre.so": dynamic_program("libc.so.6"),
            "libc.so.6": dynamic_program("ld.so"),
            "ld.so": dynamic_program(),
            "libunused.so": dynamic_program("libmissing.so"),
        }
        chosen = choose_libraries([dynamic_program("libglib.so")], available)
        assert set(chosen) == {"libglib.so", "libpcre.so", "libc.so.6", "ld.so"}

    def test_missing_library_is_named(self) -> None:
        with pytest.raises(NotFoundError, match=r"libgone\.so\.1"):
            choose_libraries([dynamic_program("libgone.so.1")], {})

    def test_applets_are_found_in_the_program(self) -> None:
        assert busybox_applets(b"ELF\0etc\0[\0[[\0acpid\0zcat\0\0more") == ("[", "[[", "acpid", "zcat")
        with pytest.raises(InvalidError, match="no table of applets"):
            busybox_applets(b"ELF\0[\0acpid\0")


class TestModules:
    FILES: ClassVar = {
        "kernel/drivers/virtio/virtio.ko": kernel_module(depends="virtio_ring"),
        "kernel/drivers/virtio/virtio_ring.ko": kernel_module(depends=""),
        "kernel/drivers/virtio/virtio_pci.ko": kernel_module(depends="virtio,virtio_ring", alias="pci:v00001AF4d*"),
        "kernel/drivers/char/virtio-rng.ko": kernel_module(depends="virtio", alias=["virtio:d4v*", "rng"]),
        "kernel/fs/unused.ko": kernel_module(),
    }

    def test_needs_are_followed_and_names_are_told_apart_from_files(self) -> None:
        modules = plan_modules(["virtio_rng", "not_in_this_kernel"], ["virtio_pci"], self.FILES, [])
        assert set(modules) == {"virtio", "virtio_ring", "virtio_pci", "virtio_rng"}

    def test_index_lists_what_is_needed_before_what_that_needs(self) -> None:
        modules = plan_modules([], ["virtio_pci"], self.FILES, [])
        drivers = "kernel/drivers/virtio/"
        assert dependency_index(modules).decode().splitlines() == [
            f"{drivers}virtio.ko: {drivers}virtio_ring.ko",
            f"{drivers}virtio_pci.ko: {drivers}virtio.ko {drivers}virtio_ring.ko",
            f"{drivers}virtio_ring.ko:",
        ]

    def test_aliases_name_the_module(self) -> None:
        modules = plan_modules(["virtio_rng"], [], self.FILES, [])
        assert alias_index(modules) == b"alias virtio:d4v* virtio_rng\nalias rng virtio_rng\n"

    def test_what_is_built_in_needs_no_file(self) -> None:
        assert plan_modules([], ["ext4"], {}, ["kernel/fs/ext4/ext4.ko"]) == {}

    def test_required_module_that_is_nowhere_is_named(self) -> None:
        with pytest.raises(InvalidError, match="no module virtio_blk"):
            plan_modules([], ["virtio_blk"], self.FILES, [])

    def test_need_of_an_optional_module_that_is_nowhere_is_named(self) -> None:
        files = {"kernel/a.ko": kernel_module(depends="gone")}
        with pytest.raises(InvalidError, match="no module gone"):
            plan_modules(["a"], [], files, [])


def test_scripts_of_the_guest_are_shipped_and_start_as_scripts() -> None:
    scripts = read_scripts()
    assert scripts["init"].startswith(b"#!/bin/sh\n")
    assert b"/etc/init.d/agent" in scripts["inittab"]
