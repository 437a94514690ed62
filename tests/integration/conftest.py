"""One real LiteLLM proxy over stub engines, for all the tests that only ask it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.litellm_proxy import CALLBACK, Proxy, deployment, proxy_config, running, wait_until
from tests.stub_engine import StubEngine

# What an operator does through LiteLLM's admin API needs its database; these routes call the same methods.
ADMIN_CALLBACK = """
from litellm.integrations.custom_logger import CustomLogger
from litellm.proxy import proxy_server
from litellm.types.router import Deployment
from fastapi import Request

async def update_settings(request: Request):
    proxy_server.llm_router.update_settings(**await request.json())
    return proxy_server.llm_router.get_settings()

async def add_deployment(request: Request):
    proxy_server.llm_router.upsert_deployment(Deployment(**await request.json()))

async def delete_deployment(request: Request):
    proxy_server.llm_router.delete_deployment(id=(await request.json())["id"])

proxy_server.app.add_api_route("/test/settings", update_settings, methods=["POST"])
proxy_server.app.add_api_route("/test/add", add_deployment, methods=["POST"])
proxy_server.app.add_api_route("/test/delete", delete_deployment, methods=["POST"])

callback = CustomLogger()
"""

ARGS: dict[str, Any] = {
    "response_headers": "debug",
    "metrics": {"path": None},
    "probe": {"interval_s": 0.2},
    "health": {"backoff_s": 0.2, "backoff_max_s": 0.5},
}


def messages_deployment(group: str, engine: StubEngine) -> dict[str, Any]:
    """A deployment that speaks Anthropic's messages itself."""
    params = {"model": f"anthropic/{group}", "api_base": engine.url, "api_key": "none"}
    return {"model_name": group, "litellm_params": params, "model_info": {"gorgo": {"name": engine.name}}}


def with_params(entry: dict[str, Any], **params: Any) -> dict[str, Any]:
    """An entry of model_list with further litellm_params."""
    return {**entry, "litellm_params": {**entry["litellm_params"], **params}}


@pytest.fixture(scope="session")
def engine_pair() -> Iterator[tuple[StubEngine, StubEngine]]:
    with StubEngine("near") as near, StubEngine("far") as far:
        yield near, far


@pytest.fixture(scope="session")
def gateway_process(
    engine_pair: tuple[StubEngine, StubEngine], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("gateway")
    (folder / "admin.py").write_text(ADMIN_CALLBACK)

    def entry(group: str, engine: StubEngine, **params: Any) -> dict[str, Any]:
        return with_params(deployment(group, engine.url, name=engine.name, region=f"{engine.name}-region"), **params)

    near, far = engine_pair
    model_list = [entry(group, engine) for group in ("m", "plain", "retried") for engine in engine_pair]
    model_list += [entry("limited", engine, cooldown_time=60) for engine in engine_pair]
    model_list += [messages_deployment("am", engine) for engine in engine_pair]
    model_list += [entry("solo", near), messages_deployment("solo-am", near)]
    model_list += [entry("vm", engine, model="hosted_vllm/vm") for engine in engine_pair]
    model_list += [entry("tagged", near, tags=["a"]), entry("tagged", far, tags=["b"])]
    model_list += [entry("ordered", near, order=2), entry("ordered", far, order=1)]
    model_list += [entry("mixed", near), unpriced("mixed"), unpriced("unpriced")]
    model_list += [deployment("gone", "http://127.0.0.1:1", name="gone"), entry("half-gone", near)]
    model_list += [deployment("half-gone", "http://127.0.0.1:1", name="gone")]
    config = proxy_config(
        model_list,
        litellm_settings={
            "callbacks": [CALLBACK, "admin.callback"],
            "cache": True,
            "cache_params": {"type": "local", "mode": "default_off"},
        },
        router_settings={
            "routing_strategy_args": ARGS,
            "routing_groups": [{"group_name": "g", "models": ["plain"], "routing_strategy": "simple-shuffle"}],
            "num_retries": 2,
            "retry_after": 0,
            "cooldown_time": 1,
            "enable_tag_filtering": True,
            "fallbacks": [{"gone": ["m"]}, {"retried": ["plain"]}],
        },
    )
    with running(config, folder) as proxy:
        yield proxy


def unpriced(group: str) -> dict[str, Any]:
    """A deployment whose endpoint only LiteLLM's provider code knows."""
    return {"model_name": group, "litellm_params": {"model": "openai/x", "api_key": "none", "mock_response": "mocked"}}


@pytest.fixture
def engines(engine_pair: tuple[StubEngine, StubEngine]) -> tuple[StubEngine, StubEngine]:
    """The engines behind the gateway, well behaved."""
    for engine in engine_pair:
        engine.reset()
    return engine_pair


@pytest.fixture
def gateway(gateway_process: Proxy, engines: tuple[StubEngine, StubEngine]) -> Iterator[Proxy]:
    """The gateway with its settings as configured; after the test no flight may be open."""
    set_args(gateway_process)
    yield gateway_process
    wait_until(
        lambda: sum(gateway_process.status()["flights"].values()) == 0,
        10.0,
        "all flights to end",
        lambda: str(gateway_process.status()["flights"]),
    )


def set_args(gateway: Proxy, **changes: Any) -> dict[str, Any]:
    """Change routing_strategy_args; returns LiteLLM's settings after it."""
    answer = gateway.post("/test/settings", {"routing_strategy_args": {**ARGS, **changes}})
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]
