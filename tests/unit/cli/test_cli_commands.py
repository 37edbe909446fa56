"""The commands against a service in memory: what they ask, what they print, how they end."""

import json
import os
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner
from tests.unit.cli.fake_client import POOL, FakeClient

from mullion.base.errors import DeniedError, MullionError, OperationFailedError, UnavailableError
from mullion.base.units import GIB, MIB
from mullion.cli.face import Face
from mullion.cli.lazy import LazyGroup
from mullion.cli.root import ENTRIES, root
from mullion.model.definition import PartitionDefinition
from mullion.model.states import PartitionState

pytestmark = pytest.mark.unit


@pytest.fixture
def service():
    return FakeClient()


@pytest.fixture
def mullion(service, monkeypatch):
    monkeypatch.setenv("MULLION_HOME", "/nonexistent")

    def call(*arguments, **options):
        return CliRunner().invoke(root, list(arguments), obj=Face(connect=lambda _: service), **options)

    return call


def asked(service, method):
    return [detail for name, detail in service.asked if name == method]


def test_the_table_of_commands_says_what_the_commands_say():
    ctx = click.Context(root)
    assert isinstance(root, LazyGroup)
    for name, entry in ENTRIES.items():
        command = root.get_command(ctx, name)
        assert command is not None
        assert command.name == name
        assert command.get_short_help_str(200) == entry.help
        assert (command.help or "").splitlines()[0] in (entry.help, "")


def test_every_command_and_option_has_help():
    def walk(ctx):
        assert ctx.command.help, ctx.command_path
        for param in ctx.command.params:
            if isinstance(param, click.Option):
                assert param.help, f"{ctx.command_path} {param.name}"
        if isinstance(ctx.command, click.Group):
            for name in ctx.command.list_commands(ctx):
                walk(click.Context(ctx.command.get_command(ctx, name), info_name=name, parent=ctx))

    walk(click.Context(root, info_name="mullion"))


def test_create_list_show_stop_delete(mullion, service):
    made = mullion("partition", "create", "web", "--memory", "1G", "--vcpus", "2", "--disk", "web,size=40G")
    assert made.exit_code == 0, made.stderr
    assert asked(service, "create_disk") == [("web", 40 * GIB, "dynamic", None, None)]
    definition = asked(service, "create_partition")[0]
    assert (definition.vcpus, definition.memory_bytes, definition.disks[0].path) == (2, GIB, "web")
    assert "mullion partition start web" in made.stderr

    assert mullion("partition", "start", "web").exit_code == 0
    listed = mullion("partition", "list")
    assert listed.stdout.splitlines()[0].split() == ["NAME", "STATE", "VCPUS", "MEMORY", "ACCEL", "AGENT", "NOTE"]
    assert listed.stdout.splitlines()[1].split() == ["web", "running", "2", "1", "GiB", "tcg", "answers", "-"]
    shown = mullion("partition", "show", "web").stdout
    assert "tcg: KVM cannot run a guest here" in shown
    assert f"{POOL}/web.vhd" in shown

    stopped = mullion("partition", "stop", "web", "--timeout", "5")
    assert stopped.exit_code == 0
    assert stopped.stdout == ""
    assert stopped.stderr.splitlines()[-1] == "web: stopped"
    assert asked(service, "stop") == [{"timeout_s": 5}]
    assert mullion("partition", "delete", "web", "--yes", "--with-disks").exit_code == 0
    assert asked(service, "delete_partition") == [True]
    assert mullion("partition", "list").stdout == ""


def test_json_is_the_view_whole_and_alone(mullion):
    made = mullion("partition", "create", "web", "--start", "--format", "json")
    assert made.stderr == ""
    view = json.loads(made.stdout)
    assert (view["name"], view["state"], view["definition"]["memory_bytes"]) == ("web", "running", 512 * MIB)
    assert [v["name"] for v in json.loads(mullion("--format", "json", "partition", "list").stdout)] == ["web"]
    operation = json.loads(mullion("partition", "--format", "json", "pause", "web").stdout)
    assert (operation["kind"], operation["state"]) == ("partition.pause", "succeeded")


