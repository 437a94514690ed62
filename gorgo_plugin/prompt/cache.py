"""Token ids of text seen before, bounded in bytes. Keys are keyed hashes: no text is kept."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from cachetools import LRUCache

from gorgo_plugin.prompt.vocabulary import Ids

# Measured for one entry: array object, 16-byte key, places in the tables of the cache.
ENTRY_BYTES = 420


class SegmentCache:
    """Least recently used out first. Thread-safe."""

    def __init__(self, capacity_bytes: int) -> None:
        self._entries: LRUCache[bytes, Ids] = LRUCache(capacity_bytes, getsizeof=_size)
        self._lock = threading.Lock()

    def get_many(self, keys: Sequence[bytes]) -> list[Ids | None]:
        """The ids under each key, None where unknown; all of them count as just used."""
        entries = self._entries
        with self._lock:
            return [entries.get(key) for key in keys]

    def put_many(self, items: Iterable[tuple[bytes, Ids]]) -> None:
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
