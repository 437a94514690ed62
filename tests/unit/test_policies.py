from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from gorgo_plugin.policies import POLICIES, View
from gorgo_plugin.policies.pick import AVAILABLE, TRIED, UNHEALTHY, Choice, pick

LOADS = ("waiting", "decoding", "queued_prompt_tokens", "decoding_prompt_tokens")


def view(gauges: Mapping[str, list[float]] | None = None, affinity: bytes = b"s", **columns: Any) -> View:
    """Three idle replicas at 37, 279 and 456 ms, a prompt of 1,000 tokens that nobody has; `columns` change that."""
    known: dict[str, Any] = {
        "network_ms": [37.0, 279.0, 456.0],
        "doubt_ms": [0.0] * 3,
        "blocking_ms": [0.0] * 3,
        "next_turn_ms": [0.0] * 3,
        "decode_ms": [0.0] * 3,
        "queue_ms": [0.0] * 3,
        "prefill_ms": [90.0] * 3,
        "cached_tokens": [0.0] * 3,
        **dict.fromkeys(LOADS, [0.0] * 3),
    } | columns
    arrays = {name: np.array(values, dtype=float) for name, values in known.items() if name not in ("weights", "rng")}
    loads = {name: arrays.pop(name) for name in LOADS}
    return View(
        names=["a", "b", "c"],
        uncached_tokens=1000.0 - arrays["cached_tokens"],
        work_tokens=1000.0 - arrays["cached_tokens"],
        prompt_tokens=1000.0,
        load=loads.__getitem__,
        gauge=lambda name: np.array((gauges or {}).get(name, [np.nan] * 3)),
        affinity=lambda: affinity,
        weights=columns.get("weights", (1.0, 1.0)),
        rng=columns.get("rng", random.Random(0)),
        **arrays,
    )


def choose(policy: str, seen: View, tiers: list[int] | None = None, seed: int = 0) -> Choice:
    return pick(POLICIES[policy], seen, np.array(tiers or [AVAILABLE] * 3), random.Random(seed))


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_scores_every_candidate_with_a_finite_number(name: str) -> None:
    scores = POLICIES[name].scores(view())
    assert scores.shape == (3,)
    assert np.isfinite(scores).all()


def test_gorgo_adds_milliseconds_of_network_doubt_queue_and_prefill() -> None:
    seen = view(queue_ms=[500.0, 0, 0], doubt_ms=[0, 50.0, 0], prefill_ms=[10.0, 90, 90])
    assert POLICIES["gorgo"].scores(seen).tolist() == [547.0, 419.0, 546.0]
    assert choose("gorgo", seen).row == 1


def test_gorgo_applies_the_papers_weights() -> None:
    seen = view(queue_ms=[500.0, 0, 0], weights=(2.0, 0.1))
    assert POLICIES["gorgo"].scores(seen).tolist() == [74.0 + 50 + 90, 558.0 + 90, 912.0 + 90]


def test_gorgo_paper_uses_the_published_token_formula() -> None:
    seen = view(queued_prompt_tokens=[2000.0, 0, 0], decoding_prompt_tokens=[1000.0, 0, 0], weights=(0.276, 0.5))
    expected = [0.276 * 37 + 0.5 * 3000 + 1000, 0.276 * 279 + 1000, 0.276 * 456 + 1000]
    assert POLICIES["gorgo-paper"].scores(seen) == pytest.approx(expected)


def test_gorgo_v1_proxy_uses_the_first_papers_rate() -> None:
    seen = view(queued_prompt_tokens=[2000.0, 0, 0], decoding_prompt_tokens=[1000.0, 0, 0], cached_tokens=[0, 400, 0])
    expected = [37 + 0.094 * 4000, 279 + 0.094 * 600, 456 + 0.094 * 1000]
    assert POLICIES["gorgo-proxy"].scores(seen) == pytest.approx(expected)


def test_least_load_reads_the_engines_gauges_and_own_counts_where_there_are_none() -> None:
    gauges = {"running": [5.0, 1, np.nan], "waiting": [0.0, 0, np.nan], "used_tokens": [900.0, 100, np.nan]}
    seen = view(gauges, waiting=[1.0, 0, 0], decoding_prompt_tokens=[0.0, 0, 50], decoding=[0.0, 0, 1])
    assert POLICIES["least-load"].scores(seen).tolist() == [906.0, 101.0, 51.0]


def test_least_request_counts_open_flights() -> None:
    assert choose("least-request", view(waiting=[1.0, 0, 1], decoding=[0.0, 2, 2])).row == 0


def test_prefix_cache_takes_the_longest_prefix_of_a_balanced_fleet() -> None:
    assert choose("prefix-cache", view(cached_tokens=[0.0, 160, 800])).row == 2


