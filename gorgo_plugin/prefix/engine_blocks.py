"""The blocks that engines themselves say they hold (vLLM's KV events), as an index over prompts.

An engine names a block by a hash of its own over the block and everything before it. Here each block is turned into a
*prefix key*, computed from the same secret block hashes as the router's own index, so that a prompt's keys are found
without knowing the engine's hash function, and so that an engine cannot make two prompts collide.

Prefix caches are closed: who holds a block holds all before it, because engines evict a prompt's tail first. A lookup
therefore bisects over the depth, for all replicas at once. Where an engine did evict a block from the middle, that
replica's depth is walked instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gorgo_plugin.prefix.blocks import HASH_BYTES, BlockHasher

PIECE_BLOCKS = 256  # blocks taken in under one hold of the router's lock: a few tenths of a millisecond
WALK_BLOCKS = 16_384  # blocks walked for a replica with a hole; what lies deeper counts as not held
MAX_ADAPTERS = 1024  # LoRA names are the engines' word; this only bounds nonsense
RETIRED_BLOCKS_PER_PIECE = 1024  # blocks of a forgotten replica that each later piece cleans away


@dataclass(frozen=True, slots=True, eq=False)
class BlockStored:
    """Consecutive blocks that an engine now holds.

    Attributes:
        block_hashes: the engine's names of them, in order.
        parent_hash: name of the block before the first; None at the start of a prompt.
        tokens: their token ids, uint32, shape (len(block_hashes) * block_tokens,).
        block_tokens: tokens of one engine block.
        adapter: name of the LoRA adapter they were computed with, "" without one.
    """

    block_hashes: Sequence[int]
    parent_hash: int | None
    tokens: NDArray[np.uint32]
    block_tokens: int
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """Blocks that an engine evicted, by its names of them."""

    block_hashes: Sequence[int]


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """The engine's prefix cache is empty."""


KvEvent: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """A part of a `BlockStored`, hashed and ready to be put into the index.

    Attributes:
        names: the engine's names of the blocks.
        parent: name of the block before them.
        hashes: keyed hashes of the router's own blocks inside them, `HASH_BYTES` each.
        from_start: the event it is a part of begins with a prompt's first block.
        adapter: as in `BlockStored`.
    """

    names: Sequence[int]
    parent: int | None
    hashes: bytes
    from_start: bool
    adapter: str


Piece: TypeAlias = StoredPiece | BlockRemoved | AllBlocksCleared


