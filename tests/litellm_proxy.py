"""Starting the real LiteLLM proxy on a configuration, and asking it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

KEY = "sk-test"
CALLBACK = "gorgo_plugin.litellm_strategy.callback"
START_TIMEOUT_S = 90.0  # about 10 s alone on a core; a machine at work needs several times that
ROOT = Path(__file__).resolve().parent.parent


class Proxy:
    """One running proxy."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.client = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30.0)

    def post(self, path: str, body: dict[str, Any], **kwargs: Any) -> httpx.Response:
        """POST a JSON body."""
        return self.client.post(path, json=body, **kwargs)

    def status(self) -> dict[str, Any]:
        """/gorgo/status."""
        answer = self.client.get("/gorgo/status")
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    def log_text(self) -> str:
        """What it has written so far."""
        return self.log.read_text(errors="replace")


def deployment(group: str, url: str, model: str | None = None, /, **own: Any) -> dict[str, Any]:
    """One entry of model_list; `own` goes under `model_info.gorgo`."""
    params = {"model": model or f"openai/{group}", "api_base": f"{url}/v1", "api_key": "none"}
    return {"model_name": group, "litellm_params": params, **({"model_info": {"gorgo": own}} if own else {})}


def proxy_config(model_list: list[dict[str, Any]], **sections: Any) -> dict[str, Any]:
    """A configuration that switches gorgo on; sections are merged into it."""
    config: dict[str, Any] = {
        "model_list": model_list,
        "litellm_settings": {"callbacks": [CALLBACK]},
        "router_settings": {"routing_strategy": "gorgo"},
        "general_settings": {"master_key": KEY},
    }
    for name, values in sections.items():
        config[name] = {**config.get(name, {}), **values}
    return config


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launch(config: dict[str, Any], folder: Path, *args: str, port: int | None = None) -> Proxy:
    """Start the proxy, not waiting until it serves."""
    port = port if port is not None else free_port()
    folder.mkdir(parents=True, exist_ok=True)
    path, log = folder / "config.yaml", folder / "proxy.log"
    path.write_text(yaml.safe_dump(config))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("REDIS_", "DATABASE_"))},
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "PYTHONPATH": os.pathsep.join((str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")]))),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", "from litellm.proxy.proxy_cli import run_server; run_server()"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--config", str(path), "--host", "127.0.0.1", "--port", str(port), *args],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Proxy(process, port, log)


@contextlib.contextmanager
def running(config: dict[str, Any], folder: Path, *args: str) -> Iterator[Proxy]:
    """The proxy while it serves."""
    proxy = launch(config, folder, *args)
    try:
        wait_until(lambda: _alive(proxy), START_TIMEOUT_S, "the proxy to serve", proxy.log_text)
        yield proxy
    finally:
        proxy.client.close()
        end(proxy)


def end(proxy: Proxy) -> None:
    """End the proxy and its workers: the process group that was made for it."""
    if proxy.process.poll() is None:
        proxy.process.terminate()
    try:
        proxy.process.wait(15)
    except subprocess.TimeoutExpired:
        os.killpg(proxy.process.pid, signal.SIGKILL)
        proxy.process.wait(15)


def wait_until(
    condition: Callable[[], object], timeout_s: float = 10.0, what: str = "", more: Callable[[], str] = str
) -> Any:
    """Wait for a condition; returns what it came out as."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s:g} s for {what or condition}\n{more()[-4000:]}")
        time.sleep(0.02)
    return value


def _alive(proxy: Proxy) -> bool:
    if proxy.process.poll() is not None:
        raise AssertionError(f"the proxy ended with {proxy.process.returncode}\n{proxy.log_text()[-4000:]}")
    try:
        return proxy.client.get("/health/liveliness").status_code == 200
    except httpx.TransportError:
        return False
