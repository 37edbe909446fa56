"""A vhost-user back-end without its I/O: bytes and descriptors in, replies out, and calls on what holds the rings.

Spec: QEMU, "Vhost-user Protocol": "Communication", "Starting and stopping rings", "Inflight I/O tracking", `REPLY_ACK`.

A vring is, in this order of conditions: sized (SET_VRING_NUM) → placed (SET_VRING_ADDR) → kicked (SET_VRING_KICK) →
enabled (SET_VRING_ENABLE, or at once when PROTOCOL_FEATURES was not negotiated). It runs while all four hold and memory
is known; GET_VRING_BASE stops it. The session calls `Backend.start_vring` and `stop_vring` at exactly these edges.

Invariants: every descriptor that came in is handed to the back end once, or closed through it. A request that is not
offered, out of range or malformed is an error: answered as such where the peer asked for an answer, and otherwise the
end of the connection. The peer is never trusted, but it can hurt only the partition that it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from mullion.wire.vhost_user import virtio_blk
from mullion.wire.vhost_user.messages import (
    CONFIG_SPACE_BYTES,
    HEADER_BYTES,
    MAX_FDS,
    U64,
    VERSION,
    VRING_INDEX_MASK,
    VRING_NO_FD,
    Config,
    DeviceFeature,
    Flag,
    Header,
    Inflight,
    Log,
    MemoryRegion,
    MemoryTable,
    ProtocolError,
    ProtocolFeature,
    Request,
    VringAddress,
    VringState,
)

OFFERED_PROTOCOL_FEATURES: Final = int(
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.INFLIGHT_SHMFD
)

# Plain numbers at run time: the methods of `enum` would be private memory of every provider.
_PROTOCOL_FEATURES: Final = int(DeviceFeature.PROTOCOL_FEATURES)
_NEED_REPLY: Final = int(Flag.NEED_REPLY)
_REPLY_FLAGS: Final = VERSION | int(Flag.REPLY)


class Reply(NamedTuple):
    """A message to send to the front-end, and the descriptors that go with it. The sender closes them afterwards."""

    data: bytes
    fds: tuple[int, ...]


@dataclass(slots=True)
class Vring:
    """What the front-end has said about one vring."""

    index: int
    size: int = 0
    address: VringAddress | None = None
    base: int = 0
    kick_fd: int | None = None
    enabled: bool = False
    running: bool = False


class Backend(Protocol):
    """What a session needs from the process that serves the rings. Descriptors passed in belong to the back end."""

    @property
    def device_features(self) -> int:
        """Feature bits of the device and its rings, without PROTOCOL_FEATURES."""
        ...

    @property
    def queue_count(self) -> int: ...

    def config_space(self) -> bytes: ...

    def map_memory(self, regions: Sequence[MemoryRegion], fds: Sequence[int]) -> None:
        """Replace the guest's memory; no vring runs meanwhile. Raises: OSError, ProtocolError."""
        ...

    def start_vring(self, vring: Vring, features: int) -> None:
        """Serve a vring from now on. Raises: ProtocolError when its addresses are not in the guest's memory."""
        ...

    def stop_vring(self, index: int) -> int:
        """Serve it no more; the index of the next request in the available ring that is not finished."""
        ...

    def set_call_fd(self, index: int, fd: int | None) -> None: ...

    def set_error_fd(self, index: int, fd: int | None) -> None: ...

    def create_inflight(self, queues: int, queue_size: int) -> tuple[Inflight, int]:
        """A fresh region and a descriptor of it that may be given away. Raises: OSError."""
        ...

    def use_inflight(self, inflight: Inflight, fd: int) -> None:
        """Track requests in this region from the next start on. Raises: OSError, ProtocolError."""
        ...

    def use_log(self, log: Log, fd: int) -> None:
        """Mark written pages there from the next start of a vring on. Raises: OSError, ProtocolError."""
        ...

    def set_backend_fd(self, fd: int | None) -> None:
        """Where the back end may send messages of its own."""
        ...

    def close_fd(self, fd: int) -> None: ...


