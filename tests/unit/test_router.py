from __future__ import annotations

import json
import random
import threading
from typing import Any

import numpy as np
import pytest

from gorgo_plugin import NoCandidates, Prompt, PromptError, Router, Settings, SettingsError
from gorgo_plugin.router import MAX_MODELS
from gorgo_plugin.settings import ReplicaSettings
from gorgo_plugin.signals import EngineGauges

RTT_S = {"us": 0.037, "eu": 0.279, "ap": 0.456}


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def replica(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "region": f"{name}-region", "url": f"http://{name}:8000"} | more


@pytest.fixture
def clock() -> Clock:
    return Clock()


def build(clock: Clock, **settings: Any) -> Router:
    given = {"replicas": [replica(name) for name in RTT_S]} | settings
    router = Router(Settings.model_validate(given), clock=clock)
    for name, rtt_s in RTT_S.items():
        router.observe_rtt(name, rtt_s)
    return router


@pytest.fixture
def router(clock: Clock) -> Router:
    return build(clock)


def prompt(first: int = 0, length: int = 8000, **more: Any) -> Prompt:
    return Prompt(np.arange(first, first + length), **more)


def at_rest(router: Router) -> bool:
    replicas = router.snapshot()["replicas"].values()
    sums = [(entry["load"]["waiting"], entry["load"]["decoding"], entry["load"]["queued_tokens"]) for entry in replicas]
    return set(sums) == {(0, 0, 0.0)} and set(router.snapshot()["flights"].values()) == {0}


def test_an_idle_fleet_is_served_from_the_nearest(router: Router) -> None:
    decision = router.route(prompt())
    assert (decision.replica, decision.region, decision.reason) == ("us", "us-region", "cheapest")
    assert list(decision.ranked) == ["us", "eu", "ap"]


def test_costs_are_the_terms_in_milliseconds(router: Router) -> None:
    cost = router.route(prompt()).costs["eu"]
    assert cost.network_ms == pytest.approx(279.0)
    assert (cost.queue_ms, cost.doubt_ms) == (0.0, 0.0)
    assert cost.prefill_ms == pytest.approx(10.0 + 0.09 * 8000)
    assert cost.total_ms == cost.score == pytest.approx(279.0 + 10.0 + 720.0)
    assert (cost.cached_tokens, cost.uncached_tokens) == (0, 8000)


def test_what_is_expected_is_said_of_the_chosen_one(router: Router) -> None:
    router.finish(router.route(prompt(), candidates=["ap"]).flight_id)
    chosen = router.route(prompt(length=8100))
    cost = chosen.costs["ap"]
    assert chosen.replica == "ap"
    assert chosen.costs.expected() == (cost.predicted_ttft_ms, cost.cached_tokens)
    assert cost.cached_tokens == 8000
    behind = router.route(prompt(length=8100), candidates=["ap"]).costs
    assert behind["ap"].queue_ms > 0.0
    assert behind.expected() == (behind["ap"].predicted_ttft_ms, behind["ap"].cached_tokens)


def test_a_long_cached_prefix_is_worth_a_round_trip(router: Router) -> None:
    router.finish(router.route(prompt(), candidates=["ap"]).flight_id)
    decision = router.route(prompt(length=8100))
    assert decision.replica == "ap"
    assert decision.costs["ap"].cached_tokens == 8000


def test_the_last_token_of_a_prompt_never_counts_as_cached(router: Router) -> None:
    router.finish(router.route(prompt(length=160), candidates=["us"]).flight_id)
    assert router.explain(prompt(length=160)).costs["us"].cached_tokens == 144
    assert router.explain(prompt(length=161)).costs["us"].cached_tokens == 160


def test_work_ahead_sends_others_away_until_the_first_token(router: Router, clock: Clock) -> None:
    first = router.route(prompt())
    assert router.explain(prompt(50_000)).replica == "eu"
    clock.now_s += 0.8
    router.first_token(first.flight_id)
    assert router.explain(prompt(50_000)).replica == "us"


