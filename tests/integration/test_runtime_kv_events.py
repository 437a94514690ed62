"""The client of KV events over real ZeroMQ sockets, against a publisher that does what vLLM's does, and worse."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
import zmq.asyncio

from gorgo_plugin import Prompt, Router, Settings
from gorgo_plugin.runtime import kv_events
from gorgo_plugin.runtime.kv_events import END_SEQUENCE, KvEventJob

BLOCK = 16
WAIT_S = 10.0
TOKENS = np.arange(1, 20 * BLOCK + 2, dtype=np.uint32)
PROMPT = Prompt(TOKENS, model="m")


class Publisher:
    """Publishes batches with running numbers, and replays those it remembers."""

    def __init__(self, *, as_maps: bool = True, topic: bytes = b"", reply_topic: bool = True) -> None:
        self._context = zmq.asyncio.Context()
        self.pub = self._context.socket(zmq.XPUB)  # which tells of subscriptions: what is sent before is lost
        self._replay = self._context.socket(zmq.ROUTER)
        self.port = self.pub.bind_to_random_port("tcp://127.0.0.1")
        self.replay_port = self._replay.bind_to_random_port("tcp://127.0.0.1")
        self.as_maps, self.topic, self.reply_topic = as_maps, topic, reply_topic
        self.remembered: list[tuple[int, bytes]] = []
        self.sequence = 0
        self._task = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        while True:
            client, _, start = await self._replay.recv_multipart()
            topic = [self.topic] if self.reply_topic else []
            for sequence, payload in self.remembered:
                if sequence >= int.from_bytes(start, "big"):
                    await self._replay.send_multipart([client, b"", *topic, sequence.to_bytes(8, "big"), payload])
            await self._replay.send_multipart([client, b"", *topic, END_SEQUENCE, b""])

    def store(self, start: int, end: int) -> dict[str, Any]:
        """BlockStored for blocks `start` to `end` of the prompt."""
        return {
            "type": "BlockStored",
            "block_hashes": [block.to_bytes(32, "big") for block in range(start + 1, end + 1)],
            "parent_block_hash": start.to_bytes(32, "big") if start else None,
            "token_ids": TOKENS[start * BLOCK : end * BLOCK].tolist(),
            "block_size": BLOCK,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
        }

    def remove(self, *blocks: int) -> dict[str, Any]:
        """BlockRemoved of the prompt's blocks with these numbers."""
        hashes = [(block + 1).to_bytes(32, "big") for block in blocks]
        return {"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU"}

    def payload(self, *events: dict[str, Any]) -> bytes:
        if self.as_maps:
            return msgspec.msgpack.encode({"ts": time.time(), "events": events, "data_parallel_rank": 0})
        return msgspec.msgpack.encode([time.time(), [list(event.values()) for event in events]])

    async def publish(self, *events: dict[str, Any], lost: bool = False, forgotten: bool = False) -> bytes:
        payload = self.payload(*events)
        if not forgotten:
            self.remembered.append((self.sequence, payload))
        if not lost:
            await self.send(self.sequence, payload)
        self.sequence += 1
        return payload

    async def send(self, sequence: int, payload: bytes) -> None:
        await self.pub.send_multipart([self.topic, sequence.to_bytes(8, "big"), payload])

    def restart(self) -> None:
        self.sequence, self.remembered = 0, []

    def close(self) -> None:
        self._task.cancel()
        self._context.destroy(linger=0)


class Follower:
    """A router and the job that keeps it informed."""

    def __init__(self, endpoint: str, replay: str | None, topic: str = "") -> None:
        given = {"endpoint": endpoint, "replay": replay, "topic": topic}
        replicas = [{"name": "a", "url": "http://a:1", "kv_events": given}, {"name": "b", "url": "http://b:1"}]
        self.router = Router(Settings.model_validate({"replicas": replicas}))
        self.troubles: list[str] = []
        replica = self.router.settings.replicas[0]
        assert replica.kv_events is not None
        note: Callable[[str, str], None] = lambda _, kind: self.troubles.append(kind)  # noqa: E731
        self.job = KvEventJob(replica, replica.kv_events, self.router.engine_caches, note, lambda _, __: None)

    @property
    def cached_blocks(self) -> int:
        return int(self.router.explain(PROMPT).costs["a"].cached_tokens) // BLOCK

    @property
    def source(self) -> str:
        return str(self.router.snapshot()["replicas"]["a"]["cache"]["source"])

    async def sees(self, blocks: int, source: str = "kv-events") -> None:
        try:
            async with asyncio.timeout(WAIT_S):
                while (self.cached_blocks, self.source) != (blocks, source):
                    await asyncio.sleep(0.005)
        except TimeoutError:
            pytest.fail(f"still {self.cached_blocks} blocks by {self.source}; {self.job.watch}; {self.troubles}")


