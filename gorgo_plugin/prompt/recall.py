"""Text to token ids by way of what was tokenized before, so that a prompt that grew costs only what is new.

Text is remembered in two sizes: in chunks, so that a long known prompt takes few look-ups, and in pieces of about a
message, so that what follows the last whole chunk, or differs in one, is not tokenized anew.

A conversation comes as the pieces that its template printed. Where one begins with a token that cuts, so does a turn;
turns that are known are neither joined nor searched, which for a long prompt would take longer than all the rest.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, compress, repeat
from typing import NamedTuple

import numpy as np

from gorgo_plugin.prompt.cache import Key, SegmentCache
from gorgo_plugin.prompt.cuts import CHUNK_CHARS, LONG_CHARS, PIECE_CHARS
from gorgo_plugin.prompt.model import PromptModel
from gorgo_plugin.prompt.vocabulary import Ids, Vocabulary, read_only

EMPTY: Ids = read_only(np.empty(0, dtype=np.uint32))

# Text that may grow at its end, text in the pieces a template printed, or the ids of what is no text.
Stretch = str | list[str] | Ids


class _Part(NamedTuple):
    """Text that is tokenized by itself: the strings it is made of, and what it is remembered under."""

    key: Key
    strings: tuple[str, ...]


@dataclass(slots=True)
class _Chunk:
    """Text that is not remembered as a whole.

    Attributes:
        key: what to remember it under; None for the last of a stretch, which may still grow.
        pieces: what it is made of.
        ids: of each piece, None where unknown.
    """

    key: Key | None
    pieces: list[_Part]
    ids: list[Ids | None]

    def filled(self, fresh: Mapping[Key, Ids]) -> list[Ids]:
        """The ids of each piece, those of unknown ones out of `fresh`."""
        return [fresh[piece.key] if ids is None else ids for piece, ids in zip(self.pieces, self.ids, strict=True)]

    def cold(self) -> Iterator[tuple[Key, str]]:
        """(key, text) of the pieces to be tokenized."""
        for piece, ids in zip(self.pieces, self.ids, strict=True):
            if ids is None:
                yield piece.key, "".join(piece.strings)


class Recalled:
    """A prompt half prepared: what was seen before is looked up, the rest waits to be tokenized.

    Attributes:
        cold_chars: characters still to be tokenized; 0: all were seen.
    """

    __slots__ = ("_cache", "_cold", "_parts", "_vocabulary", "cold_chars")

    def __init__(self, parts: Sequence[Ids | _Chunk], vocabulary: Vocabulary, cache: SegmentCache) -> None:
        self._parts = parts
        self._vocabulary = vocabulary
        self._cache = cache
        self._cold = dict(chain.from_iterable(part.cold() for part in parts if isinstance(part, _Chunk)))
        self.cold_chars = sum(map(len, self._cold.values()))

    def ids(self) -> Ids:
        """The ids of the whole; what is missing is tokenized, without the GIL where it is much, and remembered."""
        cold = self._cold
        fresh = dict(zip(cold, self._vocabulary.encode(list(cold.values())), strict=True)) if cold else {}
        remembered = list(fresh.items())
        ids: list[Ids] = []
        for part in self._parts:
            if not isinstance(part, _Chunk):
                ids.append(part)
                continue
            pieces = part.filled(fresh)
            if part.key is not None and part.ids[0] is not None:  # not at first sight: it may never come again
                remembered.append((part.key, joined_ids(pieces)))
            ids += pieces
        self._cache.put_many(remembered)
        return joined_ids(ids)


class GoneOn:
    """A prompt that goes on from known ids with a little text, which is not looked up: it was hardly seen before."""

    __slots__ = ("_known", "_text", "_vocabulary", "cold_chars")

    def __init__(self, known: Ids, text: str, vocabulary: Vocabulary) -> None:
        self._known = known
        self._text = text
        self._vocabulary = vocabulary
        self.cold_chars = len(text)

    def ids(self) -> Ids:
        """The ids of the whole."""
        return joined_ids([self._known, *self._vocabulary.encode([self._text])])


class Recall:
    """Looks text up in a cache."""

    def __init__(self, cache: SegmentCache) -> None:
        self._cache = cache

    def look_up(self, model: PromptModel, stretches: Sequence[Stretch]) -> Recalled:
        """What is known of a prompt made of these stretches, none of which merges with its neighbours."""
        parts: list[Ids | _Chunk] = []
        for stretch in stretches:
            if isinstance(stretch, list) and stretch and model.cuts:
                parts += self._turns(model, stretch)
            elif isinstance(stretch, str | list):
                parts += self._text(model, "".join(stretch))
            else:
                parts.append(stretch)
        return Recalled(parts, model.vocabulary, self._cache)

    def go_on(self, model: PromptModel, known: Ids, stretches: Sequence[Stretch]) -> Recalled | GoneOn:
        """As `look_up`, of a prompt that begins with known ids."""
        only = stretches[0] if len(stretches) == 1 else None
        if isinstance(only, list) and sum(map(len, only)) <= LONG_CHARS:
            return GoneOn(known, "".join(only), model.vocabulary)
        return self.look_up(model, [known, *stretches])

    def _text(self, model: PromptModel, text: str) -> Iterator[Ids | _Chunk]:
        *whole, (last, end) = model.chunks(text)
        # One slice at a time: a copy of all the text would push what the gateway works on out of the processor's cache.
        number = model.vocabulary.number
        keys = [(number, stop - start, hash(text[start:stop])) for start, stop in whole]
        for (start, stop), key, ids in zip(whole, keys, self._cache.get_many(keys), strict=True):
            yield self._chunk(key, _cut(model, text[start:stop])) if ids is None else ids
        yield self._chunk(None, _cut(model, text[last:end]))

    def _turns(self, model: PromptModel, strings: Sequence[str]) -> Iterator[Ids | _Chunk]:
        printed = _Printed(model, strings)
        *whole, last = printed.chunks()
        keys = [printed.key(*chunk) for chunk in whole]
        for chunk, key, ids in zip(whole, keys, self._cache.get_many(keys), strict=True):
            yield self._chunk(key, printed.pieces(*chunk)) if ids is None else ids
        yield self._chunk(None, printed.pieces(*last))

    def _chunk(self, key: Key | None, pieces: list[_Part]) -> _Chunk:
        return _Chunk(key, pieces, self._cache.get_many([piece.key for piece in pieces]))


def _cut(model: PromptModel, text: str) -> list[_Part]:
    return [_Part((model.vocabulary.number, len(piece), hash(piece)), (piece,)) for piece in model.cut(text)]


class _Printed:
    """A conversation as its template printed it: strings, some of which begin a turn.

    A prompt may have a thousand of them, so what is done for each is done without a loop in Python.
    """

    def __init__(self, model: PromptModel, strings: Sequence[str]) -> None:
        self._model = model
        self._strings = strings
        self._hashes = [*map(hash, strings)]
        begins = map(str.startswith, strings, repeat(model.cuts))
        starts = [*compress(range(len(strings)), begins)]
        self._turns = [0, *starts[strings[0].startswith(model.cuts) :], len(strings)]
        ends = [0, *accumulate(map(len, strings))]
        self._chars = [ends[turn] for turn in self._turns]  # in front of each turn, and at the end

    def key(self, first: int, last: int) -> Key:
        """Of the turns from `first` to before `last`."""
        hashes = tuple(self._hashes[self._turns[first] : self._turns[last]])
        return self._model.vocabulary.number, self._chars[last] - self._chars[first], hash(hashes)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Turns of at least `CHUNK_CHARS` together (the last may be fewer); a longer turn stands by itself."""
        chars, end, first = self._chars, len(self._turns) - 1, 0
        while first < end:
            last = bisect_left(chars, chars[first] + CHUNK_CHARS, first + 1, end)
            if last - 1 > first and chars[last] - chars[last - 1] > CHUNK_CHARS:
                last -= 1
            yield first, last
            first = last

    def pieces(self, first: int, last: int) -> list[_Part]:
        """The turns of a chunk, joined to at least `PIECE_CHARS` (the last may be shorter), long ones cut."""
        pieces: list[_Part] = []
        for turn in range(first + 1, last + 1):
            chars = self._chars[turn] - self._chars[first]
            if chars < PIECE_CHARS and turn < last:
                continue
            strings = tuple(self._strings[self._turns[first] : self._turns[turn]])
            if chars > LONG_CHARS:
                pieces += _cut(self._model, "".join(strings))
            else:
                pieces.append(_Part(self.key(first, turn), strings))
            first = turn
        return pieces


def joined_ids(parts: Sequence[Ids]) -> Ids:
    """One array of all ids, read-only."""
    if len(parts) == 1:
        return parts[0]
    # Not `np.concatenate`: that hands the GIL to other threads in the middle of a request.
    return np.frombuffer(b"".join([part.data for part in parts]), dtype=np.uint32)