class PrefixKeys:
    """Keys of prefixes: `key_j = key_(j-1) * K + h_j + c mod 2**64` with secret odd K and c, from a secret start.

    `c` sets a prompt apart from the same one followed by a block whose hash is 0, as that of zero tokens is.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = hashlib.blake2b(secret, key=b"gorgo prefix root", digest_size=32).digest()
        stream = hashlib.blake2b(secret, key=b"gorgo prefix keys", digest_size=16).digest()
        factor, self._added = (int.from_bytes(part, "little") | 1 for part in (stream[:8], stream[8:]))
        self._factors = factor, pow(factor, -1, 2**64)
        self._powers = self._inverse_powers = np.ones(0, dtype=np.uint64)
        self._roots: dict[str, int] = {}

    def root(self, adapter: str = "") -> int:
        """The key of the empty prefix; prompts of another LoRA adapter start from another one."""
        root = self._roots.get(adapter)
        if root is None:
            name = adapter.encode("utf-8", "surrogatepass")
            digest = hashlib.blake2b(name, key=self._secret, digest_size=8).digest()
            root = self._roots[adapter] = int.from_bytes(digest, "little")
        return root

    def keys(self, hashes: bytes, start: int) -> NDArray[np.uint64]:
        """Keys of the prefixes that end with each of the blocks, behind the prefix of key `start`."""
        blocks = len(hashes) // HASH_BYTES
        if blocks > len(self._powers):
            self._grow(max(blocks, 2 * len(self._powers)))
        # The recurrence divided by K**j is a running sum.
        terms = np.frombuffer(hashes, dtype=np.uint64) + np.uint64(self._added)
        terms *= self._inverse_powers[:blocks]
        np.cumsum(terms, out=terms)
        terms += np.uint64(start)
        terms *= self._powers[:blocks]
        return terms

    def _grow(self, blocks: int) -> None:
        self._powers, self._inverse_powers = (
            np.cumprod(np.full(blocks, factor, dtype=np.uint64), dtype=np.uint64) for factor in self._factors
        )


class _Block:
    """A block held by one replica. One that was evicted (`copies` 0) lives on only as the parent of what it left."""

    __slots__ = ("children", "copies", "key", "parent")

    def __init__(self, key: int, parent: _Block | None) -> None:
        self.key = key
        self.parent = parent
        self.copies = 1  # vLLM announces every physical copy, and the eviction of every one
        self.children = 0  # blocks held whose parent this is


class _Replica:
    """What one replica holds."""

    __slots__ = ("bit", "blocks", "factor", "holes")

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self.blocks: dict[int, _Block] = {}
        self.factor = 0  # own blocks per engine block; 0 until the first is stored
        self.holes = 0  # blocks held whose parent was evicted


class EngineBlocks:
    """Blocks held per replica, by the engines' own word. Replicas are small integers; not thread-safe.

    About 270 bytes a block: 17 a token at 16 tokens a block.

    Attributes:
        block_tokens: tokens of one of the router's own blocks.
        adapters: names of LoRA adapters that blocks were stored for.
    """

    def __init__(self, block_tokens: int, secret: bytes) -> None:
        self.block_tokens = block_tokens
        self.adapters: set[str] = set()
        self._hasher = BlockHasher(block_tokens, secret)
        self._prefix_keys = PrefixKeys(secret)
        self._held: dict[int, int] = {}  # prefix key -> bit mask of who holds it
        self._replicas: dict[int, _Replica] = {}
        self._owner: dict[int, int] = {}  # bit -> replica
        self._masks: dict[int, int] = {}  # own blocks per engine block -> bits of the replicas with such engines
        self._retired: list[_Replica] = []
        self._free_bits: list[int] = []
        self._next_bit = 0

    def __contains__(self, replica: int) -> bool:
        return replica in self._replicas

    def blocks(self, replica: int) -> int:
        """Engine blocks that `replica` holds."""
        found = self._replicas.get(replica)
        return 0 if found is None else len(found.blocks)

    def tokens(self, replica: int) -> int:
        """Tokens in them."""
        found = self._replicas.get(replica)
        return 0 if found is None else len(found.blocks) * found.factor * self.block_tokens

    def pieces(self, event: KvEvent) -> Iterator[Piece]:
        """The event in pieces that `apply` takes in a fraction of a millisecond; hashes, and changes nothing.

        Raises:
            ValueError: the engine's blocks cannot be told in blocks of `block_tokens`.
        """
        if isinstance(event, AllBlocksCleared):
            yield event
            return
        if isinstance(event, BlockRemoved):
            for start in range(0, len(event.block_hashes), PIECE_BLOCKS):
                yield BlockRemoved(event.block_hashes[start : start + PIECE_BLOCKS])
            return
        size = event.block_tokens
        if size % self.block_tokens or size <= 0:
            raise ValueError(
                f"the engine's blocks have {size} tokens, which block_tokens {self.block_tokens} does not divide; "
                f"set block_tokens to {size}"
            )
        parent = event.parent_hash
        step = max(PIECE_BLOCKS * self.block_tokens // size, 1)
        for start in range(0, len(event.block_hashes), step):
            names = event.block_hashes[start : start + step]
            hashes = self._hasher.hashes(event.tokens[start * size : (start + len(names)) * size])
            yield StoredPiece(names, parent, hashes, event.parent_hash is None, event.adapter)
            parent = names[-1]

    def apply(self, replica: int, piece: Piece) -> None:
        """Take in a piece of what `replica` said. What hangs on a block never heard of is left out."""
        self._clean_retired()
        if isinstance(piece, StoredPiece):
            self._store(self._known(replica), piece)
        elif isinstance(piece, BlockRemoved):
            self._remove(self._known(replica), piece.block_hashes)
        else:
            self.clear(replica)

    def clear(self, replica: int) -> None:
        """`replica` holds nothing; costs nothing now, later pieces clean up."""
        self.remove(replica)
        self._known(replica)

    def remove(self, replica: int) -> None:
        """Forget `replica`."""
        found = self._replicas.pop(replica, None)
        if found is not None:
            del self._owner[found.bit]
            if found.factor:
                self._masks[found.factor] &= ~(1 << found.bit)
            self._retired.append(found)

    def match(self, hashes: bytes, tokens: int, adapter: str = "") -> dict[int, int]:
        """Leading own blocks of a prompt that each replica can reuse: replica -> blocks, where there are any.

        Args:
            hashes: of the prompt's blocks, without a cache key.
            tokens: the prompt's length; an engine always computes the last token, so never all blocks of it count.
            adapter: LoRA adapter it is for.
        """
        found: dict[int, int] = {}
        root = self._prefix_keys.root(adapter if adapter in self.adapters else "")
        keys = self._prefix_keys.keys(hashes, root)
        for factor, alive in self._masks.items():
            usable = min((tokens - 1) // (factor * self.block_tokens), len(keys) // factor)
            if alive and usable > 0:
                self._search(keys[factor - 1 :: factor], usable, alive, factor, found)
        return found

    def holds(self, replica: int, hashes: bytes, adapter: str = "") -> bool:
        """Whether `replica` says it holds the last whole engine block of these blocks; True when there is none."""
        found = self._replicas.get(replica)
        if found is None:
            return False
        factor = max(found.factor, 1)
        blocks = len(hashes) // HASH_BYTES // factor * factor
        if not blocks:
            return True
        root = self._prefix_keys.root(adapter if adapter in self.adapters else "")
        key = int(self._prefix_keys.keys(hashes[: blocks * HASH_BYTES], root)[-1])
        return bool(self._held.get(key, 0) >> found.bit & 1)

    def _search(self, keys: NDArray[np.uint64], usable: int, alive: int, factor: int, found: dict[int, int]) -> None:
        held, key = self._held, keys.item
        # (blocks that all of the mask hold, blocks that none of it holds more than, mask)
        ranges = [(0, usable, alive & held.get(key(0), 0))]
        while ranges:
            low, high, mask = ranges.pop()
            while mask and low < high:
                middle = (low + high + 1) // 2
                here = mask & held.get(key(middle - 1), 0)
                if here == mask:
                    low = middle
                elif here:
                    ranges.append((low, middle - 1, mask & ~here))
                    low, mask = middle, here
                else:
                    high = middle - 1
            while mask and low:
                bit = (mask & -mask).bit_length() - 1
                mask &= mask - 1
                replica = self._owner[bit]
                depth = self._walk(keys[:low], bit) if self._replicas[replica].holes else low
                if depth:
                    found[replica] = depth * factor

    def _walk(self, keys: NDArray[np.uint64], bit: int) -> int:
        """How many of the first blocks a replica holds without a gap."""
        depth, held = 0, self._held
        for depth, key in enumerate(keys[:WALK_BLOCKS].tolist()):
            if not held.get(key, 0) >> bit & 1:
                return depth
        return depth + 1

    def _known(self, replica: int) -> _Replica:
        found = self._replicas.get(replica)
        if found is None:
            if self._free_bits:
                bit = self._free_bits.pop()
            else:
                bit, self._next_bit = self._next_bit, self._next_bit + 1
            found = self._replicas[replica] = _Replica(bit)
            self._owner[bit] = replica
        return found

    def _store(self, holder: _Replica, piece: StoredPiece) -> None:
        blocks, held, flag = holder.blocks, self._held, 1 << holder.bit
        factor = len(piece.hashes) // HASH_BYTES // len(piece.names)
        if not holder.factor:
            holder.factor = factor
            self._masks[factor] = self._masks.get(factor, 0) | flag
        parent = None if piece.parent is None else blocks.get(piece.parent)
        if factor != holder.factor or (piece.parent is not None and parent is None):
            return  # part of a block, or behind blocks that were never told: nothing says what they stand for
        # vLLM can tell a reused prefix again (`kv_cache_report_mode: full`): that is no further copy.
        if piece.from_start and all(name in blocks for name in piece.names):
            return
        if piece.adapter and piece.adapter not in self.adapters:
            if len(self.adapters) >= MAX_ADAPTERS:
                return
            self.adapters.add(piece.adapter)
        start = self._prefix_keys.root(piece.adapter) if parent is None else parent.key
        keys = self._prefix_keys.keys(piece.hashes, start)[factor - 1 :: factor].tolist()
        for name, key in zip(piece.names, keys, strict=True):
            block = blocks.get(name)
            if block is not None:
                block.copies += 1
            else:
                block = blocks[name] = _Block(key, parent)
                held[key] = held.get(key, 0) | flag
                if parent is not None:
                    parent.children += 1
            parent = block

    def _remove(self, holder: _Replica, names: Sequence[int]) -> None:
        blocks = holder.blocks
        for name in names:
            block = blocks.get(name)
            if block is None:
                continue
            block.copies -= 1
            if block.copies:
                continue
            del blocks[name]
            self._drop_key(block.key, 1 << holder.bit)
            holder.holes += block.children
            parent, block.parent = block.parent, None
            if parent is not None:
                parent.children -= 1
                holder.holes -= not parent.copies

    def _drop_key(self, key: int, flag: int) -> None:
        left = self._held.get(key, 0) & ~flag
        if left:
            self._held[key] = left
        else:
            self._held.pop(key, None)

    def _clean_retired(self) -> None:
        budget = RETIRED_BLOCKS_PER_PIECE
        while self._retired and budget:
            old = self._retired[-1]
            flag = 1 << old.bit
            while old.blocks and budget:
                self._drop_key(old.blocks.popitem()[1].key, flag)
                budget -= 1
            if old.blocks:
                return
            self._retired.pop()
            self._free_bits.append(old.bit)
