"""Answers as the router knows them: by the number of their tokens, from the engine's usage."""

from __future__ import annotations

import numpy as np
import pytest

from gorgo_plugin import Prompt, Router, Settings

PROMPT, ANSWER = 800, 320
ONE_REPLICA = {"replicas": [{"name": "a", "url": "http://a:1"}]}


def turn(first: int, tokens: int) -> Prompt:
    return Prompt(np.arange(first, first + tokens))


@pytest.fixture
def router() -> Router:
    return Router(Settings.model_validate(ONE_REPLICA), clock=lambda: 0.0)


def serve(router: Router, prompt: Prompt, cached_tokens: int | None = None, late: bool = False) -> int:
    """Route and answer one prompt; returns the tokens believed cached."""
    decision = router.route(prompt)
    believed = decision.costs["a"].cached_tokens
    reported = believed if cached_tokens is None else cached_tokens
    router.first_token(decision.flight_id)
    if late:
        router.finish(decision.flight_id)
    router.usage(decision.flight_id, len(prompt), reported, ANSWER)
    router.finish(decision.flight_id)
    return believed


@pytest.mark.parametrize("late", [False, True], ids=["usage-first", "usage-late"])
def test_the_next_turn_counts_the_answer_as_cached(router: Router, late: bool) -> None:
    serve(router, turn(0, PROMPT), late=late)
    believed = router.explain(turn(0, PROMPT + ANSWER + 100)).costs["a"].cached_tokens
    assert believed == (PROMPT + ANSWER - 1) // 16 * 16


def test_a_look_at_the_next_turn_changes_nothing(router: Router) -> None:
    serve(router, turn(0, PROMPT))
    before = router.snapshot()
    looks = [router.explain(turn(0, PROMPT + ANSWER + 100)).costs["a"].cached_tokens for _ in range(2)]
    assert looks[0] == looks[1]
    assert router.snapshot() == before


def test_where_chats_drop_their_answers_they_are_soon_not_counted(router: Router) -> None:
    for chat in range(10):
        first = 10_000 * chat
        serve(router, turn(first, PROMPT), cached_tokens=0)
        serve(router, turn(first, PROMPT + ANSWER + 100), cached_tokens=PROMPT)
    serve(router, turn(500_000, PROMPT))
    assert router.explain(turn(500_000, PROMPT + ANSWER + 100)).costs["a"].cached_tokens == PROMPT


def test_an_answer_that_was_not_found_again_evicts_nothing_else(router: Router) -> None:
    serve(router, turn(90_000, PROMPT))
    serve(router, turn(0, PROMPT))
    serve(router, turn(0, PROMPT + ANSWER + 100), cached_tokens=PROMPT)
    assert router.explain(turn(90_000, PROMPT + 16)).costs["a"].cached_tokens >= PROMPT


def test_status_says_how_often_the_estimate_was_right(router: Router) -> None:
    serve(router, turn(0, PROMPT))
    serve(router, turn(0, PROMPT), cached_tokens=0)
    serve(router, turn(50_000, PROMPT), cached_tokens=640)
    caches = next(entry for entry in router.snapshot()["replicas"].values())["cache"]
    assert caches["estimates"] == {"within-block": 1, "over": 1, "under": 1}
    assert caches["source"] == "usage"
