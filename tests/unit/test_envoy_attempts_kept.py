"""What the service keeps of requests that are over."""

from __future__ import annotations

import asyncio
import weakref

import pytest

from gorgo_plugin import Prompt, Settings
from gorgo_plugin.envoy_ext_proc import processor
from gorgo_plugin.envoy_ext_proc.attempts import EnvoyAttempt
from gorgo_plugin.envoy_ext_proc.messages import Head
from gorgo_plugin.envoy_ext_proc.processor import Processor
from gorgo_plugin.prompt.endpoints import CHAT
from gorgo_plugin.runtime import Runtime


async def test_an_attempt_is_let_go_of_soon_after_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "KEPT_S", 0.05)
    runtime = Runtime(Settings.model_validate({"replicas": [{"name": "a", "url": "http://127.0.0.1:1"}]}))
    try:
        service, prompt = Processor(runtime), Prompt(tokens=range(100), model="m")
        attempt = service.remember(runtime.router.route(prompt), prompt, Head(CHAT, ""), reads_usage=True)
        service.left(attempt)
        kept = weakref.ref(attempt)
        del attempt
        assert kept() is not None
        async with asyncio.timeout(5):
            while kept() is not None:
                await asyncio.sleep(0.01)
    finally:
        await runtime.stop()


async def test_a_fault_at_the_end_of_one_attempt_keeps_no_other_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "KEPT_S", 0.05)
    reported: list[BaseException | None] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, told: reported.append(told.get("exception")))
    runtime = Runtime(Settings.model_validate({"replicas": [{"name": "a", "url": "http://127.0.0.1:1"}]}))
    try:
        service, prompt = Processor(runtime), Prompt(tokens=range(100), model="m")

        async def one() -> None:
            attempt = service.remember(runtime.router.route(prompt), prompt, Head(CHAT, ""), reads_usage=True)

            async def steps() -> None:
                service.left(attempt)

            await service.follow(attempt, steps())

        faults = iter([ZeroDivisionError])
        settle = EnvoyAttempt.settle

        def settled(attempt: EnvoyAttempt) -> None:
            settle(attempt)
            for fault in faults:
                raise fault

        monkeypatch.setattr(EnvoyAttempt, "settle", settled)
        async with asyncio.timeout(5):
            await asyncio.gather(one(), one(), one())
            while service._attempts or service._left:
                await asyncio.sleep(0.01)
        assert [type(error) for error in reported] == [ZeroDivisionError]
    finally:
        await runtime.stop()
