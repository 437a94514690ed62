"""Text to token ids by way of what was tokenized before, so that a prompt that grew costs only what is new.

Text is remembered in two sizes: in chunks, so that a long known prompt takes few look-ups, and in pieces of about a
message, so that what follows the last whole chunk, or differs in one, is not tokenized anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from gorgo_plugin.prompt.cache import Key, SegmentCache
from gorgo_plugin.prompt.model import PromptModel
from gorgo_plugin.prompt.vocabulary import Ids, Vocabulary, read_only

EMPTY: Ids = read_only(np.empty(0, dtype=np.uint32))

Stretch = str | Ids  # text, or the ids of what is no text


@dataclass(slots=True)
class _Chunk:
    """Text that is not remembered as a whole.

    Attributes:
        key: what to remember it under; None for the last of a stretch, which may still grow.
        pieces: (key, text) of each piece.
        ids: of each piece, None where unknown.
    """

    key: Key | None
    pieces: list[tuple[Key, str]]
    ids: list[Ids | None]

    def filled(self, fresh: Mapping[Key, Ids]) -> list[Ids]:
        """The ids of each piece, those of unknown ones out of `fresh`."""
        return [fresh[key] if ids is None else ids for (key, _), ids in zip(self.pieces, self.ids, strict=True)]

    def cold(self) -> Iterator[tuple[Key, str]]:
        """(key, text) of the pieces to be tokenized."""
        return ((key, text) for (key, text), ids in zip(self.pieces, self.ids, strict=True) if ids is None)


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


class Recall:
    """Looks text up in a cache."""

    def __init__(self, cache: SegmentCache) -> None:
        self._cache = cache

    def look_up(self, model: PromptModel, stretches: Sequence[Stretch]) -> Recalled:
        """What is known of a prompt made of these stretches, none of which merges with its neighbours."""
        parts: list[Ids | _Chunk] = []
        for stretch in stretches:
            parts += self._chunks(model, stretch) if isinstance(stretch, str) else (stretch,)
        return Recalled(parts, model.vocabulary, self._cache)

    def _chunks(self, model: PromptModel, text: str) -> Iterator[Ids | _Chunk]:
        *whole, (last, end) = model.chunks(text)
        # One slice at a time: a copy of all the text would push what the gateway works on out of the processor's cache.
        keys = [_key(model, text[start:stop]) for start, stop in whole]
        for (start, stop), key, ids in zip(whole, keys, self._cache.get_many(keys), strict=True):
            yield self._chunk(model, text[start:stop], key) if ids is None else ids
        yield self._chunk(model, text[last:end], None)

    def _chunk(self, model: PromptModel, text: str, key: Key | None) -> _Chunk:
        pieces = [(_key(model, piece), piece) for piece in model.cut(text)]
        return _Chunk(key, pieces, self._cache.get_many([known for known, _ in pieces]))


def _key(model: PromptModel, text: str) -> Key:
    return model.vocabulary.number, len(text), hash(text)


def joined_ids(parts: Sequence[Ids]) -> Ids:
    """One array of all ids, read-only."""
    if len(parts) == 1:
        return parts[0]
    # Not `np.concatenate`: that hands the GIL to other threads in the middle of a request.
    return np.frombuffer(b"".join([part.data for part in parts]), dtype=np.uint32)
