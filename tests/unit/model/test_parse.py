"""Definitions from TOML and JSON: what is taken, and what is said of what is not."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mullion.base.errors import InvalidError
from mullion.model.definition import (
    Accelerator,
    Bus,
    DirectBoot,
    DiskAttachment,
    DiskLimits,
    Firmware,
    Machine,
    PartitionDefinition,
    PowerState,
    Transport,
)
from mullion.model.parse import complete, explain, find_problems, parse_document, parse_partition, to_toml

pytestmark = pytest.mark.unit
MIB = 1024 * 1024

WEB = """
kind = "partition"
name = "web"
description = "the shop"
vcpus = 2
memory = "1.5G"
firmware = "uefi"

[[disks]]
path = "web.vhd"

[[disks]]
id = "data"
path = "/srv/data.vhd"
bus = "sata"
read_only = true

[[disks]]
path = "third.vhd"

[labels]
team = "shop"
"""


def parse(text: str) -> PartitionDefinition:
    return parse_partition(text.encode(), source="web.toml")


def refused(text: str) -> InvalidError:
    with pytest.raises(InvalidError) as caught:
        parse(text)
    assert caught.value.message.startswith("web.toml")
    assert caught.value.remedy
    return caught.value


def test_people_s_document() -> None:
    assert parse(WEB) == PartitionDefinition(
        name="web",
        description="the shop",
        vcpus=2,
        memory_bytes=1536 * MIB,
        firmware=Firmware.UEFI,
        disks=(
            DiskAttachment("web.vhd", "disk0"),
            DiskAttachment("/srv/data.vhd", "data", Bus.SATA, True),
            DiskAttachment("third.vhd", "disk2"),
        ),
        labels={"team": "shop"},
    )


def test_the_least_that_is_needed() -> None:
    assert parse('name = "web"') == PartitionDefinition(name="web")


def test_json_and_mappings_are_taken_too() -> None:
    fields = {"name": "web", "memory_bytes": 64 * MIB, "disks": [{"path": "a.vhd"}]}
    wanted = PartitionDefinition(name="web", memory_bytes=64 * MIB, disks=(DiskAttachment("a.vhd", "disk0"),))
    assert parse_partition(json.dumps(fields).encode(), source="x", format="json") == wanted
    assert parse_partition(fields, source="x") == wanted
    assert "kind" not in fields
    assert fields["disks"] == [{"path": "a.vhd"}], "the caller's mapping was changed"


def test_caps_of_disks() -> None:
    text = """
