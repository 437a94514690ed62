"""The plain values of routing: what came in (`Prompt`), what it would cost (`Cost`), the outcome (`Decision`)."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gorgo_plugin.errors import PromptError
from gorgo_plugin.prefix.blocks import Blocks

LIST_AT_ONCE = 65_536  # entries of a list made an array in one go, 0.5 ms in which no other thread runs
MAX_TOKEN_ID = 2**32 - 1  # token ids are held as uint32; the largest vocabularies have under 2**19 entries
_NOT_IDS = "tokens: expected whole numbers from 0 to 2**32 - 1"


VERDICTS = ("within-block", "over", "under")


def verdict_on(estimated_tokens: float, reported_tokens: int, block_tokens: int) -> str:
    """How an estimate of cached tokens stands against what the engine reported: one of `VERDICTS`."""
    if abs(estimated_tokens - reported_tokens) <= block_tokens:
        return VERDICTS[0]
    return VERDICTS[1] if estimated_tokens > reported_tokens else VERDICTS[2]


def token_array(tokens: ArrayLike) -> NDArray[np.uint32]:
    """Return token ids as a read-only uint32 array of shape (n,).

    Raises:
        PromptError: not a flat sequence of integers from 0 to 2**32 - 1.
    """
    if isinstance(tokens, list | tuple):
        return _from_list(tokens)
    try:
        given = tokens if isinstance(tokens, np.ndarray) else np.asarray(tokens)
    except (TypeError, ValueError, OverflowError) as error:
        raise PromptError("tokens: expected a flat sequence of token ids") from error
    if given.ndim != 1:
        raise PromptError(f"tokens: expected shape (n,), got {given.shape}")
    if given.size == 0:
        given = given.astype(np.uint32)
    elif given.dtype.kind not in "iu":
        raise PromptError(_NOT_IDS)
    elif given.dtype != np.uint32:
        # `astype` would wrap these silently.
        if (given.dtype.kind == "i" and int(given.min()) < 0) or int(given.max()) > MAX_TOKEN_ID:
            raise PromptError(_NOT_IDS)
        given = given.astype(np.uint32)
    view = given.view()
    view.setflags(write=False)
    return view


def _from_list(tokens: Sequence[Any]) -> NDArray[np.uint32]:
    # By way of `array`, which takes a quarter of NumPy's time; its `fromlist` three quarters of its constructor's.
    given, ids = tokens if isinstance(tokens, list) else list(tokens), array("I")
    try:
        for start in range(0, len(given), LIST_AT_ONCE):
            ids.fromlist(given if len(given) <= LIST_AT_ONCE else given[start : start + LIST_AT_ONCE])
    except OverflowError as error:
        raise PromptError(_NOT_IDS) from error
    except TypeError as error:
        flat = not any(isinstance(token, list | tuple) for token in tokens)
        raise PromptError(_NOT_IDS if flat else "tokens: expected a flat sequence of token ids") from error
    made = np.frombuffer(ids, dtype=np.uint32) if ids else np.empty(0, dtype=np.uint32)
    made.setflags(write=False)
    return made


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One request as the router sees it.

    Attributes:
        tokens: token ids the engine will prefill, uint32, shape (n,); any sequence of integers is converted.
        model: the name whose tokenizer, blocks and index apply; "" is the model of a router that serves only one.
        stream: whether the first token can be observed (a non-streamed answer arrives whole).
        max_output_tokens: the output cap the request asked for, None when it did not.
        affinity_key: what `session-affinity` hashes (session, conversation or user); None: the first 256 tokens.
        cache_key: what else separates engine caches (LoRA adapter, `cache_salt`); "" when nothing does.
        exact: the ids are the engine's own; False: counts are an estimate and are scaled by what engines report.
        estimated_tokens: how many tokens are thought to follow `tokens`, which are not known yet; the flight gets them
            by `Router.attach`. `len` counts them too.
        blocks: hashes of its blocks, where `Router.prepare` has them from earlier requests; only for that router.
    """

    tokens: NDArray[np.uint32]
    model: str = ""
    stream: bool = True
    max_output_tokens: int | None = None
    affinity_key: str | None = None
    cache_key: str = ""
    exact: bool = True
    estimated_tokens: int = 0
    blocks: Blocks | None = None

    def __init__(
        self,
        tokens: Sequence[int] | NDArray[Any],
        model: str = "",
        stream: bool = True,
        max_output_tokens: int | None = None,
        affinity_key: str | None = None,
        cache_key: str = "",
        exact: bool = True,
        estimated_tokens: int = 0,
        blocks: Blocks | None = None,
    ) -> None:
        put = object.__setattr__
        put(self, "tokens", token_array(tokens))
        put(self, "model", model)
        put(self, "stream", stream)
        put(self, "max_output_tokens", max_output_tokens)
        put(self, "affinity_key", affinity_key)
        put(self, "cache_key", cache_key)
        put(self, "exact", exact and not estimated_tokens)
        put(self, "estimated_tokens", estimated_tokens)
        put(self, "blocks", blocks)

    def __len__(self) -> int:
        return len(self.tokens) + self.estimated_tokens

    def affinity(self) -> bytes:
        """What stays the same over a session: its key, else the first 256 tokens (the simple affinity of paper v2)."""
        if self.affinity_key is not None:
            return self.affinity_key.encode("utf-8", "surrogatepass")
        return self.tokens[:256].tobytes()


