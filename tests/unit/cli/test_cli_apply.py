"""`mullion apply`: what a file changes, and what it leaves alone."""

import json

import pytest
from click.testing import CliRunner
from msgspec.structs import replace
from tests.unit.cli.fake_client import FakeClient

from mullion.cli.changes import adopt, changes
from mullion.cli.face import Face
from mullion.cli.root import root
from mullion.model.definition import DiskAttachment, PartitionDefinition, PowerState

pytestmark = pytest.mark.unit

TWO = """
[[partition]]
name = "web"
memory = "1G"
disks = [{ path = "web" }]

[[partition]]
name = "db"
vcpus = 2
"""


@pytest.fixture
def service():
    return FakeClient()


@pytest.fixture
def mullion(service):
    def call(*arguments, text=None):
        return CliRunner().invoke(root, list(arguments), obj=Face(connect=lambda _: service), input=text)

    return call


def test_several_are_created_then_unchanged_then_updated(mullion, service):
    assert mullion("apply", "-f", "-", text=TWO).stdout == "web: created\ndb: created\n"
    assert mullion("apply", "-f", "-", text=TWO).stdout == "web: unchanged\ndb: unchanged\n"
    changed = TWO.replace("1G", "1536M").replace("vcpus = 2", "vcpus = 4")
    tried = mullion("apply", "-f", "-", "--dry-run", text=changed)
    assert tried.stdout == (
        "web: would be updated\n  memory_bytes: 1 GiB → 1.5 GiB\ndb: would be updated\n  vcpus: 2 → 4\n"
    )
    assert "Nothing was changed" in tried.stderr
    assert service.partition("db").definition.vcpus == 2
    assert mullion("apply", "-f", "-", text=changed).stdout.splitlines()[0] == "web: updated"
    assert service.partition("db").definition.vcpus == 4


def test_json_in_and_out(mullion, tmp_path):
    path = tmp_path / "web.json"
    path.write_text(json.dumps({"name": "web", "vcpus": 3}))
    assert json.loads(mullion("apply", "-f", str(path), "--format", "json").stdout) == [
        {"name": "web", "outcome": "created", "changes": []}
    ]
    again = mullion("apply", "-f", "-", "--format", "json", text='{"name": "web"}')
    assert json.loads(again.stdout)[0]["changes"] == ["vcpus: 3 → 1"]


def test_power_is_left_alone_unless_the_file_speaks_of_it(mullion, service):
    service.create_partition(PartitionDefinition("web", power=PowerState.RUNNING, uuid="u"))
    assert mullion("apply", "-f", "-", text='name = "web"').stdout == "web: unchanged\n"
    stopped = mullion("apply", "-f", "-", text='name = "web"\npower = "stopped"')
    assert stopped.stdout == "web: updated\n  power: running → stopped\n"
    assert service.partition("web").definition.uuid == "u"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "standard input is not TOML"),
        ('{"name": }', "standard input is not JSON"),
        ('name = "Web"', "name is 'Web'"),
        ('name = "web"\nmemroy = "1G"', "memroy is not a field"),
        ("partition = []", "no partition is defined"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_asked_of_the_service(mullion, service, text, message):
    wrong = mullion("apply", "-f", "-", text=text)
    assert wrong.exit_code == 5
    assert message in wrong.stderr
    assert service.asked == []


def test_a_file_that_cannot_be_read(mullion):
    wrong = mullion("apply", "-f", "/nonexistent/web.toml")
    assert wrong.exit_code == 5
    assert "/nonexistent/web.toml cannot be read: No such file or directory" in wrong.stderr


def test_changes_of_disks_are_named_by_place():
    before = PartitionDefinition("web", disks=(DiskAttachment("a", id="disk0"),))
    after = replace(before, disks=(DiskAttachment("b", id="disk0", read_only=True), DiskAttachment("c", id="disk1")))
    lines = changes(before, after)
    assert "disks[0].path: a → b" in lines
    assert "disks[0].read_only: no → yes" in lines
    assert "disks[1].path: nothing → c" in lines
    assert changes(before, before) == []
    assert adopt(before, after, says_power=False) == before
