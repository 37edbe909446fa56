"""A test run that dies must not leave processes behind, and one that lives must say what it left."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.framework.leftovers import Leftovers, checked_home, processes_naming, sockets_under

from mullion.base.process import ProcessIdentity

pytestmark = pytest.mark.interop

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Leftovers]:
    leftovers = Leftovers(tmp_path / "registry", patience_s=0)
    yield leftovers
    leftovers.finish()


def sleeper(*arguments: str, **environ: str) -> subprocess.Popen[bytes]:
    """A process with these in its command line and environment, in a session of its own, as our services are."""
    return subprocess.Popen(
        [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)", *arguments],
        env={**os.environ, **environ},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )


def test_a_process_is_known_by_its_command_line_or_environment(session: Leftovers) -> None:
    home = session.add_home()
    with (
        sleeper(f"unix:{home}/run/qmp.sock,server=on") as by_cmdline,
        sleeper(MULLION_HOME=str(home)) as by_environment,
        sleeper(f"{home}x", MULLION_HOME=f"{home}-other") as stranger,
    ):
        wait_until_started(by_cmdline, by_environment, stranger)
        found = {survivor.identity.pid for survivor in processes_naming(home) if survivor.identity}
        assert found == {by_cmdline.pid, by_environment.pid}
        survivors = session.remove_home(home)
        assert {survivor.identity.pid for survivor in survivors if survivor.identity} == found
        assert str(home) in str(survivors)
        assert by_cmdline.wait(60) == by_environment.wait(60) == -9
        assert stranger.poll() is None
        stranger.kill()
    assert not home.exists()


def wait_until_started(*processes: subprocess.Popen[bytes]) -> None:
    """Until exec: before it, a child still has our command line."""
    for process in processes:
        while b"time.sleep" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
            assert process.poll() is None


def test_a_listening_socket_is_found(session: Leftovers) -> None:
    home = session.add_home()
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as bound_only:
        listener.bind(f"{home}/api.sock")
        bound_only.bind(f"{home}/quiet.sock")
        assert sockets_under(home) == []
        listener.listen()
        assert [survivor.what for survivor in sockets_under(home)] == [f"{home}/api.sock"]
    assert sockets_under(home) == []


def test_a_clean_home_is_removed_without_a_word(session: Leftovers) -> None:
    with checked_home(session) as home:
        (home / "data").mkdir()
        (home / "data" / "disk.vhd").write_bytes(b"x")
        assert session.homes == (str(home),)
        assert len(str(home)) < 24
    assert not home.exists()
    assert session.homes == ()


def test_what_survives_a_test_is_named_and_ended(session: Leftovers) -> None:
    with ExitStack() as stack:
        process = sleeper(MULLION_HOME=str(stack.enter_context(checked_home(session))))
        wait_until_started(process)
        with pytest.raises(AssertionError, match=r"left behind: process \d+: .*time\.sleep"):
            stack.close()
    assert process.wait(60) == -9


def test_what_ends_by_itself_has_the_time_to(tmp_path: Path) -> None:
    session = Leftovers(tmp_path / "registry", patience_s=60)
    with checked_home(session) as home:
        argv = [sys.executable, "-c", "import time; time.sleep(0.5)", str(home)]
        process = subprocess.Popen(argv, start_new_session=True)
    assert process.wait(60) == 0
    session.finish()


def test_the_error_of_a_test_is_not_hidden_by_what_it_left(session: Leftovers) -> None:
    def broken_test() -> None:
        with checked_home(session) as home:
            processes.append(sleeper(MULLION_HOME=str(home)))
            wait_until_started(*processes)
            raise ZeroDivisionError

    processes: list[subprocess.Popen[bytes]] = []
    with pytest.raises(ZeroDivisionError):
        broken_test()
    [process] = processes
    assert process.wait(60) == -9


def test_the_end_of_a_session_reports_and_ends_the_rest(tmp_path: Path) -> None:
    session = Leftovers(tmp_path / "registry", patience_s=0)
    home = session.add_home()
    with sleeper(MULLION_HOME=str(home)) as naming, sleeper() as recorded:
        wait_until_started(naming, recorded)
        session.add_process(recorded.pid)
        survivors = session.finish()
        assert {survivor.identity.pid for survivor in survivors if survivor.identity} == {naming.pid, recorded.pid}
        assert naming.wait(60) == recorded.wait(60) == -9
    assert not home.exists()
    assert list((tmp_path / "registry").iterdir()) == []


DYING_SESSION = """
    import os, subprocess, sys
    from pathlib import Path
    from tests.framework.leftovers import Leftovers
    session = Leftovers(Path(sys.argv[1]))
    home = session.add_home()
    (home / "data").mkdir()
    nul = subprocess.DEVNULL  # a pipe of ours in their hands would make the reader wait for them
    def start(**environ):
        argv = [sys.executable, "-c", "import time; time.sleep(600)"]
        return subprocess.Popen(argv, env={**os.environ, **environ}, start_new_session=True, stdout=nul, stderr=nul)
    recorded = start()
    session.add_process(recorded.pid)
    print(home, start(MULLION_HOME=str(home)).pid, recorded.pid, flush=True)
    os._exit(9)
"""


def test_the_next_session_cleans_up_after_one_that_died(session: Leftovers, tmp_path: Path) -> None:
    own_home = session.add_home()
    with sleeper(MULLION_HOME=str(own_home)) as ours:
        died = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(DYING_SESSION), str(tmp_path / "registry")],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            check=False,
        )
        assert died.returncode == 9, died.stderr
        home, *pids = died.stdout.split()
        identities = [ProcessIdentity.of(int(pid)) for pid in pids]
        assert Path(home).is_dir()
        assert all(identities)
        done = session.reap_dead_sessions()
        assert len(done) == 2
        assert not Path(home).exists()
        assert not any(identity.is_alive for identity in identities if identity)
        assert session.reap_dead_sessions() == []
        assert ours.poll() is None  # a living session's are its own business
        ours.kill()


def test_a_pid_that_passed_to_another_process_is_not_signalled(session: Leftovers, tmp_path: Path) -> None:
    with sleeper() as stranger:
        identity = ProcessIdentity.of(stranger.pid)
        assert identity is not None
        registry = tmp_path / "registry"
        stale = f"{identity.pid} {identity.start_ticks - 1} {identity.boot_id}"
        (registry / "1-1").write_text(f"session {stale}\nprocess {stale}\nhome /etc\n")
        assert session.reap_dead_sessions() == []
        assert stranger.poll() is None
        stranger.kill()
    assert Path("/etc").is_dir()
