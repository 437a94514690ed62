"""The tuner: what it concludes from samples, and how a router learns with it."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest

from gorgo_plugin import Prompt, Router, Settings, SettingsError
from gorgo_plugin.settings import TuningSettings
from gorgo_plugin.tuning.evolution import MAX_SIGMA, Ending, Evolution, after, propose
from gorgo_plugin.tuning.guard import Guard
from gorgo_plugin.tuning.objectives import GUARDED, OBJECTIVES, Comparison, compare, tail_scores
from gorgo_plugin.tuning.screening import REQUESTS, Screening
from gorgo_plugin.tuning.trial import Sample, Trial
from gorgo_plugin.tuning.tuner import Tuner, verdict
from tests.toy_fleet import run

P95 = OBJECTIVES["ttft-p95"]
BAD = {"rtt": 20.0, "queue": 0.05}  # herds everything to the nearest: TTFT of the first few, then a queue without end
ONLINE = {"mode": "online"}


def percentile(values: list[float], rank: float) -> float:
    return float(np.percentile(values, rank))


# The search


def test_candidates_stay_within_the_bounds_and_are_drawn_alike_by_the_same_seed() -> None:
    now = Evolution((0.05, 20.0), 1.0)
    drawn = propose(now, 100, 0.05, 20.0, random.Random(1))
    assert drawn == propose(now, 100, 0.05, 20.0, random.Random(1))
    assert all(0.05 <= weight <= 20.0 for candidate in drawn for weight in candidate)
    assert len(set(drawn)) > 60


def test_one_success_in_five_keeps_sigma_and_it_never_falls_below_its_floor() -> None:
    now = Evolution((1.0, 1.0), 0.4)
    for ending in ("accepted", "worse", "guarded", "undecided", "worse"):
        now = after(now, (2.0, 2.0), ending, 0.1)
    assert now.sigma == pytest.approx(0.4)
    assert now.weights == (2.0, 2.0)
    for _ in range(100):
        now = after(now, (3.0, 3.0), "worse", 0.1)
    assert now == Evolution((2.0, 2.0), 0.1)


def test_on_a_plateau_steps_grow() -> None:
    now = Evolution((1.0, 1.0), 0.2)
    for _ in range(20):
        now = after(now, (2.0, 2.0), "same", 0.1)
    assert now == Evolution((1.0, 1.0), MAX_SIGMA)


# The objective


def test_requests_that_failed_rank_last_and_weigh_no_more_than_slow_ones() -> None:
    scores = tail_scores(np.array([1.0, 2.0, math.inf, 3.0, math.inf]), 0.95)
    assert scores[2] == scores[4] == scores.max()
    with_failures = compare([1.0] * 80, [2.0] * 10, [math.inf] * 10, 0.95, 0.5)
    with_slow_ones = compare([1.0] * 80, [2.0] * 10, [1e6] * 10, 0.95, 0.5)
    assert with_failures.z == with_slow_ones.z > 3
    assert with_failures.log_ratio == math.inf


def test_what_both_decide_alike_neither_helps_nor_hides_a_difference() -> None:
    rng = random.Random(0)
    common = [rng.uniform(0, 1) for _ in range(300)]
    slow = [rng.uniform(2, 3) for _ in range(20)]
    quick = [rng.uniform(0, 1) for _ in range(20)]
    seen = compare(common, slow, quick, 0.95, 0.5)
    assert seen.z < -4
    assert seen.samples == 20
    assert seen.candidate_ms < 1.0 < 2.0 < seen.incumbent_ms


def test_noise_is_rarely_taken_for_a_difference() -> None:
    rng = random.Random(0)

    def z() -> float:
        return compare(*([rng.lognormvariate(0, 1) for _ in range(n)] for n in (200, 15, 15)), 0.95, 0.5).z  # type: ignore[misc]

    beyond = sum(abs(z()) > 2.3 for _ in range(500))
    assert beyond <= 15


# The samples


def trial_of(*samples: Sample, **more: Any) -> Trial:
    trial = Trial((1.0, 1.0), **more)
    for sample in samples:
        trial.add(sample)
    return trial


def sample(arm: Any, ms: float | None, at_s: float = 0.0, **more: Any) -> Sample:
    return Sample(arm, at_s, predicted_ms=100.0, streamed=True, ttft_ms=ms, e2e_ms=ms, **more)


KNOWN = [sample("common", 10.0) for _ in range(20)]


def test_each_request_is_judged_for_the_weights_that_routed_it_and_no_other() -> None:
    own, other = [sample("incumbent", 50.0)] * 10, [sample("candidate", 20.0)] * 10
    seen = trial_of(*KNOWN, *own, *other).compared(P95, now_s=10.0)
    assert seen is not None
    assert (seen.incumbent_ms, seen.candidate_ms) == (50.0, 20.0)
    assert seen.z < -2


def test_a_request_without_an_answer_counts_once_it_is_old_so_a_hanging_candidate_is_not_well_off() -> None:
    hanging = [sample("candidate", None) for _ in range(10)]
    trial = trial_of(*KNOWN, *[sample("incumbent", 10.0)] * 10, *hanging)
    assert trial.compared(P95, now_s=0.001) is None
    seen = trial.compared(P95, now_s=5.0)
    assert seen is not None
    assert seen.z > 3
    assert seen.candidate_ms == 5000.0


@pytest.mark.parametrize("kind", ["unreached", "rejected", "timeout", "retried"])
def test_a_failed_attempt_is_the_worst_there_is(kind: str) -> None:
    one = Sample("candidate", 0.0, predicted_ms=100.0, streamed=True)
    one.ended(0.001, kind)
    assert (one.ttft_ms, one.e2e_ms, one.void) == (math.inf, math.inf, False)


def test_a_client_that_leaves_at_once_does_not_make_a_candidate_look_fast() -> None:
    one = Sample("candidate", 0.0, predicted_ms=700.0, streamed=True)
    one.ended(0.001, "disconnect")
    assert one.ttft_ms == 700.0
    late = Sample("candidate", 0.0, predicted_ms=700.0, streamed=True)
    late.ended(9.0, "disconnect")
    assert late.ttft_ms == 9000.0


def test_a_request_refused_for_its_own_sake_says_nothing() -> None:
    one = Sample("candidate", 0.0, predicted_ms=100.0, streamed=True)
    one.ended(0.001, "invalid")
    assert trial_of(*KNOWN, sample("incumbent", 10.0), one).compared(P95, 10.0) is None


def test_requests_that_are_not_streamed_teach_e2e_only() -> None:
    samples = [Sample(arm, 0.0, 100.0, streamed=False, e2e_ms=900.0) for arm in ("incumbent", "candidate") * 10]  # type: ignore[arg-type]
    assert trial_of(*samples).compared(P95, 10.0) is None
    assert trial_of(*samples).compared(GUARDED, 10.0) is not None


# The verdict


def seen(z: float, own_ms: float = 1000.0, other_ms: float = 800.0, samples: int = 20) -> Comparison:
    return Comparison(own_ms, other_ms, z, samples)


EVEN = seen(0.0, 1000.0, 1000.0)
SETTINGS = TuningSettings(mode="online")


@pytest.mark.parametrize(
    ("objective", "e2e", "requests", "ending"),
    [
        (seen(-3.0), EVEN, 100, "accepted"),
        (seen(-3.0), None, 100, None),  # E2E not seen yet
        (seen(-3.0, 1000.0, 999.5), EVEN, 100, None),  # gains less than anybody feels
        (seen(-2.0), EVEN, 100, None),
        (seen(-2.0), EVEN, 400, "undecided"),
        (seen(3.0, 800.0, 1000.0), EVEN, 48, "worse"),
        (seen(3.0, 800.0, 1000.0, samples=3), EVEN, 48, None),
        (seen(-3.0), seen(2.5, 1000.0, 1200.0), 48, "guarded"),
        (seen(-3.0), seen(1.0, 1000.0, 1200.0), 400, "guarded"),
        (None, None, 400, "undecided"),
    ],
)
def test_a_trial_ends_as_what_it_has_shown(
    objective: Comparison | None, e2e: Comparison | None, requests: int, ending: Ending | None
) -> None:
    trial = Trial((1.0, 1.0), requests=requests, differing=40)
    assert verdict(trial, objective, e2e, Guard(0.05), SETTINGS) == ending


def test_a_candidate_that_decides_like_the_incumbent_is_not_tried_for_long() -> None:
    assert verdict(Trial((1.0, 1.0), requests=64), None, None, Guard(0.05), SETTINGS) == "same"


def test_steps_spend_the_margin_together_and_only_getting_better_gives_it_back() -> None:
    guard, dearer = Guard(0.05), seen(0.0, 1000.0, 1030.0)
    assert guard.allows(dearer)
    spent = guard.after(dearer)
    assert not spent.allows(dearer)
    assert spent.after(seen(0.0, 1000.0, 900.0)) == guard


def test_where_requests_fail_whatever_the_weights_the_guard_bars_only_what_fails_more() -> None:
    assert Guard(0.05).allows(seen(-2.0, math.inf, 900.0))
    assert Guard(0.05).after(seen(-2.0, math.inf, 900.0)).spent == 0.0
    assert Guard(0.05).allows(seen(-0.1, math.inf, math.inf))
    assert not Guard(0.05).allows(seen(0.1, math.inf, math.inf))
    assert not Guard(0.05).allows(seen(-1.0, 900.0, math.inf))


def test_screening_finds_the_candidate_that_is_predicted_to_save_most() -> None:
    screening = Screening([(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)])
    for _ in range(REQUESTS):
        screening.add(100.0, [None, 120.0, 80.0])
    assert screening.done
    assert screening.best() == ((3.0, 3.0), True)
    dear = Screening([(1.0, 1.0), (2.0, 2.0)])
    for _ in range(REQUESTS):
        dear.add(100.0, [102.0, 130.0])
    assert dear.best() == ((1.0, 1.0), False)
    alike = Screening([(1.0, 1.0)])
    alike.add(100.0, [None])
    assert alike.best() is None


# The router that learns


@pytest.fixture(scope="module")
def learned() -> tuple[Router, list[float]]:
    """A router that began with bad weights, and its TTFTs."""
    return run(3000, 9.0, weights=BAD, tuning=ONLINE)


def test_from_bad_weights_it_finds_back_to_the_p95_of_the_default_ones(learned: tuple[Router, list[float]]) -> None:
    router, tuned = learned
    _, default = run(3000, 9.0)
    _, bad = run(1000, 9.0, weights=BAD)
    assert percentile(bad, 95) > 3 * percentile(default, 95)
    assert percentile(tuned[2000:], 95) < 1.1 * percentile(default[2000:], 95)
    known = router.snapshot()["tuning"]
    assert known["endings"]["accepted"] >= 1
    assert router.snapshot()["weights"] == known["weights"] != BAD


def test_from_weights_that_ignore_the_network_it_is_back_at_the_default_p95_after_2000_requests() -> None:
    _, default = run(2600, 9.0)
    _, tuned = run(2600, 9.0, weights={"rtt": 0.05, "queue": 20.0}, tuning=ONLINE)
    assert percentile(tuned[2000:], 95) < 1.1 * percentile(default[2000:], 95)


def test_where_weights_are_right_exploring_costs_next_to_nothing() -> None:
    ratios = []
    for seed in range(3):
        (_, default), (_, tuned) = (run(1200, 9.0, seed, tuning={"mode": mode}) for mode in ("off", "online"))
        ratios.append(math.log(percentile(tuned, 95) / percentile(default, 95)))
    assert math.exp(sum(ratios) / len(ratios)) < 1.03


def test_the_same_seed_learns_the_same() -> None:
    one, other = (run(600, 9.0, weights=BAD, tuning=ONLINE) for _ in range(2))
    assert one[1] == other[1]
    assert one[0].snapshot()["tuning"] == other[0].snapshot()["tuning"]


def test_off_it_changes_no_decision_and_shows_nothing() -> None:
    (plain, before), (off, after_) = run(300, 9.0), run(300, 9.0, tuning={"mode": "off"})
    assert before == after_
    assert off.snapshot()["tuning"] is None
    assert plain.snapshot()["weights"] == off.snapshot()["weights"] == {"rtt": 1.0, "queue": 1.0}


def test_propose_finds_better_weights_and_applies_none_of_them() -> None:
    _, untouched = run(1000, 6.0, weights=BAD)
    router, proposed = run(1000, 6.0, weights=BAD, tuning={"mode": "propose"})
    known = router.snapshot()
    assert known["weights"] == BAD
    assert known["tuning"]["weights"]["rtt"] < 10.0
    assert known["tuning"]["endings"]["accepted"] >= 1
    assert proposed == untouched


def test_where_no_first_token_is_seen_nothing_is_concluded_about_it() -> None:
    router, _ = run(1000, 6.0, weights=BAD, stream=False, tuning=ONLINE)
    known = router.snapshot()["tuning"]
    assert known["weights"] == BAD
    assert known["endings"]["accepted"] == known["endings"]["worse"] == 0
    assert known["endings"]["undecided"] >= 1


def test_what_was_learned_survives_in_a_snapshot_unless_the_settings_say_otherwise(
    learned: tuple[Router, list[float]],
) -> None:
    router, _ = learned
    state = json.loads(json.dumps(router.snapshot(), allow_nan=False))
    heir, _ = run(1, 9.0, state=state, weights=BAD, tuning=ONLINE)
    assert heir.snapshot()["weights"] == pytest.approx(router.snapshot()["weights"])
    other, _ = run(1, 9.0, state=state, weights={"rtt": 2.0, "queue": 2.0}, tuning=ONLINE)
    assert other.snapshot()["weights"] == {"rtt": 2.0, "queue": 2.0}
    off, _ = run(1, 9.0, state=state, weights=BAD)
    assert off.snapshot()["weights"] == BAD


def test_settings_that_leave_tuning_alone_leave_what_it_learned() -> None:
    router, _ = run(600, 9.0, weights=BAD, tuning=ONLINE)
    found = router.snapshot()["weights"]
    assert found != BAD
    router.reconfigure(router.settings.model_copy(update={"response_headers": "none"}))
    assert router.snapshot()["weights"] == found
    router.reconfigure(Settings.model_validate({**router.settings.model_dump(), "tuning": {"mode": "off"}}))
    assert router.snapshot()["weights"] == BAD


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def build(clock: Clock, **tuning: Any) -> Router:
    replicas = [{"name": name, "url": f"http://{name}:1"} for name in "ab"]
    given = {"replicas": replicas, "weights": {"rtt": 0.05, "queue": 20.0}, "tuning": {"mode": "online", **tuning}}
    router = Router(Settings.model_validate(given), clock=clock)
    router.observe_rtt("a", 0.01)
    router.observe_rtt("b", 0.3)
    return router


def prompt(number: int) -> Prompt:
    return Prompt(np.arange(number * 1000, number * 1000 + 400))


def test_a_further_attempt_is_no_part_of_a_trial_and_the_one_before_it_has_failed() -> None:
    clock = Clock()
    router = build(clock)
    assert router._tuned is not None
    for number in range(REQUESTS + 4):  # screened; a trial begins
        router.route(prompt(number))
    stage = router._tuned.tuner.stage(clock())
    assert isinstance(stage, Trial)
    before = len(stage.samples)
    router.route(prompt(100), request_id="r")
    assert len(stage.samples) == before + 1
    router.route(prompt(100), request_id="r")
    assert len(stage.samples) == before + 1
    assert stage.samples[-1].ttft_ms == math.inf


def test_a_flight_that_the_gateway_moved_counts_as_failed_there_and_as_nothing_where_it_was_never_asked() -> None:
    clock = Clock()
    router = build(clock)
    for number in range(REQUESTS + 1):
        router.route(prompt(number))
    assert router._tuned is not None
    stage = router._tuned.tuner.stage(clock())
    assert isinstance(stage, Trial)
    for number, failed in enumerate((True, False)):
        decision = router.route(prompt(200 + number))
        router.moved(decision.flight_id, "b" if decision.replica == "a" else "a", failed=failed)
        router.first_token(decision.flight_id)
        router.finish(decision.flight_id)
    first, second = stage.samples[-2:]
    assert first.e2e_ms == math.inf
    assert not first.void
    assert second.void


def test_another_load_widens_the_search_again() -> None:
    tuner = Tuner(TuningSettings(mode="online"), (1.0, 1.0), (1.0, 1.0), random.Random(0))
    for _ in range(30):
        tuner._end(Trial((2.0, 2.0), requests=400), "undecided", seen(0.0, 1000.0, 1000.0), EVEN)
    settled = tuner.describe()
    assert settled["sigma"] < 0.2
    assert settled["resting_requests"] == 1000
    tuner._end(Trial((2.0, 2.0), requests=400), "undecided", seen(0.0, 4000.0, 4000.0), EVEN)
    assert tuner.describe()["sigma"] == TuningSettings().sigma
    assert tuner.describe()["resting_requests"] == 0


def test_the_beaten_have_a_rematch_and_return_if_they_win_it() -> None:
    tuner = Tuner(TuningSettings(mode="online"), (1.0, 1.0), (1.0, 1.0), random.Random(0))
    tuner._end(Trial((2.0, 2.0), requests=100), "accepted", seen(-3.0), EVEN)
    assert tuner.in_force == (2.0, 2.0)
    rematch = tuner.stage(0.0)
    assert isinstance(rematch, Trial)
    assert (rematch.candidate, rematch.rematch) == ((1.0, 1.0), True)
    rematch.requests, rematch.differing = 100, 40
    assert verdict(rematch, seen(-1.8), EVEN, Guard(0.05), SETTINGS) == "accepted"
    tuner._end(rematch, "accepted", seen(-1.8), EVEN)
    assert tuner.in_force == (1.0, 1.0)
    assert not isinstance(tuner.stage(0.0), Trial)


# Settings


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"policy": "least-load", "tuning": {"mode": "online"}},
            "tuning.mode: 'online' needs a policy with weights (gorgo, gorgo-paper), policy is 'least-load'",
        ),
        (
            {"weights": {"rtt": 0.0, "queue": 1.0}, "tuning": {"mode": "online"}},
            "weights: tuning starts between tuning.low (0.05) and tuning.high (20), got rtt 0 and queue 1",
        ),
        ({"tuning": {"low": 2.0, "high": 1.0}}, "tuning: low: must be less than high, got 2 and 1"),
        (
            {"tuning": {"mode": "frozen"}},
            "tuning: path: frozen takes its weights from a state file, but none is given",
        ),
        (
            {"tuning": {"mode": "propose", "objective": "e2e-p95"}},
            "tuning: objective: propose judges by predicted first tokens; expected one of TTFT, got e2e-p95",
        ),
    ],
)
def test_settings_that_cannot_be_tuned_with_are_refused_in_one_sentence(given: Any, sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.model_validate(given)
    assert str(caught.value) == sentence


def test_deliberately_bad_weights_are_a_legal_start_and_yaml_off_is_off() -> None:
    Settings.model_validate({"weights": {"rtt": 0.05, "queue": 20.0}, "tuning": ONLINE})
    Settings.model_validate({"policy": "gorgo-paper", "tuning": {"mode": "online"}})
    assert Settings.model_validate({"tuning": {"mode": False}}).tuning.mode == "off"