def test_explain_opens_nothing_and_changes_no_later_draw(clock: Clock) -> None:
    settings = {"policy": "random", "seed": 5}
    plain, looked_at = build(clock, **settings), build(clock, **settings)
    expected = [plain.route(prompt()).replica for _ in range(10)]
    drawn = []
    for _ in range(10):
        looked_at.explain(prompt())
        drawn.append(looked_at.route(prompt()).replica)
    assert drawn == expected
    assert looked_at.explain(prompt()).flight_id == 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("ending", ["finish", "unreached", "rejected", "timeout", "disconnect", "invalid"])
def test_every_ending_releases_the_flight_exactly_once(router: Router, ending: str, stream: bool) -> None:
    flight = router.route(prompt(stream=stream)).flight_id
    for _ in range(3):
        router.finish(flight) if ending == "finish" else router.fail(flight, ending)
    router.first_token(flight)
    assert at_rest(router)


def test_unknown_flights_are_ignored_and_counted(router: Router) -> None:
    router.first_token(99)
    router.usage(99, prompt_tokens=5)
    router.finish(99)
    router.fail(99, "timeout")
    router.moved(99, "us")
    assert router.snapshot()["counters"]["unknown_flights"] == 5
    with pytest.raises(ValueError, match="kind: expected one of"):
        router.fail(99, "exploded")


@pytest.mark.parametrize("kind", ["unreached", "rejected", "timeout", "disconnect", "invalid"])
def test_an_attempt_that_failed_before_its_first_token_leaves_no_credit(router: Router, kind: str) -> None:
    router.fail(router.route(prompt()).flight_id, kind)
    assert router.explain(prompt()).costs["us"].cached_tokens == 0


def test_a_client_that_leaves_after_the_first_token_leaves_the_prefix_cached(router: Router) -> None:
    flight = router.route(prompt()).flight_id
    router.first_token(flight)
    router.fail(flight, "disconnect")
    assert router.explain(prompt()).costs["us"].cached_tokens == 7984


def test_a_replica_that_answers_500_at_once_does_not_stay_the_cheapest(router: Router, clock: Clock) -> None:
    router.fail(router.route(prompt()).flight_id, "rejected")
    clock.now_s += 0.005
    decision = router.route(prompt())
    assert (decision.replica, decision.reason) == ("eu", "best-is-unhealthy")


def test_a_request_at_fault_does_not_speak_against_the_replica(router: Router) -> None:
    router.fail(router.route(prompt()).flight_id, "invalid")
    assert router.route(prompt()).replica == "us"


def test_a_retry_goes_where_the_request_has_not_been(router: Router) -> None:
    attempts = []
    for _ in range(3):
        decision = router.route(prompt(), request_id="one")
        assert decision.request_id == "one"
        attempts.append(decision.replica)
        router.fail(decision.flight_id, "invalid")
    assert attempts == ["us", "eu", "ap"]


def test_a_retry_releases_an_earlier_attempt_that_nobody_ended(router: Router) -> None:
    router.route(prompt(), request_id="one")
    last = router.route(prompt(), request_id="one")
    assert router.snapshot()["flights"] == {"us": 0, "eu": 1, "ap": 0}
    router.finish(last.flight_id)
    assert at_rest(router)


def test_when_all_are_unhealthy_somebody_is_tried_all_the_same(router: Router) -> None:
    for name in RTT_S:
        router.set_health(name, False)
    assert router.route(prompt()).reason == "all-unhealthy"


def test_candidates_and_exclusions_are_kept_to(router: Router) -> None:
    assert router.route(prompt(), candidates=["ap", "nobody"]).replica == "ap"
    assert router.route(prompt(), candidates=["ap"]).reason == "only-candidate"
    assert router.route(prompt(), exclude=["us"]).replica == "eu"
    with pytest.raises(NoCandidates, match="no replica may serve model ''"):
        router.route(prompt(), candidates=[])
    with pytest.raises(NoCandidates):
        router.route(prompt(), exclude=list(RTT_S))


