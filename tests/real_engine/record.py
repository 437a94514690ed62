"""Records the KV events of a real engine, for tests that no engine runs in: `python -m tests.real_engine.record`.

Writes JSON: of each step the prompt's token ids, the cached tokens the engine reported for it, and the event frames it
published then, as (sequence number, base64 of the MessagePack payload). The cache holds 32 blocks, one of which vLLM
keeps to itself, so that a few hundred tokens overflow it; a prompt that ends with its block is computed twice at its
end; the last steps follow a reset of the cache, which the engine tells of with the events of its next step.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import aiohttp
import zmq
import zmq.asyncio

from tests.real_engine.engines import BLOCK_TOKENS, Engine, engines
from tests.real_engine.environment import engine_python, versions
from tests.real_engine.model import KV_BYTES_PER_TOKEN, write_model

BLOCKS = 32
FILE = Path(__file__).with_name("kv_events.json")
QUIET_S = 0.3  # events come a millisecond after their step


def prompts() -> list[list[int]]:
    """The prompts in the order of the recording."""
    rng = random.Random(0)

    def ids(count: int) -> list[int]:
        return [rng.randrange(300, 8000) for _ in range(count)]

    first, whole, long, longer = ids(200), ids(5 * BLOCK_TOKENS), ids(400), ids(330)
    branch = first[: 3 * BLOCK_TOKENS] + ids(70)
    return [first, first, whole, whole, branch, long, longer, first, whole, long, first, first]


RESET_BEFORE = 10  # index of the prompt that is asked after the cache was cleared


async def record(engine: Engine) -> list[dict[str, Any]]:
    """Ask the prompts one by one, and take down what the engine publishes."""
    subscriber = zmq.asyncio.Context.instance().socket(zmq.SUB)
    subscriber.subscribe(b"")
    subscriber.connect(engine.events)
    await asyncio.sleep(QUIET_S)
    steps: list[dict[str, Any]] = []
    async with aiohttp.ClientSession(engine.url, raise_for_status=True) as session:
        for index, prompt in enumerate(prompts()):
            if index == RESET_BEFORE:
                await engine.reset_cache()
            body = {"model": "chatml", "prompt": prompt, "max_tokens": 1}
            async with session.post("/v1/completions", json=body) as answer:
                usage = (await answer.json())["usage"]
            frames = []
            while await subscriber.poll(QUIET_S * 1000):
                _, number, payload = await subscriber.recv_multipart()
                frames.append([int.from_bytes(number, "big"), base64.b64encode(payload).decode()])
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            steps.append({"prompt": prompt, "cached_tokens": cached, "frames": frames})
    subscriber.close(linger=0)
    return steps


async def main(file: Path) -> None:
    """Run an engine with a small cache and write the recording."""
    python = engine_python()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        kv_bytes = BLOCKS * BLOCK_TOKENS * KV_BYTES_PER_TOKEN
        async with engines(python, folder / "model", folder, ("recorded",), kv_bytes, context_tokens=512) as running:
            steps = await record(running[0])
    content = {"engine": versions(python), "block_tokens": BLOCK_TOKENS, "blocks": BLOCKS, "steps": steps}
    file.write_text(json.dumps(content, separators=(",", ":")))
    print(f"{file}: {len(steps)} steps, {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Record the KV events of a real engine.")
    parser.add_argument("--output", type=Path, default=FILE, help="file to write")
    sys.exit(asyncio.run(main(parser.parse_args().output)))
