from __future__ import annotations

import time

import numpy as np

from gorgo_plugin.prefix import HASH_BYTES, BlockHasher, PrefixIndex
from gorgo_plugin.prefix.index import MAX_STAMPS, MAX_WALK_NODES, RETIRED_BLOCKS_PER_CREDIT


def path(*blocks: int) -> bytes:
    return b"".join(block.to_bytes(HASH_BYTES, "big") for block in blocks)


def index_of(replicas: int = 2, blocks: int = 1000) -> PrefixIndex:
    index = PrefixIndex()
    for replica in range(replicas):
        index.set_capacity(replica, blocks)
    return index


def test_a_credited_prompt_is_found_at_that_replica_only() -> None:
    index = index_of()
    index.credit(1, path(1, 2, 3))
    assert index.match(path(1, 2, 3, 4)) == {1: 3}
    assert index.match(path(2)) == {}


def test_the_same_lookup_has_a_row_for_a_replica_that_has_come_meanwhile() -> None:
    index = index_of()
    index.credit(0, path(1, 2, 3))
    index.credit(1, path(1, 9))
    assert index.blocks(path(1, 2, 3), 2).tolist() == [3, 1]
    assert index.blocks(path(1, 2, 3), 3).tolist() == [3, 1, 0]


def test_a_revoked_credit_is_gone_and_what_was_there_before_stays() -> None:
    index = index_of()
    index.credit(0, path(1, 2))
    index.revoke(index.credit(0, path(1, 2, 3, 4)))
    assert index.match(path(1, 2, 3, 4)) == {0: 2}


def test_a_revoked_credit_that_another_prompt_has_split_is_gone_whole() -> None:
    index = index_of()
    credit = index.credit(0, path(1, 2, 3, 4))
    index.credit(1, path(1, 2, 9))
    index.revoke(credit)
    assert index.match(path(1, 2, 3, 4)) == {1: 2}
    assert index.held_blocks(0) == 0


def test_a_revoked_extension_is_gone_even_when_it_was_split_meanwhile() -> None:
    index = index_of()
    index.credit(0, path(1, 2))
    credit = index.credit(0, path(1, 2, 3, 4, 5))
    index.credit(1, path(1, 2, 3, 4, 9))
    index.revoke(credit)
    assert index.match(path(1, 2, 3, 4, 5)) == {0: 2, 1: 4}


def test_a_conversation_of_one_replica_stays_one_node() -> None:
    index = index_of()
    for turn in range(1, 100):
        index.credit(0, path(*range(turn)))
    (node,) = index._root.children.values()
    assert not node.children


def test_a_credit_that_a_later_request_has_used_is_not_revoked() -> None:
    index = index_of()
    credit = index.credit(0, path(1, 2))
    index.credit(0, path(1, 2, 3))
    index.revoke(credit)
    assert index.match(path(1, 2, 3)) == {0: 3}


def test_a_miss_reported_by_the_engine_forgets_what_is_at_least_as_old() -> None:
    index = index_of()
    index.credit(0, path(1, 2))  # oldest
    index.credit(0, path(5, 6))
    index.credit(0, path(8, 9))  # newest
    credit = index.credit(0, path(5, 6, 7))
    assert credit.had_blocks == 2
    index.correct(credit, 0)  # the engine had evicted (5, 6), so it must have evicted (1, 2) before
    assert index.match(path(1, 2)) == {}
    assert index.match(path(8, 9)) == {0: 2}
    assert index.match(path(5, 6, 7)) == {0: 3}  # computed for this very request


def test_what_the_engine_confirms_is_not_forgotten() -> None:
    index = index_of()
    index.credit(0, path(1, 2))
    assert index.correct(index.credit(0, path(1, 2)), 2) == 0


def test_a_forgotten_replica_holds_nothing_and_others_keep_theirs() -> None:
    index = index_of()
    stale = index.credit(0, path(1, 2))
    index.credit(1, path(1, 2))
    index.forget(0)
    assert index.match(path(1, 2)) == {1: 2}
    index.credit(0, path(3))
    index.revoke(stale)  # of the time before: no effect
    assert index.match(path(3)) == {0: 1}
    assert index.match(path(1, 2)) == {1: 2}