def test_replicas_that_do_not_serve_the_model_are_left_out(clock: Clock) -> None:
    router = build(clock, replicas=[replica("us", models=["a"]), replica("eu"), replica("ap", models=["b"])])
    assert set(router.route(prompt(model="b")).ranked) == {"eu", "ap"}


def test_models_and_cache_keys_do_not_share_prefixes(router: Router) -> None:
    router.route(prompt(model="a", cache_key="t1"))
    assert router.explain(prompt(model="a", cache_key="t1")).costs["us"].cached_tokens > 0
    assert router.explain(prompt(model="a")).costs["us"].cached_tokens == 0
    assert router.explain(prompt(model="b", cache_key="t1")).costs["us"].cached_tokens == 0


def test_a_restart_clears_the_index_of_that_replica_only(router: Router) -> None:
    for name in ("us", "eu"):
        router.finish(router.route(prompt(), candidates=[name]).flight_id)
    router.forget("us")
    costs = router.explain(prompt()).costs
    assert costs["us"].cached_tokens == 0
    assert costs["eu"].cached_tokens > 0


def test_usage_that_shows_an_eviction_corrects_the_index(router: Router) -> None:
    def once(first: int, cached: int | None) -> None:
        flight = router.route(prompt(first), candidates=["us"]).flight_id
        router.first_token(flight)
        router.usage(flight, prompt_tokens=8000, cached_tokens=cached)
        router.finish(flight)

    once(0, 0)
    once(10_000, 0)
    once(10_000, 0)  # the engine had dropped it, so it has dropped the older one too
    assert router.explain(prompt(0)).costs["us"].cached_tokens == 0
    assert router.explain(prompt(10_000)).costs["us"].cached_tokens > 0


def test_late_usage_still_corrects_and_a_second_one_is_ignored(router: Router) -> None:
    router.finish(router.route(prompt(0), candidates=["us"]).flight_id)
    router.finish(router.route(prompt(20_000), candidates=["us"]).flight_id)
    flight = router.route(prompt(20_000), candidates=["us"]).flight_id
    router.finish(flight)
    router.usage(flight, prompt_tokens=8000, cached_tokens=7984)
    router.usage(flight, prompt_tokens=8000, cached_tokens=0)
    assert router.explain(prompt(0)).costs["us"].cached_tokens > 0


@pytest.mark.parametrize("usage", [(0, 0), (-5, 3), (None, 7), (8000, 9000), (8000, -1), (10**400, 0)])
def test_usage_that_makes_no_sense_teaches_nothing(router: Router, usage: tuple[int | None, int]) -> None:
    router.finish(router.route(prompt(0), candidates=["us"]).flight_id)
    flight = router.route(prompt(0), candidates=["us"]).flight_id
    router.usage(flight, prompt_tokens=usage[0], cached_tokens=usage[1])
    router.finish(flight)
    assert router.explain(prompt(0)).costs["us"].cached_tokens == 7984


def test_counts_of_an_inexact_prompt_are_scaled_to_the_engines(router: Router) -> None:
    for _ in range(5):
        flight = router.route(prompt(exact=False)).flight_id
        router.usage(flight, prompt_tokens=10_000)
        router.finish(flight)
    cost = router.explain(prompt(90_000, exact=False)).costs["us"]
    assert cost.uncached_tokens == 10_000
    assert router.explain(prompt(90_000)).costs["us"].uncached_tokens == 8000  # an exact count stays as it is


def test_rates_are_learned_from_streamed_answers_only(router: Router, clock: Clock) -> None:
    for number in range(40):
        flight = router.route(prompt(number * 10_000, stream=number % 2 == 0), candidates=["us"]).flight_id
        clock.now_s += 0.037 + 0.020 + 8000 * 0.0002
        if number % 2 == 0:
            router.first_token(flight)
        router.finish(flight)
    learned = router.snapshot()["replicas"]["us"]["models"][""]
    assert learned["samples"] == 20
    assert learned["ms_per_token"] == pytest.approx(0.2, rel=0.05)


