"""Token ids of text seen before, bounded in bytes. No text is kept, only its hash.

The hash is Python's own of strings: SipHash under a key that each process draws for itself, unless PYTHONHASHSEED sets
it. It needs no copy of the text and, unlike those of hashlib, does not hand the GIL to other threads in the middle of a
request.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from cachetools import LRUCache

from gorgo_plugin.prompt.vocabulary import Ids

Key = tuple[int, int, int]
"""(number of the vocabulary, characters, hash of the text)."""

# Measured for one entry: array object, key, places in the tables of the cache.
ENTRY_BYTES = 420


class SegmentCache:
    """Least recently used out first. Thread-safe."""

    def __init__(self, capacity_bytes: int) -> None:
        self._entries: LRUCache[Key, Ids] = LRUCache(capacity_bytes, getsizeof=_size)
        self._lock = threading.Lock()

    def get_many(self, keys: Sequence[Key]) -> list[Ids | None]:
        """The ids under each key, None where unknown; all of them count as just used."""
        entries = self._entries
        with self._lock:
            return [entries.get(key) for key in keys]

    def put_many(self, items: Iterable[tuple[Key, Ids]]) -> None:
        """Keep ids; what is larger than the whole cache is not kept."""
        with self._lock:
            for key, ids in items:
                if _size(ids) <= self._entries.maxsize:
                    self._entries[key] = ids

    @property
    def used_bytes(self) -> int:
        """Bytes the entries take."""
        with self._lock:
            return int(self._entries.currsize)

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)


def _size(ids: Ids) -> int:
    return ids.nbytes + ENTRY_BYTES
