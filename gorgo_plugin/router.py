"""The router: wires prompt, index, signals and policy together, and keeps the books of each flight.

It does no I/O, starts no thread or task, reads no clock but the one it is given and draws no randomness but from the
generator it is given. All methods are thread-safe: one lock covers deciding and observing, for microseconds;
tokenization and hashing happen outside it.
"""

from __future__ import annotations

import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cachetools import TTLCache
from numpy.typing import NDArray

from gorgo_plugin.costs import decision
from gorgo_plugin.decision import Decision, Prompt
from gorgo_plugin.engine_caches import EngineCaches
from gorgo_plugin.models import Found, ModelState
from gorgo_plugin.policies import POLICIES, View
from gorgo_plugin.policies.pick import pick
from gorgo_plugin.prompt import PromptBuilder, built_from
from gorgo_plugin.replicas import Replicas, tiers_of
from gorgo_plugin.settings import ReplicaSettings, Settings
from gorgo_plugin.signals import (
    Arrivals,
    EngineGauges,
    Flight,
    Flights,
    GaugeTable,
    HealthTable,
    LatencyTable,
    Observer,
    Silence,
)
from gorgo_plugin.state import State
from gorgo_plugin.tuned import retuned, tuned_pick, weights_in_force
from gorgo_plugin.views import Views

# Kinds of failure that speak against the replica. A client that leaves (`disconnect`) or a request that the engine
# refuses for its own sake (`invalid`) does not.
FAULTS = frozenset({"unreached", "rejected", "timeout"})
FAILURE_KINDS = FAULTS | {"disconnect", "invalid"}
LATE_USAGE_S = 30.0  # usage may follow the release: from a log event, or a last chunk after the stream closed
MAX_RECENT_FLIGHTS = 4096
MAX_REQUESTS = 65_536  # requests whose tried replicas are remembered; an entry is some hundred bytes
MAX_MODELS = 64  # models with an index; where clients may ask for any name, this bounds what they can make
# More tokens than an engine counts for a prompt, and for an answer: a larger number is a fault of the engine's.
MOST_PROMPT_TOKENS = 2**24
MOST_OUTPUT_TOKENS = 2**20
SWEEP_EVERY_S = 5.0
CONTINUES_FROM = 0.5  # share of a prompt that was seen before; what conversations merely share is mostly less


