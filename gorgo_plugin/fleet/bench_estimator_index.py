"""How both indexes grow: lookups with ever more cached tokens, and bytes per cached token.

An index is filled with conversations that share system prompts and grow over some turns, each at one replica. Memory is
the growth of a process of its own (resident set), so that it holds what the allocator holds. Run as a program it is
that process.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from gorgo_plugin.fleet.bench_estimator_prompts import SYSTEM_PROMPTS, SYSTEM_SHARE, Ids, conversation_ids
from gorgo_plugin.fleet.bench_estimator_sides import (
    BLOCK_TOKENS,
    KV_TOKENS,
    SECRET,
    Indexes,
    Lookups,
    look_up,
    replica_names,
    rival_package,
)
from gorgo_plugin.prefix import BlockHasher, PrefixIndex

GROWTH_TURNS = 5  # in which each conversation of a filled index came to its length
STRIDE = 5  # with which the conversations of one system prompt go around fleets of 3 and of 64 alike
OURS, THEIRS = SIDES = ("ours", "theirs")


@dataclass(frozen=True, slots=True)
class Memory:
    """What an index of one side took.

    Attributes:
        side: `ours` or `theirs`.
        replicas: in the fleet.
        cached_tokens: summed over the replicas.
        bytes: growth of the resident set.
    """

    side: str
    replicas: int
    cached_tokens: int
    bytes: int

    @property
    def bytes_per_token(self) -> float:
        """Bytes of the index per token that a replica caches."""
        return self.bytes / self.cached_tokens


def replica_of(number: int, replicas: int) -> int:
    """Where conversation `number` is cached; every replica comes to hold several system prompts, each of them many."""
    return (STRIDE * number + number // SYSTEM_PROMPTS) % replicas


def prompts(cached_tokens: int, prompt_tokens: int, replicas: int, seed: int) -> Iterator[tuple[int, Ids]]:
    """(replica, prompt) of each turn of as many conversations as come to about `cached_tokens`."""
    for number in range(max(1, cached_tokens // prompt_tokens)):
        ids = conversation_ids(number, prompt_tokens, seed)
        for turn in range(1, GROWTH_TURNS + 1):
            yield replica_of(number, replicas), ids[: prompt_tokens * turn // GROWTH_TURNS]


def cached(cached_tokens: int, prompt_tokens: int, replicas: int) -> int:
    """Tokens that the replicas cache after `prompts`: a system prompt once at each."""
    conversations = range(max(1, cached_tokens // prompt_tokens))
    shared = int(prompt_tokens * SYSTEM_SHARE)
    systems = {(replica_of(number, replicas), number % SYSTEM_PROMPTS) for number in conversations}
    return len(conversations) * (prompt_tokens - shared) + len(systems) * shared


class SizedLookups:
    """Indexes of several sizes, each with fleets of several sizes; looked up in turn."""

    def __init__(
        self,
        sizes: tuple[int, ...],
        fleets: tuple[int, ...],
        rival_tokens: int,
        prompt_tokens: int,
        seed: int,
        done: Callable[[str], None],
    ) -> None:
        """Fill them; the rival's up to `rival_tokens`."""
        self._prompt_tokens, self._seed = prompt_tokens, seed
        self._rng = np.random.default_rng(seed)
        self._rival_tokens = rival_tokens
        self._indexes: dict[tuple[int, int], Indexes] = {}
        for size in sizes:
            for replicas in fleets:
                done(f"an index of {size:,} tokens for {replicas} replicas")
                indexes = self._indexes[size, replicas] = Indexes(replicas, rival=size <= rival_tokens)
                for slot, ids in prompts(size, prompt_tokens, replicas, seed):
                    indexes.add(ids, slot)

    def round(self, lookups: int, ours_first: bool) -> Iterator[tuple[int, int, Lookups]]:
        """(size, replicas, times) of so many lookups of random conversations in each."""
        for (size, replicas), indexes in self._indexes.items():
            numbers = self._rng.integers(max(1, size // self._prompt_tokens), size=lookups).tolist()
            wanted = [conversation_ids(number, self._prompt_tokens, self._seed) for number in numbers]
            yield size, replicas, look_up(indexes, wanted, size <= self._rival_tokens, ours_first)


def memory(side: str, replicas: int, cached_tokens: int, prompt_tokens: int, seed: int) -> Memory:
    """Measure in a process of its own."""
    arguments = [str(argument) for argument in (side, replicas, cached_tokens, prompt_tokens, seed)]
    command = [sys.executable, "-m", "gorgo_plugin.fleet.bench_estimator_index", *arguments]
    answer: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return Memory(**answer)


def _measured(side: str, replicas: int, cached_tokens: int, prompt_tokens: int, seed: int) -> Memory:
    hold = _ours(replicas) if side == OURS else _theirs(replicas)
    for slot, ids in prompts(
        prompt_tokens, prompt_tokens, 1, seed + 1
    ):  # what the first prompt brings once is not index
        hold(slot, ids)
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    for slot, ids in prompts(cached_tokens, prompt_tokens, replicas, seed):
        hold(slot, ids)
    gc.collect()
    grown = process.memory_info().rss - before
    return Memory(side, replicas, cached(cached_tokens, prompt_tokens, replicas), grown)


def _ours(replicas: int) -> Callable[[int, Ids], None]:
    hasher, index = BlockHasher(BLOCK_TOKENS, SECRET), PrefixIndex()
    for slot in range(replicas):
        index.set_capacity(slot, KV_TOKENS // BLOCK_TOKENS)

    def hold(slot: int, ids: Ids) -> None:
        index.credit(slot, hasher.hashes(ids))

    return hold


def _theirs(replicas: int) -> Callable[[int, Ids], None]:
    trie, names = rival_package().RadixTrie(), replica_names(replicas)

    def hold(slot: int, ids: Ids) -> None:
        trie.insert(ids.tolist(), names[slot])

    return hold


if __name__ == "__main__":
    side, *numbers = sys.argv[1:]
    measured = _measured(side, *map(int, numbers))
    print(json.dumps({name: getattr(measured, name) for name in Memory.__slots__}))
