from __future__ import annotations

import json
from typing import Any

import click
import pytest

from gorgo_plugin.fleet.asked import RequestRefused, read_asked
from gorgo_plugin.fleet.commands import mock_upstream
from gorgo_plugin.fleet.engine import PROFILES
from gorgo_plugin.fleet.faults import FAULT_KINDS


def read(**body: Any) -> Any:
    return read_asked(json.dumps(body).encode(), ("m", "n"))


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "a"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}, 5]}]}, "a"),
        ({"prompt": "a"}, "a"),
        ({"prompt": [1, 2]}, "[1, 2]"),
        ({"input": "a"}, "a"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]}, "a"),
        ({"input": ["a", "b"]}, "['a', 'b']"),
        ({}, "None"),
    ],
)
def test_an_answer_follows_from_the_last_thing_the_user_said(body: dict[str, Any], text: str) -> None:
    assert read(**body).last_text == text


def test_the_first_model_is_meant_when_none_is_named() -> None:
    assert read(prompt="a").model == "m"
    assert read(prompt="a", model="n").model == "n"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_a_cap_is_read_under_every_name_and_refused_when_it_is_no_number(name: str) -> None:
    assert read(**{name: 5}).cap == 5
    assert read(**{name: None}).cap is None
    for bad in (0, -1, True, "5", 1.5):
        with pytest.raises(RequestRefused, match=name):
            read(**{name: bad})


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(RequestRefused, match="body"):
        read_asked(raw, ("m",))


def test_the_command_offers_every_profile_and_every_fault() -> None:
    choices = {param.name: param.type for param in mock_upstream.params}
    assert isinstance(profiles := choices["profile"], click.Choice)
    assert isinstance(faults := choices["fault_kind"], click.Choice)
    assert set(profiles.choices) == set(PROFILES)
    assert set(faults.choices) == set(FAULT_KINDS)
