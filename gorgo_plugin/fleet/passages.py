"""Deterministic text: a passage is named by a key, and equal keys give equal words, in every process and version."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# 256 common English words: one byte picks one. Each, with the space before it, is a single token of the embedded
# tokenizer and of the usual byte-pair vocabularies, so that a word counts as a token.
WORDS: tuple[str, ...] = tuple(
    """
    the of and to in is that for it as was with be by on not he but at are this have from or had an they which one
    you were all she there would their we been has when who will no more if out so up said what its about than into
    them can only other time new some could these two may first then do any like my now over such our man me even
    most made after also did many off before must well back through years much where your way down should because
    long each just state those too how little world good make very year still see own work day get here old between
    both being under three never know same last another while us might against came take go come since right use
    place during without high however small around found part once general upon every say hand number power point
    left set fact though early group need head full local order later large force case given past white thing second
    area best four word body side half until means family table rest called next big far free whole idea line almost
    end really always turn able less human field soon across true done want look find tell ask seem try leave call
    keep let run move write provide include continue change follow stop create read allow add open value name system
    example result common certain whether public simple single complete either future limit report issue problem
    answer question
    """.split()  # noqa: SIM905 (256 quoted words would fill a page)
)


@dataclass(frozen=True, slots=True)
class Passage:
    """`words` words of the endless text that `key` names; a shorter passage of the same key is a prefix of it."""

    key: str
    words: int

    @property
    def text(self) -> str:
        """The words, separated by spaces."""
        return _text(self.key, self.words)

    @property
    def ids(self) -> NDArray[np.uint32]:
        """One number per word, shape (words,): token ids of a tokenizer whose tokens are words."""
        return np.frombuffer(_digest(self.key, self.words), dtype=np.uint8).astype(np.uint32)


def reply_passage(last_user_text: str, words: int) -> Passage:
    """What a mock engine answers: a function of the last user text, so that a recorded conversation can hold it."""
    return Passage("reply/" + hashlib.blake2b(last_user_text.encode(), digest_size=16).hexdigest(), words)


def _digest(key: str, words: int) -> bytes:
    return hashlib.shake_128(key.encode()).digest(words)  # an extendable output: a longer one continues a shorter one


@lru_cache(maxsize=16_384)  # about 50 MB of blocks of 512 words; a conversation repeats its passages every turn
def _text(key: str, words: int) -> str:
    return " ".join([WORDS[byte] for byte in _digest(key, words)])
