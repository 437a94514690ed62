"""`gorgo bench envoy`: that all variants are measured, and that the service that does nothing leaves nothing behind."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from gorgo_plugin.envoy_ext_proc.messages import UNCHANGED
from gorgo_plugin.envoy_ext_proc.names import SERVICE
from gorgo_plugin.envoy_ext_proc.server import grpc_service
from gorgo_plugin.fleet import bench_envoy
from gorgo_plugin.fleet.bench_envoy_children import idle
from gorgo_plugin.settings import EnvoySettings

HEADERS = pb.ProcessingRequest(request_headers={})


def piece(last: bool) -> pb.ProcessingRequest:
    return pb.ProcessingRequest(observability_mode=True, response_body={"body": b"data: {}", "end_of_stream": last})


async def test_the_service_that_does_nothing_answers_and_ends_what_it_watches_with_its_last_piece() -> None:
    # What it left open Envoy would end 5 s later, and the work of that would be counted for another variant.
    async with (
        grpc_service(EnvoySettings(listen="127.0.0.1:0"), idle) as (_server, _checks, listening),
        grpc.aio.insecure_channel(listening) as channel,
        asyncio.timeout(10),
    ):
        method = channel.stream_stream(f"/{SERVICE}/Process", request_serializer=pb.ProcessingRequest.SerializeToString)
        asked, watched = method(), method()
        await asked.write(HEADERS)
        assert await asked.read() == UNCHANGED["request_headers"]
        for last in (False, True):
            assert not watched.done()
            await watched.write(piece(last))
        assert await watched.read() is grpc.aio.EOF
        assert await watched.code() == grpc.StatusCode.OK
        assert not asked.done()


async def test_each_variant_is_measured_under_each_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_envoy, "LOADS", {"few": bench_envoy.Load(2, 8_000, 2, 1)})
    said: list[str] = []
    (result,) = await bench_envoy.bench(tmp_path, 1, said.append)
    assert said == ["round 1 of 1: few"]
    assert result.load == "few"
    assert list(result.figures) == ["no filter", "does nothing", "gorgo"]
    cpu_ms = {variant: figures.cpu_ms for variant, figures in result.figures.items()}
    assert cpu_ms["no filter"] == 0.0
    assert cpu_ms["does nothing"] > 0.0
    assert result.cpu_ratio_total == pytest.approx(cpu_ms["gorgo"] / cpu_ms["does nothing"])
    assert all(figures.requests_per_s > 0.0 for figures in result.figures.values())