def test_a_new_disk_is_deleted_again_when_the_partition_cannot_be_created(mullion, service):
    service.faults["create_partition"] = DeniedError("you may not create partitions")
    failed = mullion("partition", "create", "web", "--disk", "web,parent=image:demo", "--disk", "data,size=1G")
    assert failed.exit_code == DeniedError.exit_code
    assert asked(service, "create_disk") == [
        ("web", None, "dynamic", "image:demo", None),
        ("data", GIB, "dynamic", None, None),
    ]
    assert asked(service, "delete_disk") == [f"{POOL}/data.vhd", f"{POOL}/web.vhd"]
    assert "mullion: you may not create partitions" in failed.stderr


def test_an_existing_disk_is_used_and_survives_a_failure(mullion, service):
    service.create_disk(path="web", size_bytes=GIB)
    service.faults["create_partition"] = DeniedError("you may not create partitions")
    failed = mullion("partition", "create", "web", "--disk", "web,size=40G")
    assert "disk web exists and is used as it is" in failed.stderr
    assert asked(service, "delete_disk") == []
    assert service.disk("web").size_bytes == GIB


def test_a_taken_name_creates_no_disk(mullion, service):
    mullion("partition", "create", "web")
    again = mullion("partition", "create", "web", "--disk", "other,size=1G")
    assert again.exit_code == 4
    assert "there is a partition named web already" in again.stderr
    assert asked(service, "create_disk") == []


def test_errors_say_what_to_do_next_and_end_in_their_exit_code(mullion, service):
    missing = mullion("partition", "show", "nobody")
    assert missing.exit_code == 3
    assert missing.stderr == (
        "mullion: there is no partition named nobody\n  → List what exists with the noun's `list` command.\n"
    )
    service.faults["status"] = UnavailableError("the service does not answer", path="/run/mullion/api.sock")
    failed = mullion("status", "--format", "json")
    assert failed.exit_code == 7
    assert failed.stdout == ""
    assert json.loads(failed.stderr) == {
        "code": "unavailable",
        "message": "the service does not answer",
        "remedy": "Start the service with `mullion serve --detach`, then try again.",
        "context": {"path": "/run/mullion/api.sock"},
        "exit_code": 7,
    }


def test_an_error_of_a_kind_that_only_the_service_knows_keeps_its_code(mullion, service):
    fields = {"code": "vhd-x", "message": "torn", "remedy": "Restore it.", "context": {"offset": 512}, "exit_code": 8}
    service.faults["disk"] = MullionError.from_wire(fields)
    failed = mullion("disk", "show", "web", "--format", "json")
    assert failed.exit_code == 8
    assert json.loads(failed.stderr) == fields
    assert mullion("disk", "show", "web").stderr == "mullion: torn\n  → Restore it.\n"


