"""Little text, word by word: ids of words seen before are remembered, so a new message mostly needs no tokenizer."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

_LETTERS = frozenset(string.ascii_letters)
_VISIBLE = frozenset(string.ascii_letters + string.digits + string.punctuation)
_LINE = r"(?<=\n)(?=[A-Za-z])"
WORD_CHARS = 32  # longer ones hardly come again
WORDS = 32_768  # per generation; nearly all words of a language's texts, about 6 MB
NEW_WORDS = 64  # tokenized one by one in one text, 10 us each; where there are more, the rest is tokenized whole


class Words:
    """Tokenizes text cut in front of every space between a visible ASCII character and a letter. Thread-safe.

    Right only for vocabularies whose `cuts_spaces` holds. Words are known by their hash: no text is kept. The table is
    two generations of words; when the younger is full it becomes the older, and what was not used since is dropped.
    """

    def __init__(
        self, encode: Callable[[str], Sequence[int]], lines: bool = False, specials: Sequence[str] = ()
    ) -> None:
        """Start with an empty table.

        Args:
            encode: the tokenizer, without special tokens of its own adding.
            lines: whether text may also be cut between a newline and a letter.
            specials: tokens in front of which it may be cut as well.
        """
        self._encode = encode
        cuts = [_LINE] * lines + [f"(?={re.escape(token)})" for token in specials]
        self._cuts = re.compile("|".join(cuts)) if cuts else None
        # By the hash of a word with a space before it that may be cut at both its ends; of any other piece by `_key`.
        self._young: dict[int, bytes] = {}
        self._old: dict[int, bytes] = {}

    def ids(self, text: str) -> NDArray[np.uint32]:
        """Token ids of `text`, shape (n,), read-only."""
        words = text.split(" ")
        known = [*map(self._young.get, map(hash, words))]  # without a loop in Python: most words are known
        known[0] = None  # it has no space before it
        found: list[bytes | None] = []
        start, new = 0, NEW_WORDS
        for at in [at for at, ids in enumerate(known) if ids is None]:
            if at < start:
                continue
            low, high = _piece_around(at, words, start)
            found += known[start:low]
            pieces = self._cut(_text(words, low, high))
            ids = [self._known(piece) for piece in pieces]
            new -= ids.count(None)
            if new < 0:
                start = len(words)
                found.append(self._tokenized(_text(words, low, start)))
                break
            found += [self._learned(piece) if one is None else one for piece, one in zip(pieces, ids, strict=True)]
            start = high
        found += known[start:]
        return np.frombuffer(b"".join(found), dtype=np.uint32)  # type: ignore[arg-type]  # no None is left

    def _cut(self, text: str) -> list[str]:
        return [text] if self._cuts is None else [piece for piece in self._cuts.split(text) if piece]

    def _known(self, piece: str) -> bytes | None:
        key = _key(piece)
        ids = self._young.get(key)
        if ids is None and (ids := self._old.get(key)) is not None:
            self._remember(key, ids)
        return ids

    def _learned(self, piece: str) -> bytes:
        ids = self._tokenized(piece)
        if len(piece) <= WORD_CHARS:
            self._remember(_key(piece), ids)
        return ids

    def _tokenized(self, text: str) -> bytes:
        return np.array(self._encode(text), dtype=np.uint32).tobytes()

    def _remember(self, key: int, ids: bytes) -> None:
        if len(self._young) >= WORDS:
            self._young, self._old = {}, self._young
        self._young[key] = ids


def _piece_around(at: int, words: Sequence[str], start: int) -> tuple[int, int]:
    """(first, past the last) of the words that belong together with `words[at]`, the first no earlier than `start`."""
    low, high = at, at + 1
    while low > start and not _parts(words[low - 1], words[low]):
        low -= 1
    while high < len(words) and not _parts(words[high - 1], words[high]):
        high += 1
    return low, high


def _parts(left: str, right: str) -> bool:
    """Whether text may be cut in front of the space between two words."""
    return right[:1] in _LETTERS and left[-1:] in _VISIBLE


def _key(piece: str) -> int:
    if piece[:1] != " ":
        return hash((piece,))
    word = piece[1:]
    whole = word[:1] in _LETTERS and word[-1:] in _VISIBLE and " " not in word
    return hash(word if whole else piece)


def _text(words: Sequence[str], low: int, high: int) -> str:
    return " " * (low > 0) + " ".join(words[low:high])
