"""A writer that is really killed with -9: what it acknowledged is there when the disk is opened again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.contract.block_device import all_of, read

from mullion.base.units import KIB, MIB
from mullion.vhd import create_differencing, create_dynamic, open_chain

pytestmark = pytest.mark.interop

WRITER = """
import os, random, sys
from mullion.vhd import open_chain
path, pending, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
choose = random.Random(seed)
chain = open_chain(path, pending_path=pending, holder=f"writer {seed}")
number = 0
while True:
    length = choose.choice((512, 1000, 4096, 20_000))
    offset = choose.randrange(chain.size_bytes - length)
    content = choose.randbytes(length)
    chain.pwrite(offset, content)
    if number % 97 == 96:
        chain.flush()
    number += 1
    os.write(1, b"%d\\n" % number)
"""


@pytest.mark.parametrize("kind", ["dynamic", "differencing"])
def test_twenty_kills(kind: str, tmp_path: Path) -> None:
    path, pending = str(tmp_path / "disk.vhd"), str(tmp_path / "pending")
    size = 48 * MIB
    create_dynamic(path if kind == "dynamic" else str(tmp_path / "parent.vhd"), size, block_bytes=64 * KIB)
    if kind == "differencing":
        with open_chain(str(tmp_path / "parent.vhd")) as parent:
            parent.pwrite(0, random.Random(0).randbytes(10 * MIB))
        create_differencing(path, str(tmp_path / "parent.vhd"))
    with open_chain(path, read_only=True) as chain:
        model = all_of(chain)
    carried_out = 0
    for seed in range(20):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, path, pending, str(seed)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        acknowledged = 0
        for _ in range(20 + seed * 13):
            acknowledged = int(writer.stdout.readline())
        os.kill(writer.pid, signal.SIGKILL)
        rest = writer.stdout.read().split()
        acknowledged = int(rest[-1]) if rest else acknowledged
        writer.stdout.close()
        assert writer.wait() == -signal.SIGKILL
        choose = random.Random(seed)
        for _ in range(acknowledged):
            length = choose.choice((512, 1000, 4096, 20_000))
            offset = choose.randrange(size - length)
            model[offset : offset + length] = choose.randbytes(length)
        # One more write may have been under way.
        length = choose.choice((512, 1000, 4096, 20_000))
        offset = choose.randrange(size - length)
        with open_chain(path, pending_path=pending) as chain:
            carried_out += "carried out" in " ".join(chain.warnings)
            under_way = read(chain, offset, length)
            new = choose.randbytes(length)
            for at, byte in enumerate(under_way):
                assert byte in (model[offset + at], new[at])
            model[offset : offset + length] = under_way
            assert all_of(chain) == model
    assert carried_out > 5