def test_remedies_name_the_program_as_it_was_called(service):
    service.faults["status"] = UnavailableError(
        "mullion does not answer", remedy="Run `mullion serve`, or: mullion doctor; not /x/mullion serve."
    )
    face = Face(connect=lambda _: service, invoked=".venv/bin/mullion")
    failed = CliRunner().invoke(root, ["status"], obj=face)
    assert failed.stderr == (
        "mullion: mullion does not answer\n"
        "  → Run `.venv/bin/mullion serve`, or: .venv/bin/mullion doctor; not /x/mullion serve.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message", "remedy"),
    [
        (["frobnicate"], "no such command 'frobnicate'", "mullion --help"),
        (["partition", "frobnicate"], "no such command 'frobnicate'", "mullion partition --help"),
        (["partition", "show"], "missing argument 'NAME'", "mullion partition show --help"),
        (["partition", "create", "web", "--memory", "lots"], "'lots' is not a size", "create --help"),
        (["partition", "create", "web", "--disk", "a,b=c"], "'b=c' is not a part of a disk", "create --help"),
        (["partition", "create", "web", "--append", "quiet"], "need --kernel", "create --help"),
        (["partition", "stop", "web", "--force", "--timeout", "3"], "exclude each other", "stop --help"),
        (["partition", "delete", "web"], "say --yes", "delete --help"),
        (["disk", "create", "web"], "missing option '--size'", "create --help"),
        (["backup", "restore", "4f", "--disk", "disk0", "--to", "x", "--as", "web"], "leave it out", "restore --help"),
        (["backup", "schedule", "set", "web", "a b", "--every", "1h"], "a letter or digit first", "set --help"),
        (["--format", "xml", "status"], "'xml' is not one of", "mullion --help"),
    ],
)
def test_wrong_usage_is_explained_and_ends_in_2(mullion, service, arguments, message, remedy):
    service.create_partition(PartitionDefinition("web"))
    wrong = mullion(*arguments)
    assert wrong.exit_code == 2
    assert wrong.stdout == ""
    first, second = wrong.stderr.splitlines()
    assert first.startswith("mullion: ")
    assert message in first
    assert remedy in second
    as_json = mullion(*arguments, "--format", "json") if "xml" not in arguments else None
    if as_json is not None:
        assert json.loads(as_json.stderr)["code"] == "usage"


@pytest.mark.parametrize(("arguments", "listed"), [([], "partition"), (["partition"], "console")])
def test_without_a_command_the_commands_are_listed(mullion, arguments, listed):
    told = mullion(*arguments)
    assert (told.exit_code, told.stdout) == (2, "")
    assert told.stderr.startswith("Usage: mullion")
    assert f"\n  {listed} " in told.stderr


def test_the_version(mullion):
    assert mullion("--version").stdout == mullion("version").stdout
    assert mullion("version").stdout.startswith("mullion 0.")
    told = json.loads(mullion("version", "--format", "json").stdout)
    assert set(told) == {"version", "python", "implementation"}


def test_no_wait_prints_the_operation_and_returns(mullion, service):
    mullion("partition", "create", "web")
    begun = mullion("partition", "start", "web", "--no-wait")
    assert begun.stdout == "op-1\n"
    assert "mullion operation show op-1" in begun.stderr
    assert asked(service, "wait") == []
    assert mullion("operation", "list").stdout.splitlines()[1].split()[:4] == [
        "op-1",
        "partition.start",
        "partition/web",
        "pending",
    ]


def test_progress_is_one_line_per_stage_and_quiet_has_none(mullion):
    mullion("partition", "create", "web")
    told = mullion("partition", "start", "web").stderr.splitlines()
    assert told == ["partition start web: preparing", "partition start web: finishing", "web: running, tcg"]
    assert mullion("partition", "pause", "web", "--quiet").stderr == ""


def test_interrupt_cancels_what_can_be_cancelled(mullion, service):
    mullion("partition", "create", "web")
    service.faults["wait"] = KeyboardInterrupt()
    interrupted = mullion("partition", "start", "web")
    assert interrupted.exit_code == 130
    assert asked(service, "cancel") == ["op-1"]
    assert "operation op-1 was cancelled" in interrupted.stderr
    assert service.partition("web").state is PartitionState.STOPPED


def test_a_failed_operation_fails_the_command(mullion, service):
    mullion("partition", "create", "web")
    service.faults["wait"] = OperationFailedError("QEMU ended with exit status 1")
    failed = mullion("partition", "start", "web")
    assert failed.exit_code == 14
    assert "mullion: QEMU ended with exit status 1" in failed.stderr


def test_events_are_lines_that_can_be_resumed(mullion):
    lines = mullion("events", "--after", "1").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["2", "3"]
    assert "\x1b" not in "".join(lines)
    objects = [json.loads(line) for line in mullion("events", "--format", "json").stdout.splitlines()]
    assert [event["cursor"] for event in objects] == [1, 2, 3]


