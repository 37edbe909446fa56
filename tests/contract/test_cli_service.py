"""The command line and the real service, without guests."""

import json
import os
import socket
import subprocess
import sys

import pytest
from tests.framework.leftovers import checked_home

from mullion.base.process import ProcessIdentity

pytestmark = pytest.mark.contract


class Host:
    """A folder of its own for everything, and the command line on it."""

    def __init__(self, folder, listen):
        self.folder = str(folder)
        self.environment = {**os.environ, "MULLION_HOME": self.folder, "MULLION_LISTEN": listen, "TERM": "dumb"}

    def run(self, *arguments, **options):
        environment = {**self.environment, **options.pop("env", {})}
        return subprocess.run(
            [sys.executable, "-m", "mullion.cli", *arguments],
            capture_output=True, timeout=120, check=False, text=True, env=environment, **options,
        )  # fmt: skip

    def json(self, *arguments):
        done = self.run(*arguments, "--format", "json")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return json.loads(done.stdout)

    def close(self):
        stopped = self.run("stop")
        assert stopped.returncode == 0, stopped.stderr


@pytest.fixture(scope="module")
def host(leftovers):
    with checked_home(leftovers) as folder:
        made = Host(folder, "127.0.0.1:0")
        try:
            started = made.run("serve", "--detach")
            assert started.returncode == 0, started.stderr
            yield made
        finally:
            made.close()


def test_a_service_that_runs_is_not_started_twice(host):
    again = host.run("serve", "--detach")
    assert again.returncode == 0, again.stderr
    assert "was running already" in again.stdout
    assert host.json("serve", "--detach")["pid"] == host.json("status")["pid"]


def test_status_for_people(host):
    shown = host.run("status").stdout
    for part in ("service", "accelerator", "partitions", "api.sock", host.folder):
        assert part in shown


def test_disks_partitions_and_files_that_define_them(host):
    host.run("disk", "create", "base", "--size", "64M")
    made = host.json("partition", "create", "web", "--memory", "128M", "--disk", "web,parent=base")
    assert (made["state"], made["definition"]["disks"][0]["id"]) == ("stopped", "disk0")
    disk = host.json("disk", "show", "web")
    assert [os.path.basename(file["path"]) for file in disk["chain"]] == ["web.vhd", "base.vhd"]
    assert disk["size_bytes"] == 64 * 1024**2
    assert {view["name"] for view in host.json("disk", "list")} >= {"base", "web"}

    taken = host.run("partition", "create", "web", "--disk", "other,size=1G")
    assert taken.returncode == 4
    assert "web" in taken.stderr
    assert host.run("disk", "show", "other").returncode == 3

    definition = 'name = "web"\nmemory = "256M"\ndisks = [{ path = "web" }]\n'
    changed = host.run("apply", "-f", "-", input=definition)
    assert changed.stdout == "web: updated\n  memory_bytes: 128 MiB → 256 MiB\n", changed.stderr
    assert host.run("apply", "-f", "-", input=definition).stdout == "web: unchanged\n"
    wrong = host.run("apply", "-f", "-", input=definition.replace("256M", "1K"))
    assert wrong.returncode == 5
    assert "memory" in wrong.stderr

    completed = host.run(
        env={"_MULLION_COMPLETE": "bash_complete", "COMP_WORDS": "mullion partition show w", "COMP_CWORD": "3"}
    )
    assert (completed.stdout, completed.stderr) == ("plain,web\n", "")

    assert host.run("partition", "delete", "web", "--with-disks").returncode == 2
    gone = host.run("partition", "delete", "web", "--with-disks", "--yes")
    assert gone.returncode == 0, gone.stderr
    assert host.run("disk", "show", "web").returncode == 3
    assert host.run("disk", "show", "base").returncode == 0
    kinds = [json.loads(line)["kind"] for line in host.run("events", "--format", "json").stdout.splitlines()]
    assert [kind for kind in kinds if kind.startswith("partition.")] == [
        "partition.created", "partition.updated", "partition.deleted"
    ]  # fmt: skip


def test_a_new_disk_goes_when_the_service_refuses_the_partition(host):
    refused = host.run("partition", "create", "old", "--disk", "fresh,size=64M,bus=ide")
    assert refused.returncode == 5
    assert "deleted disk" in refused.stderr
    assert "which machine q35 does not have" in refused.stderr
    assert host.run("disk", "show", "fresh").returncode == 3
    assert host.run("partition", "show", "old").returncode == 3


def test_a_damaged_disk_ends_in_its_own_exit_code(host):
    path = os.path.join(host.folder, "torn.vhd")
    with open(path, "wb") as file:
        file.write(b"x" * 4096)
    failed = host.run("disk", "show", path, "--format", "json")
    assert failed.returncode == 8
    assert json.loads(failed.stderr)["code"] == "not-a-vhd"


def test_over_tcp_with_the_token(host):
    url, token = host.json("status")["api_url"], os.path.join(host.folder, "data", "token")
    assert host.json("status", "--url", url, "--token-file", token)["api_url"] == url
    with open(os.path.join(host.folder, "wrong"), "w") as file:
        file.write("wrong")
    assert host.run("status", "--url", url, "--token-file", file.name).returncode == 12


def test_a_service_that_cannot_start_says_why(short_tmp):
    other = Host(short_tmp, "none")
    try:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            failed = other.run("serve", "--detach", "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
        assert failed.returncode == 4
        assert "the service did not start: another program listens on 127.0.0.1:" in failed.stderr
    finally:
        other.close()


def test_stop_ends_the_service_and_the_foreground_one_is_the_same_process(short_tmp):
    other = Host(short_tmp, "none")
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "mullion.cli", "serve"], env=other.environment, stderr=subprocess.DEVNULL
        )
        pid = other.json("serve", "--detach")["pid"]  # waits for it, or finds it
        if pid != process.pid:  # ours came second and gave way
            assert process.wait(60) == 4
        identity = ProcessIdentity.of(pid)
        assert other.run("stop", "--with-partitions").stdout == "the service has ended\n"
        process.wait(60)
        assert identity is not None
        assert not identity.is_alive
        assert other.run("stop").stdout == "the service does not run\n"
    finally:
        other.close()
