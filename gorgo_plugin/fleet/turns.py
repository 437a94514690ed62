"""Turns of generated sessions as requests of a replay: token ids and block keys without any text.

All prompts of a workload are paths in one tree of token runs, and no token id occurs twice in it. An id therefore names
the whole path that leads to it: prompts have equal ids where, and only where, they share their beginning, and the id
that ends a block is the key of that block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from gorgo_plugin.fleet.requests import ReplayRequest

# What an answer takes at most on an engine that is busy and not overloaded: no session goes on before it is there.
_FAR_S = 0.5  # a round trip around the world
_MS_PER_PROMPT_TOKEN = 0.1  # as slow as the paper's engines prefill
_MS_PER_OUTPUT_TOKEN = 30.0  # a well filled batch


@dataclass(frozen=True, slots=True)
class Prefix:
    """The beginning of a prompt: a run of `own_tokens` tokens, ids from `first_id` on, behind another beginning.

    `tokens` counts the whole.
    """

    before: Prefix | None
    first_id: int
    own_tokens: int
    tokens: int

    def ids(self) -> NDArray[np.uint32]:
        """The token ids from the start of the prompt, shape (tokens,)."""
        ids = np.empty(self.tokens, dtype=np.uint32)
        run: Prefix | None = self
        while run is not None:
            ids[run.tokens - run.own_tokens : run.tokens] = np.arange(
                run.first_id, run.first_id + run.own_tokens, dtype=np.uint32
            )
            run = run.before
        return ids

    def block_keys(self, block_tokens: int) -> list[int]:
        """Keys of the full blocks: equal where, and only where, everything up to their end is."""
        keys: list[int] = self.ids()[block_tokens - 1 :: block_tokens].tolist()
        return keys


class TokenTree:
    """Hands out runs of tokens, each id once."""

    def __init__(self) -> None:
        self._next_id = 0

    def grow(self, before: Prefix | None, tokens: int) -> Prefix:
        """`before` (None: nothing) and `tokens` new tokens behind it."""
        first = self._next_id
        self._next_id += tokens
        return Prefix(before, first, tokens, tokens + (before.tokens if before is not None else 0))


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session.

    Attributes:
        at_s: arrival, seconds from the start of the workload.
        session: whose it is.
        history: answers that the prompt holds.
        prompt: the prompt.
        whole: prompt and answer.
    """

    at_s: float
    session: str
    history: int
    prompt: Prefix
    whole: Prefix

    @property
    def output_tokens(self) -> int:
        """Tokens of the answer."""
        return self.whole.tokens - self.prompt.tokens

    @property
    def answered_s(self) -> float:
        """When the client holds the answer at the latest, unless its engine is overloaded."""
        return self.at_s + answer_s(self.prompt.tokens, self.output_tokens)


def answer_s(prompt_tokens: int, output_tokens: int) -> float:
    """Seconds within which a request is answered, even if nothing of its prompt is cached."""
    return _FAR_S + (prompt_tokens * _MS_PER_PROMPT_TOKEN + output_tokens * _MS_PER_OUTPUT_TOKEN) / 1e3


def turn_requests(turns: Iterable[Turn], block_tokens: int) -> list[ReplayRequest]:
    """The turns in order of arrival, as requests; tokens and block keys are made when asked for."""
    return [
        ReplayRequest(
            turn.at_s,
            turn.prompt.tokens,
            turn.output_tokens,
            turn.whole.ids,
            partial(turn.whole.block_keys, block_tokens),
            session=turn.session,
        )
        for turn in sorted(turns, key=lambda turn: turn.at_s)
    ]
