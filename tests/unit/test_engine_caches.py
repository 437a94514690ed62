"""How far the router believes what engines tell of their caches."""

from __future__ import annotations

import numpy as np
import pytest

from gorgo_plugin import Decision, Prompt, Router, Settings
from gorgo_plugin.engine_caches import BRIDGE_S, DOUBTED_AFTER, MIN_CLAIM_BLOCKS, SILENT_S
from gorgo_plugin.prefix import AllBlocksCleared, BlockRemoved, BlockStored
from gorgo_plugin.signals import EngineGauges

BLOCK = 16
TOKENS = np.arange(1, 10 * BLOCK + 2, dtype=np.uint32)
PROMPT = Prompt(TOKENS, model="m")


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def router(clock: Clock) -> Router:
    replicas = [{"name": name, "url": f"http://{name}:1"} for name in "ab"]
    return Router(Settings.model_validate({"replicas": replicas}), clock=clock)


def stored(start: int, end: int, adapter: str = "", size: int = BLOCK) -> BlockStored:
    """The event for the engine's blocks `start` to `end` of the prompt."""
    parent = start if start else None
    return BlockStored(range(start + 1, end + 1), parent, TOKENS[start * size : end * size], size, adapter)


def cached(router: Router, name: str = "a", prompt: Prompt = PROMPT) -> int:
    return router.explain(prompt).costs[name].cached_tokens


def source(router: Router, name: str = "a") -> str:
    return str(router.snapshot()["replicas"][name]["cache"]["source"])


def serve(router: Router, clock: Clock, prompt: Prompt = PROMPT) -> Decision:
    decision = router.route(prompt, candidates=["a"])
    router.first_token(decision.flight_id)
    router.finish(decision.flight_id)
    return decision


def test_a_dispatch_counts_only_until_the_engine_has_had_time_to_tell_of_it(router: Router, clock: Clock) -> None:
    router.engine_caches.observe("a", [], True)
    decision = router.route(PROMPT, candidates=["a"])
    assert cached(router) == 10 * BLOCK
    clock.now_s += 60.0  # still queued
    router.engine_caches.observe("a", [stored(0, 2)])
    assert cached(router) == 10 * BLOCK
    router.first_token(decision.flight_id)
    clock.now_s += BRIDGE_S
    router.engine_caches.observe("a", [])
    assert cached(router) == 2 * BLOCK


def test_while_the_events_are_not_complete_the_larger_of_both_beliefs_counts(router: Router, clock: Clock) -> None:
    router.engine_caches.observe("a", [stored(0, 4)])
    assert (source(router), cached(router)) == ("kv-events-partial", 4 * BLOCK)
    serve(router, clock)
    clock.now_s += 2 * BRIDGE_S
    router.engine_caches.observe("a", [BlockRemoved([4])])
    assert cached(router) == 10 * BLOCK


def test_a_cleared_cache_makes_the_events_complete(router: Router, clock: Clock) -> None:
    serve(router, clock)
    router.engine_caches.observe("a", [AllBlocksCleared(), stored(0, 3)])
    assert (source(router), cached(router)) == ("kv-events", 3 * BLOCK)


def test_a_lost_source_falls_back_to_the_credit_that_was_kept_meanwhile(router: Router, clock: Clock) -> None:
    router.engine_caches.observe("a", [stored(0, 3)], True)
    serve(router, clock)
    router.engine_caches.lost("a")
    assert (source(router), cached(router)) == ("credit", 10 * BLOCK)


def test_prompts_that_the_engine_names_otherwise_are_priced_by_credit(router: Router, clock: Clock) -> None:
    router.engine_caches.observe("a", [stored(0, 3)], True)
    for prompt in (Prompt(TOKENS, model="m", exact=False), Prompt(TOKENS, model="m", cache_key="salt")):
        assert cached(router, prompt=prompt) == 0
        serve(router, clock, prompt)
        clock.now_s += 2 * BRIDGE_S
        router.engine_caches.observe("a", [])
        assert cached(router, prompt=prompt) == 10 * BLOCK


