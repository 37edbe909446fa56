"""`make run` a second time: from no service and no guest to a guest whose agent answers, images and packages cached.

`make run` is `mullion demo` after a look whether all is installed. It starts the service and the partition on its
disk, and waits for the agent. Peer: a bare QEMU of the same command line on the same image, until its agent answers.
"""

from __future__ import annotations

import json
import time

from bench.figures import BenchFault, Measure, Row
from bench.runner import Scale
from bench.scene import MULLION, BareHost, connect, demo_image, end, service_at_home, time_command

from mullion.model.definition import Transport
from mullion.vhd import create_differencing

BAR_S = 25.0
NAME = "demo"
_ROUNDS = 5
_ASK_S = 0.25
_DEADLINE_S = 180.0


def run(scale: Scale) -> list[Row]:
    image = demo_image()
    ours, peer = [], []
    with service_at_home(images=True) as service:
        time_command(service, MULLION, "demo")  # the first time makes the partition
        bare = BareHost(service)
        try:
            time_command(service, MULLION, "stop", "--with-partitions")
            for turn in range(_ROUNDS):
                twin = f"{NAME}{turn}"
                bare.serve(
                    twin,
                    lambda path: create_differencing(path, image.path),
                    transport=Transport.NBD,
                    parents=(image.path,),
                )
                peer.append(_boot_bare(bare, twin))
                ours.append(time_command(service, MULLION, "demo"))
                time_command(service, MULLION, "stop", "--with-partitions")
        finally:
            bare.close()
    what = "mullion demo, second time, to the agent's answer"
    return [Row(what, "s", ours, BAR_S, Measure.WORST, peer, "bare QEMU to its agent's answer")]


def _boot_bare(bare: BareHost, twin: str) -> float:
    argv = [word for word in bare.argv(twin, of=NAME) if word != "-S"]
    begun_s = time.perf_counter()
    children = bare.start([argv])
    try:
        _wait_agent(bare.agent_socket(twin))
        return time.perf_counter() - begun_s
    finally:
        end(children)


def _wait_agent(path: str) -> None:
    """Ask for a number until the guest says it (`guest-sync` of the QEMU guest agent protocol)."""
    until_s = time.monotonic() + _DEADLINE_S
    with connect(path) as client:
        client.settimeout(_ASK_S)
        seen = b""
        number = 0
        while f'"return": {number}}}'.encode() not in seen or not number:
            if time.monotonic() > until_s:
                raise BenchFault(f"the agent of the bare QEMU did not answer within {_DEADLINE_S:g} s")
            number += 1
            client.sendall(json.dumps({"execute": "guest-sync", "arguments": {"id": number}}).encode() + b"\n")
            try:
                seen += client.recv(65536)
            except TimeoutError:
                continue
