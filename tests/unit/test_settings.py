from __future__ import annotations

from typing import Any

import pytest

from gorgo_plugin import Settings, SettingsError
from gorgo_plugin.runtime.kv_events import check_installed
from gorgo_plugin.settings import PUBLISHED_WEIGHTS

REPLICA = {"name": "a", "url": "http://10.0.0.1:8000"}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"polcy": "gorgo"}, "polcy: unknown setting (did you mean 'policy'?)"),
        ({"policy": "gorgoo"}, "policy: unknown policy 'gorgoo' (did you mean 'gorgo'?)"),
        ({"probe": {"intervall_s": 3}}, "probe.intervall_s: unknown setting (did you mean 'interval_s'?)"),
        (
            {"replicas": [{**REPLICA, "kv_token": 3}]},
            "replicas.0.kv_token: unknown setting (did you mean 'kv_tokens'?)",
        ),
        ({"replicas": [{"name": "a"}]}, "replicas.0.url: required, but not given"),
        (
            {"replicas": [{"name": "a", "url": "a:8000"}]},
            "replicas.0.url: expected http://host:port or https://host:port",
        ),
        ({"replicas": [{"name": "a", "url": "http://a:port"}]}, "replicas.0.url: expected a port from 0 to 65535"),
        ({"envoy": {"health_path": ""}}, "envoy.health_path: expected a path such as /health, or null"),
        ({"replicas": [REPLICA, REPLICA]}, "replicas: two replicas are named 'a'; names must be unique"),
        ({"block_tokens": "16"}, "block_tokens: input should be a valid integer (got '16')"),
        ({"weights": {"rtt": -1}}, "weights.rtt: input should be greater than or equal to 0 (got -1)"),
        ({"weights": {"rt": 1}}, "weights.rt: unknown setting (did you mean 'rtt'?)"),
        ({"weights": "artchat"}, "weights: expected {rtt, queue} or one of art-chat, wildchat, got 'artchat'"),
        ({"models": {"m": {"tokeniser": "x"}}}, "models.m.tokeniser: unknown setting (did you mean 'tokenizer'?)"),
        ({"mode": "of"}, "mode: input should be 'on', 'shadow' or 'off' (got 'of')"),
        ([], "expected a mapping of settings, got list"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_field(given: Any, sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.model_validate(given)
    assert str(caught.value) == sentence


def test_a_url_with_a_password_is_not_repeated_in_the_error() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.model_validate({"replicas": [{"name": "a", "url": "ftp://user:secret@host"}]})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("given", "mode"), [(True, "on"), (False, "off"), ("shadow", "shadow")])
def test_mode_takes_what_yaml_makes_of_on_and_off(given: object, mode: str) -> None:
    assert Settings.model_validate({"mode": given}).mode == mode


def test_published_weights_are_selected_by_name() -> None:
    assert Settings.model_validate({"weights": "wildchat"}).weight_pair() == PUBLISHED_WEIGHTS["wildchat"]
    assert Settings.model_validate({"policy": "gorgo-paper"}).weight_pair() == PUBLISHED_WEIGHTS["art-chat"]
    assert Settings.model_validate({"weights": {"queue": 2}}).weight_pair() == (1.0, 2.0)
    assert Settings().weight_pair() == (1.0, 1.0)


def test_a_model_falls_back_to_the_top_level_field_by_field() -> None:
    settings = Settings.model_validate({"tokenizer": "t", "models": {"m": {"block_tokens": 32}}})
    assert settings.model_settings("m").tokenizer == "t"
    assert settings.model_settings("m").block_tokens == 32
    assert settings.model_settings("other").block_tokens == 16


def test_kv_events_without_pyzmq_are_refused_in_one_sentence_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    settings = Settings.model_validate({"replicas": [{**REPLICA, "kv_events": {"endpoint": "tcp://a:5557"}}]})
    with pytest.raises(SettingsError, match=r"'a' has kv_events.*pip install 'gorgo-plugin\[kv-events\]'"):
        check_installed(settings)


@pytest.mark.parametrize("endpoint", ["a:5557", "tcp://a", "http://a:5557", "ipc://", "tcp://a:70000"])
def test_an_endpoint_of_kv_events_is_checked(endpoint: str) -> None:
    with pytest.raises(SettingsError, match=r"replicas\.0\.kv_events\.endpoint: expected"):
        Settings.model_validate({"replicas": [{**REPLICA, "kv_events": {"endpoint": endpoint}}]})


def test_a_path_gets_the_slash_that_was_left_out() -> None:
    settings = Settings.model_validate({"envoy": {"health_path": "health"}, "probe": {"path": "/ready"}})
    assert (settings.envoy.health_path, settings.probe.path) == ("/health", "/ready")