def test_a_moved_flight_takes_credit_and_load_along(router: Router) -> None:
    flight = router.route(prompt()).flight_id
    router.moved(flight, "ap")
    assert router.snapshot()["flights"] == {"us": 0, "eu": 0, "ap": 1}
    router.first_token(flight)
    router.finish(flight)
    costs = router.explain(prompt()).costs
    assert (costs["us"].cached_tokens, costs["ap"].cached_tokens) == (0, 7984)


@pytest.mark.parametrize("failed", [True, False])
def test_a_replica_that_a_flight_was_moved_from_is_left_out_when_it_failed(router: Router, failed: bool) -> None:
    router.moved(router.route(prompt()).flight_id, "ap", failed=failed)
    health = router.snapshot()["replicas"]["us"]["health"]
    assert (health["available"], health["failures_in_a_row"]) == (not failed, int(failed))


def test_a_trial_that_is_moved_leaves_the_next_trial_free(router: Router, clock: Clock) -> None:
    router.fail(router.route(prompt(), candidates=["us"]).flight_id, "rejected")
    clock.now_s += 1.5
    router.moved(router.route(prompt(), candidates=["us"]).flight_id, "ap", failed=False)
    assert router.snapshot()["replicas"]["us"]["health"]["available"]


def test_a_flight_that_everybody_lost_sight_of_is_swept(router: Router, clock: Clock) -> None:
    router.route(prompt())
    clock.now_s += 901.0
    router.route(prompt(), candidates=["eu"])
    assert router.snapshot()["flights"] == {"us": 0, "eu": 1, "ap": 0}
    assert router.snapshot()["counters"]["swept_flights"] == 1


@pytest.mark.parametrize("jump_s", [-500.0, 1e6])
def test_a_clock_that_jumps_breaks_nothing(router: Router, clock: Clock, jump_s: float) -> None:
    flight = router.route(prompt()).flight_id
    clock.now_s += jump_s
    other = router.route(prompt(50_000))
    assert all(np.isfinite(cost.total_ms) and cost.queue_ms >= 0.0 for cost in other.costs.values())
    router.first_token(flight)
    router.finish(flight)
    router.finish(other.flight_id)
    assert at_rest(router)


def test_a_reload_keeps_what_is_known_of_unchanged_replicas(router: Router) -> None:
    router.finish(router.route(prompt(), candidates=["us"]).flight_id)
    open_flight = router.route(prompt(), candidates=["eu"]).flight_id
    router.set_replicas([ReplicaSettings.model_validate(replica(name)) for name in ("us", "new")])
    snapshot = router.snapshot()
    assert list(snapshot["replicas"]) == ["us", "new"]
    assert snapshot["replicas"]["us"]["latency"]["rtt_ms"] == pytest.approx(37.0)
    assert snapshot["replicas"]["new"]["latency"]["rtt_ms"] is None
    assert router.explain(prompt()).costs["us"].cached_tokens == 7984
    router.first_token(open_flight)
    router.finish(open_flight)
    assert at_rest(router)


def test_other_settings_take_effect_and_what_was_learned_stays(router: Router) -> None:
    router.finish(router.route(prompt(), candidates=["us"]).flight_id)
    open_flight = router.route(prompt(length=100), candidates=["eu"]).flight_id
    changed = router.settings.model_dump(exclude_defaults=True) | {"policy": "nearest", "weights": {"rtt": 3.0}}
    router.reconfigure(Settings.model_validate(changed))
    decision = router.explain(prompt())
    assert decision.reason == "nearest"
    assert decision.costs["us"].cached_tokens == 7984
    assert decision.costs["eu"].total_ms > 3 * 279.0
    router.finish(open_flight)
    assert at_rest(router)


