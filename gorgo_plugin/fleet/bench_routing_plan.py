"""What `gorgo bench routing` runs: fleets, workloads, rows and seeds, part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gorgo_plugin.fleet.bench_routing_jobs import Job, Result
from gorgo_plugin.fleet.generated import generate
from gorgo_plugin.fleet.requests import ReplayRequest
from gorgo_plugin.fleet.rows import ROWS, Row
from gorgo_plugin.fleet.simulation_runs import Source
from gorgo_plugin.fleet.topology import Fleet

OURS = "gorgo"
WIDE, NEAR, UNEQUAL = "37/279/456", "8/65/82", "8/65/82 unequal"
TRACE_STRETCHES = (3.0, 2.0)
UTILISATIONS = (0.2, 0.5, 0.8)
SWEPT_ROWS = (OURS, "prefix-similarity", "session-affinity", "nearest", "least-request", "prefix-cache")
WINDOW_ROWS = (OURS, "session-affinity", "least-load", "least-request", "prefix-cache")  # the second paper's table
WINDOWS = Source(workload="art-chat")
HELD_OUT_SEEDS = (10_000, 20_000)  # added to the seed of the tuning window
_KV_TOKENS = 8_000_000  # the caches of routing.md's fleets, which hold a window


def _fleet(
    regions: Mapping[str, tuple[float, float, Mapping[str, Any]]], ways: Mapping[tuple[str, str], tuple[float, float]]
) -> Fleet:
    return Fleet.model_validate(
        {
            "gateways": [{"region": "gateway"}],
            "replicas": [
                {"name": f"{region}-1", "region": region, "engine": {"kv_tokens": _KV_TOKENS, **engine}}
                for region, (_rtt, _jitter, engine) in regions.items()
            ],
            "links": [
                {"between": list(pair), "rtt_ms": rtt_ms, "jitter_ms": jitter_ms}
                for pair, (rtt_ms, jitter_ms) in [
                    *((("gateway", region), one[:2]) for region, one in regions.items()),
                    *ways.items(),
                ]
            ],
        }
    )


def _near(slow: float, fast: float, middle: float) -> Fleet:
    """Three regions of one continent; milliseconds per uncached token from the nearest to the farthest."""
    return _fleet(
        {
            "us-east": (8.0, 1.0, {"a_ms": slow}),
            "us-west": (65.0, 3.0, {"a_ms": fast}),
            "eu-west": (82.0, 3.0, {"a_ms": middle}),
        },
        {
            ("us-east", "us-west"): (57.0, 3.0),
            ("us-east", "eu-west"): (74.0, 3.0),
            ("us-west", "eu-west"): (130.0, 5.0),
        },
    )


def wide_fleet(**engine: Any) -> Fleet:
    """The second paper's fleet; `engine` is what differs from the default profile."""
    return _fleet(
        {
            "us-east": (37.0, 2.0, engine),
            "eu-central": (279.0, 8.0, engine),
            "ap-northeast": (456.0, 12.0, engine),
        },
        {
            ("us-east", "eu-central"): (242.0, 8.0),
            ("us-east", "ap-northeast"): (419.0, 12.0),
            ("eu-central", "ap-northeast"): (250.0, 10.0),
        },
    )


FLEETS = {WIDE: wide_fleet(), NEAR: _near(0.09, 0.09, 0.09), UNEQUAL: _near(0.20, 0.05, 0.09)}

# Engines on which predictions are judged. The last is one that no rates can express: long prompts cost more, decodes
# slow each other down, and every step is off by a third.
PROFILES: Mapping[str, Mapping[str, Any]] = {
    "linear": {},
    "curved": {"profile": "curved"},
    "irregular": {"profile": "curved", "noise": 0.3, "step_tokens": 512, "decode_per_request_ms": 0.5},
}

