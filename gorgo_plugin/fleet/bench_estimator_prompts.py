"""Prompts of `gorgo bench estimator`: conversations that share system prompts and grow, as token ids and as chats.

All are seeded: the same numbers give the same prompts in every process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

Ids = NDArray[np.uint32]

VOCABULARY = 150_000  # of the ids: the size of today's vocabularies
SYSTEM_PROMPTS = 8  # shared, each by every eighth conversation
SYSTEM_SHARE = 0.1  # of a conversation's tokens
TURN_TOKENS = 150  # an answer and the next question
HISTORY_TURNS = 30  # of a chat before its first measured request: what a long conversation re-sends
TURN_WORDS = (75, 35)  # of an answer and of a question; together about TURN_TOKENS

# What stands between two words, with its weight. Some words are joined, so that not every word is known to a tokenizer.
_GAPS = {" ": 84, ", ": 6, ". ": 4, "": 2, "_": 1, " (": 1, ") ": 1, "\n": 1}
_WORD = re.compile("Ġ[A-Za-z]{2,}")  # Ġ: how byte-level vocabularies write the space before a word


def conversation_ids(number: int, tokens: int, seed: int) -> Ids:
    """The token ids of conversation `number`, shape (tokens,); its earlier turns are prefixes of it."""
    shared = int(tokens * SYSTEM_SHARE)
    own = np.random.default_rng([seed, 1, number]).integers(0, VOCABULARY, tokens - shared, dtype=np.uint32)
    return np.concatenate([_system_ids(number % SYSTEM_PROMPTS, shared, seed), own])


@lru_cache(maxsize=4 * SYSTEM_PROMPTS)
def _system_ids(group: int, tokens: int, seed: int) -> Ids:
    return np.random.default_rng([seed, 0, group]).integers(0, VOCABULARY, tokens, dtype=np.uint32)


class Writer:
    """Writes text of a tokenizer's own words, the frequent ones often (Zipf's law)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take the words from the vocabulary, in its order, which is by frequency."""
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        found = sorted((number, token[1:]) for token, number in vocabulary.items() if _WORD.fullmatch(token))
        self._words = np.array([word for _, word in found], dtype=object)
        weights = 1.0 / np.arange(2, len(found) + 2)
        self._weights = weights / weights.sum()
        gaps = np.array(list(_GAPS.values()), dtype=np.float64)
        self._gaps, self._gap_weights = np.array(list(_GAPS), dtype=object), gaps / gaps.sum()

    def text(self, words: int, *key: int) -> str:
        """`words` words; equal keys give equal text."""
        rng = np.random.default_rng(key)
        chosen = self._words[rng.choice(len(self._words), words, p=self._weights)]
        gaps = self._gaps[rng.choice(len(self._gaps), words, p=self._gap_weights)]
        return "".join(chain.from_iterable(zip(chosen.tolist(), gaps.tolist(), strict=True)))


class Chat:
    """A chat whose request grows by an answer and a question with every turn."""

    def __init__(self, writer: Writer, number: int, words: int, seed: int, shared_system: bool = True) -> None:
        """A system prompt and `HISTORY_TURNS` turns, `words` words in all.

        Without `shared_system` nothing of it stands in any other chat.
        """
        self._write, self._number, self._seed = writer.text, number, seed
        shared = int(words * SYSTEM_SHARE)
        system = (0, number % SYSTEM_PROMPTS) if shared_system else (2, number)
        self.messages = [{"role": "system", "content": _shared_text(writer, shared, seed, *system)}]
        each = (words - shared) // (2 * HISTORY_TURNS)
        for turn in range(HISTORY_TURNS):
            self._add("user", each, turn)
            self._add("assistant", each, turn)
        self._add("user", TURN_WORDS[1], HISTORY_TURNS)
        self._turn = HISTORY_TURNS

    def _add(self, role: str, words: int, turn: int) -> None:
        key = (self._seed, 1, self._number, turn, int(role == "user"))
        self.messages.append({"role": role, "content": self._write(words, *key)})

    def grow(self) -> None:
        """The answer, and the next question."""
        self._add("assistant", TURN_WORDS[0], self._turn)
        self._turn += 1
        self._add("user", TURN_WORDS[1], self._turn)

    @property
    def body(self) -> bytes:
        """The request."""
        return chat_body(self.messages)


@lru_cache(maxsize=4 * SYSTEM_PROMPTS)
def _shared_text(writer: Writer, words: int, *key: int) -> str:
    return writer.text(words, *key)


def chat_body(messages: Sequence[dict[str, Any]]) -> bytes:
    """A streamed chat request, written as OpenAI's Python client does."""
    request = {"messages": messages, "model": "m", "stream": True}
    return json.dumps(request, ensure_ascii=False, separators=(",", ":")).encode()


def chatml(messages: Sequence[dict[str, Any]]) -> str:
    """The prompt of a chat in ChatML, with the header of the answer."""
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join([*turns, "<|im_start|>assistant\n"])
