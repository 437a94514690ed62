"""`gorgo explain --status-url` against a gateway that serves status and explanations over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from gorgo_plugin import PromptError, Settings
from gorgo_plugin.runtime import Runtime
from gorgo_plugin.runtime.explain import question

BODY = {"model": "m", "messages": [{"role": "user", "content": "tell me a long story " * 100}]}
CHAT = "/v1/chat/completions"
KEY = "sk-admin"
SETTINGS = {
    "replicas": [
        {"name": "a", "region": "east", "url": "http://127.0.0.1:1"},
        {"name": "b", "region": "west", "url": "http://127.0.0.1:1/b"},
    ],
    "seed": 3,
}


@contextlib.asynccontextmanager
async def gateway(explains: bool) -> AsyncIterator[tuple[Runtime, str]]:
    """A runtime that has learned something, and its pages behind a key."""
    runtime = Runtime(Settings.model_validate(SETTINGS), gateway="test")
    runtime.router.observe_rtt("a", 0.2)
    runtime.router.observe_rtt("b", 0.2)
    decision = runtime.router.route(await runtime.prepare(BODY, CHAT), candidates=["b"])
    runtime.router.first_token(decision.flight_id)
    runtime.router.finish(decision.flight_id)

    async def status(_: web.Request) -> web.Response:
        return web.json_response(runtime.status())

    async def explain(request: web.Request) -> web.Response:
        try:
            return web.json_response(await runtime.explain(*question(await request.json())))
        except PromptError as error:
            return web.json_response({"detail": str(error)}, status=400)

    @web.middleware
    async def authenticated(request: web.Request, handler: Any) -> Any:
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            raise web.HTTPUnauthorized
        return await handler(request)

    app = web.Application(middlewares=[authenticated])
    app.router.add_get("/gorgo/status", status)
    if explains:
        app.router.add_post("/gorgo/explain", explain)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert isinstance(site._server, asyncio.Server)
    try:
        yield runtime, f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
    finally:
        await runner.cleanup()
        await runtime.stop()


async def gorgo_explain(folder: Path, *arguments: str, body: Any = BODY) -> tuple[int, str, str]:
    """(exit code, output, errors) of the command."""
    (folder / "body.json").write_text(json.dumps(body))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", "from gorgo_plugin.cli import main; main()"),
        *("explain", "--request", str(folder / "body.json"), *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    return process.returncode or 0, output.decode(), errors.decode()


@pytest.mark.parametrize("path", ["", "/gorgo/status"])
async def test_a_running_gateway_explains_with_what_it_believes_cached(tmp_path: Path, path: str) -> None:
    async with gateway(explains=True) as (runtime, url):
        code, output, _ = await gorgo_explain(tmp_path, "--status-url", url + path, "--key", KEY, "--json")
        assert code == 0
        explained = json.loads(output)
        assert explained["replica"] == "b"
        assert explained["replicas"]["b"]["cached_tokens"] > 100
        assert explained["replicas"]["a"]["cached_tokens"] == 0
        assert explained["gateway"] == "test"
        assert sum(runtime.status()["flights"].values()) == 0


async def test_a_gateway_that_only_shows_its_status_lends_its_round_trips(tmp_path: Path) -> None:
    (tmp_path / "gorgo.yaml").write_text(json.dumps(SETTINGS))
    async with gateway(explains=False) as (_, url):
        arguments = ("--status-url", url, "--key", KEY, "--json")
        code, output, _ = await gorgo_explain(tmp_path, *arguments, "--config", str(tmp_path / "gorgo.yaml"))
        assert code == 0
        explained = json.loads(output)
        assert explained["replicas"]["a"]["network_ms"] == pytest.approx(200.0)
        assert explained["replicas"]["b"]["cached_tokens"] == 0
        assert "what it believes cached is left out" in explained["notes"][0]


async def test_a_wrong_key_and_a_bad_body_are_one_sentence(tmp_path: Path) -> None:
    async with gateway(explains=True) as (_, url):
        code, _, errors = await gorgo_explain(tmp_path, "--status-url", url, "--key", "sk-wrong")
        assert code == 1
        assert errors == f"Error: {url}/gorgo/explain answered 401 (is --key right?)\n"
        code, _, errors = await gorgo_explain(
            tmp_path, "--status-url", url, "--key", KEY, body={"model": "m", "messages": 7}
        )
        assert code == 1
        assert errors.startswith(f"Error: {url}/gorgo/explain answered 400: ")
        assert errors.count("\n") == 1


async def test_an_explanation_opens_no_flight_and_teaches_nothing() -> None:
    async with gateway(explains=True) as (runtime, _):
        before = runtime.router.snapshot()["counters"]
        first = await runtime.explain(BODY, CHAT, "m")
        second = await runtime.explain(BODY, CHAT, "m")
        assert first["replicas"].keys() == second["replicas"].keys()
        assert first["replicas"]["a"]["cached_tokens"] == second["replicas"]["a"]["cached_tokens"] == 0
        assert runtime.router.snapshot()["counters"] == before
        json.dumps(first, allow_nan=False)


@pytest.mark.parametrize(
    "asked",
    [None, [], {}, {"body": 7, "endpoint": CHAT}, {"body": BODY}, {"body": BODY, "endpoint": CHAT, "model": 7}],
)
def test_a_question_of_another_shape_is_refused(asked: Any) -> None:
    with pytest.raises(PromptError, match=r"expected"):
        question(asked)
