"""A model of one inference engine, driven by whoever holds the clock.

It has no clock, thread or task of its own: the mock upstream advances it in real time, a simulator in virtual time.
Requests are served as vLLM serves them: one first-come-first-served prefill queue with a token budget per step, every
running decode in every step, a block prefix cache, admission limited by blocks and by running requests, cancelling at
the end of the step in progress, and gauges that move at step ends only.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import random
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from gorgo_plugin.fleet.block_cache import BlockCache, Change, Lease

_S_PER_MS = 1e-3


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """What an engine is like.

    A step that prefills `u` tokens behind `c` already computed ones takes `t0 + a*u + b*(u*c + u*u/2)`, plus `p` per
    prompt token in a request's first step, plus `decode + decode_per_request*n` when `n` requests decode in it.

    The defaults are one GPU of the paper's class serving an 8B model: about 0.09 ms per uncached token, 20 ms between
    tokens.
    """

    t0_ms: float = 15.0
    """Fixed milliseconds of a step."""
    p_ms: float = 0.0
    """Milliseconds per prompt token, cached or not (hashing, copying)."""
    a_ms: float = 0.09
    """Milliseconds per uncached prompt token."""
    b_ms: float = 0.0
    """Milliseconds per token pair that attends: 0 is a linear engine, above 0 long contexts cost more."""
    decode_ms: float = 5.0
    """Milliseconds that decoding adds to a step."""
    decode_per_request_ms: float = 0.1
    """Milliseconds that each decoding request adds to a step."""
    noise: float = 0.02
    """Spread of step times: sigma of a log-normal factor."""
    step_tokens: int = 2048
    """Token budget of a step, shared by decodes and prefill chunks; vLLM's default on GPUs of this class."""
    block_tokens: int = 16
    """Tokens of a KV block; vLLM's default."""
    kv_tokens: int = 600_000
    """Tokens the KV cache holds; about what an 80 GB GPU keeps for an 8B model."""
    max_running: int = 64
    """Requests admitted at once; the paper's setting."""
    max_model_tokens: int = 131_072
    """Longest prompt and output together."""

    def __post_init__(self) -> None:
        if self.step_tokens <= self.max_running:
            raise ValueError("step_tokens: expected more than max_running, or prefill would starve behind decodes")
        if self.kv_tokens < 2 * self.block_tokens:
            raise ValueError("kv_tokens: expected at least two blocks")

    def slowed(self, factor: float) -> EngineProfile:
        """The same engine, every step of which takes `factor` times as long."""
        times = ("t0_ms", "p_ms", "a_ms", "b_ms", "decode_ms", "decode_per_request_ms")
        return dataclasses.replace(self, **{name: getattr(self, name) * factor for name in times})

    def prefill_ms(self, uncached: int, context: int) -> float:
        """Milliseconds of computing `uncached` tokens behind `context` computed ones, without a step's fixed part."""
        return self.a_ms * uncached + self.b_ms * uncached * (context + uncached / 2)

    def decode_step_ms(self, decoding: int) -> float:
        """Milliseconds that `decoding` requests add to a step."""
        return self.decode_ms + self.decode_per_request_ms * decoding if decoding else 0.0


PROFILES = {
    "linear": EngineProfile(),
    # Attention at long context: 13% on top of a cold prompt of 12,000 tokens.
    "curved": EngineProfile(p_ms=0.001, b_ms=2e-6),
    # Measured: vLLM 0.32 on one CPU core with a tiny random-weight model.
    "tiny-cpu": EngineProfile(
        t0_ms=9.8, p_ms=0.0008, a_ms=0.051, b_ms=5.7e-5, step_tokens=2048, block_tokens=32, kv_tokens=65_536
    ),
}


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request as an engine sees it.

    Attributes:
        id: names the request in events and in `cancel`.
        prompt_tokens: tokens of the prompt, at least 1.
        output_tokens: tokens that will be generated; 0 for an embedding.
        blocks: chained keys of the full blocks of the prompt followed by the output, as far as they are known; blocks
            beyond the last key take room but are never shared.
    """

    id: Hashable
    prompt_tokens: int
    output_tokens: int
    blocks: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class FirstToken:
    """A request's first token exists; its prefill began at `started_s`, when it was admitted."""

    id: Hashable
    at_s: float
    cached_tokens: int
    started_s: float


@dataclass(frozen=True, slots=True)
class Tokens:
    """`generated` tokens of a request exist, counted from its first; emitted every `token_interval` tokens."""

    id: Hashable
    at_s: float
    generated: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A request's last token exists."""

    id: Hashable
    at_s: float
    cached_tokens: int
    generated: int


