"""The real LiteLLM proxy in front of a fleet, once with its own strategies and once with ours."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from gorgo_plugin.fleet.loadgen import Target
from gorgo_plugin.fleet.processes import Child, ProcessError, free_port, running, until

MODEL = "m"
API_KEY = "sk-demo"  # guards nothing: the proxy listens on the loopback for as long as the demo runs
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
    """One line of the demo's table: a strategy of LiteLLM's own, or a policy of ours."""

    name: str
    strategy: str
    policy: str | None = None


def _ours(policy: str) -> Row:
    return Row(policy, "gorgo", policy)


ROWS = {
    row.name: row
    for row in (
        Row("simple-shuffle", "simple-shuffle"),
        Row("latency-based-routing", "latency-based-routing"),
        Row("least-busy", "least-busy"),
        *(
            _ours(policy)
            for policy in (
                "session-affinity",
                "nearest",
                "random",
                "least-load",
                "least-request",
                "prefix-cache",
                "prefix-similarity",
                "gorgo-v1-proxy",
                "gorgo-paper",
                "gorgo",
            )
        ),
    )
}
DEFAULT_ROWS = ("simple-shuffle", "latency-based-routing", "session-affinity", "nearest", "gorgo")


def litellm_config(row: Row, replicas: Mapping[str, str], kv_tokens: int, seed: int) -> dict[str, Any]:
    """LiteLLM's configuration for a row; `replicas` maps region names to base URLs."""
    router: dict[str, Any] = {"routing_strategy": row.strategy}
    config: dict[str, Any] = {
        "model_list": [_deployment(row, name, url, kv_tokens) for name, url in replicas.items()],
        "general_settings": {"master_key": API_KEY},
        "router_settings": router,
    }
    if row.policy is not None:
        config["litellm_settings"] = {"callbacks": ["gorgo_plugin.litellm_strategy.callback"]}
        # The injected round trip does not show in a TCP connect over the loopback, only in an answer.
        router["routing_strategy_args"] = {"policy": row.policy, "seed": seed, "probe": {"path": "/health"}}
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
    executable = shutil.which("litellm", path=str(Path(sys.executable).parent)) or shutil.which("litellm")
    if executable is None:
        raise ProcessError("litellm is not installed; the demo needs: pip install 'gorgo-plugin[demo]'")
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
