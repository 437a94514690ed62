"""The ways a mock replica can be told to fail, at its start or while it runs."""

from __future__ import annotations

import random
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

ERROR_DELAY_S = 0.005  # a replica that fails at once looks fast, which is what a router must not fall for

FaultKind = Literal["none", "error", "hang", "reset", "cut", "rate-limit", "die"]
FAULT_KINDS: tuple[str, ...] = get_args(FaultKind)


class Fault(BaseModel):
    """What happens to requests for inference; `/health`, `/metrics` and the like go on answering unless told not to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: FaultKind = "none"
    """error: 500 in 5 ms; hang: no answer ever; reset: the connection breaks; cut: it breaks after the first content;
    rate-limit: 429; die: the process ends."""
    probability: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of requests that it happens to."""
    after: Annotated[int, Field(ge=0)] = 0
    """How many requests pass before it begins."""
    count: Annotated[int, Field(ge=1)] | None = None
    """How many requests it happens to before the replica is well again; null: for ever."""
    health: bool = False
    """Whether everything else the replica serves fails likewise."""


class FaultInjector:
    """Decides, request by request, whether the fault in force strikes."""

    def __init__(self, fault: Fault, rng: random.Random) -> None:
        self._rng = rng
        self.set(fault)

    def set(self, fault: Fault) -> None:
        """Put another fault in force."""
        self.fault = fault
        self._passed = 0
        self._struck = 0

    def strike(self, inference: bool) -> FaultKind:
        """The kind of fault for this request, "none" for most. `inference`: it asks for inference, not for health."""
        fault = self.fault
        if fault.kind == "none" or not (inference or fault.health):
            return "none"
        if self._passed < fault.after:
            self._passed += inference
            return "none"
        if fault.count is not None and self._struck >= fault.count:
            return "none"
        if fault.probability < 1.0 and self._rng.random() >= fault.probability:
            return "none"
        self._struck += 1
        return fault.kind
