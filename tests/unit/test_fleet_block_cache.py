from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gorgo_plugin.fleet.block_cache import BlockCache, Cleared, Lease, Removed, Stored, block_keys, finer_keys


class OracleCache:
    """vLLM's block pool, block by block: one queue of free blocks, handed out from its head, given back tail first.

    Unlike vLLM's, a block without content goes to the head, as `BlockCache` says it hands those out first.
    """

    def __init__(self, capacity: int) -> None:
        self.free: list[int] = list(range(capacity))
        self.users = [0] * capacity
        self.key_of: dict[int, int] = {}

    def block_of(self, key: int) -> int | None:
        return next((block for block, known in self.key_of.items() if known == key), None)

    def acquire(self, keys: list[int], total: int) -> list[int] | None:
        blocks: list[int] = []
        for key in keys:
            block = self.block_of(key)
            if block is None:
                break
            blocks.append(block)
        if total - len(blocks) > len([block for block in self.free if block not in blocks]):
            return None
        for block in blocks:
            if block in self.free:
                self.free.remove(block)
            self.users[block] += 1
        while len(blocks) < total:
            block = self.free.pop(0)
            self.key_of.pop(block, None)
            self.users[block] = 1
            blocks.append(block)
        return blocks

    def publish(self, blocks: list[int], keys: list[int]) -> None:
        for block, key in zip(blocks, keys, strict=False):
            if self.block_of(key) is None:
                self.key_of[block] = key

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.users[block] -= 1
            if self.users[block] == 0:
                self.free.append(block)
        self.free.sort(key=lambda block: block in self.key_of)


# A prompt: which of three conversations, how many blocks of it, and how many blocks more than it has keys for.
prompts = st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(0, 2))
steps = st.lists(st.one_of(prompts, st.integers(0, 5)), max_size=60)  # a number ends one of the prompts under way


@given(steps)
def test_the_cache_holds_what_a_block_by_block_pool_would_hold(script: list[tuple[int, int, int] | int]) -> None:
    cache, oracle = BlockCache(20), OracleCache(20)
    under_way: list[tuple[Lease, list[int]]] = []
    for step in script:
        if isinstance(step, int):
            if step < len(under_way):
                lease, blocks = under_way.pop(step)
                cache.release(lease)
                oracle.release(blocks)
        else:
            conversation, known, extra = step
            keys = [100 * conversation + position for position in range(known)]
            matched = cache.match(keys, known)
            lease_or_none = cache.acquire(keys, matched, known + extra)
            blocks_or_none = oracle.acquire(keys, known + extra)
            assert (lease_or_none is None) == (blocks_or_none is None)
            if lease_or_none is not None and blocks_or_none is not None:
                cache.publish(lease_or_none, keys[matched:])
                oracle.publish(blocks_or_none, keys)
                under_way.append((lease_or_none, blocks_or_none))
        for conversation in range(3):
            keys = [100 * conversation + position for position in range(9)]
            assert [cache.match([key], 1) for key in keys] == [int(oracle.block_of(key) is not None) for key in keys]
        assert cache.usage == pytest.approx(1 - len(oracle.free) / 20)


def test_equal_keys_mean_equal_prefixes() -> None:
    tokens = np.arange(100, dtype=np.uint32)
    other = tokens.copy()
    other[40] = 7
    keys, others = block_keys(tokens, 16), block_keys(other, 16)
    assert len(keys) == 6
    assert keys[:2] == others[:2]
    assert not set(keys[2:]) & set(others[2:])


def test_a_salt_separates_equal_prompts() -> None:
    tokens = np.arange(64, dtype=np.uint32)
    assert not set(block_keys(tokens, 16)) & set(block_keys(tokens, 16, salt="lora-a"))


def test_a_traces_coarse_blocks_become_the_engines_blocks() -> None:
    keys = finer_keys([0, 5], prompt_tokens=600, coarse_tokens=512, block_tokens=16)
    assert len(keys) == 600 // 16
    assert keys[:33] == [*range(32), 5 * 32]
    assert finer_keys([0, 6], 600, 512, 16)[:32] == keys[:32]


@pytest.mark.parametrize(("coarse", "block_tokens"), [([0], 16), ([0, 5], 48)])
def test_coarse_blocks_that_do_not_fit_are_refused(coarse: list[int], block_tokens: int) -> None:
    with pytest.raises(ValueError, match=r"cover|divisor"):
        finer_keys(coarse, prompt_tokens=600, coarse_tokens=512, block_tokens=block_tokens)


def test_recorded_changes_tell_each_run_of_new_blocks_with_what_is_before_it_and_what_was_evicted() -> None:
    cache = BlockCache(4, record=True)
    first = cache.acquire([], 0, 3)
    assert first is not None
    cache.publish(first, [1, 2, 3])
    second = cache.acquire([1], 1, 2)
    assert second is not None
    cache.publish(second, [4], parent=1)
    cache.release(first)
    cache.release(second)
    assert cache.acquire([], 0, 2) is not None
    cache.clear()
    assert cache.changes == [Stored([1, 2, 3], None), Stored([4], 1), Removed(3), Removed(2), Cleared()]
