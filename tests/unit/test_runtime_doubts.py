"""Settings that are valid and cannot be meant are named in the log."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from gorgo_plugin import Settings
from gorgo_plugin.runtime import Runtime
from gorgo_plugin.runtime.doubts import doubts

EVENTS = {"endpoint": "tcp://10.0.0.1:5557"}


def replica(name: str, host: str = "", **more: Any) -> dict[str, Any]:
    return {"name": name, "url": f"http://{host or name}:8000", **more}


def of(**settings: Any) -> list[str]:
    return doubts(Settings.model_validate(settings))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"replicas": [replica("a", kv_events=EVENTS)]},
            "replicas: 'a' has kv_events, which have no effect without the model's own `tokenizer`",
        ),
        (
            {"replicas": [replica("a", models=["llama"])], "models": {"lama": {"block_tokens": 32}}},
            "models: no replica serves 'lama' (did you mean 'llama'?)",
        ),
        (
            {"replicas": [replica("a", "host"), replica("b", "host")]},
            "replicas: 'a' and 'b' have one url; each is taken for an engine with a queue and a cache of its own",
        ),
    ],
)
def test_what_cannot_be_meant_is_named(settings: dict[str, Any], sentence: str) -> None:
    assert of(**settings) == [sentence]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"replicas": [replica("a"), replica("b")], "models": {"llama": {"block_tokens": 32}}},
        {"replicas": [replica("a", kv_events=EVENTS)], "tokenizer": "/models/llama"},
        {"replicas": [replica("a", kv_events=EVENTS)], "models": {"llama": {"tokenizer": "/models/llama"}}},
        {"replicas": [replica("a", "host", models=["x"]), replica("b", "host", models=["y"])]},
    ],
)
def test_what_can_be_meant_is_not(settings: dict[str, Any]) -> None:
    assert of(**settings) == []


def test_they_are_logged_at_the_start_and_at_each_reload(caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings.model_validate({"replicas": [replica("a", "host"), replica("b", "host")]})
    with caplog.at_level(logging.WARNING, "gorgo_plugin"):
        runtime = Runtime(settings)
        runtime.reload(settings)
        runtime.close()
    assert [record.getMessage() for record in caplog.records if "have one url" in record.getMessage()] == [
        f"gorgo: {sentence}" for sentence in doubts(settings) * 2
    ]