def test_disks_and_images(mullion, service):
    shown = mullion("disk", "create", "web", "--parent", "image:demo")
    assert "differencing" in shown.stdout
    assert "/var/lib/mullion/images/demo.vhd" in shown.stdout
    assert mullion("disk", "list").stdout.splitlines()[1].split()[:2] == ["web", "differencing"]
    assert mullion("disk", "create", "web", "--size", "1G", "--parent", "x", "--type", "fixed").exit_code == 5
    assert "mullion image build demo" in mullion("image", "list").stderr
    assert mullion("image", "build", "demo").stderr.splitlines()[-1] == "demo: built"
    assert mullion("image", "list").stdout.splitlines()[1].startswith("demo")


def test_the_demo_creates_what_is_missing_and_may_be_repeated(mullion, service):
    first = mullion("demo")
    assert first.exit_code == 0, first.stderr
    assert asked(service, "build_image") == ["demo"]
    assert asked(service, "create_disk") == [("demo", None, "dynamic", "image:demo", None)]
    for expected in ("demo is running", "tcg: KVM cannot", "3.2 s", "http://127.0.0.1:8440", "partition console demo"):
        assert expected in first.stdout
    second = mullion("demo", "--format", "json")
    assert json.loads(second.stdout)["partition"]["state"] == "running"
    assert len(asked(service, "build_image")) == len(asked(service, "create_disk")) == len(asked(service, "start")) == 1
    mullion("partition", "pause", "demo")
    assert mullion("demo").exit_code == 0
    assert asked(service, "resume") == [{}]


def test_the_connection_is_closed_whatever_happens(mullion, service):
    mullion("partition", "show", "nobody")
    assert service.closed


def test_names_are_completed_and_errors_are_not_shown(service, monkeypatch):
    from click.shell_completion import ShellComplete

    def completions(words, incomplete):
        made = ShellComplete(root, {"obj": Face(connect=lambda _: service)}, "mullion", "_MULLION_COMPLETE")
        return [item.value for item in made.get_completions(words, incomplete)]

    service.create_partition(PartitionDefinition("web"))
    assert completions(["partition", "start"], "w") == ["web"]
    assert completions(["partition", "start"], "x") == []
    assert "partition" in completions([], "")
    assert "--memory" in completions(["partition", "create"], "--m")
    made = SimpleNamespace(name="nightly", rule="daily 02:30", created_at="")
    monkeypatch.setattr(service, "checkpoints", lambda _: SimpleNamespace(checkpoints=(made,)), raising=False)
    for kind in ("checkpoint", "backup"):
        monkeypatch.setattr(service, f"{kind}_schedules", lambda _: (made,), raising=False)
        assert completions([kind, "schedule", "remove", "web"], "n") == ["nightly"]
    offered = [SimpleNamespace(id=f"of-{name}", partition=name, disks=()) for name in ("web", "mail")]
    monkeypatch.setattr(service, "exports", lambda: offered, raising=False)
    assert completions(["checkpoint", "unexport", "web"], "") == ["of-web"]
    assert completions(["checkpoint", "export", "web", "x", "--since"], "n") == ["nightly"]
    service.faults["partitions"] = UnavailableError("the service does not answer")
    assert completions(["partition", "start"], "w") == []


def test_a_folder_of_certificates_is_named_by_its_absolute_path(mullion, service, monkeypatch):
    told = []
    monkeypatch.setattr(service, "export_checkpoint", lambda *_, **how: told.append(how["tls"]), raising=False)
    mullion("checkpoint", "export", "web", "x", "--listen", "h:1", "--tls", "certificates", "--format", "json")
    assert told == [os.path.abspath("certificates")]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(mullion, shell):
    script = mullion("completion", shell)
    assert script.exit_code == 0
    assert "_MULLION_COMPLETE" in script.stdout


def test_an_internal_fault_shows_its_trace_and_asks_for_a_report(mullion, service):
    service.faults["status"] = ZeroDivisionError("division by zero")
    failed = mullion("status")
    assert failed.exit_code == 1
    assert "ZeroDivisionError" in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("  → This is a fault in Mullion")
