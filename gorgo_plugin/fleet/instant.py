"""An upstream that answers at once, so that what is measured in front of it is the gateway."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import msgspec
from aiohttp import web

from gorgo_plugin.fleet.processes import free_port

MAX_BODY_BYTES = 64 * 2**20
CHUNKS = 8
CHARS_PER_TOKEN = 3.5  # of English text; close enough for a usage that nobody is billed for


@contextlib.asynccontextmanager
async def instant_upstreams(count: int, name: str = "instant") -> AsyncIterator[dict[str, str]]:
    """Serve `count` upstreams on this loop for the length of the block: name -> base URL."""
    async with contextlib.AsyncExitStack() as stack:
        urls = {}
        for number in range(count):
            runner = web.AppRunner(_app(f"{name}-{number}"))
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            port = free_port()
            await web.TCPSite(runner, "127.0.0.1", port).start()
            urls[f"{name}-{number}"] = f"http://127.0.0.1:{port}"
        yield urls


def _app(name: str) -> web.Application:
    app = web.Application(client_max_size=MAX_BODY_BYTES)

    async def chat(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        for number in range(CHUNKS):
            await answer.write(_event(name, [{"index": 0, "delta": {"role": "assistant", "content": f"w{number} "}}]))
        await answer.write(_event(name, [{"index": 0, "delta": {}, "finish_reason": "stop"}]))
        prompt = round(len(body) / CHARS_PER_TOKEN)
        usage = {"prompt_tokens": prompt, "completion_tokens": CHUNKS, "total_tokens": prompt + CHUNKS}
        await answer.write(_event(name, [], usage) + b"data: [DONE]\n\n")
        return answer

    app.router.add_post("/v1/chat/completions", chat)
    return app


def _event(name: str, choices: list[object], usage: object = None) -> bytes:
    chunk = {
        "id": f"chatcmpl-{name}-1",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": "m",
        "choices": choices,
        "usage": usage,
    }
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"
