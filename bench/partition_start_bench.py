"""`mullion partition start` against QEMU started by hand with the very command line that the service gave it.

Ours is measured from the POST of a paused start until its operation has succeeded: request, record and operation in
the store, the disk's chain, a provider, the wrapper, QEMU, its monitor's answer. The peer's disk is served already. The
whole command (`mullion partition start`, from exec to exit, the guest let go) is measured against the same peer.
"""

from __future__ import annotations

from bench.figures import Row
from bench.runner import Scale
from bench.scene import MULLION, BareHost, small_partitions, start_paused, time_command, turn_off

from mullion.base.units import MIB
from mullion.model.definition import Transport
from mullion.vhd import create_dynamic

ONE_BAR = 1.5
BURST_BAR = 2.0
PEER = "bare QEMU"


def run(scale: Scale) -> list[Row]:
    """One start and twenty at once over the transport of this host, then one over the other."""
    return [*_measure(scale, Transport.NBD, burst=True), *_measure(scale, Transport.VHOST_USER, burst=False)]


def _measure(scale: Scale, transport: Transport, *, burst: bool) -> list[Row]:
    kind = "NBD" if transport is Transport.NBD else "vhost-user"
    with small_partitions(scale.partitions if burst else 1, transport=transport) as (service, names):
        bare = BareHost(service)
        try:
            for name in names:
                bare.serve(name, lambda path: create_dynamic(path, 64 * MIB), transport=transport)
            one, command, peer, many, many_peer = [], [], [], [], []
            first = names[:1]
            with service.client() as client:
                start_paused(client, names)  # the first turn fills the caches and writes the command lines down
                turn_off(client, names)
                bare.time_start(names)
                for _ in range(scale.rounds):
                    peer.append(bare.time_start(first) * 1e3)
                    one.append(start_paused(client, first) * 1e3)
                    turn_off(client, first)
                    command.append(time_command(service, MULLION, "partition", "start", first[0]) * 1e3)
                    turn_off(client, first)
                for _ in range(scale.burst_rounds if burst else 0):
                    many_peer.append(bare.time_start(names) * 1e3)
                    many.append(start_paused(client, names) * 1e3)
                    turn_off(client, names)
        finally:
            bare.close()
    rows = [
        Row(f"one start, POST to succeeded, {kind}", "ms", one, ONE_BAR, peer=peer, peer_name=PEER),
        Row(f"one start, the whole command, {kind}", "ms", command, peer=peer, peer_name=PEER),
    ]
    if burst:
        what = f"{len(names)} paused starts at once, {kind}"
        rows.append(Row(what, "ms", many, BURST_BAR, peer=many_peer, peer_name=PEER))
    return rows
