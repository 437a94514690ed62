"""The prefix index: which leading blocks of a prompt each replica holds.

One path-compressed trie serves all replicas. An edge is the `bytes` of its blocks' hashes, so following it is one
memcmp; a node knows as a bit mask which replicas hold all of its edge, and when each last used it. Each replica has a
capacity in blocks and forgets as engines do: least recently used first, the tail of a prompt before its head.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from cachetools import FIFOCache
from numpy.typing import NDArray

from gorgo_plugin.prefix.blocks import HASH_BYTES

# A prompt made to branch at every block would turn a lookup into one step per block; a conversation has some dozens.
MAX_WALK_NODES = 4096
# Sets of replicas, and walks, kept as arrays of half a kilobyte each at 64 replicas.
MAX_MASKS = 4096
# Parts of a prompt whose last use a credit remembers; a flight keeps it until its usage is known.
MAX_STAMPS = 256
# Blocks of a forgotten replica that each later credit cleans away, so that forgetting itself costs nothing.
RETIRED_BLOCKS_PER_CREDIT = 4096
# Evictions of a replica that are remembered, to see from reports that they came too early; about as many requests.
MAX_EVICTIONS = 1024


class Node:
    """A part of a path: what `edge` holds, `HASH_BYTES` a block, behind what the nodes above hold."""

    __slots__ = ("children", "edge", "holding_children", "mask", "parent", "queued", "used")

    def __init__(self, edge: bytes, parent: Node | None) -> None:
        self.edge = edge
        self.parent = parent
        self.children: dict[bytes, Node] = {}
        self.mask = 0  # bit set: that replica holds every block of the edge, and of every edge above
        self.queued = 0  # bit set: that replica's eviction heap has an entry for this node
        self.used: dict[int, int] = {}  # bit -> tick of last use
        self.holding_children: dict[int, int] = {}  # bit -> how many children that replica holds


@dataclass(slots=True, eq=False)
class Credit:
    """What one dispatch added to the index, so that it can be taken back or corrected.

    Attributes:
        index: who gave it; a model that starts anew has another one.
        replica, bit: who was credited, and under which identity (a forgotten replica gets a new one).
        tick: the time of use that the credit wrote.
        leaf: the last node of the path.
        blocks: length of the path.
        boundary: the last node that was held before; what lies between it and `leaf` is new.
        extended_blocks: blocks appended to the edge of `boundary` itself.
        had_blocks: blocks of the prompt that were believed cached before.
        missing: hash of the first block that was not; empty when all were.
        age: the replica's capacity and the blocks it had evicted, added up; see `would_keep`.
        stamps: (end block, tick of last use before this credit) of each part that was believed cached.
    """

    index: PrefixIndex
    replica: int
    bit: int
    tick: int
    leaf: Node
    blocks: int
    boundary: Node
    extended_blocks: int
    had_blocks: int
    missing: bytes
    age: int
    stamps: tuple[tuple[int, int], ...]


class PrefixIndex:
    """Blocks held per replica. Replicas are small integers; not thread-safe (the router's lock covers it)."""

    def __init__(self) -> None:
        self._root = Node(b"", None)
        self._tick = 0
        self._bit_of: dict[int, int] = {}
        self._owner: dict[int, int] = {}  # bit -> replica
        self._rows_of_mask: dict[int, NDArray[np.intp] | int] = {}
        self._spreads: dict[tuple[tuple[int, int], ...], NDArray[np.float64]] = {}  # all steps of a walk but the last
        self._flags: list[int] = []  # bit -> mask of it alone: one object for all nodes, in the processor's cache
        self._free_bits: list[int] = []
        self._retired: list[int] = []
        self._capacity: dict[int, int] = {}  # replica -> blocks
        self._held: dict[int, int] = {}  # bit -> blocks
        self._heaps: dict[int, list[tuple[int, int, Node]]] = {}
        self._evicted: dict[int, int] = {}  # bit -> blocks evicted so far
        self._evictions: dict[int, FIFOCache[bytes, int]] = {}  # bit -> first hash evicted -> `_evicted` before
        self._pushes = 0  # breaks ties between heap entries of one tick; later pushes are nearer the root

    def set_capacity(self, replica: int, blocks: int) -> None:
        """Let `replica` hold at most `blocks` blocks; what is over leaves at once."""
        self._capacity[replica] = blocks
        if replica not in self._bit_of:
            self._assign_bit(replica)
        self._evict_to_capacity(replica)

    def capacity(self, replica: int) -> int:
        """Blocks `replica` is believed to have room for; 0 where it is not known."""
        return self._capacity.get(replica, 0)

    def held_blocks(self, replica: int) -> int:
        """Blocks `replica` is believed to hold."""
        bit = self._bit_of.get(replica)
        return 0 if bit is None else self._held[bit]

    def match(self, hashes: bytes) -> dict[int, int]:
        """Leading blocks of `hashes` held by each replica that holds any: replica -> blocks."""
        owner = self._owner
        return {owner[bit]: depth for mask, depth in self.walk(hashes) for bit in _bits(mask) if bit in owner}

    def blocks(self, hashes: bytes, replicas: int) -> NDArray[np.float64]:
        """The same as an array of shape (replicas,), for the replicas 0 to `replicas` - 1."""
        return self.spread(self.walk(hashes), replicas)

    def spread(self, walk: Sequence[tuple[int, int]], replicas: int) -> NDArray[np.float64]:
        """What `walk` found, as an array of shape (replicas,)."""
        if not walk:
            return np.zeros(replicas)
        *shared, (mask, depth) = walk  # mostly the same again but for the last step: who holds a system prompt
        steps = tuple(shared)
        spread = self._spreads.get(steps)
        if spread is None or len(spread) != replicas:
            spread = self._spread(steps, replicas)
        found = spread.copy()
        rows = self._rows_of_mask.get(mask)
        found[self._rows_of(mask) if rows is None else rows] = depth
        return found

    def _spread(self, steps: tuple[tuple[int, int], ...], replicas: int) -> NDArray[np.float64]:
        if len(self._spreads) >= MAX_MASKS:
            self._spreads.clear()
        found = self._spreads[steps] = np.zeros(replicas)
        for mask, depth in steps:
            found[self._rows_of(mask)] = depth
        return found

    def _rows_of(self, mask: int) -> NDArray[np.intp] | int:
        """The replicas whose bits are set, as what picks them out of an array."""
        if len(self._rows_of_mask) >= MAX_MASKS:
            self._rows_of_mask.clear()
        owned = [self._owner[bit] for bit in _bits(mask) if bit in self._owner]
        rows = self._rows_of_mask[mask] = owned[0] if len(owned) == 1 else np.array(owned, dtype=np.intp)
        return rows

    def walk(self, hashes: bytes) -> list[tuple[int, int]]:
        """(mask of replicas, leading blocks of `hashes` that they hold at least), the fewest blocks first.

        Each mask holds the bits of those that come after it.
        """
        steps: list[tuple[int, int]] = []
        node = self._root.children.get(hashes[:HASH_BYTES])
        if node is None:
            return steps
        mask, position, end, nodes_left = node.mask, 0, len(hashes), MAX_WALK_NODES
        while nodes_left:
            edge = node.edge
            if not hashes.startswith(edge, position):
                position += common_blocks(edge, hashes, position, end) * HASH_BYTES
                break
            position += len(edge)
            if position == end:
                break
            node = node.children.get(hashes[position : position + HASH_BYTES])
            if node is None:
                break
            if node.mask != mask:  # a part of it
                steps.append((mask, position // HASH_BYTES))
                mask = node.mask
            nodes_left -= 1
        steps.append((mask, position // HASH_BYTES))
        return steps

    def credit(self, replica: int, hashes: bytes) -> Credit:
        """Note that `replica` is about to hold all blocks of `hashes`, evicting its oldest where it is full."""
        if self._retired:
            self._clean_retired()
        bit, capacity = self._bit_of[replica], self._capacity[replica]
        self._tick = tick = self._tick + 1
        flag = self._flags[bit]
        node = boundary = self._root
        position, end = 0, min(len(hashes), capacity * HASH_BYTES)
        stamps: list[tuple[int, int]] = []
        extended = 0
        for _ in range(MAX_WALK_NODES):
            if position >= end:
                break
            first = hashes[position : position + HASH_BYTES]
            child = node.children.get(first)
            if child is None and node.mask == flag and not node.children:
                # A conversation of this replica alone grows: a longer edge, not one more node a turn.
                extended = (end - position) // HASH_BYTES
                node.edge += hashes[position:end]
                self._held[bit] += extended
                break
            if child is None:
                child = node.children[first] = Node(hashes[position:end], node)
            if position + len(child.edge) > end or not hashes.startswith(child.edge, position):
                child = self._split(child, common_blocks(child.edge, hashes, position, end))
            position += len(child.edge)
            if child.mask & flag:
                boundary = child
                stamps.append((position // HASH_BYTES, child.used[bit]))
            else:
                self._hold(child, bit)
            child.used[bit] = tick
            node = child
        if node is not self._root:
            self._queue_if_leaf(node, bit)
        age = capacity + self._evicted[bit]
        if self._held[bit] > capacity:
            self._evict_to_capacity(replica)
        had = stamps[-1][0] if stamps else 0
        if len(stamps) > MAX_STAMPS:  # some parts as one, used when the last of them was
            stamps = stamps[:: -(len(stamps) // MAX_STAMPS + 1)][::-1]
        missing = hashes[had * HASH_BYTES : (had + 1) * HASH_BYTES]
        return Credit(
            self,
            replica,
            bit,
            tick,
            node,
            end // HASH_BYTES,
            boundary,
            extended,
            had,
            missing,
            age,
            tuple(stamps),
        )

    def revoke(self, credit: Credit) -> None:
        """Take back what `credit` added, except what a later use has confirmed."""
        bit, node = credit.bit, credit.leaf
        if not self._stands(credit):
            return
        while node is not credit.boundary:
            if node.mask >> bit & 1:
                if self._used_since(node, credit):
                    return
                self._release(node, bit)
            assert node.parent is not None  # the boundary is an ancestor, at the latest the root
            node = node.parent
        left = credit.extended_blocks  # by now perhaps cut into several nodes, this one the lowest
        while left and node.mask >> bit & 1 and not self._used_since(node, credit):
            assert node.parent is not None
            node, left = node.parent, left - self._drop_tail(node, bit, left)

    def _stands(self, credit: Credit) -> bool:
        """Whether the replica is still the one that was credited, not forgotten since and not of another index."""
        return credit.index is self and self._bit_of.get(credit.replica) == credit.bit

    def _used_since(self, node: Node, credit: Credit) -> bool:
        return node.used[credit.bit] != credit.tick or bool(node.holding_children.get(credit.bit))

    def correct(self, credit: Credit, cached_blocks: int) -> int:
        """Believe the engine, which found only `cached_blocks` where `credit.had_blocks` were expected.

        Engines evict least recently used first, so everything last used no later than the missing block is gone too.
        Returns the number of blocks forgotten.
        """
        if not self._stands(credit):
            return 0
        oldest = next((tick for end, tick in credit.stamps if end > cached_blocks), None)
        if oldest is None:
            return 0
        return self._forget_until(credit.bit, oldest)

    def expire(self, replica: int, tick: int) -> int:
        """Forget what `replica` last used no later than the credit of that tick; returns the number of blocks."""
        bit = self._bit_of.get(replica)
        return 0 if bit is None else self._forget_until(bit, tick)

    def _forget_until(self, bit: int, tick: int) -> int:
        before, heap = self._held[bit], self._heaps[bit]
        while heap and heap[0][0] <= tick:
            self._evict_one(bit, before, tick)
        return before - self._held[bit]

    def would_keep(self, credit: Credit) -> int:
        """Least capacity in blocks with which the first block that was missing would not have been evicted.

        0 when it was not evicted lately.
        """
        if not self._stands(credit):
            return 0
        evicted_before = self._evictions[credit.bit].get(credit.missing)
        return 0 if evicted_before is None else max(credit.age - evicted_before, 0)

    def ended(self, credit: Credit) -> None:
        """The request is over: engines let its blocks age from here on, not from its dispatch."""
        if self._stands(credit):
            self._tick += 1
            for node in upwards(credit.leaf):
                if credit.bit in node.used:
                    node.used[credit.bit] = self._tick

    def forget(self, replica: int) -> None:
        """Drop all credit of `replica` at once; its nodes are cleaned away by later credits."""
        bit = self._bit_of.get(replica)
        if bit is None:
            return
        self._retire(bit)
        self._assign_bit(replica)

    def remove(self, replica: int) -> None:
        """Forget `replica` and its capacity."""
        self.forget(replica)
        bit = self._bit_of.pop(replica, None)
        if bit is not None:
            self._retire(bit)
            self._capacity.pop(replica, None)

    def _retire(self, bit: int) -> None:
        del self._owner[bit]
        self._owners_changed()
        self._retired.append(bit)

    def _assign_bit(self, replica: int) -> None:
        if self._free_bits:
            bit = self._free_bits.pop()
        else:
            bit = len(self._flags)
            self._flags.append(1 << bit)
        self._bit_of[replica] = bit
        self._owner[bit] = replica
        self._owners_changed()
        self._held[bit] = 0
        self._heaps[bit] = []
        self._evicted[bit] = 0
        self._evictions[bit] = FIFOCache(MAX_EVICTIONS)

    def _owners_changed(self) -> None:
        self._rows_of_mask.clear()
        self._spreads.clear()

    def _split(self, node: Node, blocks: int) -> Node:
        """Cut the edge after `blocks`; returns the new upper node. `node` stays the lower one, still queued."""
        parent = node.parent
        assert parent is not None
        cut = blocks * HASH_BYTES
        upper = Node(node.edge[:cut], parent)
        upper.mask = node.mask
        upper.used = dict(node.used)
        upper.holding_children = dict.fromkeys(node.used, 1)
        parent.children[upper.edge[:HASH_BYTES]] = upper
        node.edge = node.edge[cut:]
        node.parent = upper
        upper.children[node.edge[:HASH_BYTES]] = node
        return upper

    def _hold(self, node: Node, bit: int) -> None:
        flag = self._flags[bit]
        node.mask = node.mask | flag if node.mask else flag
        self._held[bit] += len(node.edge) // HASH_BYTES
        parent = node.parent
        assert parent is not None
        parent.holding_children[bit] = parent.holding_children.get(bit, 0) + 1

    def _release(self, node: Node, bit: int) -> None:
        """Drop `bit` from a node none of whose children it holds, and the node itself when nobody holds it."""
        node.mask &= ~(1 << bit)
        del node.used[bit]
        self._held[bit] -= len(node.edge) // HASH_BYTES
        parent = node.parent
        assert parent is not None
        left = parent.holding_children[bit] - 1
        if left:
            parent.holding_children[bit] = left
        else:
            del parent.holding_children[bit]
            if parent.parent is not None:
                self._queue_if_leaf(parent, bit)
        if not node.mask:
            del parent.children[node.edge[:HASH_BYTES]]
            self._gone(node)

    def _gone(self, node: Node) -> None:
        """A node was taken out of the trie."""

    def _queue_if_leaf(self, node: Node, bit: int) -> None:
        flag = 1 << bit
        if node.queued & flag or node.holding_children.get(bit):
            return
        node.queued |= flag
        self._pushes += 1
        heapq.heappush(self._heaps[bit], (node.used[bit], self._pushes, node))

    def _evict_to_capacity(self, replica: int) -> None:
        bit = self._bit_of[replica]
        while (over := self._held[bit] - self._capacity[replica]) > 0 and self._heaps[bit]:
            self._evict_one(bit, over, self._tick)

    def _evict_one(self, bit: int, most_blocks: int, newest: int) -> None:
        """Pop one heap entry; evict up to `most_blocks` if it is a leaf last used no later than `newest`."""
        flag = 1 << bit
        tick, _, node = heapq.heappop(self._heaps[bit])
        node.queued &= ~flag
        if not node.mask & flag or node.holding_children.get(bit):
            return  # released meanwhile, or no leaf any more: queued again when it is
        if node.used[bit] != tick or tick > newest:
            self._queue_if_leaf(node, bit)  # used since it was queued
            return
        kept = max(len(node.edge) - most_blocks * HASH_BYTES, 0)
        self._evictions[bit][node.edge[kept : kept + HASH_BYTES]] = self._evicted[bit]
        self._evicted[bit] += self._drop_tail(node, bit, most_blocks)

    def _drop_tail(self, node: Node, bit: int, most_blocks: int) -> int:
        """Take up to `most_blocks` of a leaf's tail from a replica; returns how many it had."""
        blocks = len(node.edge) // HASH_BYTES
        if blocks <= most_blocks:
            self._release(node, bit)
            return blocks
        if node.mask == 1 << bit:  # nobody else holds it, so it has no children: shorten it in place
            node.edge = node.edge[: -most_blocks * HASH_BYTES]
            self._held[bit] -= most_blocks
            self._queue_if_leaf(node, bit)
        else:
            upper = self._split(node, blocks - most_blocks)
            self._release(node, bit)
            self._queue_if_leaf(upper, bit)
        return most_blocks

    def _clean_retired(self) -> None:
        while self._retired:
            bit = self._retired[-1]
            before, heap = self._held[bit], self._heaps[bit]
            while heap and before - self._held[bit] < RETIRED_BLOCKS_PER_CREDIT:
                self._evict_one(bit, self._held[bit], self._tick)
            if heap:
                return
            self._retired.pop()
            del self._held[bit], self._heaps[bit], self._evicted[bit], self._evictions[bit]
            self._free_bits.append(bit)


def upwards(node: Node) -> Iterator[Node]:
    """The node and those above it, without the root."""
    above: Node | None = node
    while above is not None and above.parent is not None:
        yield above
        above = above.parent


def _bits(mask: int) -> Iterator[int]:
    """The places of the bits that are set."""
    while mask:
        low = mask & -mask
        mask ^= low
        yield low.bit_length() - 1


def common_blocks(edge: bytes, hashes: bytes, position: int, end: int) -> int:
    """How many leading blocks `edge` shares with `hashes[position:end]`, by bisection over memcmp."""
    limit = end - position
    if len(edge) <= limit and hashes.startswith(edge, position):
        return len(edge) // HASH_BYTES
    low, high = 0, min(len(edge), limit) // HASH_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        if hashes.startswith(edge[: middle * HASH_BYTES], position):
            low = middle
        else:
            high = middle - 1
    return low
