"""The vhost-user protocol: messages, the back-end's session without I/O, the block device's own words."""

from mullion.wire.vhost_user.messages import Inflight, Log, MemoryRegion, ProtocolError
from mullion.wire.vhost_user.session import Backend, Reply, Session, Vring

__all__ = ["Backend", "Inflight", "Log", "MemoryRegion", "ProtocolError", "Reply", "Session", "Vring"]