def test_a_model_whose_blocks_change_starts_anew_and_its_open_flights_end_well(router: Router) -> None:
    flight = router.route(prompt(), candidates=["us"]).flight_id
    router.reconfigure(
        Settings.model_validate(router.settings.model_dump(exclude_defaults=True) | {"block_tokens": 32})
    )
    again = router.route(prompt(), candidates=["us"])
    assert again.costs["us"].cached_tokens == 0
    router.fail(flight, "unreached")  # its credit was of the index before
    assert router.explain(prompt()).costs["us"].cached_tokens == 7968
    router.finish(again.flight_id)
    assert at_rest(router)


def test_settings_that_cannot_be_read_change_nothing(router: Router) -> None:
    with pytest.raises(SettingsError, match=r"^tokenizer: "):
        router.reconfigure(Settings.model_validate({"tokenizer": "/nowhere", "policy": "random"}))
    assert router.explain(prompt()).reason == "cheapest"


def test_a_replica_at_a_new_url_is_a_new_replica(router: Router) -> None:
    router.finish(router.route(prompt(), candidates=["us"]).flight_id)
    router.set_replicas([ReplicaSettings.model_validate(replica("us") | {"url": "http://elsewhere:1"})])
    assert router.explain(prompt()).costs["us"].cached_tokens == 0
    assert router.snapshot()["replicas"]["us"]["latency"]["rtt_ms"] is None


@pytest.mark.parametrize("change", ["removed", "moved"])
@pytest.mark.parametrize("late", [False, True])
def test_usage_of_a_replica_that_was_taken_away_meanwhile_teaches_nothing(
    router: Router, change: str, late: bool
) -> None:
    flight = router.route(prompt(), candidates=["us"]).flight_id
    left = {"removed": replica("eu"), "moved": replica("us") | {"url": "http://elsewhere:1"}}[change]
    router.set_replicas([ReplicaSettings.model_validate(left)])
    if late:
        router.finish(flight)
    router.usage(flight, prompt_tokens=8000, cached_tokens=7000, output_tokens=300)
    router.finish(flight)
    assert at_rest(router)


@pytest.mark.parametrize("output_tokens", [2**31 - 1, 10**12, 10**400])
def test_an_output_longer_than_any_is_not_believed(router: Router, output_tokens: int) -> None:
    flight = router.route(prompt(), candidates=["us"]).flight_id
    router.first_token(flight)
    router.usage(flight, prompt_tokens=8000, cached_tokens=0, output_tokens=output_tokens)
    router.finish(flight)
    assert router.snapshot()["replicas"]["us"]["models"][""]["index_tokens"] == 8000


def test_slots_are_used_again_but_not_while_a_flight_is_open(router: Router) -> None:
    for round_ in range(50):
        flight = router.route(prompt()).flight_id
        router.set_replicas([ReplicaSettings.model_validate(replica(f"r{round_}-{n}")) for n in range(3)])
        router.finish(flight)
        assert at_rest(router)
    assert router._replicas.rows <= 9


def test_a_snapshot_is_plain_json_and_another_router_can_start_from_it(router: Router, clock: Clock) -> None:
    for number in range(20):
        flight = router.route(prompt(number * 9000, exact=False), candidates=["us"]).flight_id
        clock.now_s += 1.0
        router.first_token(flight)
        router.usage(flight, prompt_tokens=16_000)
        router.finish(flight)
    router.observe_gauges("us", EngineGauges(1, 2, 0.5))
    state = json.loads(json.dumps(router.snapshot()))
    heir = Router(router.settings, clock=clock, state=state)
    assert heir.snapshot()["replicas"]["us"]["models"][""]["ms_per_token"] == pytest.approx(
        state["replicas"]["us"]["models"][""]["ms_per_token"]
    )
    assert heir.snapshot()["models"][""]["token_scale"] == 2.0
    assert heir.snapshot()["replicas"]["ap"]["latency"]["rtt_ms"] == pytest.approx(456.0)


