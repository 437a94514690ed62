"""The gateways a fleet can stand behind, LiteLLM and Envoy: each with its own strategies and with our policies."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from gorgo_plugin.envoy_ext_proc.envoy_yaml import envoy_config
from gorgo_plugin.fleet.envoy import all_well, envoy_proxy, ext_proc_service, gateway_settings, own_balancing
from gorgo_plugin.fleet.loadgen import Target
from gorgo_plugin.fleet.processes import Child, free_port, program, running, until
from gorgo_plugin.settings import Settings

MODEL = "m"
API_KEY = "sk-demo"  # guards nothing: the gateway listens on the loopback for as long as the demo runs
PROBE = {"path": "/health"}  # the injected round trip shows in an answer, not in a TCP connect over the loopback
# No look-ups on the internet, no noise in the log, and a stack in it should the interpreter crash.
_ENVIRONMENT = {
    "PYTHONFAULTHANDLER": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "LITELLM_LOG": "ERROR",
    "NO_DOCS": "True",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the demo's table: a strategy of the gateway's own, in its words, or a policy of ours."""

    name: str
    strategy: str | None = None
    policy: str | None = None


@dataclass(frozen=True, slots=True)
class Setup:
    """What the gateway of a row stands in front of, and how it runs.

    Attributes:
        replicas: region name -> base URL.
        kv_tokens: cache of each replica.
        seed: seeds our policies.
        folder: for its configuration and logs.
        workers: processes of LiteLLM.
    """

    replicas: Mapping[str, str]
    kv_tokens: int
    seed: int
    folder: Path
    workers: int = 1


Serving = tuple[Target, list[Child]]  # where requests go, and the processes without which none is answered


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway and the rows it can run.

    Attributes:
        title: its name as people write it.
        rows: by name.
        default_rows: those of the README.
        serve: runs it with a row's strategy for the length of the block.
    """

    title: str
    rows: Mapping[str, Row]
    default_rows: tuple[str, ...]
    serve: Callable[[Row, Setup], contextlib.AbstractAsyncContextManager[Serving]]


_POLICIES = (
    "session-affinity",
    "nearest",
    "random",
    "least-load",
    "least-request",
    "prefix-cache",
    "prefix-similarity",
    "gorgo-v1-proxy",
    "gorgo-v1-distributed",
    "gorgo-paper",
    "gorgo",
)


def _rows(strategies: Mapping[str, str]) -> dict[str, Row]:
    """The gateway's own strategies and all our policies; where both have a name, ours becomes `plugin-...`."""
    own = {name: Row(name, strategy=strategy) for name, strategy in strategies.items()}
    ours = {f"plugin-{policy}" if policy in own else policy: policy for policy in _POLICIES}
    return own | {name: Row(name, policy=policy) for name, policy in ours.items()}


# LiteLLM

ROWS = _rows({name: name for name in ("simple-shuffle", "latency-based-routing", "least-busy")})


@contextlib.asynccontextmanager
async def _litellm(row: Row, setup: Setup) -> AsyncIterator[Serving]:
    config = litellm_config(row, setup.replicas, setup.kv_tokens, setup.seed)
    async with litellm_proxy(config, setup.folder, row.name, setup.workers) as (target, proxy):
        yield target, [proxy]


def litellm_config(row: Row, replicas: Mapping[str, str], kv_tokens: int, seed: int) -> dict[str, Any]:
    """LiteLLM's configuration for a row; `replicas` maps region names to base URLs."""
    router: dict[str, Any] = {"routing_strategy": row.strategy or "gorgo"}
    config: dict[str, Any] = {
        "model_list": [_deployment(row, name, url, kv_tokens) for name, url in replicas.items()],
        "general_settings": {"master_key": API_KEY},
        "router_settings": router,
    }
    if row.policy is not None:
        config["litellm_settings"] = {"callbacks": ["gorgo_plugin.litellm_strategy.callback"]}
        router["routing_strategy_args"] = {"policy": row.policy, "seed": seed, "probe": dict(PROBE)}
    return config


def _deployment(row: Row, name: str, url: str, kv_tokens: int) -> dict[str, Any]:
    deployment: dict[str, Any] = {
        "model_name": MODEL,
        "litellm_params": {"model": f"hosted_vllm/{MODEL}", "api_base": f"{url}/v1", "api_key": "none"},
    }
    if row.policy is not None:
        deployment["model_info"] = {"gorgo": {"name": name, "region": name, "kv_tokens": kv_tokens}}
    return deployment


@contextlib.asynccontextmanager
async def litellm_proxy(
    config: dict[str, Any], folder: Path, name: str, workers: int = 1
) -> AsyncIterator[tuple[Target, Child]]:
    """Run `litellm --config` for the length of the block; its configuration and log stay in `folder`.

    Raises:
        ProcessError: it is not installed, or did not become ready.
    """
    executable = program("litellm", "the demo needs: pip install 'gorgo-plugin[demo]'")
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    port = free_port()
    command = [executable, "--config", str(path), "--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"]
    if workers > 1:
        command += ["--num_workers", str(workers)]
    target = Target(f"http://127.0.0.1:{port}", MODEL, API_KEY)
    async with (
        running(f"litellm ({name})", command, folder / f"{name}.log", _ENVIRONMENT) as child,
        aiohttp.ClientSession() as session,
    ):

        async def alive() -> bool:
            try:
                async with session.get(f"{target.url}/health/liveliness") as response:
                    return response.status == 200
            except aiohttp.ClientError:
                return False

        await until(child, alive)
        yield target, child


# Envoy

ENVOY_ROWS = _rows({"round-robin": "ROUND_ROBIN", "least-request": "LEAST_REQUEST"})


@contextlib.asynccontextmanager
async def _envoy(row: Row, setup: Setup) -> AsyncIterator[Serving]:
    """Envoy, and for a policy of ours the service beside it; entered once Envoy has found them all.

    Raises:
        ProcessError: one of them is not installed, or did not become ready.
    """
    content = envoy_row_settings(row, setup)
    settings = Settings.model_validate(content)
    async with contextlib.AsyncExitStack() as stack:
        children = []
        if row.strategy is not None:
            config = own_balancing(settings, row.strategy)
        else:
            config = envoy_config(settings)
            _url, service = await stack.enter_async_context(ext_proc_service(content, setup.folder, row.name))
            children.append(service)
        envoy = await stack.enter_async_context(envoy_proxy(config, setup.folder, row.name))
        await all_well(envoy, config)
        yield Target(f"http://{settings.envoy.gateway_listen}", MODEL, API_KEY), [envoy, *children]


def envoy_row_settings(row: Row, setup: Setup) -> dict[str, Any]:
    """gorgo.yaml of a row; of Envoy's own rows only the fleet and the listeners matter."""
    ours = {} if row.policy is None else {"policy": row.policy, "seed": setup.seed, "probe": dict(PROBE)}
    # Envoy is gone when the service is told to end, so there is nothing to drain.
    return gateway_settings(setup.replicas, kv_tokens=setup.kv_tokens, envoy={"drain_s": 0.0}, **ours)


GATEWAYS = {
    "litellm": Gateway(
        "LiteLLM",
        ROWS,
        ("simple-shuffle", "latency-based-routing", "session-affinity", "nearest", "gorgo"),
        _litellm,
    ),
    "envoy": Gateway(
        "Envoy",
        ENVOY_ROWS,
        ("round-robin", "least-request", "session-affinity", "nearest", "gorgo"),
        _envoy,
    ),
}
