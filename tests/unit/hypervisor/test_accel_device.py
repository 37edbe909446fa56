"""What is said of /dev/kvm before anybody probes it, and of the choice, in `mullion doctor`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mullion.hypervisor.accel import accelerator_check, examine_kvm, probe_accelerator
from mullion.model.definition import Accelerator

pytestmark = pytest.mark.unit


def test_no_device_a_file_in_its_place_and_one_that_we_may_not_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(tmp_path / "accelerator.json")
    gone = examine_kvm(cache, device=str(tmp_path / "kvm"))
    assert (gone.usable, "is not there" in gone.why, "modprobe" in gone.remedy) == (False, True, True)
    (tmp_path / "kvm").touch()
    assert "is not a device" in examine_kvm(cache, device=str(tmp_path / "kvm")).why
    monkeypatch.setattr(os, "access", lambda *_: False)
    denied = examine_kvm(cache, device="/dev/null")
    assert "we may not open it" in denied.why
    assert "adduser" in denied.remedy
    assert not os.path.exists(cache), "only a probe's verdict is kept"


def test_the_doctor_names_choice_reason_and_remedy(tmp_path: Path) -> None:
    choice = probe_accelerator(str(tmp_path / "accelerator.json"), device=str(tmp_path / "kvm"))
    check = accelerator_check(choice)
    assert (check.name, check.verdict) == ("accelerator", "note")
    assert check.detail == f"tcg: {tmp_path}/kvm is not there; TCG is used"
    assert "modprobe" in check.remedy
    forced = probe_accelerator(str(tmp_path / "accelerator.json"), forced=Accelerator.TCG)
    assert accelerator_check(forced).detail == "tcg: TCG was asked for"