# What happens at EVENT_S on the wide fleet; a replica that dies returns, without its cache, after RETURN_S.
UNDISTURBED = "undisturbed"
EVENT_TIME_SCALE = 0.7  # 30% of the engines' time is prefill: what is lost is missed, and the others can take it
EVENT_S, RETURN_S = 400.0, 120.0
EVENT_LIMIT = 6_500  # what is left out is the end of the window, in which users leave
EVENTS: Mapping[str, Mapping[str, Any]] = {
    "RTT of eu-central tripled": {"kind": "rtt", "between": ["gateway", "eu-central"], "factor": 3.0},
    "us-east-1 slowed to a third": {"kind": "slow", "replica": "us-east-1", "factor": 3.0},
    "us-east-1 down for 2 minutes": {"kind": "down", "replica": "us-east-1", "for_s": RETURN_S},
}

# W_queue near 0, which the second paper's tuner can arrive at: everything goes to the nearest replica.
HACKING_TIME_SCALE = 0.7
HACKING_ROWS = (
    Row("gorgo W_queue 0.01", {"weights": {"rtt": 1.0, "queue": 0.01}}),
    Row("gorgo-paper W_queue 0", {"policy": "gorgo-paper", "weights": {"rtt": 0.276, "queue": 0.0}}),
)
# A tuner that begins where the paper's may end.
HACKED_TUNER = Row(
    "gorgo-online from W_queue 0.05", {"weights": {"rtt": 1.0, "queue": 0.05}, "tuning": {"mode": "online"}}
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One run in its place: `case` and `fleet` say in which table, its row in which line."""

    case: str
    fleet: str
    job: Job


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is run.

    Attributes:
        trace: Mooncake-format file; None leaves the cells of the trace out.
        seeds: of every cell.
        limit: first requests of each run of the grid and of `components`; None: all.
        disturbed_rows: rows that go through the events.
    """

    trace: Path | None = None
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    limit: int | None = None
    disturbed_rows: tuple[str, ...] = tuple(ROWS)


QUICK_SEEDS = (0, 1)
QUICK_LIMIT = 2_500
QUICK_DISTURBED_ROWS = (OURS, "gorgo-paper:art-chat", "least-request", "prefix-cache", "session-affinity")


def quick_plan(trace: Path | None = None) -> Plan:
    """As much as four cores run in ten minutes."""
    return Plan(trace, QUICK_SEEDS, QUICK_LIMIT, QUICK_DISTURBED_ROWS)


def online_rows() -> list[Row]:
    """Rows that tune their weights while they serve."""
    return [ROWS["gorgo-online"], ROWS["gorgo-paper-online"]]


def grid(plan: Plan) -> list[Entry]:
    """Every row on every workload and fleet."""
    cases = {"art-chat": Source(workload="art-chat"), "agentic": Source(workload="agentic")}
    if plan.trace is not None:
        cases = {f"trace x{stretch:g}": Source(plan.trace, time_scale=stretch) for stretch in TRACE_STRETCHES} | cases
    rows = list(ROWS.values())
    return [
        Entry(case, name, Job(row, fleet, replace(source, limit=plan.limit), seed))
        for case, source in cases.items()
        for name, fleet in FLEETS.items()
        for row in rows
        for seed in plan.seeds
    ]


def load_sweep(plan: Plan) -> list[Entry]:
    """Chats on the wide fleet, at time scales that need these shares of the engines' time for prefill."""
    usual = offered_load(generate("art-chat", 0), FLEETS[WIDE])
    return [
        Entry(
            f"utilisation {share:g}",
            WIDE,
            Job(ROWS[row], FLEETS[WIDE], Source(workload="art-chat", time_scale=usual / share), seed),
        )
        for share in UTILISATIONS
        for row in SWEPT_ROWS
        for seed in plan.seeds
    ]


def offered_load(requests: list[ReplayRequest], fleet: Fleet) -> float:
    """Share of the engines' time that prefill takes from the first to the last arrival, with every reuse there is.

    Each prompt is taken to need a step of its own, in which others decode, beside its uncached tokens.
    """
    seen: set[int] = set()
    size = fleet.block_tokens
    uncached_tokens = 0
    for request in requests:
        keys = list(request.blocks())
        own = keys[: (request.prompt_tokens - 1) // size]
        matched = next((place for place, key in enumerate(own) if key not in seen), len(own))
        uncached_tokens += request.prompt_tokens - matched * size
        seen.update(keys)
    uncached = uncached_tokens / len(requests)
    served_per_ms = sum(
        1.0 / (engine.a_ms * uncached + engine.t0_ms + engine.decode_ms)
        for engine in (replica.engine for replica in fleet.replicas)
    )
    return len(requests) / ((requests[-1].at_s - requests[0].at_s) * 1e3) / served_per_ms


def hacking(plan: Plan) -> list[Entry]:
    """Chats on the wide fleet with weights at which the queue is free of charge, beside the usual ones."""
    rows = [ROWS[OURS], HACKING_ROWS[0], ROWS["gorgo-paper:art-chat"], HACKING_ROWS[1], ROWS["nearest"], HACKED_TUNER]
    source = Source(workload="art-chat", time_scale=HACKING_TIME_SCALE)
    return [Entry("art-chat", WIDE, Job(row, FLEETS[WIDE], source, seed)) for row in rows for seed in plan.seeds]


def components(plan: Plan) -> list[Entry]:
    """Chats on the wide fleet, its engines of each profile: what is predicted and what comes of it."""
    source = Source(workload="art-chat", limit=plan.limit)
    return [
        Entry(name, WIDE, Job(ROWS[OURS], wide_fleet(**profile), source, seed))
        for name, profile in PROFILES.items()
        for seed in plan.seeds
    ]


def disturbances(plan: Plan) -> list[Entry]:
    """Every row through each of the events, and through none."""
    source = Source(workload="art-chat", time_scale=EVENT_TIME_SCALE, limit=EVENT_LIMIT)
    fleets = {case: _with_event(FLEETS[WIDE], event) for case, event in EVENTS.items()}
    return [
        Entry(case, WIDE, Job(row, fleet, source, seed, series=True))
        for case, fleet in [(UNDISTURBED, FLEETS[WIDE]), *fleets.items()]
        for row in map(ROWS.__getitem__, plan.disturbed_rows)
        for seed in plan.seeds
    ]


def _with_event(fleet: Fleet, event: Mapping[str, Any]) -> Fleet:
    return Fleet.model_validate({**fleet.model_dump(), "events": [{"at_s": EVENT_S, **event}]})


def tuning_windows(plan: Plan) -> list[Entry]:
    """The first windows, in which online rows learn their weights."""
    return [
        Entry("tuning window", WIDE, Job(row, FLEETS[WIDE], WINDOWS, seed))
        for row in online_rows()
        for seed in plan.seeds
    ]


def held_out_windows(plan: Plan, learned: Iterable[tuple[Entry, Result]]) -> Iterator[Entry]:
    """Windows of other users: rows that learned nothing, and those that did, their weights frozen or tuned on."""
    rows = [(ROWS[name], seed) for name in WINDOW_ROWS for seed in plan.seeds]
    for entry, result in learned:
        row, weights = entry.job.row, dict(zip(("rtt", "queue"), result.weights, strict=True))
        fixed = {name: value for name, value in row.settings.items() if name != "tuning"}
        rows.append((Row(row.name, {**row.settings, "weights": weights}), entry.job.seed))
        rows.append((Row(row.name.replace("online", "frozen"), {**fixed, "weights": weights}), entry.job.seed))
    for number, ahead in enumerate(HELD_OUT_SEEDS, 1):
        for row, seed in rows:
            yield Entry(f"held-out window {number}", WIDE, Job(row, FLEETS[WIDE], WINDOWS, seed + ahead))


PARTS: Mapping[str, Callable[[Plan], list[Entry]]] = {
    "grid": grid,
    "load": load_sweep,
    "hacking": hacking,
    "components": components,
    "disturbances": disturbances,
    "windows": tuning_windows,
}
