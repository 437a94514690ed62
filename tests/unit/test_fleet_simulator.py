from __future__ import annotations

import dataclasses
from functools import cache, partial
from typing import Any

import numpy as np
import pytest

from gorgo_plugin.fleet.replay_inputs import conversation_requests
from gorgo_plugin.fleet.requests import ReplayRequest
from gorgo_plugin.fleet.rows import ROWS, Row, RowError
from gorgo_plugin.fleet.simulation_report import LEARNING_REQUESTS, figures, lines, prediction
from gorgo_plugin.fleet.simulator import HISTORY_POINTS, Outcome, simulate
from gorgo_plugin.fleet.topology import Fleet, FleetError
from gorgo_plugin.fleet.workload import ConversationSettings, WorkloadError, conversations
from gorgo_plugin.settings import Settings

LINKS = [
    {"between": ["here", "west"], "rtt_ms": 20, "jitter_ms": 1},
    {"between": ["here", "east"], "rtt_ms": 80, "jitter_ms": 2},
    {"between": ["west", "east"], "rtt_ms": 60, "jitter_ms": 2},
]
REPLICAS = [{"name": name, "region": name.split("-")[0]} for name in ("west-1", "west-2", "east-1")]


def fleet(**changes: Any) -> Fleet:
    """One gateway at 20 ms from two engines and at 80 ms from a third."""
    given = {"gateways": [{"region": "here"}], "replicas": REPLICAS, "links": LINKS}
    return Fleet.model_validate({**given, **changes})


@cache
def requests(count: int = 150, rate_per_s: float = 6.0) -> list[ReplayRequest]:
    settings = ConversationSettings(count, rate_per_s=rate_per_s, document_share=0.1, system_words=600)
    return conversation_requests(conversations(0, settings), 16)


