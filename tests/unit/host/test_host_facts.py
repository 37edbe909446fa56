"""The doctor's checks: right when all is there, calm when nothing is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mullion.base.paths import HostPaths
from mullion.host import facts

pytestmark = pytest.mark.unit


def test_uefi_needs_code_and_variables_of_one_build(tmp_path: Path) -> None:
    pairs = [(str(tmp_path / f"{build}.code"), str(tmp_path / f"{build}.vars")) for build in ("new", "old")]
    (tmp_path / "new.code").touch()
    (tmp_path / "old.vars").touch()
    lacking = facts.check_uefi(pairs)
    assert (lacking.verdict, lacking.remedy) == ("note", "apt-get install ovmf")
    (tmp_path / "old.code").touch()
    assert facts.check_uefi(pairs).detail == str(tmp_path / "old.code")


def test_image_tools_are_complete_without_files_of_other_boot_loaders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "find_program", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(os.path, "exists", lambda _path: False)
    assert facts.check_image_tools().verdict == "ok"


def test_memory(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(
        "MemTotal:       16777216 kB\nMemFree: 5 kB\nMemAvailable:    8388608 kB\nHugePages_Total:   0\n"
    )
    assert facts.check_memory(str(meminfo)).detail == "8 GiB available of 16 GiB"
    meminfo.write_text("MemTotal: 1048576 kB\nMemAvailable: 1024 kB\n")
    assert facts.check_memory(str(meminfo)).verdict == "note"
    for damaged in ("", "MemTotal", "MemTotal: many kB"):
        meminfo.write_text(damaged)
        assert "cannot be read" in facts.check_memory(str(meminfo)).detail


@pytest.mark.parametrize(
    ("mounts", "detail"),
    [
        ("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ncgroup /c cgroup rw,cpuset 0 0\n", "version 1 (cpu, cpuset)"),
        ("cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n", "version 2, on /sys/fs/cgroup"),
        ("proc /proc proc rw 0 0\n", "none: limits of processor and disk time are not enforced"),
    ],
)
def test_cgroups(tmp_path: Path, mounts: str, detail: str) -> None:
    (tmp_path / "mounts").write_text(mounts)
    assert facts.check_cgroups(str(tmp_path / "mounts")).detail == detail


def test_the_run_folder_leaves_room_for_names() -> None:
    assert facts.check_run_folder("/run/mullion").verdict == "ok"
    tight = facts.check_run_folder("/" + "x" * 40)
    assert tight.verdict == "note"
    assert "may have 40 characters instead of 63" in tight.detail
    assert facts.check_run_folder("/" + "x" * 100).verdict == "missing"


def test_the_room_for_names_is_what_the_paths_allow() -> None:
    run_dir = "/" + "x" * 40
    paths = HostPaths("/d", run_dir).partition("n" * 40)
    assert paths.vhost_user("d" * 16)
    with pytest.raises(Exception, match="longer than 107 bytes"):
        HostPaths("/d", run_dir).partition("n" * 41).vhost_user("d" * 16)


def test_disk_of_a_folder_that_is_not_made_yet(tmp_path: Path) -> None:
    check = facts.check_disk(str(tmp_path / "a" / "b"))
    assert f"not made yet, on {tmp_path}" in check.detail


def test_programs_that_are_missing_come_with_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_args, **_more: None)
    assert facts.check_qemu().remedy == "apt-get install qemu-system-x86"
    assert facts.check_qemu_img().remedy == "apt-get install qemu-utils"
    tools = facts.check_image_tools()
    assert tools.verdict == "missing"
    words = tools.remedy.split()
    assert words[:2] == ["apt-get", "install"]
    assert {"mtools", "syslinux", "dosfstools", "e2fsprogs"} <= set(words[2:])
    assert len(words) == len(set(words)), "each package once"


def test_every_check_answers_on_a_bare_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_args, **_more: None)
    checks = facts.host_checks(HostPaths(str(tmp_path / "d"), str(tmp_path / "r")))
    assert len({check.name for check in checks}) == len(checks)
    assert all(check.verdict in ("ok", "note", "missing") for check in checks)
    assert all(check.remedy for check in checks if check.verdict == "missing")


def test_an_old_qemu_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    from mullion.base.process import Completed

    def answers(text: bytes) -> None:
        monkeypatch.setattr(facts, "find_program", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(facts, "run", lambda argv, **_: Completed(tuple(argv), 0, text, b""))

    answers(b"QEMU emulator version 5.2.0 (Debian 1:5.2+dfsg-11)\n")
    assert facts.check_qemu().verdict == "note"
    answers(b"QEMU emulator version 10.0.2\n")
    assert facts.check_qemu().verdict == "ok"
    answers(b"hello\n")
    assert "not known" in facts.check_qemu().detail


@pytest.mark.parametrize(
    ("user", "isolation", "words"),
    [(0, "auto", "a user id of its own"), (0, "off", "every QEMU runs as root"), (1000, "auto", "user id 1000")],
)
def test_users(monkeypatch: pytest.MonkeyPatch, user: int, isolation: str, words: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert words in facts.check_users(isolation).detail
