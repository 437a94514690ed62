"""Whatever happens to a fleet, every request is served once and nothing stays open."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgo_plugin.fleet.replay import Replay
from gorgo_plugin.fleet.requests import ReplayRequest, Served
from gorgo_plugin.fleet.rows import ROWS
from gorgo_plugin.fleet.topology import Fleet
from gorgo_plugin.settings import Settings

REGIONS = ("a", "b")
REPLICAS = ("a-1", "a-2", "b-1")
SPAN_S = 20.0


def link(rtt_ms: float, *between: str) -> dict[str, Any]:
    return {
        "between": list(between),
        "rtt_ms": rtt_ms,
        "jitter_ms": rtt_ms / 10,
        "spikes": {"per_hour": 600, "factor": 4, "duration_s": 1},
    }


TIMES = st.fixed_dictionaries({"at_s": st.floats(0, SPAN_S), "for_s": st.floats(0.01, SPAN_S)})
FACTORS = st.floats(0.2, 5)
EVENTS = st.one_of(
    st.builds(lambda times, replica: {"kind": "down", "replica": replica, **times}, TIMES, st.sampled_from(REPLICAS)),
    st.builds(
        lambda times, replica, factor: {"kind": "slow", "replica": replica, "factor": factor, **times},
        TIMES,
        st.sampled_from(REPLICAS),
        FACTORS,
    ),
    st.builds(lambda times, factor: {"kind": "rtt", "between": ["a", "b"], "factor": factor, **times}, TIMES, FACTORS),
)


def fleet(gateways: int, events: list[dict[str, Any]]) -> Fleet:
    return Fleet.model_validate(
        {
            "gateways": [{"region": region} for region in REGIONS[:gateways]],
            "clients": [{"region": region} for region in REGIONS],
            "replicas": [
                {"name": name, "region": name[0], "engine": {"kv_tokens": 20_000, "max_running": 4}}
                for name in REPLICAS
            ],
            "links": [link(60, "a", "b"), link(2, "a", "a"), link(2, "b", "b")],
            "events": events,
        }
    )


def requests(arrivals: list[tuple[float, int, int]]) -> list[ReplayRequest]:
    """(arrival, which of a few texts, tokens of the answer) of each."""
    made = []
    for at_s, text, output in sorted(arrivals):
        first, tokens = text * 100_000, 500 + 700 * text
        ids = partial(np.arange, first, first + tokens + output, dtype=np.uint32)
        blocks = range(first, first + (tokens + output) // 16)
        made.append(ReplayRequest(at_s, tokens, output, ids, lambda blocks=blocks: blocks, f"session-{text}"))
    return made


def serve(row: str, fleet: Fleet, coming: list[ReplayRequest], seed: int) -> tuple[Replay, list[Served]]:
    replay = Replay(
        Settings.model_validate({**ROWS[row].settings, "seed": seed}),
        fleet,
        seed=seed,
        distributed=ROWS[row].distributed,
    )
    return replay, replay.run(coming)


@settings(max_examples=25)
@given(
    row=st.sampled_from(("gorgo", "gorgo-v1-distributed", "least-load", "session-affinity")),
    gateways=st.integers(1, 2),
    events=st.lists(EVENTS, max_size=6),
    arrivals=st.lists(st.tuples(st.floats(0, SPAN_S), st.integers(0, 4), st.integers(1, 120)), min_size=1, max_size=30),
    seed=st.integers(0, 3),
)
def test_every_request_is_served_once_whatever_happens(
    row: str,
    gateways: int,
    events: list[dict[str, Any]],
    arrivals: list[tuple[float, int, int]],
    seed: int,
) -> None:
    coming = requests(arrivals)
    replay, served = serve(row, fleet(gateways, events), coming, seed)
    assert sorted(one.index for one in served) == list(range(len(coming)))
    for one in served:
        assert 0 < one.ttft_ms <= one.e2e_ms
        assert one.queue_ms > -1e-6
        assert one.prefill_ms > 0
        assert one.replica >= 0
        assert one.attempts == 1 or any(event["kind"] == "down" for event in events)
    for gateway in replay.gateways:
        assert set(gateway.router.snapshot()["flights"].values()) == {0}
    for site in replay.sites:
        assert site.engine.idle
        assert not site.calls
    assert served == serve(row, fleet(gateways, events), coming, seed)[1]
