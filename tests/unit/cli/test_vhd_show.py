"""What `mullion vhd` says when a file may not be read, a disk cannot be, or ^C comes early."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mullion.base.errors import DeniedError, MullionError
from mullion.base.units import MIB
from mullion.cli.root import root
from mullion.media import mount_process
from mullion.media.mount import MountSpec
from mullion.vhd import create_dynamic, forest

pytestmark = pytest.mark.unit


def vhd(*words: str) -> Result:
    return CliRunner().invoke(root, ["vhd", *words])


def test_a_file_that_may_not_be_read_is_not_called_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mine.vhd", "theirs.vhd"):
        create_dynamic(str(tmp_path / name), MIB)

    def open_file(path: str) -> int:
        if path.endswith("theirs.vhd"):
            raise DeniedError(f"{path} may not be read", path=path)
        return os.open(path, os.O_RDONLY)

    monkeypatch.setattr(forest, "open_file", open_file)
    lines = vhd("tree", str(tmp_path)).stdout.splitlines()
    assert lines[1:] == ["theirs.vhd  may not be read"]
    verdicts = [disk["verdict"] for disk in json.loads(vhd("tree", str(tmp_path), "--format", "json").stdout)]
    assert verdicts == ["sound", None]


def test_an_early_interrupt_says_what_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(forest, "plant", interrupted)
    done = vhd("tree", str(tmp_path))
    assert done.exit_code == 130
    assert done.stderr == "\nvhd tree was interrupted\n"


def test_storage_that_fails_is_the_mounts_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(spec: MountSpec, _: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), spec.path)

    monkeypatch.setattr(mount_process, "serve_mount", fails)
    reading, writing = os.pipe()
    log = tmp_path / "log"
    log.touch()
    assert mount_process.main(writing, str(log), MountSpec("disk.vhd", str(tmp_path))) != 0
    with open(reading, "rb") as answer:
        error = MullionError.from_wire(json.loads(answer.read()))
    assert error.message == "disk.vhd: Input/output error"
    assert "dmesg" in error.remedy