@contextlib.asynccontextmanager
async def following(publisher: Publisher, *, replay: bool = True, topic: str = "") -> AsyncIterator[Follower]:
    address = f"tcp://127.0.0.1:{publisher.replay_port}" if replay else None
    follower = Follower(f"tcp://127.0.0.1:{publisher.port}", address, topic)
    task = asyncio.create_task(follower.job.run())
    try:
        async with asyncio.timeout(WAIT_S):
            while not follower.job.watch.connected or (replay and not follower.job.watch.replays):
                await asyncio.sleep(0.005)
            await publisher.pub.recv()
        yield follower
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture
async def publisher() -> AsyncIterator[Publisher]:
    made = Publisher()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"REPLAY_TIMEOUT_S": 2.0, "REPLAY_EVERY_S": 0.0, "LOST_AFTER_S": 0.2, "RETRY_S": 0.05}.items():
        monkeypatch.setattr(kv_events, name, value)


@pytest.mark.parametrize("as_maps", [True, False])
async def test_both_layouts_make_the_index_exact(as_maps: bool) -> None:
    publisher = Publisher(as_maps=as_maps, reply_topic=as_maps)
    async with following(publisher) as follower:
        await publisher.publish(publisher.store(0, 12))
        await follower.sees(12)
        await publisher.publish(publisher.store(12, 20), publisher.remove(19, 18))
        await follower.sees(18)
        await publisher.publish({"type": "AllBlocksCleared"})
        await follower.sees(0)
    publisher.close()


async def test_what_was_published_before_the_gateway_started_is_replayed(publisher: Publisher) -> None:
    for start in range(0, 20, 4):
        await publisher.publish(publisher.store(start, start + 4))
    async with following(publisher) as follower:
        await follower.sees(20)


async def test_without_a_replay_a_late_start_is_partial_until_the_cache_is_cleared(publisher: Publisher) -> None:
    await publisher.publish(publisher.store(0, 4))
    async with following(publisher, replay=False) as follower:
        await publisher.publish(publisher.store(4, 8))
        await follower.sees(0, "kv-events-partial")
        await publisher.publish({"type": "AllBlocksCleared"}, publisher.store(0, 3))
        await follower.sees(3)


async def test_a_gap_is_filled_by_a_replay_and_counted(publisher: Publisher) -> None:
    async with following(publisher) as follower:
        await publisher.publish(publisher.store(0, 4))
        await publisher.publish(publisher.store(4, 8), lost=True)
        await publisher.publish(publisher.store(8, 12))
        await follower.sees(12)
        assert (follower.job.watch.gaps, follower.troubles) == (1, ["gap"])


async def test_a_gap_that_cannot_be_filled_drops_the_blocks_and_routing_goes_on(publisher: Publisher) -> None:
    async with following(publisher) as follower:
        await publisher.publish(publisher.store(0, 4))
        await follower.sees(4)
        publisher.remembered.clear()
        await publisher.publish(publisher.store(4, 8), lost=True, forgotten=True)
        await publisher.publish(publisher.store(8, 12), forgotten=True)
        await follower.sees(0, "kv-events-partial")
        assert follower.troubles == ["gap", "unfilled-gap"]
        assert follower.router.route(PROMPT).replica in ("a", "b")
        await publisher.publish({"type": "AllBlocksCleared"}, publisher.store(0, 2))
        await follower.sees(2)


async def test_a_batch_sent_twice_counts_once(publisher: Publisher) -> None:
    async with following(publisher) as follower:
        payload = await publisher.publish(publisher.store(0, 4))
        await publisher.send(0, payload)
        await publisher.publish(publisher.remove(3))
        await follower.sees(3)
        assert follower.job.watch.duplicates >= 1


async def test_an_engine_that_restarts_is_followed_from_its_start(publisher: Publisher) -> None:
    async with following(publisher) as follower:
        await publisher.publish(publisher.store(0, 9))
        await publisher.publish(publisher.store(9, 12))
        await follower.sees(12)
        publisher.restart()
        await publisher.publish(publisher.store(0, 2))
        await follower.sees(2)
        assert follower.troubles == ["restart"]


async def test_garbage_is_counted_and_skipped(publisher: Publisher) -> None:
    async with following(publisher) as follower:
        await publisher.publish(publisher.store(0, 4))
        for frames in ([b"x"], [b"", b"short", b""], [b"", bytes(8), b"\xc1"], [b"", bytes(8), b"\x93\x01\x02\x03"]):
            await publisher.pub.send_multipart(frames)
        wrong = [
            {"type": "Unheard"},
            {**publisher.store(4, 8), "token_ids": [1]},
            {**publisher.store(4, 8), "medium": "CPU"},
        ]
        await publisher.publish(*wrong, publisher.store(4, 6))
        await follower.sees(6)
        assert follower.job.watch.skipped == 3
        assert follower.job.watch.bad_frames == 4


