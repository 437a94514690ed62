"""KV-cache events as vLLM puts them on the wire (msgpack), read into the core's plain values.

A payload is `[ts, [event, ...], data_parallel_rank]` or a map of these; an event is a tagged array (before vLLM 0.32)
or a map with `type`. Both layouts are read, told apart by their first byte.
"""

from __future__ import annotations

from typing import Any, cast

import msgspec
import numpy as np

from gorgo_plugin.prefix import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent

EngineHash = int | bytes
# Groups of other kinds of layers (sliding window, Mamba) keep only what their own lookups need.
FULL_KINDS = frozenset({None, "full_attention", "mla_attention", "sink_full_attention"})
HASH_BITS_BYTES = 8  # of a longer digest these are enough to tell an engine's blocks apart


class _Stored(msgspec.Struct, tag="BlockStored", gc=False):
    block_hashes: list[EngineHash]
    parent_block_hash: EngineHash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class _Removed(msgspec.Struct, tag="BlockRemoved", gc=False):
    block_hashes: list[EngineHash]
    medium: str | None = None
    group_idx: int | None = None


class _Cleared(msgspec.Struct, tag="AllBlocksCleared", gc=False):
    pass


class _StoredArray(_Stored, tag="BlockStored", array_like=True, gc=False):
    pass


class _RemovedArray(_Removed, tag="BlockRemoved", array_like=True, gc=False):
    pass


class _ClearedArray(_Cleared, tag="AllBlocksCleared", array_like=True, gc=False):
    pass


class _Batch(msgspec.Struct, gc=False):
    ts: float
    events: list[msgspec.Raw]
    data_parallel_rank: int | None = None


class _BatchArray(_Batch, array_like=True, gc=False):
    pass


_batch_of: dict[bool, msgspec.msgpack.Decoder[_Batch]] = {
    True: msgspec.msgpack.Decoder(_Batch),
    False: cast(Any, msgspec.msgpack.Decoder(_BatchArray)),
}
_event_of: dict[bool, msgspec.msgpack.Decoder[_Stored | _Removed | _Cleared]] = {
    True: msgspec.msgpack.Decoder(_Stored | _Removed | _Cleared),
    False: cast(Any, msgspec.msgpack.Decoder(_StoredArray | _RemovedArray | _ClearedArray)),
}


class Unreadable(ValueError):
    """A frame that is no batch of events."""


class WireReader:
    """Reads the payloads of one publisher.

    Of an engine with several groups of layers the first one with full attention is followed, of several data-parallel
    ranks on one socket the first heard: their caches are separate. Blocks in other places than GPU memory, and blocks
    whose hash holds more than tokens and an adapter (images, a cache salt), are left out with all that follows them.

    Attributes:
        skipped: events left out or not understood.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self._group: int | None = None
        self._rank: int | None = None

    def read(self, payload: bytes) -> tuple[float, list[KvEvent]]:
        """(publisher's time in seconds, events).

        Raises:
            Unreadable: the payload is not a batch of events.
        """
        try:
            batch = _batch_of[_is_map(payload)].decode(payload)
            events = [self._event(raw) for raw in batch.events] if self._followed(batch) else []
        except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
            raise Unreadable(str(error)) from None
        return batch.ts, [event for event in events if event is not None]

    def _followed(self, batch: _Batch) -> bool:
        rank = batch.data_parallel_rank
        if self._rank is None:
            self._rank = rank
        if rank == self._rank:
            return True
        self.skipped += len(batch.events)
        return False

    def _event(self, raw: msgspec.Raw) -> KvEvent | None:
        packed = bytes(raw)
        try:
            event = _event_of[_is_map(packed)].decode(packed)
        except msgspec.ValidationError:  # of a type unknown here, or of another shape
            self.skipped += 1
            return None
        read: KvEvent | None
        if isinstance(event, _Stored):
            read = self._stored(event)
        elif isinstance(event, _Removed):
            ours = _on_gpu(event.medium) and (event.group_idx is None or event.group_idx == self._group)
            read = BlockRemoved([_short(name) for name in event.block_hashes]) if ours else None
        else:
            read = AllBlocksCleared()
        self.skipped += read is None
        return read

    def _stored(self, event: _Stored) -> BlockStored | None:
        if not _on_gpu(event.medium) or event.kv_cache_spec_kind not in FULL_KINDS or not event.block_hashes:
            return None
        if self._group is None:
            self._group = event.group_idx
        if event.group_idx != self._group or event.block_size <= 0:
            return None
        adapter = event.lora_name or ("" if event.lora_id is None else str(event.lora_id))
        names = event.block_hashes[: _plain_blocks(event.extra_keys, adapter, len(event.block_hashes))]
        if not names or len(event.token_ids) != len(event.block_hashes) * event.block_size:
            return None
        tokens = np.array(event.token_ids[: len(names) * event.block_size], dtype=np.uint32)
        parent = None if event.parent_block_hash is None else _short(event.parent_block_hash)
        return BlockStored([_short(name) for name in names], parent, tokens, event.block_size, adapter)


def _is_map(packed: bytes) -> bool:
    return bool(packed) and (packed[0] & 0xF0 == 0x80 or packed[0] in (0xDE, 0xDF))


def _on_gpu(medium: str | None) -> bool:
    return medium is None or medium.upper() == "GPU"


def _short(name: EngineHash) -> int:
    return name if isinstance(name, int) else int.from_bytes(name[-HASH_BITS_BYTES:], "big")


def _plain_blocks(extra_keys: list[list[Any] | None] | None, adapter: str, blocks: int) -> int:
    """How many leading blocks are told apart by nothing but tokens and the adapter."""
    for position, keys in enumerate(extra_keys or ()):
        if keys and keys != [adapter]:
            return min(position, blocks)
    return blocks
