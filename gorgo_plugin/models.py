"""What belongs to one model: its block hashes and index, its rates per replica, and how its tokens are counted."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Set
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gorgo_plugin.decision import Prompt
from gorgo_plugin.prefix import Answer, AnswerIndex, Credit, block_hasher
from gorgo_plugin.settings import RateSettings
from gorgo_plugin.signals import DecodeTable, Flight, RateTable, Sample, token_pairs
from gorgo_plugin.signals.columns import FloatArray

SCALE_WINDOW = 33  # ratios whose median is the scale: an odd few, so that images or hidden system prompts stay outliers
SCALE_STEP = 0.02  # a change below this is not worth re-sizing the index
ANSWER_WINDOW = 15  # reports that decide whether next turns hold the answers as they were generated; odd
MAX_SHRINK, MAX_GROWTH = 0.9, 1.25  # of a capacity, per report: one of them may mislead
MAX_CAPACITY = 4.0  # times what was told: bounds the index whatever engines report


_NOTHING: Mapping[int, int] = MappingProxyType({})


class Found(NamedTuple):
    """What the replicas hold of one prompt.

    Attributes:
        blocks: leading blocks of the prompt by slot, shape (replicas,); the answer before it is not counted.
        most_blocks: of them; as credit alone tells, where an engine's own word says otherwise.
        answers: by slot, of the replicas that gave the answer from which the prompt goes on: its blocks come on top.
        told: leading blocks by the engine's own word, by slot, where there is one.
        exact: slots for which that is all that counts.
    """

    blocks: FloatArray
    most_blocks: int
    answers: Mapping[int, Answer]
    told: Mapping[int, int] = _NOTHING
    exact: Set[int] = frozenset()

    def answer_blocks(self, slot: int) -> int:
        """Blocks of the answer that a replica gave right before this prompt; 0 where it gave none."""
        answer = self.answers.get(slot)
        return 0 if answer is None else answer.blocks


class ModelState:
    """The state of one model. Counts of an inexact prompt are multiplied by `scale`, engine tokens per own token."""

    def __init__(self, block_tokens: int, secret: bytes, prior: RateSettings) -> None:
        self.block_tokens = block_tokens
        self._block = np.array(float(block_tokens))  # NumPy takes 0.4 us longer with a number of Python's
        self.hasher = block_hasher(block_tokens, secret)
        self.index = AnswerIndex()
        self.rates = RateTable(prior)
        self.decodes = DecodeTable()
        self.scale = 1.0
        self._ratios: deque[float] = deque(maxlen=SCALE_WINDOW)
        self._answers_kept: deque[bool] = deque(maxlen=ANSWER_WINDOW)
        self._kv_tokens: dict[int, int] = {}
        self._sized_for = 1.0

    def grow(self, rows: int) -> None:
        """Lengthen the tables to `rows` rows."""
        self.rates.grow(rows)
        self.decodes.grow(rows)

    def reset(self, slot: int) -> None:
        """Forget all about one replica."""
        self.rates.reset(slot)
        self.decodes.reset(slot)
        self.remove(slot)

    def set_capacity(self, slot: int, kv_tokens: int) -> None:
        """Let the index believe that a replica keeps `kv_tokens` engine tokens, until its reports show otherwise."""
        if self._kv_tokens.get(slot) == kv_tokens:
            return
        self._kv_tokens[slot] = kv_tokens
        self.index.set_capacity(slot, self._blocks(kv_tokens))

    def remove(self, slot: int) -> None:
        """The replica has left the fleet."""
        self._kv_tokens.pop(slot, None)
        self.index.remove(slot)

    def hashes(self, prompt: Prompt) -> bytes:
        """Hashes of the prompt's full blocks."""
        if prompt.blocks is not None and prompt.blocks.hasher is self.hasher:
            return prompt.blocks.hashes
        return self.hasher.hashes(prompt.tokens, prompt.cache_key)

    def rest(self, prompt: Prompt) -> NDArray[np.uint32]:
        """The token ids behind a prompt's last full block."""
        return prompt.tokens[len(prompt.tokens) // self.block_tokens * self.block_tokens :].copy()

    def look_up(self, tokens: NDArray[np.uint32], hashes: bytes, replicas: int) -> Found:
        """Find a prompt in the index: its tokens, shape (n,), and the hashes of its full blocks."""
        index, walk = self.index, self.index.walk(hashes)
        answers = index.answers_before(hashes, walk, partial(self.hasher.tail, tokens)) if index.has_answers else {}
        return Found(index.spread(walk, replicas), walk[-1][1] if walk else 0, answers)

    def cached_tokens(self, found: Found, own_tokens: int, scale: float) -> FloatArray:
        """Engine tokens that what each replica holds saves a prompt, shape (replicas,): never its last token.

        `held` are leading blocks, of the same shape. vLLM and SGLang compute the last token of every prompt anew.
        """
        blocks = found.blocks
        if found.answers or found.exact or found.told:
            blocks = blocks.copy()
            for slot, answer in found.answers.items() if self.keeps_answers else ():
                blocks[slot] += answer.blocks
            for slot in found.exact:
                blocks[slot] = 0
            for slot, told in found.told.items():
                blocks[slot] = max(blocks[slot], told)
        most = max(own_tokens - 1, 0) // self.block_tokens
        if blocks is not found.blocks or own_tokens % self.block_tokens == 0:  # else what was found is never more
            blocks = np.minimum(blocks, most)
        cached: FloatArray = blocks * self._block
        if scale != 1.0:
            cached *= scale
        return cached

    @property
    def keeps_answers(self) -> bool:
        """Whether the last reports found the blocks of answers again: a template may drop reasoning from a chat."""
        return 2 * sum(self._answers_kept) >= len(self._answers_kept)

    def credit(self, slot: int, hashes: bytes, found: Found) -> Credit:
        """Note that a prompt is about to be at a replica, and what it shows of the answers before it."""
        return self.index.credit_after(slot, hashes, found.answers.values() if self.keeps_answers else ())

    def answered(self, credit: Credit, rest: NDArray[np.uint32], output_tokens: float) -> None:
        """Note what an answer of `output_tokens` own tokens adds behind its prompt, whose last tokens are `rest`."""
        # The last token is never fed back, so an engine has no key and value of it.
        blocks = int(len(rest) + output_tokens - 1) // self.block_tokens
        if blocks > 0:
            self.index.answered(credit, blocks, self.hasher.tail(rest, 0, len(rest)), len(rest))

    def note_answer(self, flight: Flight) -> None:
        """Take in an answer whose length is known: what it adds behind its prompt, and how fast it was decoded."""
        if flight.output_tokens is None:
            return
        if flight.credit is not None:
            self.answered(flight.credit, flight.rest, flight.output_tokens)
        if flight.answered_s is not None and flight.first_token_s is not None:
            times = flight.first_token_s, flight.answered_s
            self.decodes.observe(flight.slot, flight.decoding, *times, flight.generated_tokens)

    def learn_rate(self, flight: Flight) -> None:
        """Learn from the first token of a streamed answer; of the others it was not seen."""
        if flight.learned or flight.first_token_s is None:
            return
        flight.learned = True
        own = flight.learned_uncached_tokens
        if own is None and flight.awaits_tokens:
            return
        own = flight.uncached_tokens if own is None else own
        pairs = token_pairs(max(flight.prompt_tokens, own), own)
        service_ms = (flight.first_token_s - flight.dispatched_s) * 1000.0 - flight.network_ms
        self.rates.observe(flight.slot, Sample(flight.ahead_tokens, own, pairs, service_ms, flight.first_token_s))

    def scale_of(self, prompt: Prompt) -> float:
        """What a prompt's own count is multiplied by."""
        return 1.0 if prompt.exact else self.scale

    def recredit(self, slot: int, before: Credit | None, prompt: Prompt, hashes: bytes) -> tuple[Credit, float]:
        """Credit a replica with a whole prompt instead of what was known of it `before`.

        Returns (credit, engine tokens of the prompt that the replica had).
        """
        if before is not None:
            self.index.revoke(before)  # or the prompt's own blocks would count as cached
        credit = self.index.credit(slot, hashes)
        had = min(credit.had_blocks, max(len(prompt) - 1, 0) // self.block_tokens) * self.block_tokens
        return credit, had * self.scale_of(prompt)

    def learn_scale(self, own_tokens: int, engine_tokens: int) -> None:
        """Take in how many tokens the engine counted for a prompt counted here with another tokenizer."""
        if own_tokens <= 0 or engine_tokens <= 0:
            return
        self._ratios.append(engine_tokens / own_tokens)
        self.restore_scale(statistics.median(self._ratios))

    def restore_scale(self, scale: float) -> None:
        """Set the scale, and size the index by it."""
        self.scale = scale
        if abs(scale / self._sized_for - 1.0) > SCALE_STEP:
            self._sized_for = scale
            for slot, kv_tokens in self._kv_tokens.items():
                self.index.set_capacity(slot, self._blocks(kv_tokens))

    def learn_cached(self, flight: Flight, reported_blocks: int) -> None:
        """Compare what the engine found cached with what was believed, and let the index follow it.

        Less: the engine evicted that and all that is older, so it holds no more than what is newer. More: it kept what
        was thought evicted, so it holds at least all that was used since. One block is tolerated, and of a prompt that
        is not exact a tenth besides, because its scale is a mean.
        """
        credit, path = flight.credit, min(flight.path_blocks, max(flight.own_tokens - 1, 0) // self.block_tokens)
        if credit is None:
            return
        tolerated = 1 + (0 if flight.exact else path // 10)
        if path - reported_blocks > tolerated:
            if self.index.correct(credit, reported_blocks):
                self._resize(credit.replica, self.index.held_blocks(credit.replica))
            return
        if flight.answer_blocks > 1:  # a shortfall of these alone may be the template's doing, and evicts nothing
            self._answers_kept.append(reported_blocks - path > flight.answer_blocks // 2)
        elif reported_blocks - path > tolerated:
            needed = self.index.would_keep(credit)
            if needed > self.index.capacity(credit.replica):
                self._resize(credit.replica, needed)

    def _resize(self, slot: int, blocks: int) -> None:
        capacity = self.index.capacity(slot)
        least, most = int(capacity * MAX_SHRINK), min(capacity * MAX_GROWTH, self._told(slot) * MAX_CAPACITY)
        self.index.set_capacity(slot, max(min(max(blocks, least), int(most)), 1))

    def _told(self, slot: int) -> int:
        return self._blocks(self._kv_tokens[slot])

    def _blocks(self, kv_tokens: int) -> int:
        return max(int(kv_tokens / (self.block_tokens * self._sized_for)), 1)