class Session:
    """One connection of a front-end, from the first byte to the last."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._buffer = bytearray()
        self._fds: list[int] = []
        self._header: Header | None = None
        self._features = 0
        self._protocol_features = 0
        self._has_memory = False
        self._vrings = tuple(Vring(index) for index in range(backend.queue_count))
        self._handlers: dict[Request, Callable[[bytes], Reply | bytes | None]] = {
            Request.GET_FEATURES: self._get_features,
            Request.SET_FEATURES: self._set_features,
            Request.SET_OWNER: self._set_owner,
            Request.RESET_OWNER: self._reset_owner,
            Request.SET_MEM_TABLE: self._set_mem_table,
            Request.SET_LOG_BASE: self._set_log_base,
            Request.SET_LOG_FD: self._set_log_fd,
            Request.SET_VRING_NUM: self._set_vring_num,
            Request.SET_VRING_ADDR: self._set_vring_addr,
            Request.SET_VRING_BASE: self._set_vring_base,
            Request.GET_VRING_BASE: self._get_vring_base,
            Request.SET_VRING_KICK: self._set_vring_kick,
            Request.SET_VRING_CALL: self._set_vring_call,
            Request.SET_VRING_ERR: self._set_vring_err,
            Request.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            Request.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Request.GET_QUEUE_NUM: self._get_queue_num,
            Request.SET_VRING_ENABLE: self._set_vring_enable,
            Request.SET_BACKEND_REQ_FD: self._set_backend_req_fd,
            Request.GET_CONFIG: self._get_config,
            Request.SET_CONFIG: self._set_config,
            Request.GET_INFLIGHT_FD: self._get_inflight_fd,
            Request.SET_INFLIGHT_FD: self._set_inflight_fd,
        }

    @property
    def wanted_bytes(self) -> int:
        """How many bytes to read next: never beyond a message, so that descriptors stay with their own."""
        whole = HEADER_BYTES if self._header is None else self._header.size
        return whole - len(self._buffer)

    @property
    def is_between_messages(self) -> bool:
        """Has no part of a message come yet?"""
        return self._header is None and not self._buffer and not self._fds

    @property
    def features(self) -> int:
        return self._features

    @property
    def protocol_features(self) -> int:
        return self._protocol_features

    @property
    def vrings(self) -> Sequence[Vring]:
        return self._vrings

    def receive(self, data: bytes, fds: Sequence[int]) -> list[Reply]:
        """Take what was read, act on the message if it is whole now, return what is to be sent.

        Raises: ProtocolError; the connection is to be closed then, with `close`.
        """
        self._fds.extend(fds)
        if len(self._fds) > MAX_FDS:
            raise ProtocolError(f"more than {MAX_FDS} descriptors in one message")
        if len(data) > self.wanted_bytes:
            raise ProtocolError("more bytes than were asked for")
        self._buffer += data
        if self._header is None:
            if len(self._buffer) < HEADER_BYTES:
                return []
            self._header = Header.unpack(bytes(self._buffer))
            self._buffer.clear()
        if len(self._buffer) < self._header.size:
            return []
        header, payload = self._header, bytes(self._buffer)
        self._header = None
        self._buffer.clear()
        replies = self._dispatch(header, payload)
        if self._fds:
            for fd in (fd for reply in replies for fd in reply.fds):
                self._backend.close_fd(fd)
            raise ProtocolError(f"message {header.request}: {len(self._fds)} descriptors that do not belong to it")
        return replies

    def close(self) -> None:
        """The connection ended: stop all vrings and give back all descriptors."""
        for vring in self._vrings:
            self._stop(vring)
            self._drop_kick(vring)
            self._backend.set_call_fd(vring.index, None)
            self._backend.set_error_fd(vring.index, None)
        self._backend.set_backend_fd(None)
        self._close_fds()

    # One method a message. It returns a payload to reply with, or None when only an acknowledgement may be due.

    def _dispatch(self, header: Header, payload: bytes) -> list[Reply]:
        handler = self._handlers.get(header.request)  # type: ignore[call-overload]  # a foreign number is no Request
        wants_ack = header.flags & _NEED_REPLY  # who asks has negotiated it, if on an earlier connection (QEMU 7.2)
        try:
            if handler is None:
                raise ProtocolError(f"message {header.request} is not known or not offered")
            answer: Reply | bytes | None = handler(payload)
        except (ProtocolError, OSError) as error:
            self._close_fds()
            if not wants_ack:
                if isinstance(error, ProtocolError):
                    raise
                raise ProtocolError(f"message {header.request} failed: {error}") from error
            answer = U64(1).pack()
        else:
            if answer is None and wants_ack:
                answer = U64(0).pack()
        if answer is None:
            return []
        reply = answer if isinstance(answer, Reply) else Reply(answer, ())
        head = Header(header.request, _REPLY_FLAGS, len(reply.data))
        return [Reply(head.pack() + reply.data, reply.fds)]

    def _get_features(self, _payload: bytes) -> bytes:
        return U64(self._backend.device_features | _PROTOCOL_FEATURES).pack()

    def _set_features(self, payload: bytes) -> None:
        features = U64.unpack(payload).value
        unknown = features & ~(self._backend.device_features | _PROTOCOL_FEATURES)
        if unknown:
            raise ProtocolError(f"features {unknown:#x} were not offered")
        self._features = features

    def _get_protocol_features(self, _payload: bytes) -> bytes:
        return U64(OFFERED_PROTOCOL_FEATURES).pack()

    def _set_protocol_features(self, payload: bytes) -> None:
        features = U64.unpack(payload).value
        if features & ~OFFERED_PROTOCOL_FEATURES:
            raise ProtocolError(f"protocol features {features:#x} were not offered")
        self._protocol_features = features

    def _set_owner(self, _payload: bytes) -> None:
        """Nothing to do: the connection is the owner."""

    def _reset_owner(self, _payload: bytes) -> None:
        for vring in self._vrings:
            self._stop(vring)
            self._drop_kick(vring)

    def _get_queue_num(self, _payload: bytes) -> bytes:
        return U64(self._backend.queue_count).pack()

    def _set_mem_table(self, payload: bytes) -> None:
        table = MemoryTable.unpack(payload)
        if len(self._fds) != len(table.regions):
            raise ProtocolError(f"memory table: {len(table.regions)} regions with {len(self._fds)} descriptors")
        for vring in self._vrings:
            self._stop(vring)
        self._has_memory = False
        fds, self._fds = self._fds, []
        self._backend.map_memory(table.regions, fds)
        self._has_memory = bool(table.regions)
        for vring in self._vrings:
            self._start_if_ready(vring)

    def _set_log_base(self, payload: bytes) -> bytes:
        log = Log.unpack(payload)
        if len(self._fds) != 1:
            raise ProtocolError(f"a dirty log with {len(self._fds)} descriptors")
        running = [vring for vring in self._vrings if vring.running]
        for vring in running:
            self._stop(vring)
        self._backend.use_log(log, self._fds.pop())
        for vring in running:
            self._start_if_ready(vring)
        return U64(0).pack()  # whether or not it was asked for (observed: QEMU waits)

    def _set_log_fd(self, _payload: bytes) -> None:
        """To be told of every mark; who copies memory looks by himself."""
        self._close_fds()

    def _set_backend_req_fd(self, _payload: bytes) -> None:
        if len(self._fds) != 1:
            raise ProtocolError(f"a socket for the back end with {len(self._fds)} descriptors")
        self._backend.set_backend_fd(self._fds.pop())

    def _set_vring_num(self, payload: bytes) -> None:
        state = VringState.unpack(payload)
        vring = self._stopped_vring(state.index)
        size = state.num
        if size == 0 or size & (size - 1) or size > virtio_blk.MAX_QUEUE_SIZE:
            raise ProtocolError(f"vring {vring.index}: size {size} is not a power of two up to 1024")
        vring.size = size

    def _set_vring_addr(self, payload: bytes) -> None:
        address = VringAddress.unpack(payload)
        vring = self._vring(address.index)
        self._stop(vring)
        vring.address = address
        self._start_if_ready(vring)

    def _set_vring_base(self, payload: bytes) -> None:
        state = VringState.unpack(payload)
        if state.num > 0xFFFF:
            raise ProtocolError(f"vring {state.index}: base {state.num:#x} is more than 16 bits")
        self._stopped_vring(state.index).base = state.num

    def _get_vring_base(self, payload: bytes) -> bytes:
        vring = self._vring(VringState.unpack(payload).index)
        self._stop(vring)
        self._drop_kick(vring)
        return VringState(vring.index, vring.base).pack()

    def _set_vring_kick(self, payload: bytes) -> None:
        vring, fd = self._vring_fd(payload)
        if fd is None:
            raise ProtocolError(f"vring {vring.index}: polling without a kick descriptor is not offered")
        self._stop(vring)
        self._drop_kick(vring)
        vring.kick_fd = fd
        if not self._features & _PROTOCOL_FEATURES:
            vring.enabled = True
        self._start_if_ready(vring)

    def _set_vring_call(self, payload: bytes) -> None:
        vring, fd = self._vring_fd(payload)
        self._backend.set_call_fd(vring.index, fd)

    def _set_vring_err(self, payload: bytes) -> None:
        vring, fd = self._vring_fd(payload)
        self._backend.set_error_fd(vring.index, fd)

    def _set_vring_enable(self, payload: bytes) -> None:
        state = VringState.unpack(payload)
        if state.num > 1:
            raise ProtocolError(f"vring {state.index}: enable must be 0 or 1, not {state.num}")
        vring = self._vring(state.index)
        vring.enabled = state.num == 1
        if vring.enabled:
            self._start_if_ready(vring)
        else:
            self._stop(vring)

    def _get_config(self, payload: bytes) -> bytes:
        asked = Config.unpack(payload)
        space = self._backend.config_space().ljust(CONFIG_SPACE_BYTES, b"\0")
        return Config(asked.offset, asked.size, 0, space[asked.offset : asked.offset + asked.size]).pack()

    def _set_config(self, payload: bytes) -> None:
        Config.unpack(payload)
        raise ProtocolError("the configuration space of the disk cannot be written")

    def _get_inflight_fd(self, payload: bytes) -> Reply:
        asked = Inflight.unpack(payload)
        if not 0 < asked.queues <= self._backend.queue_count or not 0 < asked.queue_size <= virtio_blk.MAX_QUEUE_SIZE:
            raise ProtocolError(f"inflight region for {asked.queues} queues of {asked.queue_size} is not possible")
        made, fd = self._backend.create_inflight(asked.queues, asked.queue_size)
        return Reply(made.pack(), (fd,))

    def _set_inflight_fd(self, payload: bytes) -> None:
        inflight = Inflight.unpack(payload)
        if len(self._fds) != 1:
            raise ProtocolError(f"inflight region with {len(self._fds)} descriptors")
        self._backend.use_inflight(inflight, self._fds.pop())

    def _vring(self, index: int) -> Vring:
        if index >= len(self._vrings):
            raise ProtocolError(f"vring {index} of {len(self._vrings)} does not exist")
        return self._vrings[index]

    def _stopped_vring(self, index: int) -> Vring:
        vring = self._vring(index)
        if vring.running:
            raise ProtocolError(f"vring {index} is running: stop it first")
        return vring

    def _vring_fd(self, payload: bytes) -> tuple[Vring, int | None]:
        value = U64.unpack(payload).value
        vring = self._vring(value & VRING_INDEX_MASK)
        expected = 0 if value & VRING_NO_FD else 1
        if value & ~(VRING_INDEX_MASK | VRING_NO_FD) or len(self._fds) != expected:
            raise ProtocolError(f"vring {vring.index}: value {value:#x} with {len(self._fds)} descriptors")
        return vring, self._fds.pop() if expected else None

    def _start_if_ready(self, vring: Vring) -> None:
        if vring.running or not (vring.enabled and vring.size and vring.address and self._has_memory):
            return
        if vring.kick_fd is None:
            return
        self._backend.start_vring(vring, self._features)
        vring.running = True

    def _stop(self, vring: Vring) -> None:
        if vring.running:
            vring.running = False
            vring.base = self._backend.stop_vring(vring.index)

    def _drop_kick(self, vring: Vring) -> None:
        if vring.kick_fd is not None:
            self._backend.close_fd(vring.kick_fd)
            vring.kick_fd = None

    def _close_fds(self) -> None:
        while self._fds:
            self._backend.close_fd(self._fds.pop())
