"""The Network Block Device protocol: a server for exports and a client that is a block device, on unix sockets."""

from mullion.wire.nbd.client import NbdClient
from mullion.wire.nbd.export import NbdExport
from mullion.wire.nbd.messages import NbdProtocolError
from mullion.wire.nbd.server import Counters, NbdServer
from mullion.wire.nbd.session import Export, Handshake
from mullion.wire.nbd.steady import SteadyReader
from mullion.wire.nbd.transmission import Transmission

__all__ = [
    "Counters",
    "Export",
    "Handshake",
    "NbdClient",
    "NbdExport",
    "NbdProtocolError",
    "NbdServer",
    "SteadyReader",
    "Transmission",
]
