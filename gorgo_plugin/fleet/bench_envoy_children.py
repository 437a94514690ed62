"""What `gorgo bench envoy` runs beside Envoy, each a process of its own: upstreams, and a service that does nothing."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import uvloop

from gorgo_plugin.envoy_ext_proc.messages import UNCHANGED
from gorgo_plugin.envoy_ext_proc.server import grpc_service
from gorgo_plugin.fleet.instant import instant_upstreams
from gorgo_plugin.settings import Settings


def upstreams(count: int) -> None:
    """Serve instant upstreams; prints their URLs as a line of JSON."""
    asyncio.run(_upstreams(count))


async def _upstreams(count: int) -> None:
    async with instant_upstreams(count) as urls:
        print(json.dumps(urls), flush=True)
        await asyncio.Event().wait()


def idle_service(config: str) -> None:
    """Serve the protocol on the loop and the server that `gorgo ext-proc` uses, and change nothing."""
    settings = Settings.model_validate_json(Path(config).read_bytes())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_idle_service(settings))


async def _idle_service(settings: Settings) -> None:
    async with grpc_service(settings.envoy, idle) as (_server, _checks, listening):
        print(json.dumps({"listen": listening}), flush=True)
        await asyncio.Event().wait()


async def idle(_requests: object, context: Any) -> None:
    """One stream of the service that does nothing."""
    while (message := await context.read()) is not grpc.aio.EOF:
        if not message.observability_mode:
            await context.write(UNCHANGED[message.WhichOneof("request")])
        elif message.response_body.end_of_stream:
            return  # as gorgo does: else Envoy ends the stream, 5 s later, when another variant's CPU is counted
