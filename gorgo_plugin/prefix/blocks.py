"""Keyed hashes of KV blocks."""

from __future__ import annotations

import functools
import hashlib
import operator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

HASH_BYTES = 8
MAX_HASHERS = 64  # block sizes and secrets in use at a time


class BlockHasher:
    """Multilinear hash of each full block of a prompt: `h = sum(key_i * pair_i) mod 2**64` with secret odd keys.

    A pair is two token ids side by side, which halves the multiplications; a block of an odd number of tokens is hashed
    token by token. Two blocks of ids below 2**18 collide with a probability of about 2**-46 where a first token of a
    pair differs, and of about 2**-30 where only second ones do: that costs an estimate, never an answer. Blocks are not
    chained: in the index the path is the context. One vectorised pass, about 11 us for 20,000 tokens.
    """

    def __init__(self, block_tokens: int, secret: bytes) -> None:
        self.block_tokens = block_tokens
        stream = hashlib.shake_256(b"gorgo block keys" + secret).digest(8 * block_tokens)
        self._secret = hashlib.blake2b(secret, key=b"gorgo cache key", digest_size=32).digest()
        self._keys = np.frombuffer(stream, dtype=np.uint64) | np.uint64(1)
        self._unit = np.dtype(np.uint32 if block_tokens % 2 else np.uint64)
        self._units = block_tokens * 4 // self._unit.itemsize  # of a block
        self._unit_keys = self._keys[: self._units]
        self._factors: list[int] = self._keys.tolist()

    def hashes(self, tokens: NDArray[np.uint32], cache_key: str = "", known: bytes = b"") -> bytes:
        """Hashes of the full blocks of `tokens` (shape (n,)), 8 bytes each, n // block_tokens of them.

        Args:
            tokens: token ids.
            cache_key: as for `salted`.
            known: the hashes of leading blocks without a cache key, where an earlier call has computed them.
        """
        start, blocks = len(known) // HASH_BYTES, len(tokens) // self.block_tokens
        if blocks > start:
            full = np.ascontiguousarray(tokens[start * self.block_tokens : blocks * self.block_tokens])
            units = full.view(self._unit).reshape(-1, self._units)
            known += np.vecdot(units, self._unit_keys).tobytes()
        return self.salted(known, cache_key)

    def tail(self, tokens: NDArray[np.uint32], blocks: int, count: int) -> bytes:
        """Hash of the `count` tokens behind the first `blocks` blocks, fewer than fill a block."""
        start = blocks * self.block_tokens
        part: list[int] = tokens[start : start + count].tolist()
        hashed: int = sum(map(operator.mul, part, self._factors)) & 0xFFFF_FFFF_FFFF_FFFF
        return hashed.to_bytes(HASH_BYTES, "big")

    def size(self, tokens: int) -> int:
        """Bytes of the hashes of so many tokens."""
        return tokens // self.block_tokens * HASH_BYTES

    def salted(self, hashes: bytes, cache_key: str) -> bytes:
        """Hashes set apart by a cache key (a LoRA adapter, a cache salt): it enters the first block, so the path."""
        if not cache_key or not hashes:
            return hashes
        salt = hashlib.blake2b(cache_key.encode("utf-8", "surrogatepass"), key=self._secret, digest_size=HASH_BYTES)
        first = int.from_bytes(hashes[:HASH_BYTES], "little") ^ int.from_bytes(salt.digest(), "little")
        return first.to_bytes(HASH_BYTES, "little") + hashes[HASH_BYTES:]


class Blocks(NamedTuple):
    """Hashes of a prompt's full blocks, and who made them: they mean nothing to another hasher."""

    hasher: BlockHasher
    hashes: bytes


@functools.lru_cache(maxsize=MAX_HASHERS)
def block_hasher(block_tokens: int, secret: bytes) -> BlockHasher:
    """The hasher of a block size and secret; the same object each time, so that `Blocks` can be passed around."""
    return BlockHasher(block_tokens, secret)
