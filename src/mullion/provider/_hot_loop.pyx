# cython: language_level=3, wraparound=False, cdivision=True, embedsignature=False
"""The compiled twin of `hot_loop`: the same names, and by the same tests the same behaviour (ADR 0015).

What Python leaves to `serve` or to the device for being slow in a loop, it does itself: data in many segments, and reads
of a granule that several files share.

Invariants, beside those of `hot_loop`. All that the guest can reach may change at any time, so each descriptor, header
and index is copied once (`fetch`) and only the copy is looked at. Addresses are 64-bit numbers of the guest's: one is
good if its distance from the beginning of memory, mod 2⁶⁴, and its length both fit into what is there (`_holds`); no sum
of the guest's numbers is ever formed before that. A chain is followed for `SEGMENTS` descriptors at most. Only pieces
that were found good are in `_pieces`; files are read and written through these, with Python's lock released.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from mullion.base.errors import MullionError
from mullion.provider.hot_loop import ANNOUNCE_BYTES, ANNOUNCE_REQUESTS, BUDGET_REQUESTS, UNANSWERED
from mullion.provider.hot_loop import EVENTS as _EVENTS
from mullion.vhd.fileio import DATA_PIECE_BYTES
from mullion.wire.vhost_user.virtio_blk import BlkRequest, DescriptorFlag

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    #include <sys/uio.h>

    struct descriptor { uint64_t address; uint32_t length; uint16_t flags, next; };
    struct header { uint32_t kind, priority; uint64_t sector; };

    /* A copy of what the guest may change meanwhile; the compiler must not look there again. */
    static inline void fetch(void *copy, const void *shared, size_t bytes)
    {
        memcpy(copy, shared, bytes);
        __asm__ volatile("" ::: "memory");
    }

    /* All stores before this one are seen before it. */
    static inline void publish(char *shared, uint16_t index)
    {
        __atomic_thread_fence(__ATOMIC_RELEASE);
        memcpy(shared, &index, sizeof index);
    }

    static inline void store(char *shared, uint32_t word) { memcpy(shared, &word, sizeof word); }

    /* An index, before anything that it speaks of. */
    static inline uint16_t index_of(const char *shared)
    {
        uint16_t index;
        fetch(&index, shared, sizeof index);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        return index;
    }

    /* All loads and stores before it are done before those behind it. */
    static inline void barrier(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
    """
    struct descriptor:
        uint64_t address
        uint32_t length
        uint16_t flags
        uint16_t next

    struct header:
        uint32_t kind
        uint64_t sector

    struct iovec:
        void *iov_base
        size_t iov_len

    void fetch(void *copy, const void *shared, size_t size) noexcept nogil
    void publish(char *shared, uint16_t index) noexcept nogil
    void store(char *shared, uint32_t word) noexcept nogil
    uint16_t index_of(const char *shared) noexcept nogil
    void barrier() noexcept nogil
    ssize_t preadv(int fd, const iovec *pieces, int count, int64_t offset) noexcept nogil
    ssize_t pwritev(int fd, const iovec *pieces, int count, int64_t offset) noexcept nogil

cdef extern from "<sys/epoll.h>":
    ctypedef union epoll_data_t:
        int fd

    struct epoll_event:
        uint32_t events
        epoll_data_t data

    int epoll_wait(int epoll_fd, epoll_event *events, int count, int timeout_ms) noexcept nogil

cdef extern from "<sys/eventfd.h>":
    int eventfd_write(int fd, uint64_t value) noexcept nogil

cdef extern from *:
    """
    #ifndef SOURCE_DIGEST
    #define SOURCE_DIGEST ""
    #endif
    """
    const char *_SOURCE_DIGEST "SOURCE_DIGEST"

SOURCE_DIGEST = _SOURCE_DIGEST.decode()

cdef enum:
    SEGMENTS = 256  # of data in one request: what a driver is told (virtio_blk.SEG_MAX), and two
    SECTOR_SHIFT = 9
    ENTRY_BYTES = 16
    EVENTS = 32
    NO_NOTIFY = 1  # in the flags of either ring (2.7.6, 2.7.8)

