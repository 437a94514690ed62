"""The engines' own blocks against a brute-force set of token prefixes per replica."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgo_plugin.prefix import AllBlocksCleared, BlockHasher, BlockRemoved, BlockStored, EngineBlocks, KvEvent

OWN = 2  # tokens of the router's blocks
FACTORS = {0: 1, 1: 2, 2: 1}  # replica -> own blocks per engine block
SECRET = b"secret"
Tokens = tuple[int, ...]

prompts = st.lists(st.integers(0, 1), max_size=16).map(tuple)  # zeros among them: their blocks hash to 0
steps = st.lists(
    st.tuples(st.sampled_from(["store", "store", "remove", "clear", "forget"]), st.integers(0, 2), prompts),
    max_size=40,
)


class BruteForce:
    """Copies of every held prefix, by replica."""

    def __init__(self) -> None:
        self.held: dict[int, Counter[Tokens]] = {replica: Counter() for replica in FACTORS}

    def match(self, prompt: Tokens) -> dict[int, int]:
        found = {}
        for replica, factor in FACTORS.items():
            size = factor * OWN
            blocks = 0
            while (blocks + 1) * size < len(prompt) and self.held[replica][prompt[: (blocks + 1) * size]]:
                blocks += 1
            if blocks:
                found[replica] = blocks * factor
        return found


def name(prefix: Tokens) -> int:
    """The engine's name of the block that ends the prefix; not the router's hash."""
    return int("1" + "".join(map(str, prefix)))


def stored(prompt: Tokens, start: int, size: int) -> BlockStored:
    """The event for the blocks of a prompt from block `start` on."""
    ends = range((start + 1) * size, len(prompt) + 1, size)
    tokens = np.array(prompt[start * size : len(prompt) // size * size], dtype=np.uint32)
    parent = name(prompt[: start * size]) if start else None
    return BlockStored([name(prompt[:end]) for end in ends], parent, tokens, size)


def tell(blocks: EngineBlocks, replica: int, event: KvEvent) -> None:
    for piece in blocks.pieces(event):
        blocks.apply(replica, piece)


@settings(max_examples=200)
@given(steps, st.lists(prompts, max_size=6))
def test_every_lookup_equals_brute_force_whatever_engines_store_and_remove(
    steps: list[tuple[str, int, Tokens]], lookups: list[Tokens]
) -> None:
    blocks, oracle, hasher = EngineBlocks(OWN, SECRET), BruteForce(), BlockHasher(OWN, SECRET)
    for action, replica, prompt in steps:
        size, held = FACTORS[replica] * OWN, oracle.held[replica]
        full = len(prompt) // size
        if action == "store":
            # As an engine does: what is cached is hit, the rest is stored; the last block may be computed again.
            start = next((block for block in range(full) if not held[prompt[: (block + 1) * size]]), full - 1)
            if start < 0 or (start == 0 and held[prompt[:size]]):
                continue
            tell(blocks, replica, stored(prompt, start, size))
            held.update(prompt[: (block + 1) * size] for block in range(start, full))
        elif action == "remove" and full:
            # Any block, also one from the middle, whose tail stays.
            prefix = prompt[: full * size]
            tell(blocks, replica, BlockRemoved([name(prefix)]))
            held[prefix] = max(held[prefix] - 1, 0)
        elif action == "clear":
            tell(blocks, replica, AllBlocksCleared())
            held.clear()
        elif action == "forget":
            blocks.remove(replica)
            held.clear()
        assert blocks.blocks(replica) == len(+held)
        for lookup in [prompt, *lookups]:
            hashes = hasher.hashes(np.array(lookup, dtype=np.uint32))
            assert blocks.match(hashes, len(lookup)) == oracle.match(lookup)


@given(steps)
def test_what_is_removed_leaves_nothing_behind(steps: list[tuple[str, int, Tokens]]) -> None:
    blocks = EngineBlocks(OWN, SECRET)
    for _, replica, prompt in steps:
        if len(prompt) >= FACTORS[replica] * OWN:
            tell(blocks, replica, stored(prompt, 0, FACTORS[replica] * OWN))
    for replica in FACTORS:
        blocks.remove(replica)
    tell(blocks, 9, AllBlocksCleared())
    assert not blocks._held
    assert not blocks._retired
