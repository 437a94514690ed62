"""LiteLLM's model_list read as a fleet."""

from __future__ import annotations

from typing import Any

import pytest

from gorgo_plugin import SettingsError
from gorgo_plugin.litellm_strategy.deployments import Fleet, base_url, read_fleet


def entry(group: str, api_base: str | None, id_: str = "", **own: Any) -> dict[str, Any]:
    params = {"model": f"openai/{group}", **({"api_base": api_base} if api_base else {})}
    info = {"id": id_ or f"{group}@{api_base}", **({"gorgo": own} if own else {})}
    return {"model_name": group, "litellm_params": params, "model_info": info}


def read(*entries: dict[str, Any]) -> Fleet:
    return read_fleet(entries, lambda model: model != "other")


def test_a_replica_is_named_by_the_host_and_port_of_its_api_base() -> None:
    fleet = read(entry("m", "http://a:8000/v1"), entry("m", "https://b/v1"), entry("m", "http://[::1]/v1"))
    assert [replica.name for replica in fleet.replicas] == ["a:8000", "b:443", "[::1]:80"]


def test_its_own_settings_are_taken_over() -> None:
    [replica] = read(entry("m", "http://a:1/v1", name="r", region="eu", kv_tokens=7)).replicas
    assert (replica.name, replica.region, replica.kv_tokens, replica.url) == ("r", "eu", 7, "http://a:1")


@pytest.mark.parametrize(
    ("api_base", "url"),
    [
        ("http://a:1/v1", "http://a:1"),
        ("http://a:1/v1/", "http://a:1"),
        ("http://a:1", "http://a:1"),
        ("http://a:1/engine/v1?key=1", "http://a:1/engine"),
        ("http://a:1/v10", "http://a:1/v10"),
    ],
)
def test_the_engines_url_is_the_api_base_without_the_version_of_its_api(api_base: str, url: str) -> None:
    assert base_url(api_base) == url


def test_one_replica_may_serve_several_groups() -> None:
    fleet = read(entry("m", "http://a:1/v1", region="eu"), entry("n", "http://a:1/v1", kv_tokens=9))
    [replica] = fleet.replicas
    assert (replica.models, replica.region, replica.kv_tokens) == (["m", "n"], "eu", 9)
    assert fleet.serving(["n"]) == [replica]
    assert fleet.serving(["else"]) == []


def test_a_deployment_without_api_base_has_a_seat_but_no_replica() -> None:
    fleet = read(entry("m", None, "x"), entry("m", "http://a:1/v1"))
    assert fleet.seats["x"].replica is None
    assert fleet.unpriced() == ["m"]
    assert len(fleet.replicas) == 1


def test_groups_that_do_not_use_gorgo_are_not_looked_at() -> None:
    assert not read(entry("other", "no url at all", regoin="x")).seats


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        (
            [entry("n", "http://a:1"), entry("m", "http://b:1", regoin="eu")],
            "model_list.1 (m).model_info.gorgo.regoin: unknown setting (did you mean 'region'?)",
        ),
        (
            [entry("m", "http://b:1", kv_tokens=0)],
            "model_list.0 (m).model_info.gorgo.kv_tokens: input should be greater than or equal to 1 (got 0)",
        ),
        (
            [entry("m", "ftp://b:1")],
            "model_list.0 (m).litellm_params.api_base: expected http://host:port or https://host:port",
        ),
        ([entry("m", "http://b:x/v1")], "model_list.0 (m).litellm_params.api_base: expected a port from 0 to 65535"),
        (
            [entry("m", "http://b:1/v1"), entry("m", "http://b:1/v1", "second")],
            "model_list.1 (m): the replica name 'b:1' is taken by model_list.0 (m) of the same group; "
            "give each its own model_info.gorgo.name",
        ),
        (
            [entry("m", "http://b:1/v1", name="r"), entry("n", "http://c:1/v1", name="r")],
            "model_list.1 (n): the replica name 'r' stands for another api_base in model_list.0 (m); "
            "give each its own model_info.gorgo.name",
        ),
        (
            [entry("m", "http://b:1/v1", region="eu"), entry("n", "http://b:1/v1", region="us")],
            "model_list.1 (n).model_info.gorgo.region: the replica 'b:1' has 'eu' in model_list.0 (m), here 'us'",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_by_a_sentence_naming_the_field(
    entries: list[dict[str, Any]], sentence: str
) -> None:
    with pytest.raises(SettingsError) as refused:
        read(*entries)
    assert str(refused.value) == sentence


def test_settings_that_are_no_mapping_are_refused() -> None:
    bad = entry("m", "http://b:1/v1")
    bad["model_info"]["gorgo"] = "eu"
    with pytest.raises(
        SettingsError, match=r"^model_list\.0 \(m\)\.model_info\.gorgo: expected settings by name, got 'eu'$"
    ):
        read(bad)


def test_no_error_shows_what_stands_in_a_url_before_the_host() -> None:
    with pytest.raises(SettingsError) as refused:
        read(entry("m", "http://user:secret@b:x/v1"))
    assert "secret" not in str(refused.value)