def test_forgetting_takes_no_time_and_later_credits_clean_up() -> None:
    index = index_of(blocks=200_000)
    for number in range(2000):
        index.credit(0, path(*range(number * 100, number * 100 + 50)))
    started = time.thread_time()
    index.forget(0)
    assert time.thread_time() - started < 0.005
    for _ in range(100_000 // RETIRED_BLOCKS_PER_CREDIT + 2):
        index.credit(1, path(7))
    assert not index._retired
    assert len(index._root.children) == 1


def test_a_prompt_longer_than_the_cache_keeps_only_its_head() -> None:
    index = index_of(blocks=3)
    index.credit(0, path(1, 2, 3, 4, 5))
    assert index.match(path(1, 2, 3, 4, 5)) == {0: 3}


def test_a_tree_that_branches_at_every_block_is_walked_only_so_far() -> None:
    index = index_of(blocks=100_000)
    blocks = range(2 * MAX_WALK_NODES)
    whole = path(*blocks)
    for number in range(1, len(blocks), 1):
        index.credit(0, whole[: number * HASH_BYTES] if number < 64 else whole[: 64 * HASH_BYTES])
    for number in range(64, 2 * MAX_WALK_NODES, 64):
        index.credit(1, whole[: number * HASH_BYTES])
    assert index.match(whole)[1] <= 2 * MAX_WALK_NODES
    started = time.thread_time()
    index.match(whole)
    assert time.thread_time() - started < 0.05


def test_many_children_make_neither_lookup_nor_eviction_slow() -> None:
    index = index_of(blocks=20_000)
    for number in range(20_000):
        index.credit(0, path(0, number + 1))
    started = time.thread_time()
    for number in range(20_000, 22_000):
        index.credit(0, path(0, number + 1))
    assert (time.thread_time() - started) / 2000 < 0.001
    assert index.held_blocks(0) == 20_000


def test_block_hashes_cover_full_blocks_and_depend_on_the_secret() -> None:
    tokens = np.arange(40, dtype=np.uint32)
    hashes = BlockHasher(16, b"a").hashes(tokens)
    assert len(hashes) == 2 * HASH_BYTES
    assert hashes == BlockHasher(16, b"a").hashes(tokens[:32])
    assert hashes != BlockHasher(16, b"b").hashes(tokens)
    assert BlockHasher(16, b"a").hashes(tokens[:15]) == b""


def test_a_cache_key_sets_the_whole_path_apart() -> None:
    hasher, index = BlockHasher(16, b"a"), index_of()
    tokens = np.arange(64, dtype=np.uint32)
    index.credit(0, hasher.hashes(tokens, "tenant-a"))
    assert index.match(hasher.hashes(tokens, "tenant-b")) == {}
    assert index.match(hasher.hashes(tokens)) == {}
    assert index.match(hasher.hashes(tokens, "tenant-a")) == {0: 4}


def test_no_two_of_many_similar_blocks_collide() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 32_000, 16, dtype=np.uint32)
    blocks = np.tile(base, (200_000, 1))
    blocks[np.arange(200_000), rng.integers(0, 16, 200_000)] = rng.integers(0, 32_000, 200_000)
    distinct = len(np.unique(blocks, axis=0))
    hashes = np.frombuffer(BlockHasher(16, b"s").hashes(blocks.reshape(-1)), dtype=np.uint64)
    assert len(np.unique(hashes)) == distinct


def test_a_credit_along_very_many_branches_stays_small_and_can_be_corrected() -> None:
    index, blocks = index_of(replicas=1, blocks=100_000), MAX_STAMPS * 4 + 100
    trunk = path(*range(blocks))
    for end in range(1, blocks, 2):
        index.credit(0, trunk[: end * HASH_BYTES] + path(10_000 + end))
    credit = index.credit(0, trunk)
    assert len(credit.stamps) <= MAX_STAMPS
    assert credit.stamps[-1][0] == credit.had_blocks == blocks - 1
    assert list(credit.stamps) == sorted(credit.stamps)
    assert index.correct(credit, 100) > 0
    assert index.match(trunk)[0] <= blocks
