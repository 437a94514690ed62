"""The files of envoy/ are current and run as they stand."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import yaml

from gorgo_plugin import Settings
from gorgo_plugin.envoy_ext_proc.envoy_yaml import envoy_yaml
from gorgo_plugin.fleet.envoy import all_well, envoy_proxy, ext_proc_service
from gorgo_plugin.fleet.processes import first_line, running
from gorgo_plugin.fleet.topology import REGIONS, mock_command

FOLDER = Path(__file__).parents[2] / "envoy"
GORGO = yaml.safe_load((FOLDER / "gorgo.yaml").read_text())


def test_envoy_yaml_is_what_the_command_writes() -> None:
    assert (FOLDER / "envoy.yaml").read_text() == envoy_yaml(Settings.model_validate(GORGO)), "run: make docs"


def test_the_readme_shows_the_filters_as_they_are_written() -> None:
    text = (FOLDER / "README.md").read_text()
    shown = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    (filters,) = [one["http_filters"] for one in shown if isinstance(one, dict) and "http_filters" in one]
    listener = yaml.safe_load((FOLDER / "envoy.yaml").read_text())["static_resources"]["listeners"][0]
    written = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
    assert filters == written


@contextlib.asynccontextmanager
async def mock_replicas(folder: Path) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as stack:
        for region, replica in zip(REGIONS, GORGO["replicas"], strict=True):
            command = [
                *mock_command(region, 0, replica["kv_tokens"], "m", 8),
                f"--port={replica['url'].rpartition(':')[2]}",
            ]
            log = folder / f"{region.name}.log"
            await first_line(await stack.enter_async_context(running(region.name, command, log, read_output=True)))
        yield


def _free(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as listener:
        return listener.connect_ex((host, int(port))) != 0


async def test_they_run_as_they_stand(tmp_path: Path) -> None:
    addresses = [replica["url"].removeprefix("http://") for replica in GORGO["replicas"]]
    addresses += [address for name, address in GORGO["envoy"].items() if name.endswith("listen")]
    if taken := [address for address in addresses if not _free(address)]:
        pytest.skip(f"in use: {', '.join(taken)}")
    config = yaml.safe_load((FOLDER / "envoy.yaml").read_text())
    async with (
        mock_replicas(tmp_path),
        ext_proc_service(GORGO, tmp_path, "files") as (status_url, _service),
        envoy_proxy(config, tmp_path, "files") as envoy,
        aiohttp.ClientSession() as session,
    ):
        await all_well(envoy, config)
        body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        region = None
        async with asyncio.timeout(30):  # a stall may leave a request unrouted, or make the first round trip look long
            while region != "us-east":
                url = f"http://{GORGO['envoy']['gateway_listen']}/v1/chat/completions"
                async with session.post(url, json=body) as answer:
                    assert answer.status == 200
                    region = answer.headers.get("x-gorgo-region")
        async with session.get(f"{status_url}/gorgo/status") as answer:
            assert (await answer.json())["counters"]["routed"] >= 1
