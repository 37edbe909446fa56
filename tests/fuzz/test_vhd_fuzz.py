"""The fuzz target on its corpus and on mutations of it, for a few seconds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.fuzz.vhd_target import check_file

pytestmark = pytest.mark.fuzz

CORPUS = sorted((Path(__file__).parent / "vhd_corpus").iterdir())
FOUND = sorted((Path(__file__).parent / "vhd_corpus_found").iterdir())
"""What atheris kept of its runs: each covers something that the others do not."""
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)
MUTATIONS = 4000


def mutate(choose: random.Random, raw: bytes) -> bytes:
    """Flip, set, cut, repeat: where a VHD keeps its structures more often than elsewhere."""
    data = bytearray(raw)
    for _ in range(choose.choice((1, 1, 2, 4))):
        if len(data) < 2:
            break
        at = choose.choice((choose.randrange(len(data)), choose.randrange(min(3200, len(data)))))
        match choose.randrange(6):
            case 0:
                data[at] ^= 1 << choose.randrange(8)
            case 1:
                data[at] = choose.choice(INTERESTING)
            case 2:
                field = bytes([choose.choice(INTERESTING)]) * choose.choice((2, 4, 8))
                data[at : at + len(field)] = field
            case 3:
                del data[at:]
            case 4:
                other = choose.randrange(len(data))
                data[at : at + 16] = data[other : other + 16]
            case 5:
                data += choose.randbytes(choose.choice((1, 511, 512)))
    return bytes(data)


@pytest.mark.parametrize("seed", CORPUS, ids=lambda path: path.name)
def test_the_corpus_is_read_as_it_should_be(seed: Path) -> None:
    assert check_file(seed.read_bytes()) == (not seed.name.startswith("bad"))


def test_what_the_fuzzer_has_found() -> None:
    outcomes = [check_file(path.read_bytes()) for path in FOUND]
    assert {True, False} == set(outcomes)


def test_mutations() -> None:
    choose = random.Random(20)
    seeds = [path.read_bytes() for path in (*CORPUS, *FOUND)]
    outcomes = {True: 0, False: 0}
    for _ in range(MUTATIONS):
        outcomes[check_file(mutate(choose, choose.choice(seeds)))] += 1
    assert min(outcomes.values()) > MUTATIONS // 50
