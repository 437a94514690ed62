"""Whatever order the events of flights come in: sums stay true, nothing is released twice, at rest all is zero."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gorgo_plugin import Prompt, Router, Settings
from gorgo_plugin.router import FAILURE_KINDS
from gorgo_plugin.settings import ReplicaSettings

NAMES = ("a", "b", "c")


def replicas(names: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{"name": name, "url": f"http://{name}:1", "kv_tokens": 2000} for name in names]


prompts = st.builds(
    lambda start, length, stream, exact: Prompt(range(start, start + length), stream=stream, exact=exact),
    st.integers(0, 3).map(lambda group: group * 1000),
    st.integers(0, 400),
    st.booleans(),
    st.booleans(),
)
flight_ids = st.integers(1, 30)
events = st.lists(
    st.one_of(
        st.tuples(st.just("route"), prompts, st.sampled_from([None, "x", "y"])),
        st.tuples(st.just("first_token"), flight_ids),
        st.tuples(st.just("finish"), flight_ids),
        st.tuples(st.just("fail"), flight_ids, st.sampled_from(sorted(FAILURE_KINDS))),
        st.tuples(st.just("moved"), flight_ids, st.sampled_from(NAMES)),
        st.tuples(st.just("usage"), flight_ids, *3 * [st.integers(-5, 800)]),
        st.tuples(st.just("forget"), st.sampled_from(NAMES)),
        st.tuples(st.just("set_health"), st.sampled_from(NAMES), st.booleans()),
        st.tuples(st.just("observe_rtt"), st.sampled_from(NAMES), st.floats()),
        st.tuples(st.just("reload"), st.sampled_from([("a",), ("b", "c"), NAMES])),
        st.tuples(st.just("wait"), st.floats(-50.0, 1000.0)),
    ),
    max_size=60,
)


@settings(max_examples=40)
@given(events)
def test_sums_equal_the_ledger_after_every_event_and_are_zero_at_rest(steps: list[tuple[Any, ...]]) -> None:
    now = 0.0
    router = Router(Settings.model_validate({"replicas": replicas(NAMES)}), clock=lambda: now)
    opened = 0
    for name, *arguments in steps:
        if name == "wait":
            now += arguments[0]
        elif name == "route":
            opened = router.route(arguments[0], request_id=arguments[1]).flight_id
        elif name == "reload":
            router.set_replicas([ReplicaSettings.model_validate(entry) for entry in replicas(arguments[0])])
        else:
            getattr(router, name)(*arguments)
        check(router)
    for flight_id in range(1, opened + 1):
        router.finish(flight_id)
    check(router)
    assert all(count == 0 for count in router.snapshot()["flights"].values())
    for entry in router.snapshot()["replicas"].values():
        assert entry["load"] == {"waiting": 0, "decoding": 0, "queued_tokens": 0.0}


def check(router: Router) -> None:
    snapshot = router.snapshot()
    for name, entry in snapshot["replicas"].items():
        load = entry["load"]
        assert load["waiting"] + load["decoding"] == snapshot["flights"][name]
        assert load["waiting"] >= 0
        assert load["decoding"] >= 0
        assert load["queued_tokens"] > -1e-6
        for model in entry["models"].values():
            assert model["index_tokens"] <= 2000 * 1.03
    costs = router.explain(Prompt(range(100))).costs
    for cost in costs.values():
        assert math.isfinite(cost.total_ms)
        assert cost.queue_ms > -1e-6
        assert 0 <= cost.cached_tokens <= 100