def test_usage_reports_leave_what_the_engine_told_alone(router: Router) -> None:
    router.engine_caches.observe("a", [stored(0, 10)], True)
    decision = router.route(PROMPT, candidates=["a"])
    router.usage(decision.flight_id, prompt_tokens=len(TOKENS), cached_tokens=0)
    assert cached(router) == 10 * BLOCK


def test_an_adapters_blocks_are_not_taken_for_those_without_it(router: Router) -> None:
    router.engine_caches.observe("a", [stored(0, 4, adapter="lora")], True)
    assert cached(router) == 0
    assert cached(router, prompt=Prompt(TOKENS, model="lora")) == 4 * BLOCK


def test_larger_engine_blocks_count_whole_and_never_the_last_token(router: Router) -> None:
    router.engine_caches.observe("a", [stored(0, 5, size=2 * BLOCK)], True)
    assert cached(router) == 10 * BLOCK
    assert cached(router, prompt=Prompt(TOKENS[:-1], model="m")) == 8 * BLOCK


def test_engine_blocks_that_own_blocks_do_not_divide_are_refused_with_a_reason(router: Router) -> None:
    router.engine_caches.observe("a", [stored(0, 2, size=24)], True)
    shown = router.snapshot()["replicas"]["a"]["cache"]
    assert shown["source"] == "credit"
    assert "block_tokens 16 does not divide; set block_tokens to 24" in shown["events"]["refused"]


def test_a_source_that_never_tells_of_what_is_served_is_doubted_and_then_dropped(router: Router, clock: Clock) -> None:
    router.engine_caches.observe("a", [], True)
    for _ in range(2 * DOUBTED_AFTER):
        clock.now_s += BRIDGE_S
        router.engine_caches.observe("a", [])
        serve(router, clock)
    assert (source(router), cached(router)) == ("kv-events-partial", 10 * BLOCK)
    clock.now_s += SILENT_S + 1
    serve(router, clock)
    serve(router, clock)
    clock.now_s += BRIDGE_S
    serve(router, clock)
    assert source(router) == "credit"


def test_a_flooding_publisher_cannot_make_the_index_grow_without_bound(router: Router) -> None:
    piece = 4096
    tokens = np.zeros(piece * BLOCK, dtype=np.uint32)
    for start in range(0, 5 * 2**17, piece):
        router.engine_caches.observe("a", [BlockStored(range(start, start + piece), None, tokens, BLOCK)])
        blocks = router.snapshot()["replicas"]["a"]["cache"]["events"]["blocks"]
        assert blocks <= max(MIN_CLAIM_BLOCKS, 4 * 500_000 // BLOCK)
        if router.snapshot()["replicas"]["a"]["cache"]["events"]["resets"]:
            return
    pytest.fail("never dropped")


def test_a_restart_drops_the_blocks_unless_the_events_have_shown_it_already(router: Router, clock: Clock) -> None:
    router.engine_caches.observe("a", [stored(0, 3)], True)
    router.forget("a")
    assert cached(router) == 3 * BLOCK
    clock.now_s += 1000.0
    router.forget("a")
    assert cached(router) == 0


def test_a_replica_that_leaves_takes_its_blocks_along(router: Router) -> None:
    router.engine_caches.observe("a", [stored(0, 3)], True)
    before = router.settings.replicas
    router.set_replicas(before[1:])
    router.engine_caches.observe("a", [stored(3, 4)])
    router.set_replicas(before)
    assert (cached(router), source(router)) == (0, "credit")


def test_the_engines_own_size_counts_unless_the_setting_is_given(clock: Clock) -> None:
    replicas = [{"name": "a", "url": "http://a:1"}, {"name": "b", "url": "http://b:1", "kv_tokens": 1000}]
    router = Router(Settings.model_validate({"replicas": replicas}), clock=clock)
    router.explain(PROMPT)
    for name in "ab":
        router.observe_gauges(name, EngineGauges(0, 0, 0.0, kv_tokens=4 * BLOCK, block_tokens=BLOCK))
    for name in "ab":
        router.route(PROMPT, candidates=[name])
    assert [cached(router, name) for name in "ab"] == [4 * BLOCK, 10 * BLOCK]
    assert router.snapshot()["replicas"]["a"]["kv_tokens"] == 4 * BLOCK
