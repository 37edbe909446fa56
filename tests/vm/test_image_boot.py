"""The demo image boots however a partition may see its disk; what is written in the guest is kept."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.framework.image import PlainGuest, shared_image

from mullion.services.image import KERNEL_LINE, BuiltImage
from mullion.vhd import create_differencing

pytestmark = pytest.mark.vm

VIRTIO = ("-device", "virtio-blk-pci,drive=disk,bootindex=0")
OVMF = Path("/usr/share/OVMF")


@pytest.fixture(scope="module")
def image() -> BuiltImage:
    return shared_image()


@pytest.fixture
def disk(image: BuiltImage) -> Iterator[str]:
    """An empty differencing disk on the image."""
    folder = tempfile.mkdtemp(prefix="mull-", dir="/tmp")
    create_differencing(f"{folder}/disk.vhd", image.path)
    yield f"{folder}/disk.vhd"
    shutil.rmtree(folder)


def test_own_loader_keeps_what_was_written_and_both_ways_down_are_clean(disk: str, image: BuiltImage) -> None:
    before = Path(image.path).stat()
    with PlainGuest.start(disk, *VIRTIO) as guest:
        assert guest.run("awk '$2 == \"/\" { print $1, $3 }' /proc/mounts").split() == ["/dev/vda2", "ext4"]
        guest.run("echo kept >/root/note")  # and no sync: going down writes it
        guest.shut_down()
        assert "Mullion demo guest" in guest.log("console.log")
        assert "demo login:" in guest.log("console.log")
    with PlainGuest.start(disk, *VIRTIO) as guest:
        assert guest.run("cat /root/note") == "kept\n"
        assert "recover" not in guest.run("dmesg"), "the journal had to be replayed: the way down was not clean"
        guest.run("echo more >>/root/note; while ! pidof acpid; do usleep 50000; done")
        guest.monitor("system_powerdown")
        guest.wait_end()
    with PlainGuest.start(disk, *VIRTIO) as guest:
        assert guest.run("cat /root/note") == "kept\nmore\n"
        assert "recover" not in guest.run("dmesg")
    after = Path(image.path).stat()
    assert (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size), "the parent was written to"


def test_kernel_given_by_the_host_finds_the_root_filesystem(disk: str, image: BuiltImage) -> None:
    device = ("-device", "virtio-blk-pci,drive=disk")
    boot = ("-kernel", image.kernel_path, "-initrd", image.initrd_path, "-append", KERNEL_LINE)
    with PlainGuest.start(disk, *device, *boot) as guest:
        assert "/dev/vda2 / ext4" in guest.run("cat /proc/mounts")
        assert KERNEL_LINE in guest.run("cat /proc/cmdline")


def test_uefi_boots_by_the_removable_media_path(disk: str, tmp_path: Path) -> None:
    shutil.copy(OVMF / "OVMF_VARS_4M.fd", tmp_path / "vars.fd")
    code = f"if=pflash,format=raw,readonly=on,file={OVMF}/OVMF_CODE_4M.fd"
    variables = f"if=pflash,format=raw,file={tmp_path}/vars.fd"
    with PlainGuest.start(disk, "-drive", code, "-drive", variables, *VIRTIO) as guest:
        assert "/dev/vda2 / ext4" in guest.run("cat /proc/mounts")
        guest.run("test -d /sys/firmware/efi")


@pytest.mark.parametrize(
    ("machine", "arguments"),
    [
        ("pc", ("-device", "ide-hd,drive=disk,bus=ide.0,bootindex=0")),
        ("q35", ("-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=disk,bootindex=0")),
    ],
    ids=["ide", "virtio-scsi"],
)
def test_other_controllers(disk: str, machine: str, arguments: tuple[str, ...]) -> None:
    with PlainGuest.start(disk, *arguments, machine=machine) as guest:
        assert "/dev/sda2 / ext4" in guest.run("cat /proc/mounts")


def test_generic_kernel_has_the_driver_of_a_sata_disk() -> None:
    with tempfile.TemporaryDirectory(prefix="mull-", dir="/tmp") as folder:
        create_differencing(f"{folder}/disk.vhd", shared_image("generic").path)
        sata = ("-device", "ide-hd,drive=disk,bus=ide.0,bootindex=0")
        with PlainGuest.start(f"{folder}/disk.vhd", *sata) as guest:
            assert "/dev/sda2 / ext4" in guest.run("cat /proc/mounts")
            assert "ahci" in guest.run("lsmod")


def test_without_a_disk_it_is_a_rescue_system(image: BuiltImage) -> None:
    boot = ("-kernel", image.kernel_path, "-initrd", image.initrd_path, "-append", KERNEL_LINE)
    with PlainGuest.start(None, *boot) as guest:
        assert "rootfs / rootfs" in guest.run("cat /proc/mounts")
        assert "RESCUE" in guest.run("cat /etc/issue")
        guest.shut_down()


def test_two_processors_and_a_network_card(disk: str) -> None:
    network = ("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=")
    with PlainGuest.start(disk, *VIRTIO, *network, "-smp", "2") as guest:
        assert guest.run("nproc").strip() == "2"
        address = guest.run("while ! ip -4 addr show dev eth0 | grep inet; do usleep 100000; done")
        assert "10.0.2.15/24" in address
        assert "default via 10.0.2.2" in guest.run("ip route")
