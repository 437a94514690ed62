"""Requests of a replay: as they come, while they are under way, and what became of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gorgo_plugin.decision import Prompt
from gorgo_plugin.fleet.engine import EngineRequest

if TYPE_CHECKING:
    from gorgo_plugin.fleet.gateways import Door, Gateway, Target


@dataclass(frozen=True, slots=True)
class ReplayRequest:
    """One request. What is long is made when the request arrives, so that a trace's tokens are never held together.

    Attributes:
        at_s: when the client sends it, seconds from the start.
        prompt_tokens: tokens of the prompt.
        output_tokens: tokens to generate, at least 1.
        tokens: () -> token ids of prompt and answer together, uint32, shape (prompt_tokens + output_tokens,).
        blocks: () -> the engine's keys of the full blocks of prompt and answer together.
        session: what session affinity goes by; "" where it is not known.
        client: region it comes from; "" leaves that to the fleet's shares.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    tokens: Callable[[], NDArray[np.uint32]]
    blocks: Callable[[], Sequence[int]]
    session: str = ""
    client: str = ""


@dataclass(slots=True)
class Served:
    """What became of one request. Times in milliseconds; those of a request tried again are of its last attempt.

    Attributes:
        index: its place in the workload.
        at_s: when the client sent it.
        client, gateway: regions where it came from and where it was routed.
        prompt_tokens: length of the prompt.
        replica: number of the replica that served it.
        attempts: how often it was routed from the start.
        estimated_tokens: prompt tokens believed cached at the replica when it was routed.
        cached_tokens: prompt tokens that the engine found cached when it admitted the request.
        predicted_network_ms, predicted_queue_ms, predicted_prefill_ms: terms of the cost at the chosen replica.
        predicted_ms: predicted time to the first token, seen at the gateway.
        entry_ms: round trip between client and gateway, part of `ttft_ms`.
        queue_ms: from its arrival at the engine to the beginning of its prefill.
        prefill_ms: from there to its first token.
        ttft_ms, e2e_ms: from sending to the first token and to the end of the answer, seen by the client.
    """

    index: int
    at_s: float
    client: str
    gateway: str
    prompt_tokens: int
    replica: int = -1
    attempts: int = 0
    estimated_tokens: int = 0
    cached_tokens: int = 0
    predicted_network_ms: float = math.nan
    predicted_queue_ms: float = math.nan
    predicted_prefill_ms: float = math.nan
    predicted_ms: float = math.nan
    entry_ms: float = math.nan
    queue_ms: float = math.nan
    prefill_ms: float = math.nan
    ttft_ms: float = math.nan
    e2e_ms: float = math.nan


@dataclass(slots=True)
class Leg:
    """One gateway that a request went through: where it sent it, as which flight, and when its last news arrived."""

    gateway: Gateway
    target: Target
    flight_id: int
    latest_s: float = 0.0


@dataclass(slots=True)
class Call:
    """A request under way.

    Attributes:
        id: the same over its attempts.
        served: what is known of it so far.
        tokens: of prompt and answer, uint32.
        places: block key -> which block of the request it is; empty where the engine publishes nothing.
        door: where it came in.
        legs: the gateways of its present attempt, the first one first.
        entered_s, submitted_s, seen_s: arrival at gateway and engine; when the client saw the last of it.
    """

    id: str
    served: Served
    prompt: Prompt
    work: EngineRequest
    tokens: NDArray[np.uint32]
    places: Mapping[int, int]
    door: Door
    legs: list[Leg] = field(default_factory=list)
    entered_s: float = 0.0
    submitted_s: float = 0.0
    seen_s: float = 0.0