def lone(at_s: float, prompt: int = 1600, output: int = 20, first: int = 0, client: str = "") -> ReplayRequest:
    """A request whose tokens are `first`, `first + 1`, ...: the same `first` is the same text."""
    tokens = partial(np.arange, first, first + prompt + output, dtype=np.uint32)
    return ReplayRequest(
        at_s, prompt, output, tokens, lambda: range(first, first + (prompt + output) // 16), "", client
    )


def same(one: Outcome, other: Outcome) -> bool:
    return all(np.array_equal(one.numbers[name], other.numbers[name], equal_nan=True) for name in one.numbers)


@pytest.mark.parametrize("row", ROWS)
def test_every_row_serves_every_request_once_and_in_order(row: str) -> None:
    outcome = simulate(row, fleet(), requests())
    assert outcome.numbers["index"].tolist() == list(range(150))
    assert (outcome.numbers["attempts"] == 1).all()
    assert (outcome.e2e_ms >= outcome.ttft_ms).all()
    assert outcome.at_s.tolist() == [request.at_s for request in requests()]
    assert outcome.replica.min() >= 0


def test_the_same_seed_gives_the_same_outcome_and_another_one_does_not() -> None:
    first = simulate("gorgo", fleet(), requests(), 3)
    assert same(first, simulate("gorgo", fleet(), requests(), 3))
    assert not same(first, simulate("gorgo", fleet(), requests(), 4))


def test_the_first_token_takes_the_round_trip_and_the_engines_own_time() -> None:
    quiet = fleet(
        replicas=[{"name": "east-1", "region": "east", "engine": {"noise": 0}}],
        links=[{"between": ["here", "east"], "rtt_ms": 80}],
    )
    outcome = simulate("gorgo", quiet, [lone(0.0), lone(10.0)])
    assert outcome.ttft_ms.tolist() == pytest.approx([80 + 15 + 0.09 * 1600, 80 + 15 + 0.09 * 16])
    assert outcome.network_ms.tolist() == pytest.approx([80, 80])
    assert outcome.numbers["queue_ms"].tolist() == pytest.approx([0, 0])
    assert outcome.cached_tokens.tolist() == [0, 1584]


def test_clients_wait_for_their_way_to_the_gateway_too() -> None:
    far = fleet(clients=[{"region": "farm"}], links=[*LINKS, {"between": ["farm", "here"], "rtt_ms": 300}])
    outcome = simulate("gorgo", far, [lone(0.0)])
    assert outcome.numbers["entry_ms"].tolist() == pytest.approx([300])
    assert outcome.gateway_ttft_ms == pytest.approx(outcome.ttft_ms - 300)
    assert outcome.clients == ("farm",)


def test_requests_sent_together_reach_an_engine_in_their_order() -> None:
    jittery = fleet(
        replicas=[{"name": "east-1", "region": "east"}],
        links=[{"between": ["here", "east"], "rtt_ms": 80, "jitter_ms": 20}],
    )
    outcome = simulate("gorgo", jittery, [lone(1.0, 3000, first=10_000 * number) for number in range(10)])
    assert (np.diff(outcome.numbers["queue_ms"] + outcome.network_ms / 2) > 0).all()


def test_a_gateway_in_each_region_serves_the_clients_beside_it() -> None:
    sides = [{"region": "west"}, {"region": "east"}]
    both = fleet(gateways=sides, clients=[{"region": "west", "share": 3}, {"region": "east"}])
    outcome = simulate("nearest", both, requests())
    assert outcome.gateways == outcome.clients
    assert [learned.gateway for learned in outcome.learned] == ["west", "east"]
    served = np.array(outcome.regions)[outcome.replica]
    assert served.tolist() == list(outcome.clients)
    assert 0.5 < outcome.region_shares()["west"] < 0.95


def test_one_central_gateway_is_the_same_fleet_with_one_gateway() -> None:
    sides = [{"region": "west"}, {"region": "east"}]
    central = fleet(gateways=sides[:1], clients=sides)
    assert set(simulate("nearest", central, requests()).gateways) == {"west"}


def test_the_requests_of_a_session_come_from_one_region() -> None:
    both = fleet(gateways=[{"region": "west"}, {"region": "east"}])
    outcome = simulate("gorgo", both, requests())
    regions: dict[str, set[str]] = {}
    for request, client in zip(requests(), outcome.clients, strict=True):
        regions.setdefault(request.session, set()).add(client)
    assert all(len(found) == 1 for found in regions.values())
    assert len(set(outcome.clients)) == 2


def test_a_request_that_names_its_region_comes_from_there() -> None:
    both = fleet(gateways=[{"region": "west"}, {"region": "east"}])
    outcome = simulate("gorgo", both, [lone(0.1 * number, client="east") for number in range(5)])
    assert set(outcome.clients) == {"east"}
    with pytest.raises(FleetError, match="clients: none in 'moon', where request 0"):
        simulate("gorgo", both, [lone(0.0, client="moon")])


def test_a_longer_route_is_felt_while_the_event_lasts() -> None:
    event = {"kind": "rtt", "at_s": 10, "for_s": 10, "between": ["east", "here"], "factor": 3}
    one = fleet(replicas=REPLICAS[2:], events=[event], links=[{"between": ["here", "east"], "rtt_ms": 80}])
    outcome = simulate("gorgo", one, [lone(float(at_s)) for at_s in (5, 15, 25)])
    assert outcome.network_ms.tolist() == pytest.approx([80, 240, 80])


def test_a_slow_engine_takes_longer_while_the_event_lasts() -> None:
    event = {"kind": "slow", "at_s": 10, "for_s": 10, "replica": "east-1", "factor": 3}
    one = fleet(replicas=[{**REPLICAS[2], "engine": {"noise": 0}}], events=[event])
    outcome = simulate("gorgo", one, [lone(float(at_s), first=10_000 * at_s) for at_s in (5, 15, 25)])
    assert outcome.numbers["prefill_ms"].tolist() == pytest.approx([159, 477, 159])


DOWN = {"kind": "down", "at_s": 8, "for_s": 6, "replica": "west-1"}


@pytest.mark.parametrize("row", ["gorgo", "session-affinity", "gorgo-v1-distributed"])
def test_what_a_dying_replica_loses_is_served_elsewhere(row: str) -> None:
    outcome = simulate(row, fleet(events=[DOWN]), requests())
    assert outcome.numbers["index"].tolist() == list(range(150))
    again = outcome.numbers["attempts"] > 1
    assert again.any()
    down = (outcome.at_s > 8.2) & (outcome.at_s < 14)
    assert "west-1" not in {outcome.replicas[number] for number in outcome.replica[down | again]}
    assert "west-1" in {outcome.replicas[number] for number in outcome.replica[outcome.at_s > 16]}


def test_a_replica_that_returns_has_lost_its_cache_and_the_router_knows() -> None:
    event = {"kind": "down", "at_s": 10, "for_s": 10, "replica": "east-1"}
    outcome = simulate("gorgo", fleet(replicas=REPLICAS[2:], events=[event]), [lone(1.0), lone(5.0), lone(40.0)])
    assert outcome.cached_tokens.tolist() == [0, 1584, 0]
    assert outcome.numbers["estimated_tokens"].tolist() == [0, 1584, 0]


def test_a_request_that_nobody_can_serve_waits_until_somebody_can() -> None:
    event = {"kind": "down", "at_s": 1, "for_s": 30, "replica": "east-1"}
    outcome = simulate("gorgo", fleet(replicas=REPLICAS[2:], events=[event]), [lone(0.95, output=200), lone(5.0)])
    assert (outcome.numbers["attempts"] > 5).all()
    assert (outcome.at_s * 1e3 + outcome.ttft_ms > 31e3).all()
    assert (outcome.e2e_ms > outcome.ttft_ms).all()


def test_a_replica_is_down_until_the_last_of_its_outages_ends() -> None:
    events = [{"kind": "down", "at_s": at_s, "for_s": 10, "replica": "east-1"} for at_s in (10, 15)]
    outcome = simulate("gorgo", fleet(replicas=REPLICAS[2:], events=events), [lone(22.0)])
    assert outcome.ttft_ms[0] > 3000


def test_balancers_forward_at_most_once_and_only_when_their_own_engines_are_busy() -> None:
    sides = [{"region": "west"}, {"region": "east"}]
    both = fleet(gateways=sides, clients=sides[:1])
    burst = [lone(1.0, 4000, 100, first=10_000 * number) for number in range(20)]
    spread = [lone(100.0 + 10 * number, 4000, first=10_000 * (100 + number)) for number in range(5)]
    outcome = simulate("gorgo-v1-distributed", both, burst + spread)
    regions = np.array(outcome.regions)[outcome.replica]
    assert set(outcome.gateways) == {"west"}
    assert (regions[:8] == "west").all()
    assert (regions[8:20] == "east").any()
    assert (regions[20:] == "west").all()
    forwarded = outcome.network_ms[regions == "east"]
    assert forwarded.min() > 50
    assert forwarded.max() < 75


def test_balancers_need_ways_to_each_other() -> None:
    with pytest.raises(FleetError, match="links: none between 'west' and 'east'"):
        simulate("gorgo-v1-distributed", fleet(links=LINKS[:2]), requests())


def test_a_prompt_that_no_engine_could_hold_is_named() -> None:
    tiny = fleet(replicas=[{**REPLICAS[0], "engine": {"kv_tokens": 1000}}])
    with pytest.raises(FleetError, match=r"replicas\.0\.engine: request 0 .* the KV cache is smaller"):
        simulate("gorgo", tiny, [lone(0.0)])


def test_settings_of_ones_own_can_be_simulated() -> None:
    settings = Settings.model_validate({"policy": "gorgo", "weights": {"rtt": 0.0, "queue": 5.0}})
    outcome = simulate(settings, fleet(), requests())
    assert outcome.row == "gorgo"
    assert (outcome.learned[0].weights == (0.0, 5.0)).all()
    row = Row("mine", {"weights": {"rtt": 0.0, "queue": 5.0}, "seed": 7})  # the run's seed counts
    assert same(outcome, simulate(row, fleet(), requests()))


def test_an_unknown_row_is_refused() -> None:
    with pytest.raises(RowError, match="policies: unknown row 'gorgo-papr'"):
        simulate("gorgo-papr", fleet(), requests())


def test_a_workload_without_requests_is_refused() -> None:
    with pytest.raises(WorkloadError, match="requests: there are none"):
        simulate("gorgo", fleet(), [])


def test_what_routers_learn_is_recorded_over_time() -> None:
    slow = [{**REPLICAS[0], "engine": {"a_ms": 0.3}}, *REPLICAS[1:]]
    (learned,) = simulate("gorgo", fleet(replicas=slow), requests()).learned
    assert learned.weights.shape == (HISTORY_POINTS + 1, 2)
    assert learned.rates["west-1"]["ms_per_token"][-1] > 2 * learned.rates["west-2"]["ms_per_token"][-1]


def test_a_run_can_go_on_from_what_another_one_learned() -> None:
    slow = fleet(replicas=[{**REPLICAS[0], "engine": {"a_ms": 0.3}}, *REPLICAS[1:]])
    first = simulate("gorgo", slow, requests())
    again = simulate("gorgo", slow, requests(), 1, states=first.states)
    assert again.learned[0].rates["west-1"]["ms_per_token"][0] > 0.2
    assert first.learned[0].weights.tolist() == again.learned[0].weights.tolist()


def test_predictions_are_judged_after_a_while_by_error_and_rank() -> None:
    outcome = simulate("gorgo", fleet(), requests())
    judged = prediction(outcome)
    assert LEARNING_REQUESTS > 75  # so that the first half is left out
    expected = np.abs(outcome.predicted_ms - outcome.ttft_ms)[75:] / outcome.ttft_ms[75:]
    assert judged.median_error == pytest.approx(np.median(expected))
    assert 0.5 < judged.rank_correlation <= 1.0
    measured = dict(outcome.numbers, predicted_ms=outcome.ttft_ms)
    perfect = prediction(dataclasses.replace(outcome, numbers=measured))
    assert (perfect.median_error, perfect.rank_correlation) == (0.0, pytest.approx(1.0))


def test_ratios_are_those_of_the_same_seeds() -> None:
    rows = [ROWS["gorgo"], ROWS["random"]]
    outcomes = [[simulate(row, fleet(), requests(), seed) for seed in range(3)] for row in rows]
    first, second = lines(rows, outcomes)
    assert first.ratios == {}
    values = [figures(other).ttft_p95_ms / figures(own).ttft_p95_ms for own, other in zip(*outcomes, strict=True)]
    ratio = second.ratios["ttft_p95_ms"]
    assert ratio.value == pytest.approx(np.exp(np.mean(np.log(values))))
    slack = 1e-9  # of rounding
    assert min(values) - slack <= ratio.low <= ratio.value <= ratio.high <= max(values) + slack
    assert np.isnan(lines(rows, [runs[:1] for runs in outcomes])[1].ratios["ttft_p95_ms"].low)
