"""A thousand differencing children of a parent of 100 GiB in one process, against `qemu-img create -b` of QCOW2."""

from __future__ import annotations

import shutil
from pathlib import Path

from bench.figures import Measure, Row
from bench.runner import Scale
from bench.vhd.scratch import disk_folder, in_turns, run_program, scratch_folder

from mullion.base.units import GIB
from mullion.vhd import create_differencing, create_dynamic

PARENT_BYTES = 100 * GIB
CHILDREN = 1000
RATIO_BAR = 1 / 10
UNSYNCED_BAR_S = 3.0


def run(scale: Scale) -> list[Row]:
    count = 100 if scale.quick else CHILDREN
    with scratch_folder(disk_folder()) as folder:
        vhd_parent, qcow2_parent = f"{folder}/parent.vhd", f"{folder}/parent.qcow2"
        create_dynamic(vhd_parent, PARENT_BYTES)
        run_program("qemu-img", "create", "-q", "-f", "qcow2", qcow2_parent, str(PARENT_BYTES))
        children = f"{folder}/children"

        def clean() -> None:
            shutil.rmtree(children, ignore_errors=True)
            Path(children).mkdir()

        def make(*, durable: bool) -> None:
            for number in range(count):
                create_differencing(f"{children}/{number}.vhd", vhd_parent, durable=durable)

        def make_qcow2() -> None:
            for number in range(count):
                run_program(
                    "qemu-img", "create", "-q", "-f", "qcow2", "-b", qcow2_parent, "-F", "qcow2",
                    f"{children}/{number}.qcow2",
                )  # fmt: skip

        # qemu-img creates without syncing, so the ratio is that of ours without syncing too.
        ours, peer = in_turns(lambda: make(durable=False), make_qcow2, 5, before=clean)
        clean()
        synced, _ = in_turns(lambda: make(durable=True), lambda: None, 1 if scale.quick else 3, before=clean)
    what = f"{count} children of a parent of 100 GiB"
    limit_s = UNSYNCED_BAR_S * count / CHILDREN
    return [
        Row(what, "s", ours, RATIO_BAR, Measure.RATIO, peer, f"qemu-img create -b, {count} times"),
        Row(f"{what}, without fsync", "s", ours, limit_s, Measure.MEDIAN),
        Row(f"{what}, each durable", "s", synced, note="each of them synced, and its folder after it"),
    ]