name = "web"
[disk_limits]
bytes_per_s = "50M"
[[disks]]
path = "a.vhd"
[disks.limits]
iops = 500
iops_burst = 2000
burst_s = 10
[[disks]]
path = "b.vhd"
[disks.limits]
iops = 0
"""
    found = parse(text)
    assert found.disk_limits == DiskLimits(bytes_per_s=50 * MIB)
    assert found.disks[0].limits == DiskLimits(iops=500, iops_burst=2000, burst_s=10)
    assert found.disks[1].limits is None, "what limits nothing is nothing"


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ('bytes_per_s = "fast"', r"disks\[0\]\.limits\.bytes_per_s"),
        ("iops = -1", r"disks\[0\]\.limits\.iops"),
        ("iops_burst = 5", r"disks\[0\]\.limits\.iops_burst"),
        ("iops = 9\niops_burst = 9", r"disks\[0\]\.limits\.iops_burst"),
        ("ops = 1", r"disks\[0\]\.limits\.ops"),
    ],
)
def test_wrong_caps_are_named(limits: str, named: str) -> None:
    with pytest.raises(InvalidError, match=named):
        parse(f'name = "web"\n[[disks]]\npath = "a.vhd"\n[disks.limits]\n{limits}\n')


def test_an_apply_document_has_several() -> None:
    text = b'kind = "apply"\n[[partition]]\nname = "web"\n[[partition]]\nname = "db"\nmemory = "64M"\n'
    assert [one.name for one in parse_document(text, source="all.toml")] == ["web", "db"]
    assert [one.name for one in parse_document(text.partition(b"\n")[2], source="all.toml")] == ["web", "db"]
    assert parse_document(b'kind = "apply"', source="all.toml") == ()
    with pytest.raises(InvalidError, match="2 partitions where one is expected"):
        parse_partition(text, source="all.toml")
    with pytest.raises(InvalidError, match="'web' is used twice"):
        parse_document(text.replace(b"db", b"web"), source="all.toml")
    with pytest.raises(InvalidError, match=r"partition\[1\]\.vcpus is 0"):
        parse_document(text + b"vcpus = 0\n", source="all.toml")
    with pytest.raises(InvalidError, match="disk is not a field"):
        parse_document(text.replace(b'"apply"', b'"apply"\ndisk = 1'), source="all.toml")


@pytest.mark.parametrize(
    ("text", "message", "allowed"),
    [
        ('name = "web"\nmemroy = "1G"', "memroy is not a field; did you mean 'memory'?", "memory, memory_bytes"),
        (
            'name = "web"\n[[disks]]\npaht = "x"',
            "disks[0].paht is not a field; did you mean 'path'?",
            "bus, id, limits, path",
        ),
        ('name = "web"\nzzz = 1', "zzz is not a field", "accelerator"),
        ("vcpus = 1", "name is missing", "lower-case letters"),
        ('name = "Web"', "name is 'Web'", "lower-case letters"),
        ('name = "web\\n"', "name is 'web\\n'", "lower-case letters"),
        ('name = "web"\nvcpus = 0', "vcpus is 0", "from 1 to 255"),
        ('name = "web"\nvcpus = 256', "vcpus is 256", "from 1 to 255"),
        ('name = "web"\nvcpus = "two"', "vcpus is 'two'", "a whole number from 1 to 255"),
        ('name = "web"\nvcpus = true', "vcpus is True", "a whole number"),
        ('name = "web"\nvcpus = 1.5', "vcpus is 1.5", "a whole number"),
        ('name = "web"\nmemory = "1.5"', "memory '1.5' is not a whole number", "512M"),
        ('name = "web"\nmemory = "lots"', "memory 'lots' is not a size", "512M"),
        ('name = "web"\nmemory = "1M"', "memory_bytes is 1048576", "of bytes from 16 MiB to 16 TiB"),
        ('name = "web"\nmemory_bytes = 99999999', "memory_bytes is 99999999", "a multiple of 1 MiB; or memory"),
        ('name = "web"\nmemory = "1G"\nmemory_bytes = 1073741824', "memory is given twice", "one of them"),
        ('name = "web"\nfirmware = "efi"', "firmware is 'efi'", "'bios', 'uefi'"),
        ('name = "web"\n[[disks]]\npath = "a"\nbus = "scsi"', "disks[0].bus is 'scsi'", "'virtio', 'sata', 'ide'"),
        ('name = "web"\n[[disks]]\npath = ""', "disks[0].path is ''", "1 to 4096 characters"),
        ('name = "web"\n[[disks]]\nbus = "ide"', "disks[0].path is missing", "a text"),
        ('name = "web"\ndisks = "a.vhd"', "disks is 'a.vhd'", "a list"),
        ('name = "web"\ndisks = ["a.vhd"]', "disks[0] is 'a.vhd'", "a table of fields"),
        ('name = "web"\n[labels]\nteam = 1', "labels.team is 1", "a text"),
        ('name = "web"\nlabels = 1', "labels is 1", "a table"),
        ('name = "web"\n[direct_boot]\nkernel = "vmlinuz"', "direct_boot.kernel is 'vmlinuz'", "^/"),
        ('name = "web"\nuuid = "123"', "uuid is '123'", "a UUID"),
        ('name = "web"\npower = "on"', "power is 'on'", "'running', 'paused', 'stopped'"),
        ('name = "web"\n[[disks]]\nid = "a"\npath = "x"\n[[disks]]\nid = "a"\npath = "y"', "disks[1].id is 'a'", "own"),
        ('name = "web"\n[[disks]]\npath = "x"\n[[disks]]\nid = "disk0"\npath = "y"', "disks[1].id is 'disk0'", "own"),
        ('name = "web"\n[[disks]]\npath = "x"\n[[disks]]\npath = "x"', "disks[1].path is 'x'", "one disk per file"),
        ('kind = "disk"\nname = "web"', "kind is 'disk'", "'partition', 'apply'"),
        ("name = 1 2", "not TOML", "line 1"),
        ('name = "web"\npartition = 1', "partition is not a field", "power"),
        ("partition = 1", "partition is not a list of tables", "[[partition]]"),
        ('name = "web"\n[[disks]]\npath = "a\\u0000b"', "disks[0].path holds a NUL", "without"),
        ('name = "web"\n[[disks]]\npath = "a"\nid = "A"', "disks[0].id is 'A'", "a lower-case letter"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(text: str, message: str, allowed: str) -> None:
    error = refused(text)
    assert message in error.message
    assert allowed in error.remedy or allowed in error.message


def test_all_that_is_wrong_is_said_at_once() -> None:
    error = refused('name = "Web"\nvcpus = 0\nfirmware = "efi"\nmemroy = 1')
    assert all(field in error.message for field in ("name", "vcpus", "firmware", "memroy"))
    assert error.context["field"] in ("name", "memroy")


def test_a_long_list_of_faults_is_cut_short() -> None:
    error = refused('name = "web"\n' + "\n".join(f"field{number} = 1" for number in range(50)))
    assert "and 42 more" in error.message
    assert len(error.message) < 1000


def test_one_file_may_be_read_through_two_disks() -> None:
    disk = '[[disks]]\npath = "x"\nread_only = true\n'
    assert len(parse(f'name = "web"\n{disk}{disk}').disks) == 2


@pytest.mark.parametrize("data", [b"\xff\xfe", b"[" * 100_000, b"[1]", b'"x"', b"null", b"{", b""])
def test_foreign_bytes_are_refused_plainly(data: bytes) -> None:
    with pytest.raises(InvalidError):
        parse_partition(data, source="x", format="json")


def test_explain_says_what_msgspec_would_not_take() -> None:
    assert explain(b'{"name":"web"}', PartitionDefinition, source="the request") is None
    error = explain(b'{"name":"web","vcpus":0}', PartitionDefinition, source="the request")
    assert error is not None
    assert error.message == "the request: vcpus is 0"
    assert explain(b"{", PartitionDefinition, source="the request") is not None


def test_explain_knows_the_types_of_other_requests() -> None:
    class Inner(msgspec.Struct, forbid_unknown_fields=True):
        type: Literal["dynamic", "fixed"] = "dynamic"
        size: Annotated[float, msgspec.Meta(ge=0, le=3600)] | None = None
        when: datetime | None = None
        file_bytes: Annotated[int, msgspec.Meta(ge=512, le=2040 * 1024**3)] | None = None
        count: Annotated[int, msgspec.Meta(ge=1, le=2190433320960)] | None = None

    for body, message, allowed in (
        (b'{"type":"differencing"}', "type is 'differencing'", "'dynamic', 'fixed'"),
        (b'{"size":-1}', "size is -1", "a number from 0 to 3600"),
        (b'{"size":"x"}', "size is 'x'", "a number from 0 to 3600"),
        (b'{"file_bytes":1}', "file_bytes is 1", "a whole number of bytes from 512 bytes to 2040 GiB"),
        (b'{"count":0}', "count is 0", "a whole number from 1 to 2190433320960"),
        (b"[]", "a list", "a table of fields"),
    ):
        error = explain(body, Inner | None, source="the request")
        assert error is not None
        assert message in error.message
        assert allowed in error.remedy
    for body in (b"null", b"{}", b'{"type":"fixed","size":1}', b'{"when":"no date"}'):
        assert explain(body, Inner | None, source="the request") is None


def test_complete_gives_ids_and_refuses_what_types_cannot_say() -> None:
    definition = PartitionDefinition(name="web", disks=(DiskAttachment("a"), DiskAttachment("b", "x")))
    assert [disk.id for disk in complete(definition).disks] == ["disk0", "x"]
    with pytest.raises(InvalidError, match=r"disks\[1\]\.path"):
        complete(PartitionDefinition(name="web", disks=(DiskAttachment("a"), DiskAttachment("a"))))


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)
files = texts.map(lambda text: f"/{text}")
LIMITS = st.one_of(
    st.none(),
    st.builds(
        DiskLimits,
        iops=st.integers(1, 1000),
        bytes_per_s=st.integers(1, 1 << 30),
        iops_burst=st.just(0) | st.integers(1001, 1 << 50),
        write_bytes_per_s=st.integers(0, 1 << 50),
        read_iops=st.integers(0, 1 << 50),
        burst_s=st.floats(0.001, 3600),
    ),
)
DISK_FIELDS: dict[str, st.SearchStrategy[object]] = {
    "path": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20),
    "id": st.from_regex(r"[a-z][a-z0-9-]{0,15}", fullmatch=True),
    "bus": st.sampled_from(Bus),
    "read_only": st.booleans(),
    "transport": st.sampled_from(Transport),
    "limits": LIMITS,
}
BOOT_FIELDS: dict[str, st.SearchStrategy[object]] = {
    "kernel": files,
    "initrd": st.one_of(st.none(), files),
    "command_line": texts,
}
FIELDS: dict[str, st.SearchStrategy[object]] = {
    "name": names,
    "description": texts,
    "uuid": st.one_of(st.just(""), st.uuids().map(str)),
    "vcpus": st.integers(1, 255),
    "memory_bytes": st.integers(16, 1 << 24).map(lambda mib: mib * MIB),
    "machine": st.sampled_from(Machine),
    "firmware": st.sampled_from(Firmware),
    "tpm": st.booleans(),
    "accelerator": st.sampled_from(Accelerator),
    "disks": st.lists(
        st.builds(DiskAttachment, **DISK_FIELDS),
        max_size=4,
        unique_by=(lambda disk: disk.path, lambda disk: disk.id),
    ).map(tuple),
    "disk_limits": LIMITS,
    "direct_boot": st.one_of(st.none(), st.builds(DirectBoot, **BOOT_FIELDS)),
    "power": st.sampled_from(PowerState),
    "shutdown_timeout_s": st.integers(0, 3600),
    "labels": st.dictionaries(texts, texts, max_size=3),
}
definitions = st.builds(PartitionDefinition, **FIELDS)


@pytest.mark.parametrize(
    ("kind", "fields"), [(PartitionDefinition, FIELDS), (DiskAttachment, DISK_FIELDS), (DirectBoot, BOOT_FIELDS)]
)
def test_the_round_trip_below_tries_every_field(kind: type[msgspec.Struct], fields: dict[str, object]) -> None:
    assert set(kind.__struct_fields__) == set(fields)


@given(definitions)
@settings(max_examples=100, deadline=None)
def test_to_toml_and_back(definition: PartitionDefinition) -> None:
    assert parse_partition(to_toml(definition).encode(), source="x") == definition


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(
        st.sampled_from([*PartitionDefinition.__struct_fields__, "zzz"]), values, min_size=1, max_size=4
    ).map(lambda fields: {"name": "web", **fields})
)
@settings(max_examples=200, deadline=None)
def test_our_verdict_is_msgspec_s(fields: dict[str, object]) -> None:
    """A fault is found exactly when msgspec finds one: no field is refused, or let through, by mistake."""
    problems = find_problems(fields, PartitionDefinition)
    try:
        msgspec.convert(fields, PartitionDefinition)
    except msgspec.ValidationError:
        assert problems
    else:
        assert not problems