def test_prefix_cache_leaves_out_a_replica_above_mean_and_deviation() -> None:
    assert choose("prefix-cache", view(cached_tokens=[0.0, 160, 800], decoding=[0.0, 0, 8])).row == 1


def test_prefix_cache_balances_a_fleet_that_is_out_of_balance() -> None:
    assert choose("prefix-cache", view(cached_tokens=[800.0, 160, 0], decoding=[9.0, 1, 0])).row == 2


def test_prefix_similarity_ignores_load_unless_nobody_has_the_prefix() -> None:
    assert choose("prefix-similarity", view(cached_tokens=[0.0, 0, 16], decoding=[0.0, 0, 50])).row == 2
    assert choose("prefix-similarity", view({"running": [3.0, 1, 2], "waiting": [0.0, 0, 0]})).row == 1


def test_session_affinity_spreads_sessions_and_keeps_each() -> None:
    rows = [choose("session-affinity", view(affinity=f"user-{n}".encode())).row for n in range(300)]
    assert rows == [choose("session-affinity", view(affinity=f"user-{n}".encode())).row for n in range(300)]
    assert all(70 < count < 130 for count in Counter(rows).values())


def test_session_affinity_moves_only_the_sessions_of_a_replica_that_leaves() -> None:
    for number in range(100):
        seen = view(affinity=f"user-{number}".encode())
        before = choose("session-affinity", seen)
        after = choose("session-affinity", seen, tiers=[AVAILABLE, UNHEALTHY, AVAILABLE])
        assert after.row == (before.row if before.row != 1 else before.ranked[1])


def test_nearest_takes_the_smallest_round_trip_with_its_doubt() -> None:
    assert choose("nearest", view()).row == 0
    assert choose("nearest", view(doubt_ms=[300.0, 0, 0])).row == 1


def test_random_is_uniform() -> None:
    rng = random.Random(0)
    rows = [pick(POLICIES["random"], view(rng=rng), np.zeros(3, dtype=np.intp), rng).row for _ in range(600)]
    assert all(150 < count < 250 for count in Counter(rows).values())


def test_near_ties_are_broken_at_random_and_said_to_be() -> None:
    seen = view(network_ms=[100.0, 101.0, 456.0])
    choices = [choose("gorgo", seen, seed=seed) for seed in range(100)]
    assert {choice.row for choice in choices} == {0, 1}
    assert {choice.reason for choice in choices} == {"near-tie"}
    assert all(choice.ranked[0] == choice.row for choice in choices)


def test_a_clear_winner_is_always_taken() -> None:
    assert {choose("gorgo", view(), seed=seed).row for seed in range(50)} == {0}


@pytest.mark.parametrize(
    ("tiers", "row", "reason"),
    [
        ([AVAILABLE, AVAILABLE, AVAILABLE], 0, "cheapest"),
        ([TRIED, AVAILABLE, AVAILABLE], 1, "best-was-tried"),
        ([UNHEALTHY, AVAILABLE, AVAILABLE], 1, "best-is-unhealthy"),
        ([UNHEALTHY, UNHEALTHY, UNHEALTHY], 0, "all-unhealthy"),
        ([UNHEALTHY, TRIED, UNHEALTHY], 1, "best-is-unhealthy"),
    ],
)
def test_health_and_earlier_attempts_come_before_price(tiers: list[int], row: int, reason: str) -> None:
    choice = choose("gorgo", view(), tiers)
    assert (choice.row, choice.reason) == (row, reason)
    assert sorted(choice.ranked) == [0, 1, 2]


def test_v1_distributed_stays_local_while_a_local_replica_has_room() -> None:
    seen = view(
        network_ms=[1.0, 1.2, 60.0], waiting=[9.0, 2.0, 0.0], decoding=[0.0, 2.0, 0.0], cached_tokens=[0.0, 0.0, 999.0]
    )
    assert choose("gorgo-v1-distributed", seen).row == 1


def test_v1_distributed_compares_busy_local_replicas_with_peers_by_network_and_uncached_tokens_alone() -> None:
    busy = {"network_ms": [1.0, 60.0, 90.0], "waiting": [3.0, 50.0, 0.0], "decoding": [2.0, 0.0, 0.0]}
    tokens = {"queued_prompt_tokens": [2000.0, 9e5, 0.0], "decoding_prompt_tokens": [1000.0, 0.0, 0.0]}
    scores = POLICIES["gorgo-v1-distributed"].scores(view(**busy, **tokens, cached_tokens=[900.0, 0.0, 800.0]))
    expected = [0.094 * (0.5 * 1000 + 2000 + 100), 60 + 0.094 * 1000, 90 + 0.094 * 200]
    assert scores == pytest.approx(expected, abs=1e-3)
