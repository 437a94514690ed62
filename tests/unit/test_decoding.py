"""How fast replicas decode, and what that costs a decision."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from gorgo_plugin import Prompt, Router, Settings
from gorgo_plugin.policies.base import DECODING_SHARE, decode_ms
from gorgo_plugin.signals import DecodeTable
from gorgo_plugin.signals.decoding import HALF_LIFE_S


def table(replicas: int = 2) -> DecodeTable:
    made = DecodeTable()
    made.grow(replicas)
    return made


def answered(decodes: DecodeTable, slot: int, decoding: float, itl_ms: float, tokens: int = 101, at_s: float = 0.0):
    decodes.observe(slot, decoding, at_s, at_s + itl_ms * (tokens - 1) / 1000.0, tokens)


def test_base_and_slope_are_learned_although_some_answers_hang() -> None:
    decodes, rng = table(), random.Random(1)
    for number in range(400):
        n = rng.randrange(1, 40)
        hang = 20.0 if number % 20 == 5 else 1.0
        answered(decodes, 0, n, (20.0 + 0.4 * n) * rng.gauss(1.0, 0.02) * hang)
    learned = decodes.describe(0)
    assert learned["itl_ms"] == pytest.approx(20.0, rel=0.25)
    assert learned["itl_per_request_ms"] == pytest.approx(0.4, rel=0.5)
    assert learned["itl_samples"] == 400
    assert decodes.output_tokens == pytest.approx(101)


def test_with_the_same_load_all_the_time_no_slope_is_made_up() -> None:
    decodes = table()
    for number in range(100):
        answered(decodes, 0, 8.0, 25.0 + number % 2)
    assert decodes.describe(0)["itl_per_request_ms"] == 0.0
    assert decodes.describe(0)["itl_ms"] == pytest.approx(25.5, abs=0.5)


@pytest.mark.parametrize(("itl_ms", "tokens"), [(-1.0, 100), (0.0, 100), (math.nan, 100), (1e9, 100), (20.0, 2)])
def test_an_answer_that_tells_nothing_teaches_nothing(itl_ms: float, tokens: int) -> None:
    decodes = table()
    answered(decodes, 0, 1.0, itl_ms, tokens)
    assert decodes.describe(0)["itl_samples"] == 0


def test_a_replica_without_an_answer_counts_as_the_fastest() -> None:
    decodes = table(3)
    decodes.refresh(0.0)
    assert not decodes.base_ms(slice(0, 3)).any()
    answered(decodes, 0, 1.0, 40.0)
    assert decodes.base_ms(slice(0, 3)).tolist() == pytest.approx([40.0, 40.0, 40.0])
    answered(decodes, 1, 1.0, 20.0)
    assert decodes.base_ms(slice(0, 3)).tolist() == pytest.approx([40.0, 20.0, 20.0])


def test_a_replica_that_is_not_asked_any_more_is_not_believed_slow_for_ever() -> None:
    decodes = table()
    answered(decodes, 0, 1.0, 60.0)
    answered(decodes, 1, 1.0, 20.0)
    decodes.refresh(2 + HALF_LIFE_S)
    assert decodes.base_ms(slice(0, 1))[0] == pytest.approx(40.0, rel=0.05)
    decodes.refresh(10 * HALF_LIFE_S)
    assert decodes.base_ms(slice(0, 1))[0] == pytest.approx(20.0, rel=0.01)


def test_what_was_learned_is_taken_over() -> None:
    decodes, heir = table(), table()
    for n in range(1, 60):
        answered(decodes, 1, n, 20.0 + 0.4 * n)
    for one in (decodes, heir):
        one.refresh(7.0)
    for slot in (0, 1):
        heir.restore(slot, decodes.describe(slot), now_s=7.0)
    heir.refresh(7.0)
    assert heir.base_ms(slice(0, 2)).tolist() == pytest.approx(decodes.base_ms(slice(0, 2)).tolist(), rel=0.02)
    assert heir.per_request_ms(slice(0, 2)).tolist() == pytest.approx(decodes.per_request_ms(slice(0, 2)).tolist())
    assert (heir.describe(0)["itl_samples"], bool(heir.describe(1)["itl_samples"])) == (0, True)


def test_decoding_costs_what_it_takes_longer_than_where_it_is_fastest() -> None:
    cost = decode_ms(np.array([20.0, 30.0]), np.array([0.5, 0.5]), np.array([4.0, 0.0]), 200.0)
    assert cost.tolist() == pytest.approx([0.0, DECODING_SHARE * 200 * (30.5 - 24.5)])


def test_a_router_sends_answers_away_from_an_engine_that_decodes_slowly() -> None:
    """Two replicas alike but for their decoding; nothing is known of either at first."""
    now, names = 0.0, ["one", "other"]
    fleet = Settings.model_validate({"replicas": [{"name": name, "url": f"http://{name}:1"} for name in names]})
    router = Router(fleet, clock=lambda: now)
    for name in names:
        router.observe_rtt(name, 0.05)
    for number in range(60):
        slow = names[number % len(names)] == names[0]
        flight = router.route(Prompt(range(number * 1000, number * 1000 + 64)), [names[number % len(names)]]).flight_id
        now += 0.1
        router.first_token(flight)
        now += 10.0 if slow else 2.0
        router.usage(flight, prompt_tokens=64, output_tokens=100)
        router.finish(flight)
    for name in names:
        router.observe_rtt(name, 0.05)
    decision = router.route(Prompt(range(900_000, 900_064)))
    assert decision.replica != names[0]
    assert decision.costs[names[0]].decode_ms > 200.0
    assert decision.costs[decision.replica].decode_ms == pytest.approx(0.0, abs=1.0)
    short = router.explain(Prompt(range(900_000, 900_064), max_output_tokens=10)).costs[names[0]].decode_ms
    assert 0.0 < short < decision.costs[names[0]].decode_ms / 5
