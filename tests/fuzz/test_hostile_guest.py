"""Some thousand cases of each kind of attack; millions are a run by hand (`hostile_guest.py`)."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from tests.fuzz.hostile_guest import ATTACKS, attack

pytestmark = [pytest.mark.fuzz, pytest.mark.usefixtures("each_implementation")]

CASES = 20_000


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """A line for every broken ring would be most of the work."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("kind", sorted(ATTACKS))
def test_no_case_ends_in_anything_but_an_answer_or_a_refusal(kind: str) -> None:
    outcomes = attack(kind, CASES, seed=1)
    assert outcomes.total() == CASES
    assert len(outcomes) > 1, "only one kind of end: the attack does not get far"
