from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gorgo_plugin.fleet.engine import PROFILES
from gorgo_plugin.fleet.links import Link, Links
from gorgo_plugin.fleet.topology import Fleet, FleetError, FleetLink, demo_fleet, read_fleet

EXAMPLES = sorted((Path(__file__).parents[2] / "examples/fleets").glob("*.yaml"))
FLEET: dict[str, Any] = {
    "gateways": [{"region": "a"}],
    "clients": [{"region": "c", "gateway": "a"}],
    "replicas": [
        {"name": "a-1", "region": "a", "engine": {"profile": "curved", "a_ms": 0.05, "kv_tokens": 8000000}},
        {"name": "b-1", "region": "b", "engine": "tiny-cpu"},
    ],
    "links": [{"between": ["a", "b"], "rtt_ms": 70, "jitter_ms": 3}, {"between": ["c", "a"], "rtt_ms": 30}],
    "events": [{"kind": "down", "at_s": 10, "replica": "b-1"}],
}
FLEET["replicas"][1]["engine"] = {"profile": "tiny-cpu", "block_tokens": 16}


def test_engines_are_profiles_with_what_differs() -> None:
    first, second = (replica.engine for replica in Fleet.model_validate(FLEET).replicas)
    assert (first.a_ms, first.b_ms, first.kv_tokens) == (0.05, PROFILES["curved"].b_ms, 8_000_000)
    assert second.t0_ms == PROFILES["tiny-cpu"].t0_ms


def test_a_link_is_the_same_in_both_directions_and_regions_have_one_to_themselves() -> None:
    fleet = Fleet.model_validate(FLEET)
    assert fleet.require_link("b", "a") is fleet.require_link("a", "b")
    assert fleet.require_link("a", "a").rtt_ms == fleet.local_rtt_ms
    links = Links(fleet, 0)
    assert links.between("a", "b") is links.between("b", "a")


WRONG: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda f: f.pop("replicas"), "^replicas: required, but not given"),
    (lambda f: f.update(replica=[]), r"^replica: unknown setting \(did you mean 'replicas'\?\)"),
    (lambda f: f["replicas"][0].update(engine="liner"), r"^replicas.0.engine: unknown profile 'liner' \(did you mean"),
    (lambda f: f["replicas"][0].update(engine={"a": 1}), r"^replicas.0.engine: a: unknown setting"),
    (lambda f: f["replicas"][0].update(engine={"a_ms": -1}), "^replicas.0.engine: a_ms: expected a number from 0, got"),
    (lambda f: f["replicas"][0].update(engine={"kv_tokens": 1.5}), "^replicas.0.engine: kv_tokens: expected a whole"),
    (lambda f: f["replicas"][0].update(engine={"step_tokens": 9}), "^replicas.0.engine: step_tokens: expected more"),
    (lambda f: f["replicas"][0].update(engine=7), "^replicas.0.engine: expected the name of a profile or a mapping"),
    (lambda f: f["replicas"][0].update(engine={"block_tokens": 32}), "^replicas: engines of one model share one block"),
    (lambda f: f["replicas"][1].update(name="a-1"), "^replicas: two replicas are named 'a-1'"),
    (lambda f: f["gateways"].append({"region": "a"}), "^gateways: two gateways are in 'a'"),
    (lambda f: f.update(gateways=[]), "^gateways: "),
    (lambda f: f["clients"].append({"region": "c"}), "^clients: clients in 'c' are listed twice"),
    (lambda f: f["clients"][0].update(gateway="b"), "^clients.0.gateway: unknown gateway in 'b'"),
    (lambda f: f["clients"][0].update(share=0), r"^clients.0.share: .*\(got 0\)"),
    (lambda f: f["links"][0].update(rtt_ms="70"), r"^links.0.rtt_ms: .*\(got '70'\)"),
    (lambda f: f["links"][0].update(between=["a"]), "^links.0.between: "),
    (lambda f: f["links"][0].update(between=["a", "d"]), "^links: none between 'a' and 'b', which requests go between"),
    (lambda f: f["links"].append(f["links"][0]), "^links: 'a and b' are linked twice"),
    (lambda f: f["links"].pop(0), "^links: none between 'a' and 'b'"),
    (lambda f: f["events"][0].update(replica="z"), "^events.0.replica: unknown replica 'z'"),
    (lambda f: f["events"][0].update(kind="sleep"), "^events.0: .*'sleep'"),
    (lambda f: f["events"].append({"kind": "slow", "at_s": 1, "replica": "a-1"}), "^events.1.slow.factor: required"),
    (
        lambda f: f["events"].append({"kind": "rtt", "at_s": 1, "between": ["b", "c"], "factor": 2}),
        "^events.1.between: no link between b and c",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_wrong_is_one_sentence_that_names_the_field(
    spoil: Callable[[dict[str, Any]], object], message: str
) -> None:
    fleet = copy.deepcopy(FLEET)
    spoil(fleet)
    with pytest.raises(FleetError, match=message) as caught:
        Fleet.model_validate(fleet)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gateways: [", "line 2: is not YAML"),
        ("[1, 2]", "expected a mapping of settings, got list"),
        ("", "expected a mapping of settings, got NoneType"),
        ("gateways: []", "replicas: required"),
    ],
)
def test_a_file_that_is_no_fleet_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(text + "\n")
    with pytest.raises(FleetError, match=f"fleet {path}.*{message}"):
        read_fleet(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="cannot be read"):
        read_fleet(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_examples_are_fleets_whose_regions_are_linked_for_balancers_too(path: Path) -> None:
    fleet = read_fleet(path)
    assert all(fleet.link(one, other) for one in fleet.regions for other in fleet.regions)


def test_there_are_examples() -> None:
    assert {"wide", "near", "unequal", "regions", "trouble"} <= {path.stem for path in EXAMPLES}


def test_the_demos_fleet_has_its_regions() -> None:
    assert [demo_fleet().require_link("gateway", region).rtt_ms for region in demo_fleet().regions] == [37, 279, 456]


def link(**settings: Any) -> Link:
    return Link(FleetLink.model_validate({"between": ["a", "b"], "rtt_ms": 100, **settings}), "seed")


def test_a_round_trip_drifts_as_a_sine() -> None:
    way = link(drift={"share": 0.2, "period_s": 400})
    assert [way.one_way_s(at_s) * 2e3 for at_s in (0, 100, 200, 300)] == pytest.approx([100, 120, 100, 80])


def test_spikes_come_as_often_and_last_as_long_as_told_and_are_the_same_again() -> None:
    spikes = {"per_hour": 60, "factor": 3, "duration_s": 2}
    times = [link(spikes=spikes).one_way_s(0.1 * step) for step in range(10)]
    way, other = link(spikes=spikes), link(spikes=spikes)
    seen = [way.one_way_s(0.1 * step) for step in range(360_000)]
    assert {round(one, 9) for one in seen} == {0.05, 0.15}
    assert sum(one > 0.1 for one in seen) / len(seen) == pytest.approx(2 / 60, rel=0.2)
    assert [other.one_way_s(0.1 * step) for step in reversed(range(10))] == times[::-1]
