"""Publishes a mock engine's cache changes as vLLM publishes KV-cache events: a PUB socket, and a ROUTER for replays."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec
from numpy.typing import NDArray

from gorgo_plugin.fleet.block_cache import Change, Cleared, Removed, Stored

REMEMBERED_BATCHES = 10_000  # vLLM's default
MAX_KNOWN_BLOCKS = 1 << 20  # tokens are learned when a request comes, and not forgotten should it never be scheduled
_END = b"\xff" * 8


class KvPublisher:
    """Publishes from a running loop; must be created on it.

    Attributes:
        endpoint, replay_endpoint: addresses bound.
    """

    def __init__(self, endpoint: str, block_tokens: int) -> None:
        import zmq  # comes with an extra
        import zmq.asyncio

        self._block_tokens = block_tokens
        self._context = zmq.asyncio.Context()
        self._pub = self._context.socket(zmq.PUB)
        self._replay = self._context.socket(zmq.ROUTER)
        self._pub.bind(endpoint)
        self._replay.bind(f"{endpoint.rpartition(':')[0]}:*")
        self.endpoint, self.replay_endpoint = (
            socket.getsockopt_string(zmq.LAST_ENDPOINT) for socket in (self._pub, self._replay)
        )
        self._known: dict[int, tuple[list[int], str]] = {}  # key -> tokens of the block, salt
        self._batches: deque[tuple[int, bytes]] = deque(maxlen=REMEMBERED_BATCHES)
        self._sequence = 0
        self._task = asyncio.create_task(self._serve())

    def learn(self, keys: Sequence[int], tokens: NDArray[Any], salt: str) -> None:
        """Remember which tokens, shape (n,), the keys of a request stand for."""
        if len(self._known) + len(keys) > MAX_KNOWN_BLOCKS:
            return
        size = self._block_tokens
        for position, key in enumerate(keys):
            if key not in self._known:
                self._known[key] = tokens[position * size : (position + 1) * size].tolist(), salt

    def publish(self, changes: Sequence[Change]) -> None:
        """One batch of events."""
        batch = {"ts": time.time(), "events": [self._event(change) for change in changes], "data_parallel_rank": 0}
        payload = msgspec.msgpack.encode(batch)
        self._batches.append((self._sequence, payload))
        self._pub.send_multipart([b"", self._sequence.to_bytes(8, "big"), payload])
        self._sequence += 1

    def restart(self) -> None:
        """Count from 0 again, as a new engine does."""
        self._sequence = 0
        self._batches.clear()

    def close(self) -> None:
        """Close the sockets."""
        self._task.cancel()
        self._context.destroy(linger=0)

    def _event(self, change: Change) -> dict[str, Any]:
        if isinstance(change, Cleared):
            return {"type": "AllBlocksCleared"}
        if isinstance(change, Removed):
            return {"type": "BlockRemoved", "block_hashes": [change.key], "medium": "GPU", "group_idx": 0}
        return self._stored(change)

    def _stored(self, change: Stored) -> dict[str, Any]:
        known = [self._known.get(key, ([0] * self._block_tokens, "unknown")) for key in change.keys]
        return {
            "type": "BlockStored",
            "block_hashes": list(change.keys),
            "parent_block_hash": change.parent,
            "token_ids": [token for tokens, _ in known for token in tokens],
            "block_size": self._block_tokens,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
            "extra_keys": [[salt] if salt else None for _, salt in known],
            "group_idx": 0,
        }

    async def _serve(self) -> None:
        while True:
            frames = await self._replay.recv_multipart()
            if len(frames) != 3:
                continue
            client, _, start = frames
            for sequence, payload in list(self._batches):
                if sequence >= int.from_bytes(start, "big"):
                    await self._replay.send_multipart([client, b"", b"", sequence.to_bytes(8, "big"), payload])
            await self._replay.send_multipart([client, b"", b"", _END, b""])
