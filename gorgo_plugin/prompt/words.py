"""Little text, word by word: ids of words seen before are remembered, so a new message mostly needs no tokenizer."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

_LETTERS = frozenset(string.ascii_letters)
_VISIBLE = frozenset(string.ascii_letters + string.digits + string.punctuation)
WORD_CHARS = 32  # longer ones hardly come again
WORDS = 32_768  # per generation; nearly all words of a language's texts, about 6 MB
NEW_WORDS = 64  # tokenized one by one in one text, 10 us each; after these its rest is tokenized whole


class Words:
    """Tokenizes text cut in front of every space between a visible ASCII character and a letter. Thread-safe.

    Right only for vocabularies whose `cuts_spaces` holds. Words are known by their hash: no text is kept. The table is
    two generations of words; when the younger is full it becomes the older, and what was not used since is dropped.
    """

    def __init__(self, encode: Callable[[str], Sequence[int]]) -> None:
        """`encode` is the tokenizer, without special tokens of its own adding."""
        self._encode = encode
        # By the hash of a word that may be cut at both its ends; of any other piece, with the space it begins with.
        self._young: dict[int, bytes] = {}
        self._old: dict[int, bytes] = {}

    def ids(self, text: str) -> NDArray[np.uint32]:
        """Token ids of `text`, shape (n,), read-only."""
        words = text.split(" ")
        known = [*map(self._young.get, map(hash, words))]  # without a loop in Python: most words are known
        known[0] = None  # it has no space before it
        found: list[bytes | None] = []
        start = unknown = 0
        for at in [at for at, ids in enumerate(known) if ids is None]:
            if at < start:
                continue
            low, high = _piece_around(at, words, start)
            found += known[start:low]
            key, piece = _named(words, low, high)
            ids = self._young.get(key) or self._old.get(key)
            if ids is None and unknown == NEW_WORDS:
                start = len(words)
                found.append(self._tokenized(_text(words, low, start)))
                break
            if ids is None:
                unknown += 1
                ids = self._tokenized(piece)
            if len(piece) <= WORD_CHARS:
                self._remember(key, ids)
            found.append(ids)
            start = high
        found += known[start:]
        return np.frombuffer(b"".join(found), dtype=np.uint32)  # type: ignore[arg-type]  # no None is left

    def _tokenized(self, text: str) -> bytes:
        return np.array(self._encode(text), dtype=np.uint32).tobytes()

    def _remember(self, key: int, ids: bytes) -> None:
        if len(self._young) >= WORDS:
            self._young, self._old = {}, self._young
        self._young[key] = ids


def _piece_around(at: int, words: Sequence[str], start: int) -> tuple[int, int]:
    """(first, past the last) of the words that belong together with `words[at]`, the first no earlier than `start`."""
    low, high = at, at + 1
    while low > start and not _cuts(words[low - 1], words[low]):
        low -= 1
    while high < len(words) and not _cuts(words[high - 1], words[high]):
        high += 1
    return low, high


def _cuts(left: str, right: str) -> bool:
    """Whether text may be cut between two words."""
    return right[:1] in _LETTERS and left[-1:] in _VISIBLE


def _named(words: Sequence[str], low: int, high: int) -> tuple[int, str]:
    """(key, text) of a piece."""
    text, word = _text(words, low, high), words[low]
    if not low:
        return hash((text,)), text
    whole = high == low + 1 and word[:1] in _LETTERS and word[-1:] in _VISIBLE
    return hash(word if whole else text), text


def _text(words: Sequence[str], low: int, high: int) -> str:
    return " " * (low > 0) + " ".join(words[low:high])