Event = FirstToken | Tokens | Finished


@dataclass(frozen=True, slots=True)
class Gauges:
    """What the engine reports of itself, as of the end of its last step.

    Attributes:
        running: requests admitted and not finished.
        waiting: requests not admitted yet.
        kv_usage: share of KV blocks held by requests, from 0 to 1.
        used_tokens: tokens that these blocks hold room for.
        prefix_queries_tokens: prompt tokens looked up since the start.
        prefix_hits_tokens: prompt tokens found cached since the start.
        busy_s: time spent in steps since the start.
        prefill_s: time that prefill chunks took of it.
    """

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    used_tokens: int = 0
    prefix_queries_tokens: int = 0
    prefix_hits_tokens: int = 0
    busy_s: float = 0.0
    prefill_s: float = 0.0


class _Sequence:
    """A request in the engine. `first_tick` is the decode tick at which its first token appeared."""

    __slots__ = ("cached_tokens", "cancelled", "computed", "first_tick", "lease", "published", "request", "started_s")

    def __init__(self, request: EngineRequest) -> None:
        self.request = request
        self.lease: Lease | None = None
        self.cached_tokens = 0
        self.computed = 0
        self.published = 0
        self.started_s = math.nan
        self.first_tick: int | None = None
        self.cancelled = False


@dataclass(slots=True)
class _Step:
    """Steps under way: `count` equal ones from `start_s`; more than one only while nothing but decoding happens."""

    start_s: float
    duration_s: float
    count: int
    decoding: int
    completing: list[_Sequence]
    prefill_s: float

    @property
    def end_s(self) -> float:
        return self.start_s + self.count * self.duration_s


