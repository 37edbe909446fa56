"""The compiled twin of the hot loop does what the module in Python does: the same hostile guest before both, in step."""

from __future__ import annotations

import random

import pytest
from tests.fuzz.hostile_guest import RingAttack

from mullion.base.implementation import TWINS, choose

pytestmark = pytest.mark.fuzz

CASES = 6_000


def test_the_same_attack_has_the_same_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outcome, the guest's whole memory, the disk and what it was asked for, after each step.

    After a request that broke the ring both begin anew: how much of it had been moved before is not promised.
    """
    (name,) = TWINS
    loops = [choose(name, wanted).module.HotLoop for wanted in ("python", "compiled")]
    pair = [RingAttack(random.Random(7)) for _loop in loops]
    moved = 0
    try:
        for case in range(CASES):
            outcomes = []
            for loop, attack in zip(loops, pair, strict=True):
                monkeypatch.setattr("mullion.provider.ring.HotLoop", loop)
                outcomes.append(attack.case())
            assert outcomes[0] == outcomes[1], f"case {case}"
            sides = [attack._side for attack in pair]
            assert sides[0] is not None
            assert sides[1] is not None
            if outcomes[0] == "broken":
                for attack in pair:
                    attack._age = attack.LIFE
                continue
            assert sides[0].memory == sides[1].memory, f"case {case}"
            assert sides[0].ring.next_index == sides[1].ring.next_index
            assert sides[0].ring.requests == sides[1].ring.requests
            assert sides[0].ring.bytes == sides[1].ring.bytes
            size_bytes = sides[0].disk.size_bytes
            assert sides[0].disk.content(0, size_bytes) == sides[1].disk.content(0, size_bytes), f"case {case}"
            moved += sides[0].ring.bytes > 0
    finally:
        for attack in pair:
            attack.close()
    assert moved > CASES // 100, "the attack does not get far"
