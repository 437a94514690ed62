"""What the index makes of answers, whose tokens nobody shows it until a later prompt holds them."""

from __future__ import annotations

import numpy as np

from gorgo_plugin.models import ModelState
from gorgo_plugin.prefix import Credit
from gorgo_plugin.settings import RateSettings

BLOCK_TOKENS = 16
TURN = np.arange(1000, 1040, dtype=np.uint32)  # two blocks and 8 tokens
ANSWER = np.arange(5000, 5041, dtype=np.uint32)  # with those 8, and without its last, three blocks
NEXT = np.concatenate([TURN, ANSWER, np.arange(9000, 9030, dtype=np.uint32)])


def model(blocks: int = 100) -> ModelState:
    state = ModelState(BLOCK_TOKENS, b"secret", RateSettings())
    state.grow(2)
    for slot in range(2):
        state.set_capacity(slot, blocks * BLOCK_TOKENS)
    return state


def dispatch(state: ModelState, slot: int, tokens: np.ndarray) -> Credit:
    hashes = state.hasher.hashes(tokens)
    return state.credit(slot, hashes, state.look_up(tokens, hashes, 2))


def serve(state: ModelState, slot: int, tokens: np.ndarray, answer: int = len(ANSWER)) -> None:
    credit = dispatch(state, slot, tokens)
    state.index.ended(credit)
    state.answered(credit, tokens[len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS :], answer)


def cached(state: ModelState, tokens: np.ndarray) -> list[float]:
    found = state.look_up(tokens, state.hasher.hashes(tokens), 2)
    return [float(count) / BLOCK_TOKENS for count in state.cached_tokens(found, len(tokens), 1.0)]


def test_the_next_turn_finds_the_answer_where_it_was_given() -> None:
    state = model()
    serve(state, 0, TURN)
    assert cached(state, NEXT) == [5, 0]
    assert state.index.held_blocks(0) == 5


def test_a_turn_dispatched_elsewhere_leaves_the_answer_where_it_is() -> None:
    state = model()
    serve(state, 0, TURN)
    dispatch(state, 1, NEXT)
    assert cached(state, NEXT) == [5, len(NEXT) // BLOCK_TOKENS]
    assert state.index.held_blocks(0) == 5


def test_an_answer_does_not_count_on_top_of_a_prompt_that_went_on_from_it() -> None:
    state = model()
    serve(state, 0, TURN)
    state.index.credit(0, state.hasher.hashes(NEXT))  # as when a gateway moved it there
    state.index.credit(1, state.hasher.hashes(TURN))
    assert cached(state, np.concatenate([NEXT, NEXT])) == [len(NEXT) // BLOCK_TOKENS, 2]


def test_a_conversation_that_goes_on_is_held_once() -> None:
    state = model()
    serve(state, 0, TURN)
    serve(state, 0, NEXT)
    assert state.index.held_blocks(0) == (len(NEXT) + len(ANSWER) - 1) // BLOCK_TOKENS
    assert sum(len(answers) for answers in state.index._answers.values()) == 1


def test_a_prompt_that_parts_before_the_answer_finds_none() -> None:
    state = model()
    serve(state, 0, TURN)
    other = NEXT.copy()
    other[38] = 7  # within the turn's last, partial block
    assert cached(state, other) == [2, 0]


def test_the_same_prompt_again_finds_no_answer() -> None:
    state = model()
    serve(state, 0, TURN)
    assert cached(state, TURN) == [2, 0]


def test_an_answer_is_evicted_before_its_prompt() -> None:
    state = model(blocks=6)
    serve(state, 0, TURN)
    dispatch(state, 0, np.arange(3 * BLOCK_TOKENS, dtype=np.uint32))
    assert cached(state, NEXT) == [3, 0]
    dispatch(state, 0, np.arange(70_000, 70_000 + BLOCK_TOKENS, dtype=np.uint32))
    assert cached(state, NEXT) == [2, 0]
    assert not state.index._answers


def test_a_forgotten_replica_has_no_answers() -> None:
    state = model()
    serve(state, 0, TURN)
    state.index.forget(0)
    assert cached(state, NEXT) == [0, 0]
    dispatch(state, 1, TURN)
    assert not state.index._answers


def test_what_ended_last_is_evicted_last() -> None:
    state = model(blocks=4)
    first = dispatch(state, 0, TURN)
    dispatch(state, 0, NEXT[64:96])
    state.index.ended(first)
    dispatch(state, 0, np.arange(BLOCK_TOKENS, dtype=np.uint32))
    assert cached(state, NEXT)[0] == 2


def test_what_came_back_after_it_was_thought_evicted_tells_the_least_capacity() -> None:
    state = model(blocks=4)
    dispatch(state, 0, TURN[:32])
    for start in (10_000, 20_000):
        dispatch(state, 0, np.arange(start, start + 32, dtype=np.uint32))
    hashes = state.hasher.hashes(TURN)
    assert state.index.would_keep(state.index.credit(0, hashes)) == 6


def test_a_block_never_held_tells_nothing_of_the_capacity() -> None:
    state = model(blocks=4)
    hashes = state.hasher.hashes(TURN)
    assert state.index.would_keep(state.index.credit(0, hashes)) == 0


def test_many_samples_of_one_prompt_count_once_and_the_newest_is_found() -> None:
    state = model(blocks=40)
    for _ in range(200):
        serve(state, 0, TURN)
    assert sum(map(len, state.index._answers.values())) == 1
    assert cached(state, NEXT) == [5, 0]
    assert state.index.held_blocks(0) <= 40