def test_the_same_seed_and_clock_give_the_same_decisions(clock: Clock) -> None:
    def replay() -> list[str]:
        router = build(clock, seed=3, policy="random")
        return [router.route(prompt(n)).replica for n in range(20)]

    assert replay() == replay()


def test_made_up_model_names_do_not_grow_without_bound(router: Router) -> None:
    for number in range(3 * MAX_MODELS):
        router.finish(router.route(prompt(length=64, model=f"m{number}")).flight_id)
    assert len(router.snapshot()["models"]) == MAX_MODELS


def test_made_up_model_names_do_not_push_out_a_model_that_is_served(router: Router, clock: Clock) -> None:
    for _ in range(8):
        flight = router.route(prompt(model="real")).flight_id
        clock.now_s += 1.0
        router.first_token(flight)
        router.finish(flight)
    for number in range(3 * MAX_MODELS):
        router.fail(router.route(prompt(length=64, model=f"m{number}")).flight_id, "invalid")
    assert "real" in router.snapshot()["models"]


def test_an_empty_prompt_is_routed(router: Router) -> None:
    assert router.route(Prompt([])).replica == "us"


@pytest.mark.parametrize("tokens", [[-1], [2**32], [1.5], ["a"], [[1, 2]], [None], 7])
def test_tokens_that_are_no_token_ids_are_refused(tokens: Any) -> None:
    with pytest.raises(PromptError, match=r"^tokens: expected"):
        Prompt(tokens)


def test_threads_may_use_one_router_together(router: Router) -> None:
    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(200):
            decision = router.route(prompt(rng.randrange(10) * 8000, stream=rng.random() < 0.5))
            if rng.random() < 0.7:
                router.first_token(decision.flight_id)
            router.usage(decision.flight_id, prompt_tokens=8000, cached_tokens=rng.randrange(8000))
            router.fail(decision.flight_id, "timeout") if rng.random() < 0.2 else router.finish(decision.flight_id)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert at_rest(router)
    assert router.snapshot()["counters"]["routed"] == 800


def long_prompt(known: int = 0, **more: Any) -> tuple[Prompt, np.ndarray]:
    """A prompt of 8,000 tokens of which `known` are there and the others thought to be 10,000, and its tokens."""
    tokens = np.arange(50_000, 58_000)
    return Prompt(tokens[:known], estimated_tokens=10_000, **more), tokens


def load(router: Router, name: str) -> dict[str, float]:
    return router.snapshot()["replicas"][name]["load"]


def test_an_estimated_prompt_is_priced_by_its_estimate_and_the_reason_says_so(router: Router) -> None:
    estimated, _ = long_prompt(known=160)
    assert (len(estimated), estimated.exact) == (10_160, False)
    decision = router.route(estimated)
    assert decision.reason == "cheapest-by-estimate"
    assert router.explain(estimated).reason.endswith("-by-estimate")
    assert decision.costs["us"].uncached_tokens == 10_160
    assert load(router, "us")["queued_tokens"] == 10_160


def test_attached_tokens_put_counts_and_credit_right(router: Router) -> None:
    estimated, tokens = long_prompt(known=160)
    first = router.route(prompt(length=1000))
    decision = router.route(estimated, ["us"])
    router.attach(decision.flight_id, tokens)
    assert load(router, "us")["queued_tokens"] == 9000
    assert router.explain(Prompt(tokens)).costs["us"].cached_tokens == 7984
    router.first_token(first.flight_id)
    assert load(router, "us")["queued_tokens"] == 8000
    router.first_token(decision.flight_id)
    router.finish(first.flight_id)
    router.finish(decision.flight_id)
    assert at_rest(router)


