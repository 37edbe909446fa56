"""The command line as a process: what it imports, how it ends, what it does without a service."""

import json
import os
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.contract

HEAVY = ("asyncio", "click.testing", "http.client", "litestar", "msgspec", "rich", "sqlite3", "uvicorn", "websockets")


def mullion(*arguments, **options):
    options.setdefault("capture_output", True)
    return subprocess.run(
        [sys.executable, "-m", "mullion.cli", *arguments], timeout=120, check=False, text=True, **options
    )


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MULLION_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("arguments", [["--help"], ["version"], ["completion", "bash"]])
def test_what_needs_no_service_imports_nothing_heavy(arguments):
    program = (
        "import sys\n"
        "from mullion.cli.root import root\n"
        "try:\n"
        f"    root.main({arguments!r})\n"
        "except SystemExit as ended:\n"
        "    assert ended.code == 0, ended.code\n"
        f"print('\\nimported', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120, check=False, text=True)
    assert done.stdout.endswith("\nimported []\n"), done.stdout + done.stderr


def test_without_a_service_the_way_to_start_it_is_named(home):
    failed = mullion("partition", "list")
    assert failed.returncode == 7
    assert failed.stdout == ""
    assert "serve --detach`" in failed.stderr.splitlines()[-1]
    assert json.loads(mullion("status", "--format", "json").stderr)["code"] == "unavailable"


def test_stopping_a_service_that_does_not_run_is_no_error(home):
    done = mullion("stop")
    assert (done.returncode, done.stdout) == (0, "the service does not run\n")


def test_a_wrong_setting_is_refused_before_anything_starts(home):
    wrong = mullion("serve", "--accelerator", "xen")
    assert wrong.returncode == 2
    assert "'xen' is not one of 'auto', 'kvm', 'tcg'" in wrong.stderr
    wrong = mullion("serve", env={**os.environ, "MULLION_BOOT_SLOTS": "many"})
    assert wrong.returncode == 5
    assert "MULLION_BOOT_SLOTS: boot_slots = 'many' is not a whole number" in wrong.stderr


def test_a_folder_or_file_that_cannot_be_used_is_named(home):
    wrong = mullion("serve", "--detach", "--data-dir", "/proc/nope/x")
    assert wrong.returncode == 5
    assert "the data folder /proc/nope/x cannot be used: No such file or directory" in wrong.stderr
    (home / "file").touch()
    wrong = mullion("status", env={**os.environ, "MULLION_HOME": str(home / "file")})
    assert wrong.returncode == 5
    assert "the settings cannot be read" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_a_reader_that_goes_away_ends_us_silently(home):
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    try:
        done = mullion("completion", "bash", stdout=write_fd, stderr=subprocess.PIPE, capture_output=False)
    finally:
        os.close(write_fd)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