class Router:
    """Decides which replica gets a request, and learns from what becomes of it.

    Args:
        settings: the validated configuration.
        clock: () -> seconds, monotonic.
        state: a `snapshot()` of another router, whose round trips, rates and token scales are taken over.
        rng: breaks near-ties; seeded with `settings.seed` when not given.
        secret: keys hashes of blocks, media and salts. Derived from the seed when not given: a gateway passes its own.

    Raises:
        SettingsError: a tokenizer or chat template of the settings cannot be read.
    """

    def __init__(
        self,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        state: Mapping[str, Any] | None = None,
        rng: random.Random | None = None,
        secret: bytes | None = None,
    ) -> None:
        self.settings = settings
        self._clock = clock
        self._rng = rng if rng is not None else random.Random(settings.seed)
        self._secret = secret if secret is not None else f"seed {settings.seed}".encode()
        self.builder = PromptBuilder(settings, secret=self._secret)
        self._lock = threading.RLock()
        self._policy = POLICIES[settings.policy]
        self._latency = LatencyTable(settings.probe)
        self._flights = Flights()
        self._gauges = GaugeTable()
        self._arrivals = Arrivals()
        self._tuned = tuned_pick(settings, state)
        weights = weights_in_force(settings, self._tuned)
        self._silence = Silence()
        self._views = Views(self._latency, self._flights, self._arrivals, self._gauges, self._silence, weights)
        self._health = HealthTable(settings.health)
        followers = self._latency, self._flights, self._arrivals, self._gauges, self._silence, self._health
        self._replicas = Replicas(followers)
        self.engine_caches = EngineCaches(self._lock, clock, self._secret, self._replicas, self._block_tokens)
        self._models: OrderedDict[str, ModelState] = OrderedDict()  # the least recently used first
        self._recent: TTLCache[int, Flight] = TTLCache(MAX_RECENT_FLIGHTS, LATE_USAGE_S, clock)
        self._attempts: TTLCache[str, list[tuple[int, int]]] = TTLCache(MAX_REQUESTS, settings.flight_ttl_s, clock)
        self._last_flight_id = 0
        tables = (self._latency, self._flights, self._gauges, self._health, self._models, self._model)
        self._state = State(self._replicas, *tables, self.engine_caches)
        self._swept_s = clock()
        self._counters = dict.fromkeys(("routed", "unknown_flights", "swept_flights", "forgotten_caches"), 0)
        self.set_replicas(settings.replicas)
        if state is not None:
            self._state.restore(state, clock())

    # Deciding

    def prepare(self, body: bytes | Mapping[str, Any], endpoint: str, model: str | None = None) -> Prompt:
        """Turn a request body into a `Prompt`. Slow on unseen text (milliseconds per 1,000 tokens), thread-safe.

        Raises:
            PromptError: the body is not JSON, holds no prompt, or a field has the wrong shape.
        """
        return self.builder.prepare(body, endpoint, model)

    def route(
        self,
        prompt: Prompt,
        candidates: Sequence[str] | None = None,
        exclude: Iterable[str] = (),
        request_id: str | None = None,
    ) -> Decision:
        """Choose a replica and open a flight there.

        Args:
            prompt: what to route.
            candidates: names that may serve it; none given: all that serve its model. Unknown names are left out.
            exclude: names that must not.
            request_id: the same over the attempts of one request. Replicas it tried come last, and an attempt of it
                that is still open is released. None: a new request.

        Raises:
            NoCandidates: nobody is left to serve it.
        """
        model = self._model(prompt.model)
        hashes = model.hashes(prompt)
        with self._lock:
            now = self._clock()
            self._sweep_when_due(now)
            attempts = self._attempts.get(request_id, []) if request_id is not None else []
            if attempts:
                self._release(attempts[-1][0], now, "retried")
            among = self._replicas.candidates(prompt.model, candidates, exclude)
            found = self.engine_caches.look_up(prompt, model, hashes)
            view = self._views.view(prompt, model, found, among, now, self._rng)
            tiers, sample = tiers_of(among, attempts, self._health.unavailable(now)), None
            if self._tuned is None:
                choice = pick(self._policy, view, tiers, self._rng)
            else:
                choice, sample = self._tuned(self._policy, view, tiers, self._rng, prompt.stream, now, not attempts)
                self._views.weights = self._tuned.weights
            flight_id, slot = self._last_flight_id + 1, among.slots[choice.row]
            self._last_flight_id = flight_id
            request = request_id if request_id is not None else f"flight-{flight_id}"
            self._open(flight_id, request, prompt, model, hashes, found, slot, view, choice.row, now, sample)
            if request_id is not None:
                self._attempts[request_id] = [*attempts, (flight_id, slot)]
            self._counters["routed"] += 1
            return decision(request, flight_id, self._replicas[slot], view, choice, prompt)

    def explain(self, prompt: Prompt, candidates: Sequence[str] | None = None, exclude: Iterable[str] = ()) -> Decision:
        """The decision that `route` would take now, with `flight_id` 0: opens nothing, teaches nothing.

        Raises:
            NoCandidates: nobody may serve it.
        """
        model = self._model(prompt.model)
        hashes = model.hashes(prompt)
        with self._lock:
            now = self._clock()
            among = self._replicas.candidates(prompt.model, candidates, exclude)
            rng = random.Random()
            rng.setstate(self._rng.getstate())  # a look must not change what is drawn next
            found = self.engine_caches.look_up(prompt, model, hashes)
            view = self._views.view(prompt, model, found, among, now, rng)
            choice = pick(self._policy, view, tiers_of(among, (), self._health.unavailable(now)), rng)
            return decision("", 0, self._replicas[among.slots[choice.row]], view, choice, prompt)

    # What became of a flight

    def attach(self, flight_id: int, tokens: Sequence[int] | NDArray[Any], exact: bool = True) -> None:
        """The tokens of a prompt that was routed on an estimate, shape (n,): its counts and its credit are put right.

        Once per flight; ignored after its end, and where nothing was estimated. `exact` as in `Prompt`.

        Raises:
            PromptError: no token ids.
        """
        with self._lock:
            flight = self._known(flight_id)
            if flight is None or not flight.awaits_tokens:
                return
            model = self._model(flight.model)
        prompt = Prompt(tokens, flight.model, cache_key=flight.cache_key, exact=exact)
        hashes = model.hashes(prompt)
        with self._lock:
            if self._flights.get(flight_id) is not flight or self._replicas.name(flight.slot) is None:
                return  # ended meanwhile, or its replica was taken away
            if flight.awaits_tokens:
                flight.hashes, flight.own_tokens, flight.exact = hashes, len(prompt), exact
                flight.rest = model.rest(prompt)
                flight.credit, cached_tokens = model.recredit(flight.slot, flight.credit, prompt, hashes)
                flight.path_blocks, flight.answer_blocks = flight.credit.had_blocks, 0
                length = len(prompt) * model.scale_of(prompt)
                work_tokens = model.rates.slot_work_tokens(flight.slot, length, length - cached_tokens)
                self._flights.recount(flight, length, cached_tokens, work_tokens)
                self.engine_caches.dispatched(flight)

    def first_token(self, flight_id: int, at_s: float | None = None) -> None:
        """The first token of a streamed answer was seen, at `at_s` of the router's clock (now, when not given)."""
        with self._lock:
            flight = self._known(flight_id)
            if flight is None or flight.first_token_s is not None:
                return
            now = self._clock() if at_s is None else at_s
            flight.first_token_s = now
            self._flights.prefilled(flight, now)
            self._health.answered(flight.slot)
            self._silence.heard(flight.slot, now)
            if flight.observer is not None:
                flight.observer.first_token(now)

    def usage(
        self,
        flight_id: int,
        prompt_tokens: int | None = None,
        cached_tokens: int | None = None,
        output_tokens: int | None = None,
    ) -> None:
        """What the engine says it counted; once per flight, also shortly after its release.

        Corrects the index where the engine had less or more than believed, adds the answer's blocks to it, and learns
        the token scale of inexact prompts.
        """
        with self._lock:
            under_way = self._flights.get(flight_id)
            flight = under_way or self._recent.get(flight_id)
            if flight is None or flight.usage_seen:
                self._count_if_unknown(flight_id)
                return
            if not prompt_tokens or not 0 < prompt_tokens <= MOST_PROMPT_TOKENS:
                return  # engines and gateways report 0 when they do not know
            flight.usage_seen = True
            if self._replicas.name(flight.slot) is None:
                return  # taken away while the request ran
            model = self._model(flight.model)
            if not flight.exact and not flight.awaits_tokens:
                model.learn_scale(flight.own_tokens, prompt_tokens)
            scale = 1.0 if flight.exact else prompt_tokens / max(flight.own_tokens, 1)
            if output_tokens is not None and 0 < output_tokens <= MOST_OUTPUT_TOKENS:
                flight.output_tokens, flight.generated_tokens = output_tokens / scale, output_tokens
                if under_way is None:
                    self._note_answer(flight, model)
            if cached_tokens is None or not 0 <= cached_tokens <= prompt_tokens:
                return
            self.engine_caches.reported(flight, cached_tokens, model.block_tokens)
            if flight.credit is not None and not flight.awaits_tokens:
                model.learn_cached(flight, int(cached_tokens / scale) // model.block_tokens)
            flight.learned_uncached_tokens = float(max(prompt_tokens - cached_tokens, 1))

    def finish(self, flight_id: int) -> None:
        """The answer is complete: release the flight and learn from it."""
        with self._lock:
            self._release(flight_id, self._clock())

    def fail(self, flight_id: int, kind: str) -> None:
        """The attempt ended without a complete answer.

        Args:
            flight_id: of the attempt.
            kind: `unreached` (no connection), `rejected` (the engine answered with an error), `timeout`, `disconnect`
                (the client left) or `invalid` (the request itself was refused). Without a first token the credit is
                taken back; the first three also speak against the replica.

        Raises:
            ValueError: an unknown kind.
        """
        if kind not in FAILURE_KINDS:
            raise ValueError(f"kind: expected one of {', '.join(sorted(FAILURE_KINDS))}, got {kind!r}")
        with self._lock:
            now = self._clock()
            flight = self._release(flight_id, now, kind)
            if flight is None:
                return
            if kind in FAULTS:
                self._health.failed(flight.slot, flight.dispatched_s, now)
            elif kind == "invalid":
                self._health.answered(flight.slot)
                self._silence.heard(flight.slot, now)

    def moved(self, flight_id: int, replica: str, failed: bool = True) -> None:
        """The gateway itself sent the flight to another replica: credit and load follow it there.

        Args:
            flight_id: of the attempt.
            replica: where it is now; the one where it was: it was tried anew there, and its times teach nothing.
            failed: the replica it left did not serve it, which speaks against it; not so when it was never asked.
        """
        with self._lock:
            flight, slot = self._known(flight_id), self._replicas.slot(replica)
            if flight is None or slot is None:
                return
            now = self._clock()
            flight.learned = True  # its times span two tries
            flight.tell_end(now, "unreached" if failed else "invalid")
            if slot == flight.slot:
                return
            if failed:
                self._health.failed(flight.slot, flight.dispatched_s, now)
            else:
                self._health.ended(flight.slot, flight_id)
            model = self._model(flight.model)
            if flight.credit is not None:
                model.index.revoke(flight.credit)
            if not flight.stream:
                self._silence.ended(flight.slot)
            self._flights.move(flight, slot, now)
            if not flight.stream:
                self._silence.asked(slot, flight.prefill_ends_s)
            self._health.dispatched(slot, flight_id, now)
            flight.credit = model.index.credit(slot, flight.hashes)
            flight.path_blocks, flight.answer_blocks = flight.credit.had_blocks, 0
            self.engine_caches.dispatched(flight)

    # What is known of the replicas

    def observe_rtt(self, name: str, rtt_s: float) -> None:
        """One measured round trip, in seconds."""
        with self._lock:
            slot = self._replicas.slot(name)
            if slot is not None:
                self._latency.observe(slot, rtt_s, self._clock())

    def observe_gauges(self, name: str, gauges: EngineGauges) -> None:
        """One reading of an engine's own gauges."""
        with self._lock:
            slot = self._replicas.slot(name)
            if slot is not None:
                self.engine_caches.told_size(slot, gauges, self._models.values())
                self._gauges.observe(slot, gauges, self.engine_caches.kv_tokens(slot), self._clock())

    def set_health(self, name: str, ok: bool) -> None:
        """A probe's verdict on a replica. Unhealthy ones are chosen only when nobody else is left."""
        with self._lock:
            slot = self._replicas.slot(name)
            if slot is not None:
                self._health.probed(slot, ok)

    def forget(self, name: str) -> None:
        """The replica was restarted: what it had cached is gone."""
        with self._lock:
            slot = self._replicas.slot(name)
            if slot is not None:
                self._counters["forgotten_caches"] += 1
                self.engine_caches.restarted(slot)
                for model in self._models.values():
                    model.index.forget(slot)

    def set_replicas(self, replicas: Sequence[ReplicaSettings]) -> None:
        """Replace the fleet. A replica whose name and url stay keeps its state; open flights end normally."""
        with self._lock:
            removed = self._replicas.replace(replicas, set(self._flights.open_per_slot()))
            self.engine_caches.remove(removed)
            for model in self._models.values():
                for slot in removed:
                    model.remove(slot)
                self.engine_caches.size(model)
            self.settings = self.settings.model_copy(update={"replicas": list(replicas)})

    def reconfigure(self, settings: Settings) -> None:
        """Put other settings into force. What was learned stays, but for a model whose prompts are now cut otherwise.

        Slow where a tokenizer has to be read, and not under the lock meanwhile.

        Raises:
            SettingsError: a tokenizer or chat template cannot be read; nothing has changed then.
        """
        same_prompts = built_from(settings) == built_from(self.settings)
        builder = self.builder if same_prompts else PromptBuilder(settings, secret=self._secret)
        with self._lock:
            old, self.settings, self.builder = self.settings, settings, builder
            self._policy = POLICIES[settings.policy]
            self._tuned = retuned(self._tuned, old, settings)
            self._views.weights = weights_in_force(settings, self._tuned)
            self._latency.settings, self._health.settings = settings.probe, settings.health
            if settings.flight_ttl_s != old.flight_ttl_s:
                self._attempts = TTLCache(MAX_REQUESTS, settings.flight_ttl_s, self._clock)
            for name, model in list(self._models.items()):
                model.rates.prior = settings.rates
                if settings.model_settings(name) != old.model_settings(name):
                    self._replicas.drop_table(self._models.pop(name))
            self.set_replicas(settings.replicas)

    def sweep(self) -> int:
        """Release flights older than `flight_ttl_s`, whoever lost sight of them, and let rates age.

        Returns how many flights.
        """
        with self._lock:
            now = self._clock()
            self._swept_s = now
            for model in self._models.values():
                model.rates.refit_old(now)
                model.decodes.refresh(now)
            lost = self._flights.opened_before(now - self.settings.flight_ttl_s)
            for flight_id in lost:
                self._release(flight_id, now, "lost")
            self._counters["swept_flights"] += len(lost)
            return len(lost)

    def snapshot(self) -> dict[str, Any]:
        """State as plain data: per replica round trip, health, flights, gauges, rates and index; weights; counters."""
        with self._lock:
            now = self._clock()
            self._flights.release_unstreamed(now)
            return {
                "version": 1,
                "policy": self._policy.name,
                "weights": dict(zip(("rtt", "queue"), self._views.weights, strict=True)),
                "tuning": None if self._tuned is None else self._tuned.describe(),
                **self._state.describe(now),
                "counters": dict(self._counters),
            }

    # The steps of a decision; the lock is held

    def _model(self, name: str) -> ModelState:
        with self._lock:
            model = self._models.get(name)
            if model is None:
                if len(self._models) >= MAX_MODELS:
                    unserved = (known for known, model in self._models.items() if not model.rates.known)
                    self._replicas.drop_table(self._models.pop(next(unserved, next(iter(self._models)))))
                model = ModelState(self._block_tokens(name), self._secret, self.settings.rates)
                self._replicas.add_table(model)
                self.engine_caches.size(model)
                self._models[name] = model
            self._models.move_to_end(name)
            return model

    def _block_tokens(self, model: str) -> int:
        return self.settings.model_settings(model).block_tokens or self.settings.block_tokens

    def _open(
        self,
        flight_id: int,
        request_id: str,
        prompt: Prompt,
        model: ModelState,
        hashes: bytes,
        found: Found,
        slot: int,
        view: View,
        row: int,
        now: float,
        observer: Observer | None,
    ) -> None:
        flight = Flight(
            flight_id=flight_id,
            request_id=request_id,
            slot=slot,
            model=prompt.model,
            stream=prompt.stream,
            exact=prompt.exact,
            dispatched_s=now,
            prompt_tokens=view.prompt_tokens,
            own_tokens=len(prompt),
            cached_tokens=view.cached_tokens.item(row),
            uncached_tokens=view.uncached_tokens.item(row),
            work_tokens=view.work_tokens.item(row),
            ahead_tokens=self._flights.ahead_tokens(slot, model.rates.slot_ms_per_token(slot), now),
            network_ms=view.network_ms.item(row),
            predicted_ms=view.ttft_ms(row),
            path_blocks=int(found.blocks[slot]),
            answer_blocks=found.answer_blocks(slot),
            rest=model.rest(prompt),
            hashes=hashes,
            credit=model.credit(slot, hashes, found),
            awaits_tokens=prompt.estimated_tokens > 0,
            cache_key=prompt.cache_key,
            observer=observer,
        )
        self._flights.open(flight)
        if not flight.stream:
            self._silence.asked(slot, flight.prefill_ends_s)
        continues = found.most_blocks * model.block_tokens > CONTINUES_FROM * len(prompt)
        self._arrivals.sent(slot, view.prefill_ms.item(row), now, continues)
        self.engine_caches.dispatched(flight)
        self._health.dispatched(slot, flight_id, now)

    # The end of a flight; the lock is held

    def _known(self, flight_id: int) -> Flight | None:
        flight = self._flights.get(flight_id)
        if flight is None:
            self._count_if_unknown(flight_id)
        return flight

    def _count_if_unknown(self, flight_id: int) -> None:
        """Of flights that have ended more may be heard; one that was never opened is a gateway's mistake."""
        self._counters["unknown_flights"] += not 0 < flight_id <= self._last_flight_id

    def _release(self, flight_id: int, now: float, failure: str | None = None) -> Flight | None:
        flight, answered = self._flights.close(flight_id, now), failure is None
        if flight is None:
            self._count_if_unknown(flight_id)
            return None
        model = self._model(flight.model)
        flight.tell_end(now, failure)
        if not flight.stream:
            self._silence.ended(flight.slot, now - flight.prefill_ends_s if answered else None)
        if answered:
            self._silence.heard(flight.slot, now)
            flight.answered_s = now
            self.engine_caches.answered(flight)
        flight.hashes = b""  # of a long prompt a megabyte, and needed no more
        if not flight.usage_seen:
            self._recent[flight_id] = flight
        self._health.ended(flight.slot, flight_id)
        if answered:
            self._health.answered(flight.slot)
            if self._replicas.name(flight.slot) is not None:
                model.learn_rate(flight)
        if flight.credit is not None:
            if not answered and flight.first_token_s is None:
                model.index.revoke(flight.credit)
            else:
                model.index.ended(flight.credit)
                self._note_answer(flight, model)
        return flight

    def _note_answer(self, flight: Flight, model: ModelState) -> None:
        if self._replicas.name(flight.slot) is not None:
            model.note_answer(flight)

    def _sweep_when_due(self, now: float) -> None:
        if not 0.0 <= now - self._swept_s < SWEEP_EVERY_S:
            self.sweep()
