"""What online tuning of the weights gains and costs, simulated: `gorgo bench tuning`.

Every seed is a workload of its own, served with tuning and without: from weights that are far off, and from the
default ones, where there is little to find and exploring can only cost.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gorgo_plugin.fleet import simulator
from gorgo_plugin.fleet.replay_inputs import conversation_requests
from gorgo_plugin.fleet.rows import Row
from gorgo_plugin.fleet.statistics import RESAMPLES, Ratio
from gorgo_plugin.fleet.topology import demo_fleet
from gorgo_plugin.fleet.workload import ConversationSettings, conversations

BAD = {"rtt": 0.05, "queue": 20.0}  # takes the network for free and an idle replica for worth any price
RECOVERED_AFTER = 2000  # requests, after which p95 must be back


@dataclass(frozen=True, slots=True)
class Outcome:
    """One seed with tuning, against the same without it and with the default weights.

    Attributes:
        seed: of workload, engines and networks.
        ttft_p95, e2e_p95: of the judged requests, over those of the other run.
        untuned: TTFT p95 with the weights that tuning began with, left alone, over the other run's.
        guarded: E2E p95 over that with the weights that tuning began with: what the guard watches.
        weights: at the end.
        endings: how many trials ended how.
    """

    seed: int
    ttft_p95: float
    e2e_p95: float
    untuned: float
    guarded: float
    weights: Mapping[str, float]
    endings: Mapping[str, int]


def recovery(seed: int, requests: int = 4000, rate_per_s: float = 5.0, **tuning: Any) -> Outcome:
    """From weights that are far off; judged from the 2,000th request on."""
    return _against_default(seed, requests, rate_per_s, BAD, tuning, RECOVERED_AFTER)


def stationary(seed: int, requests: int = 3000, rate_per_s: float = 5.0, **tuning: Any) -> Outcome:
    """From the default weights; all requests are judged."""
    return _against_default(seed, requests, rate_per_s, None, tuning, 0)


KINDS: Mapping[str, Callable[..., Outcome]] = {"recovery": recovery, "stationary": stationary}


def _against_default(
    seed: int, requests: int, rate_per_s: float, start: Any, tuning: Mapping[str, Any], judged_from: int
) -> Outcome:
    sizes = ConversationSettings(requests=requests, rate_per_s=rate_per_s)
    fleet = demo_fleet(max_model_tokens=2**20)
    workload = conversation_requests(conversations(seed, sizes), fleet.block_tokens)

    def run(**settings: Any) -> simulator.Outcome:
        return simulator.simulate(Row("gorgo", settings), fleet, workload, seed)

    def p95(served: simulator.Outcome, times: str) -> float:
        return float(np.percentile(served.numbers[times][judged_from:], 95))

    default, tuned = run(), run(weights=start, tuning={"mode": "online", **tuning})
    untuned = default if start is None else run(weights=start)
    return Outcome(
        seed,
        p95(tuned, "ttft_ms") / p95(default, "ttft_ms"),
        p95(tuned, "e2e_ms") / p95(default, "e2e_ms"),
        p95(untuned, "ttft_ms") / p95(default, "ttft_ms"),
        p95(tuned, "e2e_ms") / p95(untuned, "e2e_ms"),
        tuned.states[0]["weights"],
        tuned.states[0]["tuning"]["endings"],
    )


def mean_ratio(ratios: Sequence[float], seed: int = 0) -> Ratio:
    """The geometric mean of paired ratios, with a 95% bootstrap interval over the pairs."""
    logs = np.log(ratios)
    drawn = np.random.default_rng(seed).integers(0, len(logs), (RESAMPLES, len(logs)))
    low, high = np.exp(np.percentile(logs[drawn].mean(axis=1), (2.5, 97.5)))
    return Ratio(float(np.exp(logs.mean())), float(low), float(high))


def measure(
    kinds: Sequence[str], seeds: int, rate_per_s: float, jobs: int | None, done: Callable[[], None]
) -> dict[str, list[Outcome]]:
    """The outcomes of every seed, by kind (of `KINDS`); `done` is called after each."""
    found = {}
    with ProcessPoolExecutor(jobs or os.cpu_count()) as pool:
        for kind in kinds:
            outcomes = []
            for outcome in pool.map(partial(KINDS[kind], rate_per_s=rate_per_s), range(seeds)):
                outcomes.append(outcome)
                done()
            found[kind] = outcomes
    return found


def means(outcomes: Sequence[Outcome]) -> dict[str, Ratio]:
    """The mean over the seeds of each ratio."""
    return {
        "TTFT p95": mean_ratio([one.ttft_p95 for one in outcomes]),
        "E2E p95": mean_ratio([one.e2e_p95 for one in outcomes]),
        "E2E p95 over where it began": mean_ratio([one.guarded for one in outcomes]),
        "TTFT p95 left alone": mean_ratio([one.untuned for one in outcomes]),
    }


def report(name: str, outcomes: Sequence[Outcome]) -> list[str]:
    """The figures of one kind of run: a line a seed, and the means."""
    lines = [f"{name}: ratios to the default weights, tuning off"]
    for one in outcomes:
        weights = f"W_rtt {one.weights['rtt']:.2f}, W_queue {one.weights['queue']:.2f}"
        endings = ", ".join(f"{count} {ending}" for ending, count in one.endings.items() if count)
        lines.append(
            f"  seed {one.seed:2}: TTFT p95 {one.ttft_p95:.3f} (left alone {one.untuned:.2f}), "
            f"E2E p95 {one.e2e_p95:.3f} (over where it began {one.guarded:.2f}); {weights}; {endings}"
        )
    for what, mean in means(outcomes).items():
        lines.append(f"  {what}: {mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}] over {len(outcomes)} seeds")
    return lines