cdef uint16_t NEXT = DescriptorFlag.NEXT
cdef uint16_t WRITE = DescriptorFlag.WRITE
cdef uint16_t INDIRECT = DescriptorFlag.INDIRECT
cdef uint32_t IN = BlkRequest.IN
cdef uint32_t OUT = BlkRequest.OUT
cdef int64_t UNANSWERED_NOW = UNANSWERED
cdef uint64_t BATCH_BYTES = ANNOUNCE_BYTES
cdef uint64_t PIECE_BYTES = DATA_PIECE_BYTES
cdef uint32_t BATCH_REQUESTS = ANNOUNCE_REQUESTS
cdef int64_t BUDGET = BUDGET_REQUESTS
assert EVENTS == _EVENTS


cdef class Call:
    """As of `hot_loop.Call`."""

    cdef int _fd

    def __cinit__(self, int fd):
        self._fd = fd

    def __call__(self):
        self.signal()

    cdef int signal(self) except -1:
        cdef int failure
        with nogil:
            failure = eventfd_write(self._fd, 1)
        if failure and errno != EAGAIN:
            PyErr_SetFromErrno(OSError)
        return 0


@cython.no_gc  # views of memory lead to no object of ours; and the collector would clear them without releasing them
cdef class HotLoop:
    """The loop over one ring. After each run, also one that raised, the attributes say how far it came."""

    cdef public uint16_t available_index
    cdef public uint16_t used_index
    cdef readonly uint64_t answered
    cdef readonly uint64_t moved_bytes
    cdef Py_buffer _descriptors
    cdef Py_buffer _available
    cdef Py_buffer _used
    cdef Py_buffer _memory
    cdef bint _event_idx
    cdef uint16_t _signalled  # the used index at which the driver was last thought of
    cdef object _view  # of the memory, for the pieces that Python code gets
    cdef uint64_t _base
    cdef uint32_t _size
    # The request that is being served: what `_parse` found, and of `_pieces` what goes to or from one place in a file.
    cdef header _header
    cdef iovec _pieces[SEGMENTS]
    cdef iovec _part[SEGMENTS]
    cdef int _count
    cdef uint64_t _length
    cdef bint _is_read
    cdef char *_status

    def __cinit__(
        self,
        *,
        uint32_t size,
        descriptors,
        available,
        used,
        uint64_t base,
        memory,
        bint event_idx,
        barrier,
    ):
        """As of `hot_loop.HotLoop`."""
        PyObject_GetBuffer(descriptors, &self._descriptors, PyBUF_SIMPLE)
        PyObject_GetBuffer(available, &self._available, PyBUF_SIMPLE)
        PyObject_GetBuffer(used, &self._used, PyBUF_WRITABLE)
        PyObject_GetBuffer(memory, &self._memory, PyBUF_WRITABLE)
        if not 0 < size <= 1 << 15 or size & (size - 1):
            raise ValueError(f"a ring of {size} descriptors")
        if (
            self._descriptors.len < ENTRY_BYTES * size
            or self._available.len < 6 + 2 * size
            or self._used.len < 6 + 8 * size
        ):
            raise ValueError(f"the parts of a ring of {size} descriptors are too small")
        self._view = memory
        self._base = base
        self._size = size
        self._event_idx = event_idx
        fetch(&self._signalled, <char *>self._used.buf + 2, 2)

    def __dealloc__(self):
        PyBuffer_Release(&self._descriptors)
        PyBuffer_Release(&self._available)
        PyBuffer_Release(&self._used)
        PyBuffer_Release(&self._memory)

    def pending(self, uint16_t available_index):
        """As of `hot_loop.HotLoop`."""
        return self._pending(available_index)

    def arm(self, uint16_t available_index):
        """As of `hot_loop.HotLoop`."""
        return self._arm(available_index)

    def announce(self, uint16_t used_index, notify):
        """As of `hot_loop.HotLoop`."""
        self._announce(used_index, notify)

    def sweep(
        self, device, serve, notify, holder, uint16_t available_index, uint16_t used_index, int64_t budget
    ):
        """As of `hot_loop.HotLoop`."""
        self.available_index, self.used_index = available_index, used_index
        return self._sweep(Disk(device), serve, notify, holder, budget)

    cdef bint _sweep(self, Disk disk, serve, notify, holder, int64_t budget) except -1:
        cdef uint16_t unanswered = self.available_index - self.used_index
        cdef uint32_t count
        cdef uint16_t first
        try:
            while True:
                first = self.available_index
                count = self._pending(first)
                if not count:
                    if self._arm(first):
                        return True
                    self._announce(self.used_index, notify)
                    continue
                if count > self._size or budget <= 0 or <uint16_t>(first - self.used_index) != unanswered or holder.is_held:
                    return False
                self._take(disk, serve, min(count, self._size - (first & (self._size - 1)), BATCH_REQUESTS))
                budget -= <uint16_t>(self.available_index - first)
                if self._pending(self.available_index):
                    self._announce(self.used_index, notify)
        finally:
            self._announce(self.used_index, notify)

    def attend(self, owner, notify, holder, seat, epoll, int kick):
        """As of `hot_loop.HotLoop`."""
        cdef epoll_event events[EVENTS]
        cdef int epoll_fd = epoll.fileno()
        cdef int count, number
        cdef bint is_idle = False
        serve, blk, lane = owner.serve, owner.blk, owner.lane
        try:
            while True:
                with nogil:
                    count = epoll_wait(epoll_fd, events, EVENTS, -1)
                if count < 0:
                    if errno != EINTR:
                        PyErr_SetFromErrno(OSError)
                    PyErr_CheckSignals()
                    continue
                if count == 1 and events[0].data.fd == kick and not holder.is_held and not lane.is_limited:
                    with seat:
                        is_idle = self._sweep(Disk(blk.device), serve, notify, holder, BUDGET)
                    if is_idle:
                        continue
                return [(events[number].data.fd, events[number].events) for number in range(count)]
        finally:
            owner.keep()

    def run(self, device, serve, uint16_t available_index, uint16_t used_index, uint32_t count):
        """As of `hot_loop.HotLoop`."""
        self.available_index, self.used_index = available_index, used_index
        self._take(Disk(device), serve, count)

    cdef uint16_t _pending(self, uint16_t available_index) noexcept:
        return index_of(<char *>self._available.buf + 2) - available_index

    cdef bint _arm(self, uint16_t available_index) noexcept:
        if self._event_idx:
            publish(<char *>self._used.buf + 4 + 8 * self._size, available_index)
        else:
            publish(<char *>self._used.buf, 0)
        barrier()
        return not self._pending(available_index)

    cdef int _announce(self, uint16_t used_index, notify) except -1:
        if self._is_wanted(used_index):
            if type(notify) is Call:
                (<Call>notify).signal()
            else:
                notify()
        return 0

    cdef bint _is_wanted(self, uint16_t used_index) noexcept:
        """Whether the driver wants to hear of what was answered since the last time (2.7.7.2, 2.7.10)."""
        cdef uint16_t old = self._signalled
        cdef uint16_t event
        if used_index == old:
            return False
        self._signalled = used_index
        barrier()  # used.idx must be visible before the driver's wish is read
        if self._event_idx:
            event = index_of(<char *>self._available.buf + 4 + 2 * self._size)
            return <uint16_t>(used_index - event - 1) < <uint16_t>(used_index - old)
        return not index_of(<char *>self._available.buf) & NO_NOTIFY

    cdef int _take(self, Disk disk, serve, uint32_t count) except -1:
        """Take so many requests, which are available; fewer when they have moved much."""
        cdef const char *heads = <const char *>self._available.buf + 4
        cdef char *used = <char *>self._used.buf
        cdef char *element
        cdef uint32_t mask = self._size - 1
        cdef uint64_t limit = self.moved_bytes + BATCH_BYTES
        cdef uint32_t number
        cdef uint16_t head
        cdef int64_t written
        if not self._event_idx:
            publish(<char *>self._used.buf, NO_NOTIFY)
        for number in range(count):
            fetch(&head, heads + 2 * (self.available_index & mask), 2)
            written = 0
            if self._parse(head):
                written = self._transfer(disk)
            if not written:
                written = serve(head)
            self.available_index += 1
            if written == UNANSWERED_NOW:
                continue
            element = used + 4 + 8 * (self.used_index & mask)
            store(element, head)
            store(element + 4, <uint32_t>written)
            self.used_index += 1
            self.answered += 1
            publish(used + 2, self.used_index)
            if self.moved_bytes >= limit:
                break
        return 0

    cdef inline bint _holds(self, uint64_t offset, uint64_t length) noexcept nogil:
        """Whether the region has all of these bytes, by their distance from its beginning (mod 2⁶⁴)."""
        cdef uint64_t size = <uint64_t>self._memory.len
        return offset <= size and length <= size - offset

    cdef bint _parse(self, uint16_t head) noexcept nogil:
        """Whether it is a plain request: a header, data in one direction, a byte of status, each a descriptor (2.7.5)."""
        cdef descriptor now
        cdef const char *table = <const char *>self._descriptors.buf
        cdef char *memory = <char *>self._memory.buf
        cdef uint32_t entries = self._size
        cdef uint16_t direction = 0
        cdef uint64_t at
        cdef int count = 0
        cdef uint64_t length = 0
        if head >= entries:
            return False
        fetch(&now, table + ENTRY_BYTES * <uint32_t>head, ENTRY_BYTES)
        if now.flags == INDIRECT:
            at = now.address - self._base
            entries = now.length // ENTRY_BYTES
            if now.length % ENTRY_BYTES or not 0 < entries <= SEGMENTS + 2 or not self._holds(at, now.length):
                return False
            table = memory + at
            fetch(&now, table, ENTRY_BYTES)
        at = now.address - self._base
        if now.flags != NEXT or now.length != sizeof(header) or not self._holds(at, sizeof(header)):
            return False
        fetch(&self._header, memory + at, sizeof(header))
        while True:
            if now.next >= entries:
                return False
            fetch(&now, table + ENTRY_BYTES * <uint32_t>now.next, ENTRY_BYTES)
            at = now.address - self._base
            if not now.length or not self._holds(at, now.length):
                return False
            if now.flags == WRITE:
                break
            if now.flags | WRITE != NEXT | WRITE or count == SEGMENTS or (count and now.flags != direction):
                return False
            direction = now.flags
            self._pieces[count].iov_base = memory + at
            self._pieces[count].iov_len = now.length
            length += now.length
            count += 1
        if now.length != 1 or not count:
            return False
        self._status = memory + at
        self._count = count
        self._length = length
        self._is_read = direction & WRITE
        return self._header.kind == (IN if self._is_read else OUT)

    cdef int64_t _transfer(self, Disk disk) except -2:
        """Move the data of the request that was parsed; the bytes written into memory, 0 if `serve` has to do it."""
        cdef uint64_t granule = self._header.sector >> (disk.shift - SECTOR_SHIFT)
        cdef uint64_t inside = (self._header.sector << SECTOR_SHIFT) & ((<uint64_t>1 << disk.shift) - 1)
        cdef bint is_done
        if granule >= disk.granules or self._length % 512 or self._length > (<uint64_t>1 << disk.shift) - inside:
            return 0
        if self._is_read:
            is_done = self._read(disk, granule, inside)
        else:
            is_done = not disk.read_only and self._write(disk, granule, inside)
        if not is_done:
            return 0
        self._status[0] = 0
        self.moved_bytes += self._length
        return <int64_t>self._length + 1 if self._is_read else 1

    cdef bint _read(self, Disk disk, uint64_t granule, uint64_t inside) except -1:
        cdef object place = disk.direct_read(granule)
        cdef object levels
        if place is not None:
            return self._move(place, inside, self._pieces, self._count, self._length)
        levels = disk.mixed_read(granule)
        if levels is not None and self._read_shared((<tuple>levels)[0], inside):
            disk.mixed_used(granule)
            return True
        try:
            disk.preadv(self._header.sector << SECTOR_SHIFT, self._views())
        except (OSError, MullionError):
            return False  # what is wrong is found out by `serve`
        return True

    cdef bint _write(self, Disk disk, uint64_t granule, uint64_t inside) except -1:
        cdef object place = disk.direct_write(granule)
        cdef object levels
        if place is None:
            levels = disk.mixed_read(granule)
            if levels is not None:
                place = self._shared_place((<tuple>levels)[0], inside)
                if place is not None and (<tuple>place)[0] == disk.mixed_write_fd:
                    disk.mixed_used(granule)
                else:
                    place = None
        if place is not None:
            if self._length > PIECE_BYTES:
                return self._write_in_pieces(place, inside)
            return self._move(place, inside, self._pieces, self._count, self._length)
        try:
            disk.pwritev(self._header.sector << SECTOR_SHIFT, self._views())
        except (OSError, MullionError):
            return False
        return True

    cdef bint _move(self, tuple place, uint64_t inside, iovec *pieces, int count, uint64_t length) except -1:
        """Read or write pieces at a place in a file; whether all was moved."""
        cdef int fd = place[0]
        cdef int64_t offset = <int64_t>place[1] + <int64_t>inside
        cdef bint is_read = self._is_read
        cdef ssize_t moved
        with nogil:
            if is_read:
                moved = preadv(fd, pieces, count, offset)
            else:
                moved = pwritev(fd, pieces, count, offset)
        return moved >= 0 and <uint64_t>moved == length

    cdef bint _write_in_pieces(self, tuple place, uint64_t inside) except -1:
        """As `vhd.fileio.FileIO.write_data`; whether all was written."""
        cdef int fd = place[0]
        cdef int64_t offset = <int64_t>place[1] + <int64_t>inside
        cdef uint64_t left = self._length
        cdef uint64_t step = PIECE_BYTES - <uint64_t>offset % PIECE_BYTES
        cdef int first = 0
        cdef size_t skip = 0
        with nogil:
            while left:
                if step > left:
                    step = left
                if pwritev(fd, self._part, self._cut(&first, &skip, step), offset) != <ssize_t>step:
                    break
                offset += <int64_t>step
                left -= step
                step = PIECE_BYTES
        return not left

    cdef object _shared_place(self, tuple level, uint64_t inside):
        """Where the granule would begin in the one file that all of the request lies in, if there is one."""
        cdef bytes owners = level[0]
        cdef int shift = level[1]
        cdef const uint8_t *owner_of = owners
        cdef uint64_t unit = inside >> shift
        cdef uint64_t last = (inside + self._length - 1) >> shift
        cdef uint8_t owner
        if last >= <uint64_t>len(owners):
            return None
        owner = owner_of[unit]
        while unit < last:
            unit += 1
            if owner_of[unit] != owner:
                return None
        return (<tuple>level[2])[owner]

    cdef bint _read_shared(self, tuple level, uint64_t inside) except -1:
        """Read run by run what several files have of a granule; False when there is more to it than that."""
        cdef bytes owners = level[0]
        cdef int shift = level[1]
        cdef tuple places = level[2]
        cdef const uint8_t *owner_of = owners
        cdef uint64_t at = inside
        cdef uint64_t end = inside + self._length
        cdef uint64_t after, unit
        cdef uint8_t owner
        cdef object place
        cdef int first = 0
        cdef size_t skip = 0
        if (end - 1) >> shift >= <uint64_t>len(owners):
            return False
        while at < end:
            unit = at >> shift
            owner = owner_of[unit]
            unit += 1
            while unit << shift < end and owner_of[unit] == owner:
                unit += 1
            after = min(end, unit << shift)
            place = places[owner]
            if place is None:
                return False
            if not self._move(place, at, self._part, self._cut(&first, &skip, after - at), after - at):
                return False
            at = after
        return True

    cdef int _cut(self, int *first, size_t *skip, uint64_t length) noexcept nogil:
        """Put the next so many bytes of `_pieces` into `_part`; how many pieces they are.

        `first` is the piece to begin with, `skip` what of it is gone; both are moved on.
        """
        cdef int count = 0
        cdef size_t step
        while length:
            step = self._pieces[first[0]].iov_len - skip[0]
            if step > length:
                step = length
            self._part[count].iov_base = <char *>self._pieces[first[0]].iov_base + skip[0]
            self._part[count].iov_len = step
            count += 1
            length -= step
            skip[0] += step
            if skip[0] == self._pieces[first[0]].iov_len:
                first[0] += 1
                skip[0] = 0
        return count

    cdef list _views(self):
        """The pieces for Python code."""
        cdef list views = []
        cdef Py_ssize_t at
        cdef int number
        for number in range(self._count):
            at = <char *>self._pieces[number].iov_base - <char *>self._memory.buf
            views.append(self._view[at : at + <Py_ssize_t>self._pieces[number].iov_len])
        return views


cdef class Disk:
    """What a run needs of its device, looked up once: tables may have been exchanged since the last run."""

    cdef object direct_read
    cdef object direct_write
    cdef object mixed_read
    cdef object mixed_used
    cdef object preadv
    cdef object pwritev
    cdef object mixed_write_fd
    cdef bint read_only
    cdef uint8_t shift
    cdef uint64_t granules

    def __cinit__(self, device):
        self.direct_read = device.direct_read.get
        self.direct_write = device.direct_write.get
        self.mixed_read = device.mixed_read.get
        self.mixed_used = device.mixed_used.add
        self.mixed_write_fd = device.mixed_write_fd
        self.preadv = device.preadv
        self.pwritev = device.pwritev
        self.read_only = device.read_only
        self.shift = device.block_shift
        self.granules = <uint64_t>device.size_bytes >> self.shift
