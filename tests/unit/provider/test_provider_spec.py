"""The provider's specification: what it takes, and what its refusals say."""

from __future__ import annotations

import json

import pytest

from mullion.base.errors import InvalidError
from mullion.provider.spec import DiskSpec, ProviderSpec

pytestmark = pytest.mark.unit

SPEC = ProviderSpec(
    "web", (DiskSpec("d0", ("/d/top.vhd", "/d/base.vhd"), vhost_user="/r/d0.vhost"),), "/r/control", "/l/log", uid=7
)


def test_round_trip() -> None:
    assert ProviderSpec.from_json(json.dumps(SPEC.to_wire())) == SPEC


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"colour": 1}, "colour"),
        ({"partition": ""}, "provider.partition"),
        ({"control": None}, "provider.control"),
        ({"control": "relative"}, "provider.control"),
        ({"control": "/" + "x" * 107}, "107"),
        ({"log": 5}, "provider.log"),
        ({"uid": -1}, "provider.uid"),
        ({"uid": True}, "provider.uid"),
        ({"disks": {}}, "provider.disks"),
        ({"disks": ["d0"]}, "provider.disks[0]"),
        ({"disks": [{"id": "d0", "chain": []}]}, "provider.disks[0].chain"),
        ({"disks": [{"id": "d0", "chain": ["../x"]}]}, "provider.disks[0].chain"),
        ({"disks": [{"id": "d0", "chain": ["/a\0b"]}]}, "provider.disks[0].chain"),
        ({"disks": [{"chain": ["/a"]}]}, "provider.disks[0].id"),
        ({"disks": [{"id": "d0", "chain": ["/a"], "read_only": "no"}]}, "provider.disks[0].read_only"),
        ({"disks": [{"id": "d0", "chain": ["/a"]}] * 2}, "same id"),
    ],
)
def test_refusals_name_the_field(change: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidError) as caught:
        ProviderSpec.from_fields(SPEC.to_wire() | change)
    assert named in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize("text", ["", "[]", "{", "nul"])
def test_not_a_specification(text: str) -> None:
    with pytest.raises(InvalidError):
        ProviderSpec.from_json(text)
