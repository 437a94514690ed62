"""`gorgo explain` without a gateway."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from gorgo_plugin import Prompt, Router, Settings
from gorgo_plugin.cli import main
from gorgo_plugin.explain import read_settings
from gorgo_plugin.policies import POLICIES
from gorgo_plugin.runtime.explain import REASONS, explanation, plain_table, rows, summary

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello there"}]}


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


def fleet(port: int = 1, **other: Any) -> dict[str, Any]:
    return {
        "replicas": [
            {"name": "a", "region": "east", "url": f"http://127.0.0.1:{port}"},
            {"name": "b", "region": "west", "url": "http://127.0.0.1:1"},
        ],
        **other,
    }


def run(folder: Path, *arguments: str, config: Any = None, body: Any = CHAT) -> Result:
    (folder / "body.json").write_text(body if isinstance(body, str) else json.dumps(body))
    given = ["explain", "--request", str(folder / "body.json"), *arguments]
    if config is not None:
        (folder / "gorgo.yaml").write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        given += ["--config", str(folder / "gorgo.yaml")]
    return CliRunner().invoke(main, given)


def test_it_measures_the_round_trips_and_says_which_replica_did_not_answer(tmp_path: Path, port: int) -> None:
    result = run(tmp_path, config=fleet(port))
    assert result.exit_code == 0
    assert "b did not answer its probe (refused)." in result.output
    assert "a (east): cheapest, its score is the lowest." in result.output
    assert "never measured" in next(line for line in result.output.splitlines() if "west" in line)


def test_json_holds_every_term_of_every_replica(tmp_path: Path, port: int) -> None:
    explained = json.loads(run(tmp_path, "--json", config=fleet(port)).output)
    assert explained["replica"] == "a"
    assert explained["ranked"] == ["a", "b"]
    for row in explained["replicas"].values():
        cost = row["network_ms"] + row["doubt_ms"] + row["queue_ms"] + row["prefill_ms"]
        cost += row["blocking_ms"] + row["next_turn_ms"] + row["decode_ms"]
        assert row["total_ms"] == pytest.approx(cost)
        assert row["cached_tokens"] + row["uncached_tokens"] == explained["prompt_tokens"]


def test_without_probing_only_the_priors_count(tmp_path: Path) -> None:
    explained = json.loads(run(tmp_path, "--no-probe", "--json", config=fleet(probe={"prior_ms": 70.0})).output)
    assert {row["network_ms"] for row in explained["replicas"].values()} == {70.0}
    assert explained["notes"] == ["Nothing was measured: all that counts is the configured priors."]


def test_a_saved_status_gives_round_trips_and_rates(tmp_path: Path) -> None:
    router = Router(Settings.model_validate(fleet()))
    router.observe_rtt("a", 0.5)
    router.observe_rtt("b", 0.1)
    (tmp_path / "state.json").write_text(json.dumps(router.snapshot()))
    explained = json.loads(run(tmp_path, "--state", str(tmp_path / "state.json"), "--json", config=fleet()).output)
    assert explained["replica"] == "b"
    assert explained["replicas"]["a"]["network_ms"] == pytest.approx(500.0)


@pytest.mark.parametrize(
    ("body", "endpoint"),
    [
        (CHAT, "/v1/chat/completions"),
        ({"model": "m", "prompt": "hello"}, "/v1/completions"),
        ({"model": "m", "input": "hello"}, "/v1/responses"),
    ],
)
def test_the_endpoint_is_told_from_the_body(tmp_path: Path, body: Any, endpoint: str) -> None:
    explained = json.loads(run(tmp_path, "--no-probe", "--json", config=fleet(), body=body).output)
    assert explained["endpoint"] == endpoint


def test_a_given_endpoint_counts(tmp_path: Path) -> None:
    result = run(tmp_path, "--no-probe", "--json", "--endpoint", "messages", config=fleet())
    assert "Error: --endpoint: 'messages' takes no prompt; known: /v1/chat/completions" in result.output
    explained = json.loads(run(tmp_path, "--no-probe", "--json", "--endpoint", "/v1/messages", config=fleet()).output)
    assert explained["endpoint"] == "/v1/messages"


@pytest.mark.parametrize(
    ("arguments", "config", "body", "said"),
    [
        ((), {"replicas": [], "polcy": "gorgo"}, CHAT, "polcy: unknown setting (did you mean 'policy'?)"),
        ((), "a: [", CHAT, "not YAML"),
        ((), "- 1", CHAT, "expected settings by name"),
        ((), fleet(tokenizer="/nowhere"), CHAT, "tokenizer: '/nowhere' is no file"),
        ((), fleet(), "{", "not JSON"),
        ((), fleet(), [1], "expected a JSON object"),
        ((), fleet(), {"model": "m"}, "give --endpoint"),
        (("--no-probe",), fleet(), {"model": "m", "messages": 7}, "messages"),
        (("--no-probe",), {"replicas": []}, CHAT, "no replica may serve model 'm'"),
        ((), None, CHAT, "--config is needed"),
        (("--status-url", "http://user:secret@127.0.0.1:1"), None, CHAT, "--status-url: expected"),
        (("--status-url", "http://127.0.0.1:1"), None, CHAT, "gave no usable answer"),
    ],
)
def test_bad_input_is_one_sentence_and_no_traceback(
    tmp_path: Path, arguments: tuple[str, ...], config: Any, body: Any, said: str
) -> None:
    result = run(tmp_path, *arguments, config=config, body=body)
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit)
    assert said in result.output
    assert result.output.count("Error: ") == 1
    assert "secret" not in result.output


LITELLM = {
    "model_list": [
        {"model_name": "m", "litellm_params": {"model": "openai/m", "api_base": "os.environ/EAST_URL"}},
        {
            "model_name": "m",
            "litellm_params": {"model": "openai/m", "api_base": "http://10.0.0.2:8000/v1"},
            "model_info": {"gorgo": {"name": "b", "region": "west", "kv_tokens": 9000}},
        },
        {"model_name": "other", "litellm_params": {"model": "openai/x", "api_base": "http://10.0.0.3:8000/v1"}},
    ],
    "router_settings": {"routing_strategy": "gorgo", "routing_strategy_args": {"probe": {"prior_ms": 33.0}}},
}


def litellm_file(folder: Path, config: Any) -> Path:
    file = folder / "litellm.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def test_a_litellm_config_gives_the_replicas_of_the_requests_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EAST_URL", "http://10.0.0.1:8000/v1")
    settings = read_settings(litellm_file(tmp_path, LITELLM), "m")
    assert settings.probe.prior_ms == 33.0
    assert {replica.name: (replica.region, replica.url) for replica in settings.replicas} == {
        "10.0.0.1:8000": ("default", "http://10.0.0.1:8000"),
        "b": ("west", "http://10.0.0.2:8000"),
    }


def test_a_routing_group_of_a_litellm_config_has_its_own_settings(tmp_path: Path) -> None:
    group = {
        "group_name": "g",
        "models": ["m"],
        "routing_strategy": "gorgo",
        "routing_strategy_args": {"policy": "nearest"},
    }
    config = {**LITELLM, "model_list": LITELLM["model_list"][1:], "router_settings": {"routing_groups": [group]}}
    assert read_settings(litellm_file(tmp_path, config), "m").policy == "nearest"
    result = run(tmp_path, config=config, body={**CHAT, "model": "other"})
    assert "model 'other' is routed by 'simple-shuffle', not by gorgo" in result.output


def test_a_model_that_a_litellm_config_does_not_know_is_named(tmp_path: Path) -> None:
    result = run(tmp_path, config=LITELLM, body={**CHAT, "model": "ghost"})
    assert "model_list: no deployment of model 'ghost'; known: m, other" in result.output


def test_every_reason_of_every_policy_is_put_in_words() -> None:
    assert {policy.reason for policy in POLICIES.values()} <= REASONS.keys()


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_score_in_a_unit_of_its_own_has_its_own_column(policy: str) -> None:
    router = Router(Settings.model_validate(fleet(policy=policy)))
    router.observe_rtt("a", 0.03)
    router.observe_rtt("b", 0.3)
    explained = explanation(router, Prompt(range(100)), "/v1/completions")
    own_unit = any(row["score"] != row["total_ms"] for row in explained["replicas"].values())
    header, *lines = rows(explained)
    assert ("score" in header) == own_unit
    assert [line[1] for line in lines] == explained["ranked"]
    assert [line[0] for line in lines] == ["→", ""]
    assert summary(explained)[1].startswith(f"{explained['replica']} (")


def test_the_plain_table_is_aligned() -> None:
    text = plain_table([("", "replica", "region", "ms"), ("→", "a", "e", "1,000.0"), ("", "longer-name", "e", "1.0")])
    assert text.splitlines() == [
        "   replica      region       ms",
        "→  a            e       1,000.0",
        "   longer-name  e           1.0",
    ]


def test_the_table_shows_terms_that_add_up_to_the_total() -> None:
    router = Router(Settings.model_validate(fleet()))
    router.observe_rtt("a", 0.03)
    router.observe_rtt("b", 0.3)
    for _ in range(20):  # a conversation, so that every term but doubt has a price
        router.route(Prompt(range(4000)))
    header, *lines = rows(explanation(router, Prompt(range(9000)), "/v1/completions"))
    shown = [column for column, heading in enumerate(header) if heading.endswith(" ms")]
    assert header[shown[-1]] == "total ms"
    for line in lines:
        *terms, total = (float(line[column].replace(",", "")) for column in shown)
        assert sum(terms) == pytest.approx(total, abs=0.05 * len(shown))
    assert any(float(line[header.index("next turn ms")]) > 1.0 for line in lines)
