"""The index against a brute-force one that stores every block of every path, with the same eviction order."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given, settings
from hypothesis import strategies as st

from gorgo_plugin.prefix import HASH_BYTES, AnswerIndex


def path(*blocks: int) -> bytes:
    return b"".join(block.to_bytes(HASH_BYTES, "big") for block in blocks)


class BruteForce:
    """One ordered dict of whole prefixes per replica: a prefix is a block with all its context."""

    def __init__(self, capacities: dict[int, int]) -> None:
        self.capacities = capacities
        self.held: dict[int, OrderedDict[bytes, None]] = {replica: OrderedDict() for replica in capacities}

    def credit(self, replica: int, hashes: bytes) -> None:
        held = self.held[replica]
        end = min(len(hashes), self.capacities[replica] * HASH_BYTES)
        for stop in range(end, 0, -HASH_BYTES):  # the tail is older than the head, so it is evicted first
            held.pop(hashes[:stop], None)
            held[hashes[:stop]] = None
        while len(held) > self.capacities[replica]:
            held.popitem(last=False)

    def match(self, hashes: bytes) -> dict[int, int]:
        found = {}
        for replica, held in self.held.items():
            blocks = 0
            while blocks * HASH_BYTES < len(hashes) and hashes[: (blocks + 1) * HASH_BYTES] in held:
                blocks += 1
            if blocks:
                found[replica] = blocks
        return found


# Few distinct blocks, so that paths share prefixes, branch, and end inside each other.
paths = st.lists(st.integers(0, 2), max_size=8).map(lambda blocks: path(*blocks))
credits = st.lists(st.tuples(st.integers(0, 2), paths), max_size=40)


def index_of(capacities: dict[int, int]) -> AnswerIndex:
    index = AnswerIndex()
    for replica, blocks in capacities.items():
        index.set_capacity(replica, blocks)
    return index


@given(credits, st.lists(paths, max_size=10))
def test_without_eviction_every_lookup_equals_brute_force(steps: list[tuple[int, bytes]], lookups: list[bytes]) -> None:
    capacities = dict.fromkeys(range(3), 10_000)
    index, oracle = index_of(capacities), BruteForce(capacities)
    for replica, hashes in steps:
        assert index.match(hashes) == oracle.match(hashes)
        index.credit(replica, hashes)
        oracle.credit(replica, hashes)
    for hashes in lookups:
        assert index.match(hashes) == oracle.match(hashes)


@given(credits, st.lists(paths, max_size=10), st.integers(1, 12))
def test_under_eviction_every_lookup_equals_a_block_level_lru(
    steps: list[tuple[int, bytes]], lookups: list[bytes], capacity: int
) -> None:
    capacities = dict.fromkeys(range(3), capacity)
    index, oracle = index_of(capacities), BruteForce(capacities)
    for replica, hashes in steps:
        index.credit(replica, hashes)
        oracle.credit(replica, hashes)
        assert index.held_blocks(replica) == len(oracle.held[replica]) <= capacity
    for hashes in lookups:
        assert index.match(hashes) == oracle.match(hashes)


def spread(index: AnswerIndex, hashes: bytes) -> dict[int, int]:
    """What `blocks` finds, without the replicas that hold nothing."""
    return {replica: int(held) for replica, held in enumerate(index.blocks(hashes, 3)) if held}


@given(credits, st.lists(st.one_of(paths, st.integers(0, 2)), max_size=20))
def test_the_array_of_a_lookup_equals_the_mapping_even_after_replicas_were_forgotten(
    steps: list[tuple[int, bytes]], later: list[bytes | int]
) -> None:
    index = index_of(dict.fromkeys(range(3), 10_000))
    for replica, hashes in steps:
        index.credit(replica, hashes)
        assert spread(index, hashes) == index.match(hashes)
    for hashes in later:
        if isinstance(hashes, int):
            index.forget(hashes)
        else:
            assert spread(index, hashes) == index.match(hashes)


actions = st.lists(
    st.one_of(
        st.tuples(st.just("credit"), st.integers(0, 2), paths),
        st.tuples(st.just("revoke"), st.integers(0, 40), st.just(b"")),
        st.tuples(st.just("correct"), st.integers(0, 40), paths),
        st.tuples(st.just("ended"), st.integers(0, 40), st.just(b"")),
        st.tuples(st.just("answered"), st.integers(0, 40), paths),
        st.tuples(st.just("forget"), st.integers(0, 2), st.just(b"")),
        st.tuples(st.just("resize"), st.integers(0, 2), paths),
    ),
    max_size=60,
)


@settings(max_examples=200)
@given(actions)
def test_books_balance_whatever_happens(steps: list[tuple[str, int, bytes]]) -> None:
    index = index_of(dict.fromkeys(range(3), 9))
    given_credits = []
    for action, number, hashes in steps:
        if action == "credit":
            answers = index.answers_before(hashes, index.walk(hashes), lambda blocks, tokens: b"")
            given_credits.append(index.credit_after(number, hashes, answers.values()))
        elif action == "forget":
            index.forget(number)
            assert index.held_blocks(number) == 0
        elif action == "resize":
            index.set_capacity(number, len(hashes) // HASH_BYTES + 1)
        elif given_credits and action == "revoke":
            index.revoke(given_credits[number % len(given_credits)])
        elif given_credits and action == "ended":
            index.ended(given_credits[number % len(given_credits)])
        elif given_credits and action == "answered":
            index.answered(given_credits[number % len(given_credits)], len(hashes) // HASH_BYTES, b"", 0)
        elif given_credits and action == "correct":
            index.correct(given_credits[number % len(given_credits)], len(hashes) // HASH_BYTES)
        for replica in range(3):
            assert index.held_blocks(replica) == blocks_in_tree(index, replica)


def blocks_in_tree(index: AnswerIndex, replica: int) -> int:
    """Counted by walking the tree; checks on the way that what a replica holds hangs together."""
    bit = index._bit_of[replica]
    total, stack = 0, [index._root]
    while stack:
        node = stack.pop()
        for first, child in node.children.items():
            assert child.parent is node
            assert child.edge.startswith(first)
            assert child.mask, "a node nobody holds was left behind"
            if child.mask >> bit & 1:
                assert node is index._root or node.mask >> bit & 1
                total += len(child.edge) // HASH_BYTES
            stack.append(child)
        holding = sum(child.mask >> bit & 1 for child in node.children.values())
        assert node.holding_children.get(bit, 0) == holding
    return total
