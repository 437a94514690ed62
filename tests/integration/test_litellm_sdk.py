"""gorgo in litellm.Router without the proxy: async and sync."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gorgo_plugin.runtime import Runtime
from tests.litellm_proxy import deployment, wait_until
from tests.stub_engine import Behaviour, StubEngine

Engines = tuple[StubEngine, StubEngine]
# Long enough that its prefill outweighs any round trip a busy machine may measure over loopback.
MESSAGES = [{"role": "user", "content": "where does the river go? " * 800}]


@pytest.fixture(scope="module")
def pair() -> Iterator[Engines]:
    with StubEngine("near") as near, StubEngine("far") as far:
        yield near, far


@pytest.fixture
def make(pair: Engines) -> Iterator[Callable[..., tuple[Any, Runtime]]]:
    """A litellm.Router with gorgo over the two engines, and its runtime."""
    import litellm

    from gorgo_plugin.litellm_strategy import callback
    from gorgo_plugin.litellm_strategy.plugin import plugin

    for engine in pair:
        engine.reset()
    runtimes = []

    def build(args: dict[str, Any] | None = None, **settings: Any) -> tuple[Any, Runtime]:
        router = litellm.Router(
            model_list=[deployment("m", engine.url, name=engine.name) for engine in pair],
            routing_strategy="gorgo",
            routing_strategy_args={"metrics": {"path": None}, **(args or {})},
            retry_after=0,
            **{"num_retries": 2, **settings},
        )
        runtime = plugin().adapter(router).shares[0].runtime
        runtimes.append(runtime)
        return router, runtime

    yield build
    litellm.callbacks[:] = [one for one in litellm.callbacks if one is not callback]
    for runtime in runtimes:
        runtime.close()


def flights(runtime: Runtime) -> int:
    from gorgo_plugin.litellm_strategy.plugin import plugin

    plugin().status()  # ends what is left of requests that are gone
    return sum(runtime.router.snapshot()["flights"].values())


async def at_rest(runtime: Runtime) -> None:
    async with asyncio.timeout(10):
        while flights(runtime):
            await asyncio.sleep(0.01)


CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("acompletion", {"messages": MESSAGES}),
    "streamed chat": ("acompletion", {"messages": MESSAGES, "stream": True}),
    "completion": ("atext_completion", {"prompt": MESSAGES[0]["content"]}),
    "completion of token ids": ("atext_completion", {"prompt": list(range(100, 5100))}),
    "embedding": ("aembedding", {"input": MESSAGES[0]["content"]}),
    "responses": ("aresponses", {"input": MESSAGES[0]["content"]}),
    "streamed responses": ("aresponses", {"input": MESSAGES[0]["content"], "stream": True}),
    "messages": ("aanthropic_messages", {"messages": MESSAGES, "max_tokens": 8}),
    "streamed messages": ("aanthropic_messages", {"messages": MESSAGES, "max_tokens": 8, "stream": True}),
}


@pytest.mark.parametrize("call", CALLS)
async def test_an_async_call_is_routed_and_its_prompt_remembered(make: Any, call: str) -> None:
    router, runtime = make()
    method, fields = CALLS[call]
    for _ in range(2):
        answer = await getattr(router, method)(model="m", **fields)
        if fields.get("stream"):
            async for _ in answer:
                pass
        await at_rest(runtime)
    snapshot = runtime.router.snapshot()
    assert snapshot["counters"]["routed"] == 2
    assert snapshot["counters"]["unknown_flights"] == 0
    held = [replica["models"]["m"]["index_tokens"] for replica in snapshot["replicas"].values()]
    assert max(held) > 0
    assert min(held) == 0  # the second call went where the first had been


SYNC_CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("completion", {"messages": MESSAGES}),
    "streamed chat": ("completion", {"messages": MESSAGES, "stream": True}),
    "embedding": ("embedding", {"input": MESSAGES[0]["content"]}),
    "responses": ("responses", {"input": MESSAGES[0]["content"]}),
}


@pytest.mark.parametrize("call", SYNC_CALLS)
def test_a_sync_call_is_routed_without_a_running_loop(make: Any, call: str) -> None:
    router, runtime = make()
    method, fields = SYNC_CALLS[call]
    answer = getattr(router, method)(model="m", **fields)
    if fields.get("stream"):
        assert [chunk.choices[0].delta.content for chunk in answer if chunk.choices[0].delta.content]
    wait_until(lambda: flights(runtime) == 0)
    assert runtime.router.snapshot()["counters"]["routed"] == 1


def test_a_sync_failure_is_retried_elsewhere_and_counted(make: Any, pair: Engines) -> None:
    router, runtime = make()
    router.completion(model="m", messages=MESSAGES)
    wait_until(lambda: flights(runtime) == 0)  # LiteLLM's thread for callbacks tells that the call is over
    home, other = pair if pair[0].requests else pair[::-1]
    home.behaviour = Behaviour(status=500)
    router.completion(model="m", messages=MESSAGES)
    assert (len(home.requests), len(other.requests)) == (2, 1)
    wait_until(lambda: flights(runtime) == 0)
    assert runtime.router.snapshot()["replicas"][home.name]["health"]["failures_in_a_row"] == 1


def test_sync_calls_of_many_threads_do_not_mix(make: Any) -> None:
    router, runtime = make()
    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(lambda _: router.completion(model="m", messages=MESSAGES), range(24)))
    assert [answer.choices[0].message.content for answer in answers] == ["hi"] * 24
    wait_until(lambda: flights(runtime) == 0)
    assert runtime.router.snapshot()["counters"]["routed"] == 24


async def test_concurrent_calls_are_requests_of_their_own(make: Any, pair: Engines) -> None:
    router, runtime = make()
    await asyncio.gather(*(router.acompletion(model="m", messages=MESSAGES) for _ in range(12)))
    await at_rest(runtime)
    snapshot = runtime.router.snapshot()
    assert snapshot["counters"]["routed"] == 12
    assert all(replica["health"]["failures_in_a_row"] == 0 for replica in snapshot["replicas"].values())


async def test_a_stream_that_is_dropped_ends_its_flight(make: Any, pair: Engines) -> None:
    for engine in pair:
        engine.behaviour = Behaviour(tokens=400, between_tokens_s=0.01)
    router, runtime = make()
    stream = await router.acompletion(model="m", messages=MESSAGES, stream=True)
    await anext(aiter(stream))
    assert flights(runtime) == 1
    del stream
    async with asyncio.timeout(10):
        while flights(runtime):
            gc.collect()
            await asyncio.sleep(0.01)


async def test_a_cancelled_call_ends_its_flight(make: Any, pair: Engines) -> None:
    for engine in pair:
        engine.behaviour = Behaviour(before_headers_s=5.0)
    router, runtime = make()
    call = asyncio.create_task(router.acompletion(model="m", messages=MESSAGES))
    async with asyncio.timeout(10):
        while not pair[0].requests and not pair[1].requests:
            await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    del call
    async with asyncio.timeout(10):
        while flights(runtime):
            gc.collect()
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(500, "rejected"), (429, "rejected"), (401, "rejected"), (400, "invalid"), (422, "invalid")],
)
async def test_a_status_of_the_engine_is_judged(
    make: Any, pair: Engines, status: int, kind: str, failed: list[str]
) -> None:
    for engine in pair:
        engine.behaviour = Behaviour(status=status)
    router, runtime = make(num_retries=0)
    with pytest.raises(Exception, match=f"injected {status}"):
        await router.acompletion(model="m", messages=MESSAGES)
    await at_rest(runtime)
    assert failed == [kind]


async def test_a_slow_engine_is_a_timeout(make: Any, pair: Engines, failed: list[str]) -> None:
    for engine in pair:
        engine.behaviour = Behaviour(before_headers_s=5.0)
    router, runtime = make(num_retries=0, timeout=1.5)
    with pytest.raises(Exception, match=r"[Tt]imed? ?out"):
        await router.acompletion(model="m", messages=MESSAGES)
    await at_rest(runtime)
    assert failed == ["timeout"]


async def test_a_closed_port_is_unreached(make: Any, failed: list[str]) -> None:
    import litellm

    from gorgo_plugin.litellm_strategy.plugin import plugin

    make()
    router = litellm.Router(
        model_list=[deployment("m", "http://127.0.0.1:1"), deployment("m", "http://127.0.0.1:2")],
        routing_strategy="gorgo",
        num_retries=1,
        retry_after=0,
        disable_cooldowns=True,
    )
    with pytest.raises(litellm.exceptions.InternalServerError):
        await router.acompletion(model="m", messages=MESSAGES)
    runtime = plugin().adapter(router).shares[0].runtime
    await at_rest(runtime)
    assert failed == ["unreached", "unreached"]
    health = [replica["health"] for replica in runtime.router.snapshot()["replicas"].values()]
    assert [one["failures_in_a_row"] for one in health] == [1, 1]
    runtime.close()


@pytest.fixture
def failed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of failure counted during the test."""
    from gorgo_plugin.runtime.metrics import Metrics

    kinds: list[str] = []
    monkeypatch.setattr(Metrics, "failed", lambda self, replica, kind: kinds.append(kind))
    return kinds


