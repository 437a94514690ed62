"""The prefix cache of one engine: full blocks under chained keys, reference counts, LRU eviction tail first.

Follows vLLM: a block counts from the moment its tokens are scheduled, a block in use is never evicted, a finished
request gives its blocks back last one first, so that the tail of a prompt is forgotten before its head, and a hit takes
a block out of the eviction order until its last user ends.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_KEY_BYTES = 8  # 64-bit keys: among a million blocks two collide with a probability under 1e-7


def block_keys(tokens: NDArray[np.uint32], block_tokens: int, salt: str = "") -> list[int]:
    """Chained keys of the full blocks of `tokens` (uint32, shape (n,)): equal keys mean equal prefixes.

    The list has n // block_tokens entries. `salt` separates what must not share (model, LoRA adapter, cache salt).
    """
    blake2b = hashlib.blake2b
    parent = blake2b(salt.encode(), digest_size=_KEY_BYTES).digest()
    raw = np.ascontiguousarray(tokens, dtype=np.uint32).tobytes()
    width = 4 * block_tokens
    keys = []
    for start in range(0, len(raw) - width + 1, width):
        parent = blake2b(parent + raw[start : start + width], digest_size=_KEY_BYTES).digest()
        keys.append(int.from_bytes(parent, "big"))
    return keys


def finer_keys(coarse: Sequence[int], prompt_tokens: int, coarse_tokens: int, block_tokens: int) -> list[int]:
    """Keys of the engine's blocks for a prompt whose prefixes a trace names in coarser blocks.

    `coarse` holds one id per `coarse_tokens` tokens, equal ids being equal prefixes, as in a Mooncake trace; the last
    one may be partial. The result has prompt_tokens // block_tokens entries.

    Raises:
        ValueError: `coarse_tokens` is not a multiple of `block_tokens`, or `coarse` does not cover the prompt.
    """
    factor, remainder = divmod(coarse_tokens, block_tokens)
    if remainder:
        raise ValueError(f"block_tokens: expected a divisor of {coarse_tokens}, got {block_tokens}")
    if len(coarse) * coarse_tokens < prompt_tokens:
        raise ValueError(f"{len(coarse)} blocks of {coarse_tokens} tokens do not cover {prompt_tokens} tokens")
    keys: list[int] = []
    for identity in coarse:
        keys.extend(range(identity * factor, (identity + 1) * factor))
    return keys[: prompt_tokens // block_tokens]


@dataclass(slots=True)
class Lease:
    """The blocks one request holds: `shared` under keys, `private` not (yet) findable by others."""

    shared: list[int] = field(default_factory=list)
    private: int = 0


@dataclass(frozen=True, slots=True)
class Stored:
    """Blocks became findable: their keys in order, and the key of the block before the first (None: a start)."""

    keys: Sequence[int]
    parent: int | None


@dataclass(frozen=True, slots=True)
class Removed:
    """A block was evicted."""

    key: int


@dataclass(frozen=True, slots=True)
class Cleared:
    """Everything was forgotten."""


Change = Stored | Removed | Cleared


class BlockCache:
    """Blocks of one engine, `capacity` of them usable; `evicted`, where given, is told the keys of what is evicted.

    With `record` every change of what is findable is appended to `changes`, which whoever drives the engine drains.

    A block is blank, private to one lease, or keyed; a keyed one is in use (reference count above 0) or idle, and then
    stands in the eviction order. Blank blocks are handed out before any idle one is evicted.
    """

    def __init__(self, capacity: int, record: bool = False) -> None:
        self.capacity = capacity
        self.changes: list[Change] = []
        self._record = record
        self._references: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._blank = capacity

    def match(self, keys: Sequence[int], limit: int) -> int:
        """How many of the first `limit` blocks are cached, counted from the start without a gap."""
        references = self._references
        matched = 0
        for key in keys[:limit]:
            if key not in references:
                break
            matched += 1
        return matched

    def acquire(self, keys: Sequence[int], matched: int, total: int) -> Lease | None:
        """Hold the first `matched` cached blocks and `total - matched` new ones, evicting the longest idle.

        None, with nothing changed, when there is no room without taking blocks in use.
        """
        hits = keys[:matched]
        references, idle = self._references, self._idle
        needed = total - matched
        if needed > self._blank and needed > self._blank + len(idle) - sum(key in idle for key in hits):
            return None
        for key in hits:
            if references[key] == 0:
                del idle[key]
            references[key] += 1
        from_blank = min(needed, self._blank)
        self._blank -= from_blank
        for _ in range(needed - from_blank):
            evicted, _nothing = idle.popitem(last=False)
            del references[evicted]
            if self._record:
                self.changes.append(Removed(evicted))
        return Lease(list(hits), needed)

    def publish(self, lease: Lease, keys: Sequence[int], parent: int | None = None) -> None:
        """Make private blocks of a lease findable; one whose content is cached already stays a private duplicate.

        `parent` is the key of the block before the first.
        """
        references = self._references
        if self._record:
            self._record_stored(keys, parent)
        for key in keys:
            if key not in references:
                references[key] = 1
                lease.shared.append(key)
                lease.private -= 1

    def release(self, lease: Lease) -> None:
        """Give a lease's blocks back, the tail first in line for eviction."""
        references, idle = self._references, self._idle
        for key in reversed(lease.shared):
            left = references[key] - 1
            references[key] = left
            if left == 0:
                idle[key] = None
        self._blank += lease.private
        lease.shared, lease.private = [], 0

    def _record_stored(self, keys: Sequence[int], parent: int | None) -> None:
        """Note each run of the keys that is new."""
        run: list[int] = []
        before = parent
        for key in keys:
            if key not in self._references:
                run.append(key)
            else:
                if run:
                    self.changes.append(Stored(run, before))
                run, before = [], key
        if run:
            self.changes.append(Stored(run, before))

    def clear(self) -> None:
        """Forget everything; leases still out must not be released afterwards."""
        if self._record:
            self.changes.append(Cleared())
        self._references.clear()
        self._idle.clear()
        self._blank = self.capacity

    @property
    def cached_blocks(self) -> int:
        """Blocks that a prompt could share."""
        return len(self._references)

    @property
    def usage(self) -> float:
        """Share of the blocks held by requests, from 0 to 1; idle cached blocks count as free, as in vLLM's gauge."""
        return 1.0 - (self._blank + len(self._idle)) / self.capacity
