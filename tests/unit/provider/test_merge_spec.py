"""What a merge worker may be told."""

from __future__ import annotations

import pytest

from mullion.base.errors import InvalidError
from mullion.base.units import MIB
from mullion.provider.merge_spec import MergeSpec

pytestmark = pytest.mark.unit

SPEC = MergeSpec("web", "/d/u", "/d/l", "/r/control", "/r/pid", "/r/result", "/d/log", 7, 7, MIB, 1 << 40)


def test_it_comes_back_from_the_wire() -> None:
    assert MergeSpec.from_fields(SPEC.to_wire()) == SPEC
    plain = {name: value for name, value in SPEC.to_wire().items() if isinstance(value, str)}
    assert MergeSpec.from_fields(plain).uid is None


@pytest.mark.parametrize(
    "change",
    [
        {"upper": None},
        {"lower": "relative"},
        {"log": "/a\0b"},
        {"result": "/" + "x" * 5000},
        {"control": "/" + "x" * 108},
        {"partition": ""},
        {"uid": -1},
        {"gid": True},
        {"bytes_per_s": None},
        {"bytes_per_s": 1},
        {"below_bytes": "much"},
        {"surprise": 1},
    ],
)
def test_refused(change: dict[str, object]) -> None:
    with pytest.raises(InvalidError):
        MergeSpec.from_fields({**SPEC.to_wire(), **change})