async def test_an_error_of_ours_leaves_the_choice_to_litellm(
    make: Any, pair: Engines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    router, runtime = make()

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("as it were")

    monkeypatch.setattr(runtime.router, "route", broken)
    for _ in range(3):
        answer = await router.acompletion(model="m", messages=MESSAGES)
        assert answer.choices[0].message.content == "hi"
    assert sum("simple-shuffle serves" in record.message for record in caplog.records) == 1


async def test_a_call_without_a_prompt_is_left_to_litellm(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    router, runtime = make()
    reasons: list[str] = []
    monkeypatch.setattr(runtime.metrics, "fell_back", reasons.append)
    await router.async_get_available_deployment(model="m", request_kwargs={})
    assert reasons == ["no-prompt"]


def test_a_router_that_is_dropped_leaves_no_thread(make: Any) -> None:
    import litellm

    before = set(threading.enumerate())

    def ours() -> list[threading.Thread]:
        return [one for one in threading.enumerate() if one not in before and one.name.startswith("gorgo-")]

    router = litellm.Router(model_list=[deployment("m", "http://127.0.0.1:1")], routing_strategy="gorgo")
    assert ours()
    # LiteLLM's global callbacks hold a router for good; without them nothing does.
    for name in ("success_callback", "_async_success_callback", "failure_callback", "_async_failure_callback"):
        kept = [one for one in getattr(litellm, name) if getattr(one, "__self__", None) is not router]
        getattr(litellm, name)[:] = kept
    del router
    deadline = time.monotonic() + 10
    while ours():
        gc.collect()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_routing_groups_of_equal_settings_share_one_runtime(make: Any, pair: Engines) -> None:
    import litellm

    from gorgo_plugin.litellm_strategy.plugin import plugin

    make()
    models = [deployment(name, engine.url, name=engine.name) for name in ("a", "b", "c") for engine in pair]
    groups = [
        {"group_name": "g1", "models": ["a"], "routing_strategy": "gorgo"},
        {"group_name": "g2", "models": ["b"], "routing_strategy": "gorgo", "routing_strategy_args": {}},
    ]
    router = litellm.Router(
        model_list=models,
        routing_groups=groups,
        routing_strategy="gorgo",
        routing_strategy_args={"policy": "nearest"},
    )
    shares = plugin().adapter(router).shares
    assert sorted(sorted(share.models) for share in shares) == [["a", "b"], ["c"]]
    assert {share.runtime.settings.policy for share in shares} == {"gorgo", "nearest"}
    for share in shares:
        share.runtime.close()


async def test_a_strategy_asked_for_by_one_request_alone_is_served(make: Any, pair: Engines) -> None:
    import litellm

    from gorgo_plugin.litellm_strategy.plugin import plugin

    make()
    router = litellm.Router(model_list=[deployment("m", engine.url, name=engine.name) for engine in pair])
    await router.acompletion(model="m", messages=MESSAGES, routing_strategy="gorgo")
    shares = plugin().adapter(router).shares
    assert [share.runtime.router.snapshot()["counters"]["routed"] for share in shares] == [1]
    for share in shares:
        share.runtime.close()


async def test_a_strategy_switched_at_run_time_is_followed(make: Any, pair: Engines) -> None:
    import litellm

    from gorgo_plugin.litellm_strategy.plugin import plugin

    make()
    router = litellm.Router(model_list=[deployment("m", engine.url, name=engine.name) for engine in pair])
    router.update_settings(routing_strategy="gorgo", routing_strategy_args={"polcy": "nearest"})
    assert router.routing_strategy == "simple-shuffle"  # the last good state
    assert "polcy" in str(plugin().adapter(router).settings_error)
    router.update_settings(routing_strategy="gorgo", routing_strategy_args={"policy": "nearest"})
    await router.acompletion(model="m", messages=MESSAGES)
    runtime = plugin().adapter(router).shares[0].runtime
    assert runtime.router.snapshot()["counters"]["routed"] == 1
    router.update_settings(routing_strategy="simple-shuffle")
    assert not plugin().adapter(router).shares
    await router.acompletion(model="m", messages=MESSAGES)
    assert runtime.router.snapshot()["counters"]["routed"] == 1
    router.update_settings(routing_groups=[{"group_name": "g", "models": ["m"], "routing_strategy": "gorgo"}])
    assert [share.models for share in plugin().adapter(router).shares] == [{"m"}]
    for share in plugin().adapter(router).shares:
        share.runtime.close()


async def test_the_callback_need_not_be_registered_by_hand(make: Any, pair: Engines) -> None:
    import litellm

    from gorgo_plugin.litellm_strategy import callback

    assert callback not in litellm.callbacks
    router, runtime = make()
    assert litellm.callbacks.count(callback) == 1
    await router.acompletion(model="m", messages=MESSAGES)
    await at_rest(runtime)