class Engine:
    """One engine.

    Calls must come in the order of their `now_s` (seconds on any clock); how often `advance` is called in between
    changes nothing. The same calls with the same seed give the same events.
    """

    def __init__(
        self, profile: EngineProfile, seed: int = 0, *, token_interval: int = 0, record_changes: bool = False
    ) -> None:
        """
        Args:
            profile: what it is like.
            seed: of its noise.
            token_interval: tokens between `Tokens` events of a request; 0 emits none, which is fastest.
            record_changes: keep the changes of the prefix cache for `take_changes`.
        """
        self._record_changes = record_changes
        self.profile = profile
        self.gauges = Gauges()
        self._seed = seed
        self._token_interval = token_interval
        self._reset()

    def _reset(self) -> None:
        self.gauges = Gauges()
        self._random = random.Random(self._seed)
        self._changes: list[Change] = []  # as of the end of the last step
        blocks = self.profile.kv_tokens // self.profile.block_tokens - 1  # vLLM keeps one back
        self._cache = BlockCache(blocks, self._record_changes)
        self._sequences: dict[Hashable, _Sequence] = {}
        self._waiting: deque[_Sequence] = deque()
        self._prefilling: list[_Sequence] = []
        self._decoding = 0
        self._tick = 0  # steps in which decoding requests got a token each
        self._milestones: list[tuple[int, int, _Sequence]] = []  # heap of (tick, order, sequence)
        self._order = 0
        self._leaving: list[_Sequence] = []
        self._step: _Step | None = None
        self._events: list[Event] = []
        self._queries_tokens = self._hits_tokens = 0
        self._busy_s = self._prefill_s = 0.0

    def submit(self, request: EngineRequest, now_s: float) -> None:
        """Take a request.

        Raises:
            ValueError: it could never be served (empty, too long for the model or the cache), or its id is in use.
        """
        self._check(request)
        self._run_until(now_s)
        sequence = _Sequence(request)
        self._sequences[request.id] = sequence
        self._waiting.append(sequence)
        self._wake(now_s)

    def cancel(self, request_id: Hashable, now_s: float) -> None:
        """Drop a request: at once while it waits, else at the end of the step in progress. Unknown ids are ignored."""
        self._run_until(now_s)
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return
        if sequence.lease is None:
            self._waiting.remove(sequence)
            return
        sequence.cancelled = True
        self._leaving.append(sequence)
        self._wake(now_s)

    def restart(self, now_s: float) -> list[Hashable]:
        """Start over with an empty cache; returns the ids of the requests that are lost."""
        self._run_until(now_s)
        lost = list(self._sequences)
        self._reset()
        return lost

    def change_speed(self, factor: float, now_s: float) -> None:
        """From the next step on, steps take `factor` times as long as they do now."""
        self._run_until(now_s)
        self.profile = self.profile.slowed(factor)
        if self._step is not None:
            self._wake(now_s)

    def next_event_s(self) -> float | None:
        """When to advance next; None while nothing is to be done. Not every such moment brings an event."""
        if self._events:
            return self._events[0].at_s
        return self._step.end_s if self._step is not None else None

    def advance(self, now_s: float) -> list[Event]:
        """Everything that happened up to `now_s` and was not returned yet, in order."""
        self._run_until(now_s)
        events, self._events = self._events, []
        return events

    def take_changes(self) -> list[Change]:
        """Changes of the prefix cache as of the end of the last step and not taken yet, in order.

        None after a restart are from before it.
        """
        changes, self._changes = self._changes, []
        return changes

    @property
    def idle(self) -> bool:
        """Whether no request is in the engine."""
        return not self._sequences and self._step is None

    @property
    def cached_blocks(self) -> int:
        """Blocks a new prompt could share."""
        return self._cache.cached_blocks

    def _check(self, request: EngineRequest) -> None:
        total = request.prompt_tokens + request.output_tokens
        if request.prompt_tokens < 1:
            raise ValueError("prompt_tokens: expected at least 1")
        if total > self.profile.max_model_tokens:
            raise ValueError(f"prompt and output are {total} tokens; the model takes {self.profile.max_model_tokens}")
        if self._blocks_needed(request) > self._cache.capacity:
            raise ValueError(f"prompt and output are {total} tokens; the KV cache is smaller")
        if request.id in self._sequences:
            raise ValueError(f"id: {request.id!r} is already in the engine")

    def _blocks_needed(self, request: EngineRequest) -> int:
        return math.ceil((request.prompt_tokens + request.output_tokens) / self.profile.block_tokens)

    def _wake(self, now_s: float) -> None:
        """Begin a step if there is none; cut a run of equal steps after the one in progress."""
        step = self._step
        if step is None:
            self._step = self._form_step(now_s)
        elif step.count > 1:
            in_progress = int((now_s - step.start_s) / step.duration_s) + 1
            step.count = max(1, min(step.count, in_progress))

    def _run_until(self, now_s: float) -> None:
        while self._step is not None and self._step.end_s <= now_s:
            end_s = self._step.end_s
            self._finish_step(self._step)
            self._step = self._form_step(end_s)

    def _form_step(self, start_s: float) -> _Step | None:
        """Schedule: every decode, then prefill chunks in order of arrival within the rest of the budget."""
        profile = self.profile
        decoding = self._decoding
        prefill_ms, completing = self._schedule_prefill(profile.step_tokens - decoding, start_s)
        if prefill_ms is None and not decoding:
            return None
        count = 1 if prefill_ms is not None else self._ticks_to_milestone()
        factor = math.exp(self._random.gauss(0.0, profile.noise)) if profile.noise else 1.0
        chunk_ms = (prefill_ms or 0.0) * factor
        duration_ms = (profile.t0_ms + profile.decode_step_ms(decoding)) * factor + chunk_ms
        return _Step(start_s, duration_ms * _S_PER_MS, count, decoding, completing, chunk_ms * _S_PER_MS)

    def _schedule_prefill(self, budget: int, start_s: float) -> tuple[float | None, list[_Sequence]]:
        """Milliseconds of the chunks of a step at `start_s` (None without any) and the prompts that they complete."""
        total_ms: float | None = None
        completing: list[_Sequence] = []
        while budget > 0 and (self._prefilling or self._admit(start_s)):
            sequence = self._prefilling[0]
            request = sequence.request
            first = sequence.computed == sequence.cached_tokens
            chunk = min(budget, request.prompt_tokens - sequence.computed)
            chunk_ms = self.profile.prefill_ms(chunk, sequence.computed)
            total_ms = (total_ms or 0.0) + chunk_ms + (self.profile.p_ms * request.prompt_tokens if first else 0.0)
            sequence.computed += chunk
            budget -= chunk
            self._publish(sequence, sequence.computed)
            if sequence.computed == request.prompt_tokens:
                completing.append(self._prefilling.pop(0))
        return total_ms, completing

    def _admit(self, now_s: float) -> bool:
        """Move the head of the waiting queue to prefill, if there is room for its prompt and output."""
        if not self._waiting or len(self._sequences) - len(self._waiting) >= self.profile.max_running:
            return False
        sequence = self._waiting[0]
        request, block_tokens = sequence.request, self.profile.block_tokens
        # The last prompt token is always computed: its logits give the first output token.
        matched = self._cache.match(request.blocks, (request.prompt_tokens - 1) // block_tokens)
        lease = self._cache.acquire(request.blocks, matched, self._blocks_needed(request))
        if lease is None:
            return False
        self._waiting.popleft()
        sequence.lease = lease
        sequence.started_s = now_s
        sequence.published = matched
        sequence.cached_tokens = sequence.computed = matched * block_tokens
        self._queries_tokens += request.prompt_tokens
        self._hits_tokens += sequence.cached_tokens
        self._prefilling.append(sequence)
        return True

    def _publish(self, sequence: _Sequence, computed: int) -> None:
        """Make the full blocks of the first `computed` tokens findable."""
        assert sequence.lease is not None
        full = min(computed // self.profile.block_tokens, len(sequence.request.blocks))
        if full > sequence.published:
            blocks, start = sequence.request.blocks, sequence.published
            self._cache.publish(sequence.lease, blocks[start:full], blocks[start - 1] if start else None)
            sequence.published = full

    def _ticks_to_milestone(self) -> int:
        while self._milestones[0][2].cancelled:
            heapq.heappop(self._milestones)
        return self._milestones[0][0] - self._tick

    def _finish_step(self, step: _Step) -> None:
        end_s = step.end_s
        if step.decoding:
            self._tick += step.count
        self._busy_s += step.count * step.duration_s
        self._prefill_s += step.prefill_s
        while self._milestones and self._milestones[0][0] <= self._tick:
            self._reach(heapq.heappop(self._milestones)[2], end_s)
        for sequence in step.completing:
            self._complete_prefill(sequence, end_s)
        for sequence in self._leaving:
            self._leave(sequence)
        self._leaving.clear()
        self._changes += self._cache.changes
        self._cache.changes = []
        self._update_gauges()

    def _complete_prefill(self, sequence: _Sequence, at_s: float) -> None:
        sequence.first_tick = self._tick
        self._decoding += 1
        if sequence.cancelled:
            return
        request = sequence.request
        if request.output_tokens > 0:
            self._events.append(FirstToken(request.id, at_s, sequence.cached_tokens, sequence.started_s))
        if request.output_tokens <= 1:
            self._finish(sequence, at_s)
        else:
            self._plan_milestone(sequence, 1)

    def _plan_milestone(self, sequence: _Sequence, generated: int) -> None:
        """Put the sequence's next event on the heap: its last token, or one interval on."""
        assert sequence.first_tick is not None
        target = sequence.request.output_tokens
        if self._token_interval:
            target = min(target, generated + self._token_interval)
        self._order += 1
        heapq.heappush(self._milestones, (sequence.first_tick + target - 1, self._order, sequence))

    def _reach(self, sequence: _Sequence, at_s: float) -> None:
        if sequence.cancelled:
            return
        generated = self._generated(sequence)
        if generated >= sequence.request.output_tokens:
            self._finish(sequence, at_s)
        else:
            self._events.append(Tokens(sequence.request.id, at_s, generated))
            self._plan_milestone(sequence, generated)

    def _generated(self, sequence: _Sequence) -> int:
        return 0 if sequence.first_tick is None else self._tick - sequence.first_tick + 1

    def _finish(self, sequence: _Sequence, at_s: float) -> None:
        request = sequence.request
        self._events.append(Finished(request.id, at_s, sequence.cached_tokens, request.output_tokens))
        del self._sequences[request.id]
        self._leave(sequence)

    def _leave(self, sequence: _Sequence) -> None:
        """Give back what an admitted sequence holds."""
        assert sequence.lease is not None
        if sequence.first_tick is None:
            self._prefilling.remove(sequence)
        else:
            self._decoding -= 1
            # The last generated token was never fed back, so its key and value do not exist.
            self._publish(sequence, sequence.computed + max(0, self._generated(sequence) - 1))
        self._cache.release(sequence.lease)

    def _update_gauges(self) -> None:
        usage = self._cache.usage
        self.gauges = Gauges(
            running=self._decoding + len(self._prefilling),
            waiting=len(self._waiting),
            kv_usage=usage,
            used_tokens=round(usage * self._cache.capacity) * self.profile.block_tokens,
            prefix_queries_tokens=self._queries_tokens,
            prefix_hits_tokens=self._hits_tokens,
            busy_s=self._busy_s,
            prefill_s=self._prefill_s,
        )