async def test_a_flood_leaves_the_loop_free_and_the_index_right_at_its_end(publisher: Publisher) -> None:
    async with following(publisher) as follower:
        await publisher.publish(publisher.store(0, 20))
        longest_s, began = 0.0, time.perf_counter()
        for _ in range(50):
            for _ in range(40):
                await publisher.publish(publisher.remove(19, 18), publisher.store(18, 20))
            before = time.thread_time()
            follower.router.explain(PROMPT)
            await asyncio.sleep(0)
            longest_s = max(longest_s, time.thread_time() - before)
        await publisher.publish(publisher.remove(19))
        await follower.sees(19)
        assert longest_s < 1.0
        assert time.perf_counter() - began < WAIT_S


async def test_a_publisher_that_goes_away_is_given_up_and_taken_up_again(publisher: Publisher) -> None:
    async with following(publisher) as follower:
        await publisher.publish(publisher.store(0, 4))
        await follower.sees(4)
        port = publisher.port
        publisher.pub.close(linger=0)
        await follower.sees(0, "credit")
        assert follower.troubles == ["lost"]
        publisher.pub = publisher._context.socket(zmq.XPUB)
        publisher.pub.bind(f"tcp://127.0.0.1:{port}")
        async with asyncio.timeout(WAIT_S):
            while not follower.job.watch.connected:
                await asyncio.sleep(0.01)
            await publisher.pub.recv()
        await publisher.publish(publisher.store(4, 6))
        await follower.sees(6)


CHILD = """
import sys, time, msgspec, zmq
socket = zmq.Context().socket(zmq.PUB)
print(socket.bind_to_random_port("tcp://127.0.0.1"), flush=True)
events = msgspec.json.decode(sys.argv[1])
for sequence in range(10**6):
    payload = msgspec.msgpack.encode({"ts": time.time(), "events": events, "data_parallel_rank": 0})
    socket.send_multipart([b"", sequence.to_bytes(8, "big"), payload])
    time.sleep(0.02)
"""


async def test_a_publisher_that_hangs_is_given_up_and_taken_up_again(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_events, "HEARTBEAT_MS", 200)
    stored = {**publisher.store(0, 3), "block_hashes": [1, 2, 3]}
    told = msgspec.json.encode([{"type": "AllBlocksCleared"}, stored]).decode()
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", CHILD, told, stdout=asyncio.subprocess.PIPE)
    assert child.stdout is not None
    follower = Follower(f"tcp://127.0.0.1:{int(await child.stdout.readline())}", None)
    task = asyncio.create_task(follower.job.run())
    try:
        await follower.sees(3)
        os.kill(child.pid, signal.SIGSTOP)
        await follower.sees(0, "credit")
        assert follower.troubles[-1] == "lost"
        assert follower.router.route(PROMPT).replica in ("a", "b")
        os.kill(child.pid, signal.SIGCONT)
        async with asyncio.timeout(WAIT_S):
            while follower.source != "kv-events":
                await asyncio.sleep(0.01)
    finally:
        child.kill()
        await child.wait()
        task.cancel()


async def test_a_replay_that_hangs_holds_nothing_up_for_longer_than_its_time(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_events, "REPLAY_TIMEOUT_S", 0.3)
    silent = await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", 0)
    publisher.replay_port = silent.sockets[0].getsockname()[1]
    async with silent, following(publisher) as follower:
        await publisher.publish(publisher.store(0, 4))
        await follower.sees(4)
        await publisher.publish(publisher.store(4, 8), lost=True)
        await publisher.publish(publisher.store(8, 12))
        await follower.sees(0, "kv-events-partial")
        assert follower.troubles == ["gap", "unfilled-gap"]
        await publisher.publish({"type": "AllBlocksCleared"}, publisher.store(0, 2))
        await follower.sees(2)


async def test_engines_can_connect_to_a_gateway_that_binds_and_may_come_late() -> None:
    with contextlib.closing(zmq.Context().socket(zmq.PUB)) as free:
        port = free.bind_to_random_port("tcp://127.0.0.1")
    follower = Follower(f"tcp://*:{port}", None, topic="kv@")
    task = asyncio.create_task(follower.job.run())
    publisher = Publisher(topic=b"kv@pod@m")
    publisher.pub.connect(f"tcp://127.0.0.1:{port}")
    async with asyncio.timeout(WAIT_S):
        while not follower.job.watch.connected:
            await asyncio.sleep(0.01)
        await publisher.pub.recv()
    await publisher.publish(publisher.store(0, 5))
    await follower.sees(5)
    publisher.close()
    task.cancel()
