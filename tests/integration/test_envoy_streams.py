"""The service's streams over real gRPC, which frees no operation that fails and none whose awaiter was cancelled."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from envoy.config.core.v3.base_pb2 import HeaderMap, HeaderValue
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from gorgo_plugin import Settings
from gorgo_plugin.envoy_ext_proc import messages, processor
from gorgo_plugin.envoy_ext_proc.names import SERVICE
from gorgo_plugin.envoy_ext_proc.processor import Processor
from gorgo_plugin.envoy_ext_proc.server import grpc_service
from gorgo_plugin.prompt.endpoints import CHAT
from gorgo_plugin.runtime import Runtime

SETTINGS = {
    "replicas": [{"name": "a", "url": "http://127.0.0.1:1"}],
    "envoy": {"listen": "127.0.0.1:0", "status_listen": None, "message_timeout_s": 0.02},
}
HEADERS = pb.ProcessingRequest(
    request_headers=pb.HttpHeaders(
        headers=HeaderMap(
            headers=[HeaderValue(key=":method", raw_value=b"POST"), HeaderValue(key=":path", raw_value=CHAT.encode())]
        )
    )
).SerializeToString()
BODY = pb.ProcessingRequest(
    request_body=pb.HttpBody(
        body=json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}]}).encode(), end_of_stream=True
    )
).SerializeToString()


@dataclass
class Watched:
    """A stream's context that tells what became of gRPC's operations on it."""

    context: Any
    task: asyncio.Task[Any] | None
    reads: int = 0
    cut_reads: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self) -> Any:
        self.reads += 1
        try:
            return await self.context.read()
        except asyncio.CancelledError:
            self.cut_reads += 1
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.context, name)


@dataclass
class Service:
    """The service, and the streams it was sent."""

    call: Any
    processor: Processor
    streams: list[Watched] = field(default_factory=list)


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    settings = Settings.model_validate(SETTINGS)
    runtime = Runtime(settings, gateway="envoy")
    served = Service(None, Processor(runtime))

    async def process(requests: object, context: Any) -> None:
        stream = Watched(context, asyncio.current_task())
        served.streams.append(stream)
        try:
            await served.processor.process(requests, stream)
        finally:
            stream.ended.set()

    try:
        async with (
            grpc_service(settings.envoy, process, reads=None) as (_server, _checks, listening),
            grpc.aio.insecure_channel(listening) as channel,
        ):
            served.call = channel.stream_stream(f"/{SERVICE}/Process")
            yield served
    finally:
        await runtime.stop()


async def routed(service: Service) -> tuple[Any, Watched]:
    """A stream whose request was routed and is at its replica now."""
    call = service.call()
    for message in (HEADERS, BODY):
        await call.write(message)
        assert await call.read() is not grpc.aio.EOF
    return call, service.streams[-1]


@pytest.fixture
def _resets_may_be_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "RESET_WITHIN_S", 5.0)


@pytest.mark.usefixtures("_resets_may_be_late")
async def test_a_stream_that_is_ended_and_reset_is_sent_no_status(service: Service) -> None:
    for _ in range(20):
        call, stream = await routed(service)
        await call.done_writing()
        await asyncio.sleep(0.001)
        call.cancel()
        await asyncio.wait_for(stream.ended.wait(), 5)
        assert not stream.context.done()  # gRPC's word for having sent one
        assert stream.cut_reads == 0
    assert service.processor.streams == 0


async def test_a_stream_that_is_ended_only_gets_its_status(service: Service) -> None:
    call, stream = await routed(service)
    await call.done_writing()
    assert await asyncio.wait_for(call.read(), 5) is grpc.aio.EOF
    assert await call.code() == grpc.StatusCode.OK
    assert stream.context.done()


async def test_a_reset_cuts_no_read_and_ends_the_flight(service: Service) -> None:
    call, stream = await routed(service)
    async with asyncio.timeout(5):
        while stream.reads < 3:
            await asyncio.sleep(0.001)
    assert stream.task is not None
    stream.task.cancel()  # what gRPC does at a reset, sometimes before the read has its end
    call.cancel()
    await asyncio.wait_for(stream.ended.wait(), 5)
    async with asyncio.timeout(5):
        while sum(service.processor.runtime.status()["flights"].values()):
            await asyncio.sleep(0.01)
    assert stream.cut_reads == 0
    assert not stream.context.done()
    assert service.processor.streams == 0


async def test_what_cannot_be_read_after_a_decision_fails_the_stream_and_ends_the_flight(service: Service) -> None:
    call, stream = await routed(service)
    await call.write(b"\xff")
    with pytest.raises(grpc.aio.AioRpcError):
        await asyncio.wait_for(call.read(), 5)
    await asyncio.wait_for(stream.ended.wait(), 5)
    async with asyncio.timeout(5):
        while sum(service.processor.runtime.status()["flights"].values()):
            await asyncio.sleep(0.01)
    assert service.processor.streams == 0
    assert not service.processor._tasks


async def test_a_reset_while_an_answer_is_written_is_no_error(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    served = pb.ProcessingRequest(
        response_headers=pb.HttpHeaders(headers=HeaderMap(headers=[HeaderValue(key=":status", raw_value=b"200")]))
    ).SerializeToString()
    for _ in range(100):
        call, _ = await routed(service)
        await call.write(served)
        call.cancel()
    for stream in service.streams:
        await asyncio.wait_for(stream.ended.wait(), 5)
    await asyncio.sleep(0.1)
    gc.collect()  # asyncio reports what nobody was told when it is collected
    assert [record.message for record in caplog.records if record.name in ("asyncio", "grpc._cython.cygrpc")] == []


@pytest.mark.parametrize("steps_later", range(5))
async def test_a_decision_made_while_the_service_asks_for_time_is_sent(
    service: Service, monkeypatch: pytest.MonkeyPatch, steps_later: int
) -> None:
    """gRPC takes one message at a time: the decision must wait until the question is sent."""
    runtime, asking, more_time = service.processor.runtime, asyncio.Event(), messages.more_time
    prepare = runtime.prepare

    def ask(seconds: float) -> bytes:
        asking.set()
        return more_time(seconds)

    async def slow(body: bytes, endpoint: str, waiting: Any) -> Any:
        waiting()
        await asking.wait()
        for _ in range(steps_later):
            await asyncio.sleep(0)
        return await prepare(body, endpoint)

    monkeypatch.setattr(messages, "more_time", ask)
    monkeypatch.setattr(runtime, "prepare", slow)
    call = service.call()
    await call.write(HEADERS)
    await call.read()
    await call.write(BODY)
    kinds = [pb.ProcessingResponse.FromString(await asyncio.wait_for(call.read(), 5)) for _ in range(2)]
    assert [kind.HasField("override_message_timeout") for kind in kinds] == [True, False]
    assert kinds[1].HasField("request_body")
    call.cancel()
