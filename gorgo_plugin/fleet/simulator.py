"""One simulated run: a row, a fleet, a workload and a seed in; what became of every request out, as arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gorgo_plugin.fleet.replay import Replay
from gorgo_plugin.fleet.requests import ReplayRequest, Served
from gorgo_plugin.fleet.rows import Row, row_named
from gorgo_plugin.fleet.topology import Fleet
from gorgo_plugin.fleet.workload import WorkloadError
from gorgo_plugin.settings import Settings

HISTORY_POINTS = 240  # a plot shows no more
_TIMES = tuple(field.name for field in fields(Served) if field.name.endswith("_ms"))
_COUNTS = ("index", "prompt_tokens", "replica", "attempts", "estimated_tokens", "cached_tokens")


@dataclass(frozen=True, slots=True)
class Learned:
    """What one gateway's router had learned, over time.

    Attributes:
        gateway: its region.
        at_s: when it was looked at, shape (points,).
        weights: W_rtt and W_queue then, shape (points, 2).
        rates: replica -> what its rates are called -> values, shape (points,); NaN before the first request.
    """

    gateway: str
    at_s: NDArray[np.float64]
    weights: NDArray[np.float64]
    rates: dict[str, dict[str, NDArray[np.float64]]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a workload. Arrays have shape (requests,), in the order of the workload.

    Attributes:
        row: name of the row.
        seed: of the run.
        replicas, regions: names of the replicas and their regions, shape (replicas,).
        gateways: regions of the gateways that requests entered by, shape (requests,).
        clients: regions that they came from, shape (requests,).
        at_s: when each was sent.
        numbers: the numeric fields of `Served` by name: times in float64, counts in int64.
        prefill_share: share of the run that each replica spent on prefill, shape (replicas,).
        busy_share: share that it spent in steps of any kind.
        learned: one per gateway.
        states: what each gateway's router knew at the end, as `Router.snapshot` gives it.
    """

    row: str
    seed: int
    replicas: tuple[str, ...]
    regions: tuple[str, ...]
    gateways: tuple[str, ...]
    clients: tuple[str, ...]
    at_s: NDArray[np.float64]
    numbers: dict[str, NDArray[Any]]
    prefill_share: NDArray[np.float64]
    busy_share: NDArray[np.float64]
    learned: tuple[Learned, ...]
    states: tuple[dict[str, Any], ...]

    @property
    def ttft_ms(self) -> NDArray[np.float64]:
        """Time to the first token, seen by the client."""
        return self.numbers["ttft_ms"]

    @property
    def e2e_ms(self) -> NDArray[np.float64]:
        """Time to the end of the answer, seen by the client."""
        return self.numbers["e2e_ms"]

    @property
    def predicted_ms(self) -> NDArray[np.float64]:
        """Predicted time to the first token, as seen at the gateway."""
        return self.numbers["predicted_ms"]

    @property
    def gateway_ttft_ms(self) -> NDArray[np.float64]:
        """Time to the first token, seen at the gateway: what `predicted_ms` predicts."""
        seen: NDArray[np.float64] = self.numbers["ttft_ms"] - self.numbers["entry_ms"]
        return seen

    @property
    def network_ms(self) -> NDArray[np.float64]:
        """What of `gateway_ttft_ms` was the network, shape (requests,)."""
        spent: NDArray[np.float64] = self.gateway_ttft_ms - self.numbers["queue_ms"] - self.numbers["prefill_ms"]
        return spent

    @property
    def replica(self) -> NDArray[np.int64]:
        """Number of the replica that served it."""
        return self.numbers["replica"]

    @property
    def prompt_tokens(self) -> NDArray[np.int64]:
        """Length of the prompt."""
        return self.numbers["prompt_tokens"]

    @property
    def cached_tokens(self) -> NDArray[np.int64]:
        """Prompt tokens that the engine found cached."""
        return self.numbers["cached_tokens"]

    @property
    def hit_rate(self) -> float:
        """Cached share of all prompt tokens."""
        return float(self.cached_tokens.sum() / self.prompt_tokens.sum())

    def percentiles_ms(self, of: str, ranks: Sequence[float]) -> list[float]:
        """Percentiles of one of the times, `ttft_ms` or another name of `numbers`."""
        return [float(value) for value in np.percentile(self.numbers[of], ranks)]

    def region_shares(self) -> dict[str, float]:
        """Share of the requests that each region served."""
        counts = np.bincount(self.replica, minlength=len(self.replicas))
        shares = dict.fromkeys(self.regions, 0.0)
        for region, count in zip(self.regions, counts.tolist(), strict=True):
            shares[region] += count / len(self.replica)
        return shares


