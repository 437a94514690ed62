"""What a policy sees of the candidates, worked out from what is known of them."""

from __future__ import annotations

import random
from dataclasses import dataclass

from gorgo_plugin.decision import Prompt
from gorgo_plugin.models import Found, ModelState
from gorgo_plugin.policies import View
from gorgo_plugin.policies.base import WAITING_SHARE, blocking_ms, decode_ms, next_turn_ms
from gorgo_plugin.replicas import Candidates
from gorgo_plugin.signals import Arrivals, Flights, GaugeTable, LatencyTable, Silence
from gorgo_plugin.signals.columns import FloatArray, Rows


@dataclass(slots=True)
class Views:
    """The tables that views are made from, and the weights that go with them: (W_rtt, W_queue)."""

    latency: LatencyTable
    flights: Flights
    arrivals: Arrivals
    gauges: GaugeTable
    silence: Silence
    weights: tuple[float, float]

    def view(
        self, prompt: Prompt, model: ModelState, found: Found, among: Candidates, now: float, rng: random.Random
    ) -> View:
        """The candidates as they are `now`, for a prompt of which `found` is cached."""
        flights, gauges, rows = self.flights, self.gauges, among.rows
        flights.release_unstreamed(now)
        scale = model.scale_of(prompt)
        tokens = len(prompt) * scale
        cached = model.cached_tokens(found, len(prompt), scale)[rows]
        uncached = tokens - cached
        ms_per_token = model.rates.ms_per_token(rows)
        network_ms, doubt_ms = self.latency.price_ms(rows, now)
        work = model.rates.work_tokens(rows, tokens, uncached)
        prefill_ms = ms_per_token * work
        prefill_ms += model.rates.overhead_ms(rows)
        queue_ms = flights.backlog_ms(rows, ms_per_token, now)
        late_ms = self.silence.late_ms(rows, now)
        if late_ms is not None:
            queue_ms += late_ms
        decoding = flights.column("decoding", rows)
        arrivals, busy = self.arrivals.lately(rows, now, WAITING_SHARE)
        return View(
            names=among.names,
            network_ms=network_ms,
            doubt_ms=doubt_ms,
            queue_ms=queue_ms,
            prefill_ms=prefill_ms,
            blocking_ms=blocking_ms(prefill_ms, queue_ms, arrivals, decoding, busy / len(among.names)),
            next_turn_ms=next_turn_ms(network_ms, prefill_ms, self.arrivals.continued),
            decode_ms=self._decode_ms(prompt, model, rows, decoding),
            cached_tokens=cached,
            uncached_tokens=uncached,
            work_tokens=work,
            prompt_tokens=tokens,
            load=lambda name: flights.column(name, rows),
            gauge=lambda name: gauges.column(name, rows),
            affinity=prompt.affinity,
            weights=self.weights,
            rng=rng,
        )

    def _decode_ms(self, prompt: Prompt, model: ModelState, rows: Rows, decoding: FloatArray) -> FloatArray | None:
        decodes, most = model.decodes, prompt.max_output_tokens
        if not decodes.output_tokens:
            return None
        tokens = decodes.output_tokens if most is None else min(decodes.output_tokens, most)
        return decode_ms(decodes.base_ms(rows), decodes.per_request_ms(rows), decoding, tokens)
