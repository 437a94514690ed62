"""Tuning through the real gateways: a step is accepted, survives a restart, and is reproduced by `frozen`."""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import envoy_gateway, litellm_proxy
from tests.litellm_proxy import deployment, proxy_config, wait_until

BAD = {"rtt": 0.05, "queue": 20.0}
CLIENTS = 8
GORGO = "from gorgo_plugin.cli import main; main(prog_name='gorgo')"
# Trials of seconds instead of minutes: fewer requests, and less evidence than a gateway should ask for.
TUNED: dict[str, Any] = {
    "probe": {"path": "/health", "interval_s": 0.2},
    "metrics": {"path": None},
    "weights": BAD,
    "tuning": {
        "mode": "online",
        "objective": "ttft-p50",
        "least_samples": 3,
        "confidence_z": 0.5,
        "trial_requests": 128,
    }
    | {"guard_margin": 1.0, "rest_requests": 0},
}

numbers = itertools.count()


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A replica nearby and one far away: name -> URL."""
    with contextlib.ExitStack() as stack:
        urls = {}
        for name, rtt_ms in (("near", 5), ("far", 200)):
            options = [f"--name={name}", f"--rtt-ms={rtt_ms}", "--model=m", "--ms-per-token=0.05"]
            process = stack.enter_context(
                subprocess.Popen([sys.executable, "-c", GORGO, "mock-upstream", *options], stdout=subprocess.PIPE)
            )
            stack.callback(process.terminate)
            assert process.stdout is not None
            urls[name] = json.loads(process.stdout.readline())["url"]
        yield urls


def load(client: httpx.Client, status: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Stream answers to several clients at once until a candidate was accepted; what tuning shows then."""

    def ask(number: int) -> None:
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": f"{number} " + "a river runs under the bridge " * 60}],
            "max_tokens": 4,
            "stream": True,
        }
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            for _ in answer.iter_lines():
                pass

    with ThreadPoolExecutor(CLIENTS) as pool:
        for _ in range(60):
            list(pool.map(ask, itertools.islice(numbers, 4 * CLIENTS)))
            known = status()
            if known["tuning"]["endings"]["accepted"] and known["weights"] != BAD:  # not beaten in the rematch
                return known
    raise AssertionError(known["tuning"])


def accepted(known: dict[str, Any]) -> dict[str, float]:
    """The weights in force, which are no more the bad ones."""
    assert known["weights"] == known["tuning"]["weights"] != BAD
    return known["weights"]  # type: ignore[no-any-return]


def test_litellm_accepts_a_step_keeps_it_over_a_restart_and_reproduces_it_frozen(
    replicas: dict[str, str], tmp_path: Path
) -> None:
    state = {"path": str(tmp_path / "state.json"), "interval_s": 1.0}
    models = [deployment(group, url, "openai/m", name=name) for group in "mf" for name, url in replicas.items()]

    def config(frozen: dict[str, Any]) -> dict[str, Any]:
        group = {"group_name": "g", "models": ["f"], "routing_strategy": "gorgo", "routing_strategy_args": frozen}
        args = {**TUNED, "state": state}
        return proxy_config(models, router_settings={"routing_strategy_args": args, "routing_groups": [group]})

    with litellm_proxy.running(config({}), tmp_path / "first") as proxy:
        accepted(load(proxy.client, proxy.status))
        wait_until(lambda: sum(proxy.status()["flights"].values()) == 0)
        status = proxy.status()
        learned = accepted(status)
        assert "accepted" in [step["ending"] for step in status["tuning"]["steps"]]
        assert status["state"]["path"] == str(tmp_path / "state-0.json")
    frozen = {"tuning": {"mode": "frozen", "path": str(tmp_path / "state-0.json")}, "metrics": {"path": None}}
    with litellm_proxy.running(config(frozen), tmp_path / "second") as proxy:
        status = proxy.status()
        assert status["weights"] == pytest.approx(learned)
        (other,) = status["others"]
        assert other["weights"] == pytest.approx(learned)
        assert other["tuning"] is None


def test_envoy_accepts_a_step_keeps_it_over_a_restart_and_reproduces_it_frozen(
    replicas: dict[str, str], tmp_path: Path
) -> None:
    state = {"path": str(tmp_path / "state.json"), "interval_s": 1.0}
    described = [{"name": name, "url": url} for name, url in replicas.items()]
    with envoy_gateway.running(tmp_path / "envoy", described, **TUNED, state=state) as gateway:
        accepted(load(gateway.client, gateway.status))
        gateway.wait_until_at_rest()
        learned = accepted(gateway.status())
        assert gateway.metric("gorgo_tuning_trials_total", ending="accepted") >= 1
        assert gateway.metric("gorgo_weight", weight="queue") == pytest.approx(learned["queue"])
        wait_until(lambda: "accepted: W_rtt" in (tmp_path / "envoy" / "ext-proc.log").read_text())
        assert gateway.service is not None
        gateway.signal_service(signal.SIGTERM)
        gateway.service.wait(20)
        gateway.start_service()
        assert gateway.status()["weights"] == pytest.approx(learned)
        gateway.reload(tuning={"mode": "frozen", "path": str(tmp_path / "state-0.json")})
        assert gateway.status()["weights"] == pytest.approx(learned)
        assert gateway.status()["tuning"] is None