@dataclass(frozen=True, slots=True)
class Cost:
    """What one replica would cost one request, in milliseconds (paper v2, eq. 3, with every term in time units).

    Attributes:
        network_ms: one round trip to the replica, EWMA.
        doubt_ms: the price of not knowing: a round trip never measured or measured long ago.
        queue_ms: the uncached tokens dispatched there and still without a first token, at the replica's own rate.
        prefill_ms: this prompt's uncached tokens at the replica's own rate, with its fixed overhead.
        blocking_ms: what its prefill is expected to make others wait there (`blocking_ms` in `policies/base.py`).
        next_turn_ms: what the conversation's next turn is expected to pay for finding its prefix there (`next_turn_ms`,
            ibid.).
        decode_ms: what decoding its answer there is expected to cost it and those that decode there (`decode_ms`,
            ibid.).
        total_ms: the weighted sum
            `W_rtt * (network + doubt) + W_queue * queue + prefill + blocking + next_turn + decode`.
        score: what the policy in force minimises; equals `total_ms` for `gorgo`, has another unit for the baselines.
        cached_tokens: prompt tokens believed cached there.
        uncached_tokens: prompt tokens left to prefill.
    """

    network_ms: float
    doubt_ms: float
    queue_ms: float
    prefill_ms: float
    blocking_ms: float
    next_turn_ms: float
    decode_ms: float
    total_ms: float
    score: float
    cached_tokens: int
    uncached_tokens: int

    @property
    def predicted_ttft_ms(self) -> float:
        """The unweighted prediction: network + queue + prefill."""
        return self.network_ms + self.queue_ms + self.prefill_ms


class Expected(NamedTuple):
    """What is expected of the chosen replica: `Cost.predicted_ttft_ms` and `Cost.cached_tokens`, without the rest."""

    ttft_ms: float
    cached_tokens: int


class Costs(Mapping[str, Cost]):
    """Replica name -> `Cost`, worked out when it is looked at."""

    __slots__ = ()

    @abstractmethod
    def expected(self) -> Expected:
        """Of the chosen one."""

    @abstractmethod
    def ranked(self) -> list[str]:
        """Names in failover order."""


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """The outcome of routing one request.

    Attributes:
        request_id: stays the same over the attempts of one request.
        flight_id: names this attempt; 0 when none was opened (`explain`).
        replica: name of the chosen replica.
        region: its region label.
        reason: kebab-case; why this one (`cheapest`, `near-tie`, `only-candidate`, `retry`, ...). It ends in
            `-by-estimate` where tokens of the prompt were not known yet.
        costs: replica name -> `Cost`, worked out only when looked at.
    """

    request_id: str
    flight_id: int
    replica: str
    region: str
    reason: str
    costs: Costs

    @property
    def ranked(self) -> Sequence[str]:
        """Candidate names, cheapest first: the failover order. `ranked[0]` is `replica`."""
        return self.costs.ranked()
