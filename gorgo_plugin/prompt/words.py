"""Little text, word by word: ids of words seen before are remembered, so a new message mostly needs no tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

_CUT = re.compile(r"(?<=[!-~])(?= [A-Za-z])")
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
        self._young: dict[int, bytes] = {}
        self._old: dict[int, bytes] = {}

    def ids(self, text: str) -> NDArray[np.uint32]:
        """Token ids of `text`, shape (n,), read-only."""
        found: list[bytes] = []
        words = _CUT.split(text)
        unknown = 0
        for number, word in enumerate(words):
            key = hash(word)
            ids = self._young.get(key)
            if ids is None:
                ids = self._old.get(key)
                if ids is None:
                    if unknown == NEW_WORDS:
                        found.append(self._tokenized("".join(words[number:])))
                        break
                    unknown += 1
                    ids = self._tokenized(word)
                if len(word) <= WORD_CHARS:
                    self._remember(key, ids)
            found.append(ids)
        return np.frombuffer(b"".join(found), dtype=np.uint32)

    def _tokenized(self, text: str) -> bytes:
        return np.array(self._encode(text), dtype=np.uint32).tobytes()

    def _remember(self, key: int, ids: bytes) -> None:
        if len(self._young) >= WORDS:
            self._young, self._old = {}, self._young
        self._young[key] = ids
