"""Chunk maps: which chunk is at which place of a disk, as a tree of nodes that are stored like chunks.

A node is 256 ids of 32 bytes, 8192 bytes. The leaves' ids are those of chunks, 16 MiB of a disk a leaf; those of the
levels above are ids of nodes. The tree of a disk has as many levels as it needs (one for 16 MiB, two for 4 GiB, three
for 1 TiB); its root is all that a manifest has to keep. The id of zeros, 32 zero bytes, stands for a chunk or for
a whole node without data: nothing is stored for it. Equal parts of two disks have equal nodes, stored once; so an
incremental backup writes the nodes above what has changed, and two trees are compared, or marked, without looking into
what they share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from mullion.repository.keys import CHUNK_BYTES, ID_BYTES, NODE_IDS

ZERO_ID: Final = bytes(ID_BYTES)
NODE_BYTES: Final = NODE_IDS * ID_BYTES
ZERO_NODE: Final = bytes(NODE_BYTES)
SIZE_LIMIT_BYTES: Final = CHUNK_BYTES * NODE_IDS**4
"""256 TiB: four levels."""

LoadNode = Callable[[bytes], bytes]
StoreNode = Callable[[bytes], bytes]
"""Stores a node of 8192 bytes and gives its id."""


class Tree(NamedTuple):
    """A stored map."""

    root: bytes
    size_bytes: int

    @property
    def chunks(self) -> int:
        return chunks_of(self.size_bytes)

    @property
    def levels(self) -> int:
        return levels_of(self.chunks)


def chunks_of(size_bytes: int) -> int:
    """How many chunks cover a size; the last one is filled up with zeros."""
    return -(-size_bytes // CHUNK_BYTES)


def levels_of(chunks: int) -> int:
    levels = 1
    while chunks > NODE_IDS**levels:
        levels += 1
    return levels


def node_ids(node: bytes) -> Iterator[bytes]:
    return (node[offset : offset + ID_BYTES] for offset in range(0, NODE_BYTES, ID_BYTES))


def walk_nodes(tree: Tree, load: LoadNode, enter: Callable[[bytes, int, int], bool]) -> Iterator[tuple[int, bytes]]:
    """The leaves of a tree that has any: the number of the leaf's first chunk, and the leaf.

    `enter` is asked for each node before it is loaded, with its id, its level (0 is a leaf) and its first chunk.
    """
    if tree.root != ZERO_ID:
        yield from _walk(tree.root, tree.levels - 1, 0, load, enter)


def _walk(
    node_id: bytes, level: int, first: int, load: LoadNode, enter: Callable[[bytes, int, int], bool]
) -> Iterator[tuple[int, bytes]]:
    if not enter(node_id, level, first):
        return
    node = load(node_id)
    if level == 0:
        yield first, node
        return
    span = NODE_IDS**level
    for number, child in enumerate(node_ids(node)):
        if child != ZERO_ID:
            yield from _walk(child, level - 1, first + number * span, load, enter)


def find_leaf(tree: Tree, chunk: int, load: LoadNode) -> bytes:
    """The leaf that has a chunk; one of zeros where nothing is stored."""
    node_id = tree.root
    for level in range(tree.levels - 1, -1, -1):
        if node_id == ZERO_ID:
            return ZERO_NODE
        node = load(node_id)
        if level:
            offset = chunk // NODE_IDS**level % NODE_IDS * ID_BYTES
            node_id = node[offset : offset + ID_BYTES]
    return node


class TreeBuilder:
    """A new tree, made by changing another or from nothing.

    One node a level is open; chunks must be set in rising order, so that no node is stored and then loaded again.
    """

    def __init__(self, size_bytes: int, load: LoadNode, store: StoreNode, base: Tree | None = None) -> None:
        self._size = size_bytes
        self._load = load
        self._store = store
        self._levels = levels_of(chunks_of(size_bytes))
        self._open: list[tuple[int, bytearray, bytes] | None] = [None] * self._levels
        self._root = ZERO_ID
        self.data_chunks = 0
        """How many chunks have data now, less those of the base."""
        if base is not None and base.root != ZERO_ID:
            self._fit(base)
        self._is_shorter = base is not None and base.chunks > chunks_of(size_bytes)

    def set(self, chunk: int, chunk_ids: Sequence[bytes]) -> None:
        """What some chunks, from the one of this number on, are from now on."""
        done = 0
        while done < len(chunk_ids):
            leaf_number, place = divmod(chunk + done, NODE_IDS)
            leaf = self._node(0, leaf_number)
            ids = chunk_ids[done : done + NODE_IDS - place]
            stored = slice(place * ID_BYTES, (place + len(ids)) * ID_BYTES)
            self.data_chunks += _count_zeros(leaf[stored]) - ids.count(ZERO_ID)
            leaf[stored] = b"".join(ids)
            done += len(ids)

    def finish(self) -> Tree:
        """Store what is open still."""
        if self._is_shorter:
            self._cut()
        self._close(self._levels - 1)
        return Tree(self._root, self._size)

    def _node(self, level: int, number: int) -> bytearray:
        """The node of a level, opened, with all those above it."""
        held = self._open[level]
        if held is not None and held[0] == number:
            return held[1]
        if level == self._levels - 1:
            node_id = self._root
        else:
            parent = self._node(level + 1, number // NODE_IDS)
            self._close(level)
            offset = number % NODE_IDS * ID_BYTES
            node_id = bytes(parent[offset : offset + ID_BYTES])
        before = ZERO_NODE if node_id == ZERO_ID else self._load(node_id)
        content = bytearray(before)
        self._open[level] = (number, content, before)
        return content

    def _close(self, top: int) -> None:
        """Store the open nodes from the leaf up to a level, each into its parent, which is open."""
        for level in range(top + 1):
            held = self._open[level]
            if held is None:
                continue
            self._open[level] = None
            number, content, before = held
            if content == before:
                continue
            node = bytes(content)
            node_id = ZERO_ID if node == ZERO_NODE else self._store(node)
            if level == self._levels - 1:
                self._root = node_id
            else:
                above = self._open[level + 1]
                assert above is not None
                assert above[0] == number // NODE_IDS
                offset = number % NODE_IDS * ID_BYTES
                above[1][offset : offset + ID_BYTES] = node_id

    def _fit(self, base: Tree) -> None:
        """Begin with the content of a base of as many levels, or of fewer or more."""
        self._root = base.root
        for _ in range(self._levels, base.levels):
            self._root = ZERO_ID if self._root == ZERO_ID else self._load(self._root)[:ID_BYTES]
        if base.levels < self._levels:
            self._root = ZERO_ID  # until a new node above the base's root is stored; none is when nothing has data
        for level in range(base.levels, self._levels):  # new nodes above the base's root, open until the end
            content = bytearray(NODE_BYTES)
            if level == base.levels:
                content[:ID_BYTES] = base.root
            self._open[level] = (0, content, ZERO_NODE)

    def _cut(self) -> None:
        """Forget what lies past the end, on each level of the way to the last chunk."""
        last = chunks_of(self._size) - 1
        for level in range(self._levels):
            node = self._node(level, last // NODE_IDS ** (level + 1))
            kept = (last // NODE_IDS**level % NODE_IDS + 1) * ID_BYTES
            node[kept:] = bytes(NODE_BYTES - kept)


def _count_zeros(ids: bytearray) -> int:
    """How many of the ids in a part of a node are those of zeros."""
    if ids == ZERO_NODE[: len(ids)]:
        return len(ids) // ID_BYTES
    return sum(ids.startswith(ZERO_ID, offset) for offset in range(0, len(ids), ID_BYTES))


def count_data(tree: Tree, load: LoadNode) -> int:
    """How many chunks of a tree have data."""
    leaves = walk_nodes(tree, load, lambda _node, _level, _first: True)
    return sum(chunk_id != ZERO_ID for _, leaf in leaves for chunk_id in node_ids(leaf))
