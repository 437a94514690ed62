from __future__ import annotations

import itertools
import random
import time

import pytest

from gorgo_plugin.fleet.engine import (
    PROFILES,
    Engine,
    EngineProfile,
    EngineRequest,
    Event,
    Finished,
    FirstToken,
    Gauges,
    Tokens,
)

EXACT = EngineProfile(noise=0.0, step_tokens=8192)
CURVED = EngineProfile(noise=0.0, step_tokens=8192, t0_ms=9.8, p_ms=0.0008, a_ms=0.051, b_ms=5.7e-5)


def request(name: str, prompt: int, output: int = 1, start: int = 0, blocks: int | None = None) -> EngineRequest:
    """A request whose block keys are `start`, `start + 1`, ...: the same `start` means the same text."""
    known = (prompt + output) // 16 if blocks is None else blocks
    return EngineRequest(name, prompt, output, range(start, start + known))


def run(engine: Engine, until_s: float = float("inf")) -> list[Event]:
    events: list[Event] = []
    while (at_s := engine.next_event_s()) is not None and at_s <= until_s:
        events += engine.advance(at_s)
    return events


def first_tokens(events: list[Event]) -> dict[object, FirstToken]:
    return {event.id: event for event in events if isinstance(event, FirstToken)}


def ttft_ms(profile: EngineProfile, prompt: int, cached: int) -> float:
    """Time to first token of a prompt alone on an engine that holds its first `cached` tokens."""
    engine = Engine(profile)
    keys = range((prompt + 1) // profile.block_tokens)
    if cached:
        engine.submit(EngineRequest("before", cached + 1, 1, keys), 0.0)
        run(engine)
    engine.submit(EngineRequest("it", prompt, 1, keys), 1000.0)
    return (first_tokens(run(engine))["it"].at_s - 1000.0) * 1e3


@pytest.mark.parametrize("profile", [EXACT, CURVED])
@pytest.mark.parametrize(("prompt", "cached"), [(1, 0), (1000, 0), (8000, 0), (7008, 6000), (8000, 7984)])
def test_time_to_first_token_of_a_lone_prompt_follows_the_formula(
    profile: EngineProfile, prompt: int, cached: int
) -> None:
    new = prompt - cached
    expected = profile.t0_ms + profile.p_ms * prompt + profile.a_ms * new + profile.b_ms * (new * cached + new**2 / 2)
    assert ttft_ms(profile, prompt, cached) == pytest.approx(expected, abs=1e-6)


def test_a_curved_engine_takes_longer_for_the_same_new_tokens_behind_more_cached_ones() -> None:
    assert ttft_ms(PROFILES["curved"], 8_000, 6_000) > 1.05 * ttft_ms(PROFILES["curved"], 2_000, 0)


def test_prompts_that_arrive_together_are_served_in_order_one_budget_a_step() -> None:
    engine = Engine(EngineProfile(noise=0.0, step_tokens=2048, max_running=64))
    for index in range(8):
        engine.submit(request(str(index), 2048, 1, start=10_000 * index), 0.0)
    times = [event.at_s for event in run(engine) if isinstance(event, FirstToken)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert gaps == [pytest.approx(0.015 + 0.09e-3 * 2048)] * 7


def test_a_fully_cached_prompt_waits_behind_an_uncached_one_as_long_as_a_cold_prompt_does() -> None:
    def wait_s(cached: bool) -> float:
        engine = Engine(EXACT)
        if cached:
            engine.submit(request("warm", 160, start=7_000_000), 0.0)
            run(engine)
        engine.submit(request("long", 30_000), 10.0)
        engine.submit(request("short", 160, start=7_000_000), 10.0)
        return first_tokens(run(engine))["short"].at_s - 10.0

    assert wait_s(cached=True) == pytest.approx(wait_s(cached=False), rel=0.01)
    assert wait_s(cached=True) > 2.7


def test_a_running_decode_gets_a_token_in_every_step_and_each_prefill_step_delays_it() -> None:
    engine = Engine(EXACT, token_interval=1)
    engine.submit(request("decoding", 16, output=100), 0.0)
    run(engine, until_s=0.2)
    engine.submit(request("long", 20_000, start=1_000), 0.2)
    tokens = [event.at_s for event in run(engine) if isinstance(event, Tokens) and event.id == "decoding"]
    gaps = [later - earlier for earlier, later in itertools.pairwise(tokens)]
    assert sum(gap > 0.3 for gap in gaps) == 3  # 20,000 tokens at 8,191 a step
    assert min(gaps) == pytest.approx(0.0201)


def test_the_last_prompt_token_is_computed_even_when_every_block_is_cached() -> None:
    engine = Engine(EXACT)
    engine.submit(request("a", 160), 0.0)
    run(engine)
    engine.submit(request("b", 160), 1.0)
    assert first_tokens(run(engine))["b"].cached_tokens == 144


def test_only_full_blocks_are_shared() -> None:
    engine = Engine(EXACT)
    engine.submit(request("a", 31), 0.0)
    run(engine)
    engine.submit(request("b", 64), 1.0)
    assert first_tokens(run(engine))["b"].cached_tokens == 16


def test_a_prompt_shares_the_blocks_of_one_that_is_still_being_prefilled() -> None:
    engine = Engine(EXACT)
    engine.submit(request("a", 8_000), 0.0)
    engine.submit(request("b", 8_000), 0.005)
    events = first_tokens(run(engine))
    assert events["a"].cached_tokens == 0
    assert events["b"].cached_tokens == 7_984


def test_generated_tokens_are_cached_up_to_the_last_one_fed_back() -> None:
    engine = Engine(EXACT)
    engine.submit(request("a", 100, output=61), 0.0)  # 160 of the 161 tokens have a key and a value
    run(engine)
    engine.submit(request("next turn", 400), 10.0)
    assert first_tokens(run(engine))["next turn"].cached_tokens == 160


def test_a_short_cache_forgets_the_tail_of_the_longest_idle_prompt_first() -> None:
    engine = Engine(EngineProfile(noise=0.0, kv_tokens=16 * 21, max_model_tokens=1_000))  # 20 usable blocks
    engine.submit(request("old", 159, start=100), 0.0)  # 10 blocks
    run(engine)
    engine.submit(request("new", 223, start=200), 1.0)  # 14 blocks: takes 10 blank ones and evicts 4
    run(engine)
    engine.submit(request("old again", 160, start=100), 2.0)
    assert first_tokens(run(engine))["old again"].cached_tokens == (9 - 3) * 16


def test_a_hit_protects_a_prompt_from_eviction() -> None:
    engine = Engine(EngineProfile(noise=0.0, kv_tokens=16 * 21, max_model_tokens=1_000))
    engine.submit(request("first", 127, start=100), 0.0)
    engine.submit(request("second", 127, start=200), 0.0)
    run(engine)
    engine.submit(request("first again", 127, start=100), 1.0)
    run(engine)
    engine.submit(request("third", 127, start=300), 2.0)  # evicts 4 blocks of the second
    run(engine)
    engine.submit(request("check", 127, start=100), 3.0)
    assert first_tokens(run(engine))["check"].cached_tokens == 112


def test_one_block_of_the_cache_is_kept_back() -> None:
    engine = Engine(EngineProfile(noise=0.0, kv_tokens=160))
    engine.submit(EngineRequest("fits", 143, 1), 0.0)
    with pytest.raises(ValueError, match="KV cache"):
        engine.submit(EngineRequest("one block more", 145, 1), 0.0)


def test_admission_waits_for_kv_blocks_and_nothing_is_preempted() -> None:
    engine = Engine(EngineProfile(noise=0.0, kv_tokens=16 * 101))
    for name in ("a", "b", "c"):
        engine.submit(request(name, 700, output=50, blocks=0), 0.0)
    events = run(engine)
    finished = [event.id for event in events if isinstance(event, Finished)]
    assert finished == ["a", "b", "c"]
    assert first_tokens(events)["c"].at_s > next(e.at_s for e in events if isinstance(e, Finished) and e.id == "a")


def test_admission_is_limited_by_running_requests() -> None:
    engine = Engine(EngineProfile(noise=0.0, max_running=4))
    for index in range(12):
        engine.submit(request(str(index), 32, output=20, blocks=0), 0.0)
    most = 0
    while (at_s := engine.next_event_s()) is not None:
        engine.advance(at_s)
        most = max(most, engine.gauges.running)
    assert most == 4


def test_gauges_show_nothing_of_a_step_before_it_ends() -> None:
    engine = Engine(EXACT)
    for index in range(8):
        engine.submit(request(str(index), 8_000, output=20, start=index * 1_000), 0.0)
    engine.advance(0.5)
    assert engine.gauges == Gauges()
    engine.advance(0.8)
    assert (engine.gauges.running, engine.gauges.waiting) == (1, 7)  # the seven came when the first's step had begun


def test_a_waiting_request_that_is_cancelled_is_never_served() -> None:
    engine = Engine(EXACT)
    engine.submit(request("a", 8_192), 0.0)
    engine.submit(request("b", 8_192, start=1_000), 0.0)
    engine.cancel("b", 0.1)
    assert {event.id for event in run(engine)} == {"a"}
    assert engine.idle


def test_a_cancelled_prefill_stops_at_the_end_of_its_chunk_and_keeps_what_it_computed() -> None:
    engine = Engine(EXACT)
    engine.submit(request("a", 50_000), 0.0)
    engine.cancel("a", 0.1)
    engine.submit(request("b", 50_000), 0.2)
    event = first_tokens(run(engine))["b"]
    assert event.cached_tokens == 8_192
    assert event.at_s == pytest.approx(0.752 + (50_000 - 8_192) * 0.09e-3 + 6 * 0.015, abs=0.001)


def test_a_cancelled_decode_makes_room_at_once() -> None:
    engine = Engine(EngineProfile(noise=0.0, max_running=1))
    engine.submit(request("a", 16, output=1_000), 0.0)
    engine.submit(request("b", 16, output=2, start=50), 0.0)
    engine.advance(1.0)
    engine.cancel("a", 1.0)
    events = run(engine)
    assert {event.id for event in events} == {"b"}
    assert first_tokens(events)["b"].at_s < 1.05


def test_cancelling_an_unknown_request_changes_nothing() -> None:
    engine = Engine(EXACT)
    engine.submit(request("a", 16), 0.0)
    engine.cancel("never seen", 0.001)
    assert len(run(engine)) == 2


def test_a_restart_loses_requests_and_cache() -> None:
    engine = Engine(EXACT)
    engine.submit(request("a", 160), 0.0)
    run(engine)
    engine.submit(request("b", 160), 1.0)
    assert engine.restart(1.001) == ["b"]
    assert engine.cached_blocks == 0
    engine.submit(request("c", 160), 2.0)
    assert first_tokens(run(engine))["c"].cached_tokens == 0


def test_an_embedding_finishes_without_a_first_token() -> None:
    engine = Engine(EXACT)
    engine.submit(request("a", 100, output=0), 0.0)
    assert [type(event) for event in run(engine)] == [Finished]


def test_token_events_come_at_the_interval_and_the_last_token_is_finished() -> None:
    engine = Engine(EXACT, token_interval=8)
    engine.submit(request("a", 16, output=20), 0.0)
    seen = [event.generated if isinstance(event, (Tokens, Finished)) else 1 for event in run(engine)]
    assert seen == [1, 9, 17, 20]


@pytest.mark.parametrize("bad", [EngineRequest("x", 0, 1), EngineRequest("x", 131_072, 1), EngineRequest("a", 5, 1)])
def test_a_request_that_cannot_be_served_is_refused_and_leaves_no_trace(bad: EngineRequest) -> None:
    engine = Engine(EXACT)
    engine.submit(request("a", 16), 0.0)
    with pytest.raises(ValueError, match=r"prompt|id"):
        engine.submit(bad, 0.0)
    assert {event.id for event in run(engine)} == {"a"}


def random_load(seed: int) -> list[tuple[float, str, EngineRequest | None]]:
    """Submissions and cancellations (None) at random times, sharing prefixes, on a cache that is too small."""
    rng = random.Random(seed)
    calls: list[tuple[float, str, EngineRequest | None]] = []
    at_s = 0.0
    for index in range(120):
        at_s += rng.expovariate(4.0)
        prompt, output, base = rng.randint(1, 9_000), rng.randint(0, 60), rng.randrange(6) * 100_000
        calls.append((at_s, str(index), request(str(index), prompt, output, start=base)))
        if rng.random() < 0.2:
            calls.append((at_s + rng.expovariate(2.0), str(index), None))
    return sorted(calls, key=lambda call: call[0])


def replay(seed: int, advances_per_call: int, token_interval: int = 0) -> tuple[list[Event], Engine]:
    engine = Engine(EngineProfile(kv_tokens=20_000, max_running=8, b_ms=1e-6), seed, token_interval=token_interval)
    events: list[Event] = []
    before_s = 0.0
    for at_s, name, submitted in random_load(seed):
        for step in range(advances_per_call):
            events += engine.advance(before_s + (at_s - before_s) * step / advances_per_call)
        if submitted is None:
            engine.cancel(name, at_s)
        else:
            engine.submit(submitted, at_s)
        before_s = at_s
    return events + run(engine), engine


@pytest.mark.parametrize("seed", range(5))
def test_how_often_the_clock_is_advanced_changes_nothing(seed: int) -> None:
    assert replay(seed, advances_per_call=0)[0] == replay(seed, advances_per_call=7)[0]


@pytest.mark.parametrize("seed", range(5))
def test_after_any_load_every_block_is_free_and_every_request_ended_once(seed: int) -> None:
    events, engine = replay(seed, advances_per_call=0)
    finished = [event.id for event in events if isinstance(event, Finished)]
    cancelled = {name for _at, name, submitted in random_load(seed) if submitted is None}
    assert engine.idle
    assert engine.gauges.kv_usage == 0.0
    assert (engine.gauges.running, engine.gauges.waiting) == (0, 0)
    assert len(finished) == len(set(finished))
    assert {str(index) for index in range(120)} - cancelled <= set(finished)


def test_events_come_in_order_of_time() -> None:
    times = [event.at_s for event in replay(1, 3, token_interval=4)[0]]
    assert times == sorted(times)


def test_another_seed_gives_other_step_times() -> None:
    def first_s(seed: int) -> float:
        engine = Engine(EngineProfile(noise=0.05), seed)
        engine.submit(request("a", 1_000), 0.0)
        return run(engine)[0].at_s

    assert first_s(1) == first_s(1)
    assert first_s(1) != first_s(2)


def test_an_hour_of_a_busy_engine_is_simulated_in_seconds() -> None:
    rng = random.Random(0)
    engine = Engine(EngineProfile(kv_tokens=2_000_000, block_tokens=64))
    started = time.process_time()
    at_s = 0.0
    for index in range(1_000):
        at_s += rng.expovariate(1.1)
        engine.submit(request(str(index), rng.randint(4_000, 20_000), 343, start=rng.randrange(80) * 10_000), at_s)
        engine.advance(at_s)
    run(engine)
    assert time.process_time() - started < 5.0  # 0.3 s here; 4,000 requests of an hour on one engine take 1.3 s


@pytest.mark.parametrize(
    ("settings", "field"), [({"step_tokens": 64, "max_running": 64}, "step_tokens"), ({"kv_tokens": 16}, "kv_tokens")]
)
def test_a_profile_that_could_not_work_is_refused(settings: dict[str, int], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        EngineProfile(**settings)
