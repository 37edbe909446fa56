"""Every example of `mullion vhd` works as it stands; the man pages are those of the commands."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mullion.base.units import MIB
from mullion.vhd import create_differencing, create_dynamic, create_fixed, open_chain

pytestmark = pytest.mark.interop

ROOT = Path(__file__).parents[2]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_man_pages", ROOT / "tools/generate_man_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAN = generator()
EXAMPLES = [
    pytest.param(line, id=line.removeprefix("mullion vhd "))
    for ctx in MAN.contexts()
    for line in MAN.blocks(ctx.command.help or "")[1]
]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The disks that the examples speak of."""
    folder = tmp_path_factory.mktemp("disks")
    with contextlib.chdir(folder):
        make_disks()
    return folder


def make_disks() -> None:
    """In the working folder, so that children name their parents as they were typed."""
    create_dynamic("base.vhd", 40 * MIB)
    create_differencing("child.vhd", "base.vhd")
    create_differencing("grandchild.vhd", "child.vhd")
    create_fixed("fixed.vhd", 40 * MIB)
    create_dynamic("damaged.vhd", 40 * MIB)
    create_dynamic("files.vhd", 40 * MIB)
    for number, name in enumerate(("base", "child", "grandchild", "fixed", "damaged")):
        with open_chain(f"{name}.vhd") as chain:
            chain.pwrite(number * MIB, name.encode() * 1000)
    Path("disk.img").write_bytes(b"raw" * 1000)
    os.truncate("disk.img", 40 * MIB)
    os.truncate("damaged.vhd", os.path.getsize("damaged.vhd") - 512)
    os.mkdir("old-parent-moved")
    os.makedirs("tree/etc")
    Path("tree/etc/hostname").write_text("mullion\n")
    program = ["mke2fs", "-q", "-t", "ext4", "-d", "tree", "files.img", "40M"]
    subprocess.run(program, check=True, capture_output=True, timeout=60)
    with open_chain("files.vhd") as chain:
        chain.pwrite(0, Path("files.img").read_bytes())
    shutil.rmtree("tree")
    os.unlink("files.img")


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_works(line: str, scene: Path, tmp_path: Path) -> None:
    """Through a shell, as it would be typed, each in a fresh copy of the disks."""
    here = tmp_path / "disks"
    shutil.copytree(scene, here, copy_function=lambda source, target: subprocess.run(
        ["cp", "--sparse=always", "--preserve=all", source, target], check=True, timeout=60))  # fmt: skip
    command = f"{shlex.quote(sys.executable)} -m mullion.cli vhd "
    assert line.startswith("mullion vhd ")
    if line.startswith("mullion vhd serve "):
        command = f"exec {command}"  # the signal is for the command, not for a shell around it
    typed = line.replace("mullion vhd ", command)
    pipe = subprocess.PIPE
    with subprocess.Popen(["bash", "-c", typed], cwd=here, stdout=pipe, stderr=pipe, text=True) as process:
        if line.startswith("mullion vhd serve "):  # it stays until it is told to end, and says when it can be used
            assert process.stdout is not None
            assert process.stdout.readline().startswith("nbd+unix:")
            process.terminate()
        said, noted = process.communicate(timeout=120)
    assert process.returncode == 0, f"{line}\n{said}{noted}"


def test_every_command_has_an_example() -> None:
    for ctx in MAN.contexts():
        if ctx.info_name != "vhd":
            assert MAN.blocks(ctx.command.help or "")[1], ctx.command_path


def test_the_man_pages_are_up_to_date() -> None:
    there = {path.name: path.read_text(encoding="utf-8") for path in MAN.FOLDER.glob("*.1")}
    assert there == dict(MAN.pages()), "run tools/generate_man_pages.py"


def test_man_takes_the_pages_without_a_complaint() -> None:
    for path in MAN.FOLDER.glob("*.1"):
        text = path.read_text(encoding="utf-8")
        assert text.startswith(".TH MULLION")
        known = (".TH", ".SH", ".B", ".BR", ".TP", ".PP", ".nf", ".fi")
        assert all(line.split()[0] in known for line in text.splitlines() if line.startswith(".")), path
