"""How a gateway starts: with settings it refuses, and with several workers."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gorgo_plugin import SettingsError
from tests.litellm_proxy import (
    CALLBACK,
    ROOT,
    START_TIMEOUT_S,
    deployment,
    end,
    launch,
    proxy_config,
    running,
    wait_until,
)
from tests.stub_engine import StubEngine

NEAR, FAR = "http://127.0.0.1:11", "http://127.0.0.1:12"
ARGS = "router_settings.routing_strategy_args"


@pytest.fixture(scope="module")
def router_class() -> Iterator[Any]:
    import litellm

    from gorgo_plugin.litellm_strategy import callback

    litellm.callbacks.append(callback)
    yield litellm.Router
    litellm.callbacks.remove(callback)


def fleet(**own: Any) -> list[dict[str, Any]]:
    return [deployment("m", NEAR), deployment("m", FAR, **own)]


REFUSED: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "unknown setting": (fleet(), {"polcy": "gorgo"}, f"{ARGS}.polcy: unknown setting (did you mean 'policy'?)"),
    "unknown policy": (fleet(), {"policy": "fastest"}, f"{ARGS}.policy: unknown policy 'fastest'"),
    "wrong type": (
        fleet(),
        {"probe": {"interval_s": "often"}},
        f"{ARGS}.probe.interval_s: input should be a valid number",
    ),
    "replicas by hand": (fleet(), {"replicas": []}, f"{ARGS}.replicas: not set here"),
    "unreachable tokenizer": (fleet(), {"tokenizer": "./no-such/tokenizer.json"}, f"{ARGS}.tokenizer: "),
    "typo under model_info.gorgo": (
        fleet(regoin="x"),
        {},
        "model_list.1 (m).model_info.gorgo.regoin: unknown setting (did you mean 'region'?)",
    ),
    "wrong kv_tokens": (fleet(kv_tokens="many"), {}, "model_list.1 (m).model_info.gorgo.kv_tokens: input should be"),
    "misspelt gorgo": (
        [{**deployment("m", NEAR), "model_info": {"id": "1", "gorg": {"region": "x"}}}],
        {},
        "model_list.0 (m).model_info.gorg: did you mean 'gorgo'?",
    ),
    "gorgo at the wrong place": (
        [{**deployment("m", NEAR), "litellm_params": {"model": "hosted_vllm/m", "api_base": NEAR, "gorgo": {}}}],
        {},
        "model_list.0 (m).litellm_params.gorgo: belongs under model_info",
    ),
    "two replicas of one name": (
        [deployment("m", NEAR), deployment("m", NEAR)],
        {},
        "model_list.1 (m): the replica name '127.0.0.1:11' is taken by model_list.0 (m) of the same group",
    ),
    "one name for two urls": (
        [deployment("m", NEAR, name="r"), deployment("n", FAR, name="r")],
        {},
        "model_list.1 (n): the replica name 'r' stands for another api_base in model_list.0 (m)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_router_with_bad_settings_is_refused_by_one_sentence_naming_the_field(router_class: Any, case: str) -> None:
    model_list, args, sentence = REFUSED[case]
    with pytest.raises(SettingsError) as refused:
        router_class(model_list=model_list, routing_strategy="gorgo", routing_strategy_args=args)
    assert str(refused.value).startswith(sentence)
    assert "\n" not in str(refused.value)


def test_bad_settings_of_a_routing_group_name_the_group(router_class: Any) -> None:
    group = {"group_name": "g", "models": ["m"], "routing_strategy": "gorgo", "routing_strategy_args": {"polcy": 1}}
    with pytest.raises(SettingsError, match=r"^routing_groups\.g\.routing_strategy_args\.polcy: unknown setting"):
        router_class(model_list=fleet(), routing_groups=[group])


def test_only_groups_that_use_gorgo_are_checked(router_class: Any) -> None:
    model_list = [*fleet(), deployment("other", NEAR, regoin="x")]
    group = {"group_name": "g", "models": ["other"], "routing_strategy": "simple-shuffle"}
    router_class(model_list=model_list, routing_strategy="gorgo", routing_groups=[group])


def test_the_proxy_ends_its_start_with_one_sentence(tmp_path: Path) -> None:
    config = proxy_config(fleet(regoin="x"))
    proxy = launch(config, tmp_path)
    try:
        assert proxy.process.wait(START_TIMEOUT_S) != 0
    except subprocess.TimeoutExpired:
        pytest.fail(f"the proxy goes on\n{proxy.log_text()[-2000:]}")
    finally:
        end(proxy)
    sentence = "model_list.1 (m).model_info.gorgo.regoin: unknown setting (did you mean 'region'?)"
    assert proxy.log_text().count(sentence) == 1
    assert 'File "' not in proxy.log_text()


def test_two_workers_serve_each_with_a_state_of_its_own(tmp_path: Path) -> None:
    with StubEngine("near") as near, StubEngine("far") as far:
        config = proxy_config([deployment("m", engine.url, region=engine.name) for engine in (near, far)])
        with running(config, tmp_path, "--num_workers", "2") as proxy:

            def both_seen() -> bool:
                # A new connection each time: the kernel picks the worker.
                proxy.client.headers["connection"] = "close"
                body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
                answer = proxy.post("/v1/chat/completions", body)
                assert answer.status_code == 200, answer.text
                assert answer.headers["x-gorgo-region"] in ("near", "far")
                status = proxy.status()
                workers[status["worker"]] = status
                return len(workers) == 2 and all(sum(one["flights"].values()) == 0 for one in workers.values())

            workers: dict[int, dict[str, Any]] = {}
            wait_until(both_seen, START_TIMEOUT_S, "answers from both workers", proxy.log_text)
            assert all(status["active"] for status in workers.values())


CONFIGS = sorted((ROOT / "litellm_config").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_of_the_repository_is_accepted_as_it_stands(router_class: Any, path: Path) -> None:
    from gorgo_plugin.litellm_strategy.plugin import plugin

    config = yaml.safe_load(path.read_text())
    assert CALLBACK in config["litellm_settings"]["callbacks"]
    router = router_class(model_list=config["model_list"], **config["router_settings"])
    [share] = plugin().adapter(router).shares
    assert share.models == {"m"}
    assert len(share.runtime.settings.replicas) >= 2
    share.runtime.close()


def test_the_first_configuration_of_the_repository_starts_a_proxy_as_it_stands(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "litellm_config" / "gorgo.yaml").read_text())
    with running(config, tmp_path) as proxy:
        proxy.client.headers["Authorization"] = f"Bearer {config['general_settings']['master_key']}"
        status = proxy.status()
    assert status["active"] is True
    assert list(status["replicas"]) == ["us-east-1a", "eu-west-1a", "ap-south-1a"]


def test_with_litellms_own_callback_its_metrics_page_has_gorgos(tmp_path: Path) -> None:
    with StubEngine("near") as near:
        config = proxy_config([deployment("m", near.url)])
        config["litellm_settings"]["callbacks"] = ["prometheus", CALLBACK]
        with running(config, tmp_path) as proxy:
            answer = proxy.post("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "hi"}]})
            assert answer.status_code == 200
            page = proxy.client.get("/metrics", follow_redirects=True)
    assert page.status_code == 200
    assert re.search(r'^gorgo_active\{policy="gorgo",worker="\d+"\} 1.0$', page.text, re.MULTILINE)
    assert "gorgo_decisions_total{" in page.text


BROKEN_CALLBACK = """
import litellm
from litellm.integrations.custom_logger import CustomLogger

core = getattr(litellm.Router, "_core_class", litellm.Router)
del core._select_deployment_async  # as in a LiteLLM whose core moved once more
callback = CustomLogger()
"""


def test_on_a_litellm_that_cannot_be_extended_the_proxy_serves_and_says_so(tmp_path: Path) -> None:
    with StubEngine() as engine:
        (tmp_path / "broken.py").write_text(BROKEN_CALLBACK)
        callbacks = {"callbacks": ["broken.callback", CALLBACK]}
        config = proxy_config([deployment("m", engine.url, region="near")], litellm_settings=callbacks)
        with running(config, tmp_path) as proxy:
            answer = proxy.post("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "x"}]})
            assert answer.status_code == 200, answer.text
            assert "x-gorgo-region" not in answer.headers
            status = proxy.status()
        assert status["active"] is False
        assert status["reason"].startswith("LiteLLM ")
        assert proxy.log_text().count("gorgo is inactive, LiteLLM's own simple-shuffle serves") == 1
