"""Where a text is cut, so that each part of it is tokenized once.

Every cut depends on what stands before it alone: a text that grows keeps its cuts. Which cuts a tokenizer allows, and
why, is for `vocabulary` to say.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

PIECE_CHARS = 256  # shorter pieces cost more to look up than to tokenize, and could fill the cache with next to nothing
LONG_CHARS = 2048  # about 500 tokens, 1 ms: what a prompt that grew has to tokenize again
CHUNK_CHARS = 8192  # a known prompt of 20,000 tokens takes a dozen look-ups then, and the rest of one some more
_SPACE = re.compile(r"[!-~] [A-Za-z]")


def cut_text(text: str, cuts: Sequence[str], spaces: bool = False, piece_chars: int = PIECE_CHARS) -> list[str]:
    """Cut text in front of `cuts`, into pieces of at least `piece_chars` (the last may be shorter).

    With `spaces`, pieces longer than `LONG_CHARS` are also cut between words, so that text without special tokens is
    remembered up to where it grew.
    """
    pieces: list[str] = []
    start = 0
    for at in (*_places(text, cuts), len(text)):
        if at - start >= piece_chars or start < at == len(text):
            between = _between_words(text, start, at, LONG_CHARS) if spaces else ()
            pieces += (text[begin:end] for begin, end in pairwise((start, *between, at)))
            start = at
    return pieces


def chunk_spans(text: str, cuts: Sequence[str], spaces: bool = False) -> list[tuple[int, int]]:
    """(start, end) of chunks of `text` cut in front of `cuts`, of at least `CHUNK_CHARS` (the last may be shorter).

    A message longer than that begins a chunk, and is with `spaces` cut between words, so that a long document is cut
    the same whatever stands before it.
    """
    starts = [0]
    for at, end in pairwise((0, *_places(text, cuts), len(text))):
        long = end - at > CHUNK_CHARS
        if at > starts[-1] and (long or at - starts[-1] >= CHUNK_CHARS):
            starts.append(at)
        if long and spaces:
            starts += _between_words(text, at, end, CHUNK_CHARS)
    return list(pairwise((*starts, len(text))))


def _places(text: str, cuts: Sequence[str]) -> list[int]:
    return sorted(place for cut in cuts for place in _occurrences(text, cut))


def _between_words(text: str, start: int, end: int, long_chars: int) -> list[int]:
    places: list[int] = []
    at = start
    while end - at > long_chars and (space := _SPACE.search(text, at + long_chars, end)):
        at = space.start() + 1
        places.append(at)
    return places


def _occurrences(text: str, token: str) -> list[int]:
    """Where `token` begins in `text`, without overlaps."""
    found: list[int] = []
    step = len(token)
    at = text.find(token)
    while at >= 0:
        found.append(at)
        at = text.find(token, at + step)
    return found
