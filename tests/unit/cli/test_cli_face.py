"""The global options: which service, which words, which environment."""

import os

import pytest

from mullion.base.errors import InvalidError
from mullion.cli.doctor import render
from mullion.cli.face import Face, exit_code_of, how_invoked, read_token
from mullion.cli.progress import progress_line
from mullion.cli.service import daemon_argv, daemon_environment, why_it_ended
from mullion.model.states import OperationState
from mullion.model.views import CheckView, OperationView

pytestmark = pytest.mark.unit


@pytest.fixture
def program(tmp_path, monkeypatch):
    path = tmp_path / "a b" / "bin" / "mullion"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return path


def test_a_program_on_the_search_path_is_called_by_its_name(program):
    assert how_invoked(str(program), f"/nonexistent:{program.parent}") == "mullion"


def test_another_one_on_the_search_path_does_not_stand_for_this_one(program, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "mullion").write_text("#!/bin/sh\n")
    (other / "mullion").chmod(0o755)
    assert how_invoked(str(program), f"{other}:{program.parent}") == "'a b/bin/mullion'"


def test_a_program_elsewhere_is_called_by_its_path(program, monkeypatch):
    assert how_invoked("a b/bin/mullion", "/nonexistent") == "'a b/bin/mullion'"
    monkeypatch.chdir(program.parent)
    assert how_invoked("mullion", "/nonexistent") == "./mullion"
    monkeypatch.chdir("/")
    assert how_invoked(str(program), "") == f"'{program}'"
    assert how_invoked("/x/mullion/cli/__main__.py", "") == "python -m mullion.cli"


def test_a_suggested_command_asks_the_same_service():
    face = Face(invoked="bin/mullion", socket="/run/a b/api.sock")
    assert (
        face.command("partition", "console", "web") == "bin/mullion partition console web --socket '/run/a b/api.sock'"
    )


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(InvalidError, match="--socket and --url"):
        _ = Face(socket="/x", url="http://127.0.0.1:1").client
    with pytest.raises(InvalidError, match="--token-file without --url"):
        _ = Face(token_file="/x").client


def test_a_token_is_read_from_its_file(tmp_path):
    (tmp_path / "token").write_text("secret\n")
    assert read_token(Face(token_file=str(tmp_path / "token"))) == "secret"
    with pytest.raises(InvalidError, match=r"the token cannot be read: .*: No such file"):
        read_token(Face(token_file=str(tmp_path / "none")))


def test_settings_reach_the_daemon_by_its_environment(monkeypatch):
    monkeypatch.setenv("MULLION_LISTEN", "none")
    monkeypatch.setenv("MULLION_RUN_DIR", "run")
    environment = daemon_environment(Face(overrides={"data_dir": "data", "boot_slots": 3}))
    assert environment["MULLION_DATA_DIR"] == os.path.join(os.getcwd(), "data")
    assert environment["MULLION_RUN_DIR"] == os.path.join(os.getcwd(), "run")
    assert environment["MULLION_BOOT_SLOTS"] == "3"
    assert environment["MULLION_LISTEN"] == "none"
    assert daemon_argv("doctor")[1:] == ["-P", "-m", "mullion.daemon", "doctor"]


def test_a_service_that_did_not_start_is_quoted():
    log = "2030 error __main__ no\nmullion: another program listens on 127.0.0.1:1\n  → Set `listen` to none.\n"
    error = why_it_ended(4, log, "/d/mullion.log")
    assert error.message == "the service did not start: another program listens on 127.0.0.1:1"
    assert error.remedy == "Set `listen` to none."
    assert exit_code_of(error) == 4
    crashed = why_it_ended(-9, "half a line", "/d/mullion.log")
    assert crashed.message == "the service ended at once with exit status -9: half a line"
    assert "/d/mullion.log" in crashed.remedy
    assert why_it_ended(None, "", "/d/mullion.log").message == "the service does not answer"


def test_doctor_aligns_its_verdicts_and_shows_what_mends():
    checks = (
        CheckView("python", "ok", "3.11.2", "not shown"),
        CheckView("accelerator", "note", "tcg: KVM cannot run a guest here", "mullion serve --accelerator kvm"),
        CheckView("qemu", "missing", "qemu-system-x86_64 is not installed", "apt-get install qemu-system-x86"),
    )
    assert render(Face(invoked="./mullion"), checks).splitlines() == [
        "ok       python       3.11.2",
        "note     accelerator  tcg: KVM cannot run a guest here",
        "                      → ./mullion serve --accelerator kvm",
        "missing  qemu         qemu-system-x86_64 is not installed",
        "                      → apt-get install qemu-system-x86",
        "",
        "1 missing: run the commands marked with →, then look again.",
    ]
    assert render(Face(), checks[:1]).endswith("Nothing is missing.")


def test_a_line_of_progress():
    view = OperationView("7", "image.build", "image/demo", OperationState.RUNNING, "", "", 0.25, "fetch\x1b packages")
    assert progress_line(view, 3.21) == "image build demo  [#####...............]  25%  3.2 s  fetch? packages"
