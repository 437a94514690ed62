"""What belongs to one model: its block hashes and index, its rates per replica, and how its tokens are counted."""

from __future__ import annotations

import statistics
from collections import deque

import numpy as np

from gorgo_plugin.decision import Prompt
from gorgo_plugin.prefix import Credit, PrefixIndex, block_hasher
from gorgo_plugin.settings import RateSettings
from gorgo_plugin.signals import RateTable
from gorgo_plugin.signals.columns import FloatArray

SCALE_WINDOW = 33  # ratios whose median is the scale: an odd few, so that images or hidden system prompts stay outliers
SCALE_STEP = 0.02  # a change below this is not worth re-sizing the index


class ModelState:
    """The state of one model. Counts of an inexact prompt are multiplied by `scale`, engine tokens per own token."""

    def __init__(self, block_tokens: int, secret: bytes, prior: RateSettings) -> None:
        self.block_tokens = block_tokens
        self.hasher = block_hasher(block_tokens, secret)
        self.index = PrefixIndex()
        self.rates = RateTable(prior)
        self.scale = 1.0
        self._ratios: deque[float] = deque(maxlen=SCALE_WINDOW)
        self._kv_tokens: dict[int, int] = {}
        self._sized_for = 1.0

    def grow(self, rows: int) -> None:
        """Lengthen the tables to `rows` rows."""
        self.rates.grow(rows)

    def reset(self, slot: int) -> None:
        """Forget all about one replica."""
        self.rates.reset(slot)
        self.index.remove(slot)

    def set_capacity(self, slot: int, kv_tokens: int) -> None:
        """Let the index believe that a replica keeps `kv_tokens` engine tokens."""
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

    def cached_tokens(self, hashes: bytes, own_tokens: int, scale: float, replicas: int) -> FloatArray:
        """Engine tokens that what each replica holds saves a prompt, shape (replicas,): never its last token.

        vLLM and SGLang compute the last token of every prompt anew.
        """
        blocks = np.minimum(self.index.blocks(hashes, replicas), max(own_tokens - 1, 0) // self.block_tokens)
        blocks *= self.block_tokens * scale
        return blocks

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

    def correct(self, credit: Credit, estimated_tokens: float, reported_tokens: int, scale: float, exact: bool) -> int:
        """Compare what the engine found cached with the estimate; returns the blocks forgotten.

        One block is tolerated, for an exact prompt; with a scaled count a tenth besides, because the scale is a mean.
        """
        tolerated = self.block_tokens * scale + (0.0 if exact else 0.1 * estimated_tokens)
        if estimated_tokens - reported_tokens <= tolerated:
            return 0
        return self.index.correct(credit, int(reported_tokens / scale) // self.block_tokens)

    def _blocks(self, kv_tokens: int) -> int:
        return max(int(kv_tokens / (self.block_tokens * self._sized_for)), 1)