def test_attaching_finds_what_the_replica_had_but_not_what_the_flight_itself_brought(router: Router) -> None:
    estimated, tokens = long_prompt()
    router.finish(router.route(Prompt(tokens[:4000]), ["us"]).flight_id)
    decision = router.route(estimated, ["us"])
    router.attach(decision.flight_id, tokens)
    assert load(router, "us")["queued_tokens"] == 4000
    estimated, _ = long_prompt(known=4800)
    router.attach(router.route(estimated, ["eu"]).flight_id, tokens)
    assert load(router, "eu")["queued_tokens"] == 8000


def test_tokens_are_attached_once_and_only_where_they_were_estimated(router: Router) -> None:
    estimated, tokens = long_prompt()
    decision, exact = router.route(estimated, ["us"]), router.route(prompt(length=320), ["eu"])
    router.attach(decision.flight_id, tokens)
    router.attach(decision.flight_id, tokens[:100])
    router.attach(exact.flight_id, tokens)
    assert (load(router, "us")["queued_tokens"], load(router, "eu")["queued_tokens"]) == (8000, 320)
    router.attach(4711, tokens)
    assert router.snapshot()["counters"]["unknown_flights"] == 1
    with pytest.raises(PromptError):
        router.attach(router.route(long_prompt()[0]).flight_id, [-1])


@pytest.mark.parametrize("end", ["finish", "fail"])
def test_tokens_that_come_after_the_end_change_nothing(router: Router, end: str) -> None:
    estimated, tokens = long_prompt()
    decision = router.route(estimated, ["us"])
    router.first_token(decision.flight_id)
    router.finish(decision.flight_id) if end == "finish" else router.fail(decision.flight_id, "timeout")
    router.attach(decision.flight_id, tokens)
    assert at_rest(router)
    assert router.explain(Prompt(tokens)).costs["us"].cached_tokens == 0


def test_tokens_of_a_replica_that_was_taken_away_change_nothing(router: Router) -> None:
    estimate, tokens = long_prompt()
    flight = router.route(estimate, candidates=["us"]).flight_id
    router.set_replicas([ReplicaSettings.model_validate(replica("eu"))])
    router.attach(flight, tokens, exact=True)
    router.finish(flight)
    assert at_rest(router)


def test_tokens_follow_a_flight_that_was_moved(router: Router) -> None:
    estimated, tokens = long_prompt(known=160)
    decision = router.route(estimated, ["us"])
    router.moved(decision.flight_id, "eu")
    router.attach(decision.flight_id, tokens)
    costs = router.explain(Prompt(tokens)).costs
    assert (costs["us"].cached_tokens, costs["eu"].cached_tokens) == (0, 7984)
    assert (load(router, "us")["queued_tokens"], load(router, "eu")["queued_tokens"]) == (0, 8000)
    router.fail(decision.flight_id, "disconnect")
    assert router.explain(Prompt(tokens)).costs["eu"].cached_tokens == 0


def test_tokens_that_come_after_the_first_one_count_as_decoding(clock: Clock) -> None:
    router = build(clock, policy="gorgo-v1-proxy")  # prices prompts under way, decoding ones too
    estimated, tokens = long_prompt()
    decision = router.route(estimated, ["us"])
    router.first_token(decision.flight_id)
    by_estimate = router.explain(prompt()).costs["us"].score
    router.attach(decision.flight_id, tokens)
    assert router.explain(prompt()).costs["us"].score < by_estimate
    router.finish(decision.flight_id)
    assert at_rest(router)


def test_nothing_is_learned_from_an_estimated_length(router: Router, clock: Clock) -> None:
    estimated, _ = long_prompt()
    decision, other = router.route(estimated, ["us"]), router.route(estimated, ["eu"])
    router.usage(decision.flight_id, prompt_tokens=8000)
    clock.now_s += 5.0
    router.first_token(other.flight_id)
    router.finish(other.flight_id)
    known = router.snapshot()
    assert known["models"][""]["token_scale"] == 1.0
    assert known["replicas"]["eu"]["models"][""]["samples"] == 0