def simulate(
    row: Row | Settings | str,
    fleet: Fleet,
    requests: Sequence[ReplayRequest],
    seed: int = 0,
    *,
    states: Sequence[Mapping[str, Any]] = (),
    usage: bool = True,
    on_served: Callable[[], None] = lambda: None,
) -> Outcome:
    """Serve a workload once. The same arguments give the same outcome, whatever ran before.

    Args:
        row: a row or its name, or settings of a router, whose replicas, if there are any, stand for those of the fleet.
        fleet: where it is served.
        requests: in order of arrival.
        seed: of engines, links, routers and clients.
        states: `Outcome.states` of a run of the same row and fleet, from which the routers go on; none given: they
            begin with what their settings say.
        usage: whether engines report what they counted, as `stream_options.include_usage` asks for.
        on_served: called when a request's answer is complete.

    Raises:
        RowError: no row has that name.
        FleetError: the fleet cannot serve this row or these requests.
        SettingsError: the row's settings are wrong.
        WorkloadError: there are no requests.
    """
    if not requests:
        raise WorkloadError("requests: there are none")
    if isinstance(row, Settings):
        shown, settings = Row(row.policy), row.model_copy(update={"seed": seed})
    else:
        shown = row_named(row) if isinstance(row, str) else row
        settings = Settings.model_validate({**shown.settings, "seed": seed})
    options: dict[str, Any] = {"seed": seed, "states": states, "usage": usage, "on_served": on_served}
    replay = Replay(settings, fleet, distributed=shown.distributed, **options)
    history = _History(replay, requests[-1].at_s)
    served = sorted(replay.run(requests), key=lambda one: one.index)
    return _outcome(shown.name, seed, replay, served, history)


def _outcome(row: str, seed: int, replay: Replay, served: Sequence[Served], history: _History) -> Outcome:
    numbers: dict[str, NDArray[Any]] = {
        **{name: np.array([getattr(one, name) for one in served], dtype=np.float64) for name in _TIMES},
        **{name: np.array([getattr(one, name) for one in served], dtype=np.int64) for name in _COUNTS},
    }
    gauges = [site.engine.gauges for site in replay.sites]
    return Outcome(
        row=row,
        seed=seed,
        replicas=tuple(site.name for site in replay.sites),
        regions=tuple(site.replica.region for site in replay.sites),
        gateways=tuple(one.gateway for one in served),
        clients=tuple(one.client for one in served),
        at_s=np.array([one.at_s for one in served]),
        numbers=numbers,
        prefill_share=np.array([one.prefill_s for one in gauges]) / replay.now_s,
        busy_share=np.array([one.busy_s for one in gauges]) / replay.now_s,
        learned=history.learned(),
        states=tuple(gateway.router.snapshot() for gateway in replay.gateways),
    )


class _History:
    """Looks at the routers now and then until the last arrival."""

    def __init__(self, replay: Replay, last_arrival_s: float) -> None:
        self._replay = replay
        self._seen: list[tuple[float, list[dict[str, Any]]]] = []
        for point in range(HISTORY_POINTS + 1):
            replay.at(last_arrival_s * point / HISTORY_POINTS, self._look)

    def _look(self) -> None:
        self._seen.append((self._replay.now_s, [gateway.router.snapshot() for gateway in self._replay.gateways]))

    def learned(self) -> tuple[Learned, ...]:
        """What was seen, per gateway."""
        return tuple(self._learned(number) for number in range(len(self._replay.gateways)))

    def _learned(self, number: int) -> Learned:
        states = [states[number] for _, states in self._seen]
        return Learned(
            gateway=self._replay.gateways[number].region,
            at_s=np.array([at_s for at_s, _ in self._seen]),
            weights=np.array([[state["weights"]["rtt"], state["weights"]["queue"]] for state in states]),
            rates={name: _rates([state["replicas"][name] for state in states]) for name in states[-1]["replicas"]},
        )


def _rates(states: Sequence[dict[str, Any]]) -> dict[str, NDArray[np.float64]]:
    """One replica's rates over time, of the only model there is."""
    seen: list[dict[str, Any]] = [next(iter(state["models"].values()), {}) for state in states]
    names = [name for name, value in seen[-1].items() if isinstance(value, int | float)]
    return {name: np.array([one.get(name, np.nan) for one in seen], dtype=np.float64) for name in names}
