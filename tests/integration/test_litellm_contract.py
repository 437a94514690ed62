"""What this package relies on in LiteLLM, on whichever release is installed: in effect, or clearly not.

`make test-litellm-versions` runs this file on the supported releases, with LiteLLM of one environment over the other
dependencies of the tested one.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.litellm_proxy import ROOT, Proxy, deployment, proxy_config, running
from tests.stub_engine import StubEngine

RELEASE = tuple(int(part) for part in importlib.metadata.version("litellm").split(".")[:2])
# Releases on which the extension is known to work. On others it must be either in effect or clearly inactive.
ACTIVE = (1, 84) <= RELEASE <= (1, 109)
# Before this one the proxy loads callbacks from files beside its configuration only.
IMPORTS_CALLBACKS = RELEASE >= (1, 94)
# Before this one a stream that breaks looks like one that ends, for every strategy.
SEES_BREAKS = RELEASE >= (1, 95)
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[StubEngine, StubEngine]]:
    with StubEngine("near") as near, StubEngine("far") as far:
        yield near, far


@pytest.fixture(scope="module")
def plugin() -> Any:
    import litellm

    from gorgo_plugin.litellm_strategy import callback
    from gorgo_plugin.litellm_strategy.plugin import plugin

    litellm.callbacks.append(callback)
    yield plugin()
    litellm.callbacks.remove(callback)


@pytest.fixture
def make_router(plugin: Any, engines: tuple[StubEngine, StubEngine]) -> Any:
    import litellm

    for engine in engines:
        engine.reset()
    return lambda **settings: litellm.Router(
        model_list=[deployment("m", engine.url, region=engine.name) for engine in engines],
        num_retries=2,
        retry_after=0,
        **settings,
    )


def needs_effect(plugin: Any) -> None:
    if not ACTIVE and plugin.inactive is not None:
        pytest.skip(plugin.inactive)
    assert plugin.inactive is None


def routed(plugin: Any) -> int:
    return sum(share.runtime.router.snapshot()["counters"]["routed"] for share in shares(plugin))


def flights(plugin: Any) -> int:
    return sum(plugin.status()["flights"].values())


def shares(plugin: Any) -> list[Any]:
    return [share for adapter in plugin._adapters.values() for share in adapter.shares]


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def test_the_extension_is_in_effect_on_a_known_release(plugin: Any) -> None:
    assert plugin.inactive is None or not ACTIVE, plugin.inactive


async def test_an_async_request_is_routed_and_its_flight_ends(plugin: Any, make_router: Any) -> None:
    needs_effect(plugin)
    router = make_router(routing_strategy="gorgo")
    before = routed(plugin)
    answer = await router.acompletion(model="m", messages=MESSAGES)
    assert answer.choices[0].message.content == "hi"
    assert routed(plugin) == before + 1
    await until(lambda: flights(plugin) == 0)


def test_a_sync_request_is_routed_and_its_flight_ends(plugin: Any, make_router: Any) -> None:
    needs_effect(plugin)
    router = make_router(routing_strategy="gorgo")
    before = routed(plugin)
    answer = router.completion(model="m", messages=MESSAGES)
    assert answer.choices[0].message.content == "hi"
    assert routed(plugin) == before + 1
    asyncio.run(until(lambda: flights(plugin) == 0))


async def test_a_streamed_request_ends_its_flight(plugin: Any, make_router: Any) -> None:
    needs_effect(plugin)
    router = make_router(routing_strategy="gorgo")
    stream = await router.acompletion(model="m", messages=MESSAGES, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "w0 w1 w2 w3 "
    await until(lambda: flights(plugin) == 0)


async def test_a_retry_goes_to_the_replica_not_tried_yet(
    plugin: Any, make_router: Any, engines: tuple[StubEngine, StubEngine]
) -> None:
    needs_effect(plugin)
    router = make_router(routing_strategy="gorgo", disable_cooldowns=True)
    engines[0].behaviour.status = engines[1].behaviour.status = 500
    with pytest.raises(Exception, match="injected 500"):
        await router.acompletion(model="m", messages=MESSAGES)
    first_two = len(engines[0].requests), len(engines[1].requests)
    assert min(first_two) >= 1, first_two
    await until(lambda: flights(plugin) == 0)


async def test_a_stream_that_breaks_before_its_first_token_is_tried_elsewhere(
    plugin: Any, make_router: Any, engines: tuple[StubEngine, StubEngine]
) -> None:
    needs_effect(plugin)
    if not SEES_BREAKS:
        pytest.skip("this LiteLLM takes a broken stream for an ended one")
    router = make_router(routing_strategy="gorgo", disable_cooldowns=True)
    engines[0].behaviour.break_after_tokens = engines[1].behaviour.break_after_tokens = 0
    with pytest.raises(Exception, match="not completed"):
        await router.acompletion(model="m", messages=MESSAGES, stream=True)
    attempts = len(engines[0].requests), len(engines[1].requests)
    assert min(attempts) >= 1, attempts
    await until(lambda: flights(plugin) == 0)


async def test_a_routing_group_alone_uses_gorgo(plugin: Any, make_router: Any) -> None:
    needs_effect(plugin)
    import litellm

    make_router()
    models = [deployment(name, url) for name in ("a", "b") for url in ("http://127.0.0.1:1", "http://127.0.0.1:2")]
    group = {"group_name": "g", "models": ["a"], "routing_strategy": "gorgo", "routing_strategy_args": {}}
    router = litellm.Router(model_list=models, routing_groups=[group])
    adapter = plugin.adapter(router)
    assert [share.models for share in adapter.shares] == [{"a"}]


def test_new_arguments_take_effect_and_bad_ones_keep_the_last_good_state(plugin: Any, make_router: Any) -> None:
    needs_effect(plugin)
    router = make_router(routing_strategy="gorgo", routing_strategy_args={"policy": "nearest"})
    adapter = plugin.adapter(router)
    router.update_settings(routing_strategy_args={"policy": "random"})
    assert adapter.shares[0].runtime.settings.policy == "random"
    router.update_settings(routing_strategy_args={"polcy": "nearest"}, num_retries=1)
    assert adapter.shares[0].runtime.settings.policy == "random"
    assert "polcy: unknown setting (did you mean 'policy'?)" in adapter.settings_error
    assert router.routing_strategy_args == {"policy": "random"}
    assert router.num_retries == 1


def test_a_router_of_another_strategy_is_left_alone(plugin: Any, make_router: Any) -> None:
    before = routed(plugin)
    answer = make_router(routing_strategy="simple-shuffle").completion(model="m", messages=MESSAGES)
    assert answer.choices[0].message.content == "hi"
    assert routed(plugin) == before


def test_an_unknown_strategy_is_still_refused(plugin: Any, make_router: Any) -> None:
    with pytest.raises(ValueError, match=r"[Ii]nvalid"):
        make_router(routing_strategy="gargo")


INACTIVE_PROGRAM = f"""
import asyncio, logging, sys
logging.basicConfig()
import litellm
core = getattr(litellm.Router, "_core_class", litellm.Router)
names = dict(core._DEFAULT_SELECTOR_ATTR_BY_STRATEGY)
del core._select_deployment_async  # as in a LiteLLM whose core moved once more
from gorgo_plugin.litellm_strategy import callback
from gorgo_plugin.litellm_strategy.plugin import plugin
from tests.litellm_proxy import deployment
router = litellm.Router(
    model_list=[deployment("m", sys.argv[1])],
    routing_strategy="gorgo",
    routing_groups=[{{"group_name": "g", "models": ["m"], "routing_strategy": "gorgo"}}],
)
router.update_settings(routing_strategy="gorgo", num_retries=0)
answer = router.completion(model="m", messages={MESSAGES!r})
status = plugin().status()
print(answer.choices[0].message.content, router.routing_strategy, status["active"], status["reason"])
assert core._DEFAULT_SELECTOR_ATTR_BY_STRATEGY == names  # all put back
from prometheus_client import generate_latest
print(generate_latest().decode())
"""


def test_where_the_extension_has_no_effect_the_router_serves_by_simple_shuffle(
    engines: tuple[StubEngine, StubEngine],
) -> None:
    engines[0].reset()
    done = subprocess.run(
        [sys.executable, "-c", INACTIVE_PROGRAM, engines[0].url],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "hi simple-shuffle False LiteLLM" in done.stdout
    assert "gorgo is inactive, LiteLLM's own simple-shuffle serves" in done.stderr
    assert 'gorgo_active{policy="gorgo"' in done.stdout
    metric = next(line for line in done.stdout.splitlines() if line.startswith("gorgo_active{"))
    assert metric.endswith(" 0.0")


def test_the_proxy_starts_and_answers(engines: tuple[StubEngine, StubEngine], tmp_path: Path) -> None:
    for engine in engines:
        engine.reset()
    config = proxy_config([deployment("m", engine.url, region=engine.name) for engine in engines])
    if not IMPORTS_CALLBACKS:
        shutil.copy(ROOT / "litellm_config" / "gorgo_callback.py", tmp_path)
        config["litellm_settings"]["callbacks"] = ["gorgo_callback.callback"]
    with running(config, tmp_path) as proxy:
        for stream in (False, True):
            answer = proxy.post("/v1/chat/completions", {"model": "m", "messages": MESSAGES, "stream": stream})
            assert answer.status_code == 200, answer.text
            assert_routed(proxy, answer.headers.get("x-gorgo-region"))


def assert_routed(proxy: Proxy, region: str | None) -> None:
    status = proxy.status()
    if status["active"]:
        assert region in ("near", "far")
    else:
        assert not ACTIVE, status["reason"]
        assert "gorgo is inactive" in proxy.log_text()
