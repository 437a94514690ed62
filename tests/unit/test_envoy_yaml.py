"""The envoy.yaml that is written from gorgo's settings; the real Envoy must accept each."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from click.testing import CliRunner

from gorgo_plugin import Settings
from gorgo_plugin.cli import main
from gorgo_plugin.envoy_ext_proc.envoy_yaml import (
    FIRST,
    OBSERVING_FILTER,
    ROUTING_FILTER,
    Mode,
    envoy_config,
    envoy_yaml,
)
from gorgo_plugin.errors import SettingsError
from gorgo_plugin.prompt.endpoints import ENDPOINTS, endpoint_of
from tests.envoy_gateway import ENVOY

MODES: tuple[Mode, ...] = ("composite", "override-host", "aggregate")
ODD_NAMES = ["a b", "ünï", 'quo"te', "co:lon", "sla/sh", "$1 %REQ(x)%", "dot.dot", "#", "null", "0", "Ω" * 60]


def settings(urls: dict[str, str], region: str = "", **envoy: Any) -> Settings:
    replicas = [{"name": name, "region": region or f"{name}-region", "url": url} for name, url in urls.items()]
    return Settings.model_validate({"replicas": replicas, "envoy": envoy})


def fleet(count: int, scheme: str = "http") -> dict[str, str]:
    return {f"replica-{number}": f"{scheme}://10.0.{number}.1:8000" for number in range(count)}


def clusters(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {cluster["name"]: cluster for cluster in config["static_resources"]["clusters"]}


def manager(config: dict[str, Any]) -> dict[str, Any]:
    (chain,) = config["static_resources"]["listeners"][0]["filter_chains"]
    return chain["filters"][0]["typed_config"]  # type: ignore[no-any-return]


def routes(config: dict[str, Any]) -> list[dict[str, Any]]:
    return manager(config)["route_config"]["virtual_hosts"][0]["routes"]  # type: ignore[no-any-return]


def members(cluster: dict[str, Any]) -> list[str]:
    """The clusters that a cluster tries one after the other."""
    listed: Sequence[Any] = cluster["cluster_type"]["typed_config"]["clusters"]
    return [one if isinstance(one, str) else one["name"] for one in listed]


# What Envoy accepts


@dataclass
class Files:
    """Certificates that Envoy reads when it validates."""

    ca: str
    tls: dict[str, str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder, authority = tmp_path_factory.mktemp("certificates"), trustme.CA()
    ca, certificate = folder / "ca.pem", authority.issue_cert("gorgo")
    authority.cert_pem.write_to_path(str(ca))
    certificate.private_key_pem.write_to_path(str(folder / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
    own = {"cert_file": str(folder / "cert.pem"), "key_file": str(folder / "key.pem")}
    envoys = {"envoy_cert_file": own["cert_file"], "envoy_key_file": own["key_file"]}
    return Files(str(ca), {**own, **envoys, "ca_file": str(ca), "client_ca_file": str(ca)})


def accepted(text: str, folder: Path) -> None:
    """Fail unless Envoy accepts the configuration."""
    path = folder / "envoy.yaml"
    path.write_text(text)
    command = [ENVOY, "--mode", "validate", "-c", str(path), "-l", "warn"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "deprecated" not in ended.stderr


FLEETS: dict[str, dict[str, str]] = {
    "one": fleet(1),
    "three https": fleet(3, "https"),
    "64": fleet(64),
    "both schemes": {**fleet(2), "secure": "https://10.1.0.1"},
    "IPv6": {"six": "http://[::1]:8000", "secure six": "https://[2001:db8::1]"},
    "odd names": {name: f"http://10.0.0.{number}:80/" for number, name in enumerate(ODD_NAMES, start=1)},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FLEETS)
def test_envoy_accepts_the_fleet(tmp_path: Path, files: Files, mode: Mode, name: str) -> None:
    accepted(envoy_yaml(settings(FLEETS[name], replica_ca_file=files.ca), mode), tmp_path)


@pytest.mark.parametrize("mode", ["composite", "aggregate"])
def test_envoy_accepts_replicas_by_hostname(tmp_path: Path, files: Files, mode: Mode) -> None:
    urls = {"east": "https://llm.east.example", "west": "http://llm.west.example:8000"}
    accepted(envoy_yaml(settings(urls, replica_ca_file=files.ca), mode), tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_envoy_accepts_the_service_behind_mutual_tls(tmp_path: Path, files: Files, mode: Mode) -> None:
    accepted(envoy_yaml(settings(fleet(2), tls=files.tls), mode), tmp_path)


OTHERS: dict[str, dict[str, Any]] = {
    "a Unix socket": {"listen": "unix:/run/gorgo.sock"},
    "the service by hostname": {"listen": "gorgo.example:50051"},
    "IPv6 listeners": {"listen": "[::1]:50051", "gateway_listen": "[::]:10000", "admin_listen": "[::1]:9901"},
    "no admin page, no health checks": {"admin_listen": None, "health_path": None},
    "no retries, a timeout per try": {"retries": 0, "try_idle_timeout_s": 0.75},
    "odd times": {"message_timeout_s": 0.0015, "max_message_timeout_s": 1e3, "replica_idle_s": 0.25},
    "the largest body": {"max_body_bytes": 1_073_741_824},
}


@pytest.mark.parametrize("name", OTHERS)
def test_envoy_accepts_the_settings(tmp_path: Path, name: str) -> None:
    accepted(envoy_yaml(settings(fleet(2), **OTHERS[name])), tmp_path)


# What stands in it


def test_each_replica_is_a_cluster_and_tried_first_by_one_route() -> None:
    config = envoy_config(settings(fleet(3)))
    for name in fleet(3):
        (endpoint,) = clusters(config)[name]["load_assignment"]["endpoints"][0]["lb_endpoints"]
        assert endpoint["metadata"]["filter_metadata"]["gorgo"] == {"replica": name}
        assert members(clusters(config)[FIRST + name])[0] == name
    chosen = {}
    for route in routes(config)[:3]:
        (header,) = route["match"]["headers"]
        assert header["name"] == "x-gorgo-replica"
        chosen[header["string_match"]["exact"]] = route["route"]["cluster"]
    assert chosen == {name: FIRST + name for name in fleet(3)}


@pytest.mark.parametrize("mode", ["composite", "aggregate"])
def test_after_the_first_choice_come_those_of_its_region_then_the_others_as_listed(mode: Mode) -> None:
    names = {"a1": "a", "b1": "b", "a2": "a", "c1": "c", "b2": "b"}
    replicas = [{"name": name, "region": region, "url": f"http://{name}:80"} for name, region in names.items()]
    config = envoy_config(Settings.model_validate({"replicas": replicas}), mode)
    assert members(clusters(config)[FIRST + "b1"])[:5] == ["b1", "b2", "a1", "a2", "c1"]
    assert members(clusters(config)[FIRST + "a1"])[:5] == ["a1", "a2", "b1", "c1", "b2"]


def test_the_last_resort_is_any_replica_whatever_the_health_checks_say() -> None:
    config = envoy_config(settings(fleet(3)))
    last = clusters(config)[members(clusters(config)[FIRST + "replica-0"])[-1]]
    assert len(last["load_assignment"]["endpoints"][0]["lb_endpoints"]) == 3
    assert "health_checks" not in last
    assert "outlier_detection" not in last


def test_each_https_replica_is_verified_by_its_own_name() -> None:
    urls = {"east": "https://llm.east.example", "ip": "https://10.0.0.1", "plain": "http://llm.west.example:8000"}
    config = envoy_config(settings(urls))
    assert "transport_socket_matches" not in clusters(config)["plain"]
    (east,) = clusters(config)["east"]["transport_socket_matches"]
    assert east["transport_socket"]["typed_config"]["sni"] == "llm.east.example"
    (ip,) = clusters(config)["ip"]["transport_socket_matches"]
    assert "sni" not in ip["transport_socket"]["typed_config"]
    validation = ip["transport_socket"]["typed_config"]["common_tls_context"]["validation_context"]
    assert validation["match_typed_subject_alt_names"] == [{"san_type": "IP_ADDRESS", "matcher": {"exact": "10.0.0.1"}}]


@pytest.mark.parametrize(
    "path",
    [
        *ENDPOINTS,
        *(endpoint.removeprefix("/v1") for endpoint in ENDPOINTS),
        f"{ENDPOINTS[0]}/",
        f"{ENDPOINTS[0]}//",
        "/v1/models",
        "/",
        "/v1/chat",
        "/v1/chat/completions/x",
        "/v1/v1/completions",
        "/x/v1/completions",
        "/v1xcompletions",
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_the_routes_know_the_same_paths_as_the_core(mode: Mode, path: str) -> None:
    *_, with_prompts, rest = routes(envoy_config(settings(fleet(2)), mode))
    matches = re.fullmatch(with_prompts["match"]["safe_regex"]["regex"], path) is not None
    assert matches == (endpoint_of(path) is not None)
    off = rest["typed_per_filter_config"]
    assert {name: config["disabled"] for name, config in off.items()} == {ROUTING_FILTER: True, OBSERVING_FILTER: True}


@pytest.mark.parametrize("mode", MODES)
def test_a_clients_routing_headers_are_removed_before_the_routes_are_looked_at(mode: Mode) -> None:
    (early,) = manager(envoy_config(settings(fleet(2)), mode))["early_header_mutation_extensions"]
    removed = {mutation["remove"] for mutation in early["typed_config"]["mutations"]}
    assert "x-gorgo-replica" in removed
    assert ("x-gateway-destination-endpoint" in removed) == (mode == "override-host")


def test_of_the_headers_few_are_forwarded_and_none_that_is_secret() -> None:
    _, routing, _ = manager(envoy_config(settings(fleet(2))))["http_filters"]
    patterns = routing["typed_config"]["forward_rules"]["allowed_headers"]["patterns"]
    allowed = {pattern["exact"] for pattern in patterns}
    assert allowed >= {":method", ":path", ":status", "content-encoding"}
    assert all(name.startswith((":", "content-")) for name in allowed)


def test_times_and_sizes_are_those_of_the_settings() -> None:
    config = envoy_config(settings(fleet(1), message_timeout_s=0.125, max_message_timeout_s=3.0, max_body_bytes=2**20))
    observing, routing, _ = manager(config)["http_filters"]
    assert routing["typed_config"]["message_timeout"] == "0.125s"
    assert routing["typed_config"]["max_message_timeout"] == "3s"
    assert config["static_resources"]["listeners"][0]["per_connection_buffer_limit_bytes"] == 2**20
    assert observing["typed_config"]["observability_mode"] is True


# What cannot be written


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("url", ["http://10.0.0.1:8000/v1", "http://10.0.0.1/?key=x", "http://user:secret@10.0.0.1"])
def test_a_url_with_more_than_host_and_port_is_refused(mode: Mode, url: str) -> None:
    with pytest.raises(SettingsError, match=r"^replicas\.a\.url: Envoy sends requests to a host and port") as caught:
        envoy_config(settings({"a": url}), mode)
    assert "secret" not in str(caught.value)


def test_a_hostname_is_refused_where_envoy_picks_addresses() -> None:
    with pytest.raises(SettingsError, match=r"^replicas\.a\.url: --mode override-host .*'llm\.example' is a name"):
        envoy_config(settings({"a": "http://llm.example:8000"}), "override-host")


@pytest.mark.parametrize("name", ["x" * 61, "new\nline", "tab\t"])
def test_a_name_that_is_no_clusters_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=r"\.name: it names a cluster of Envoy"):
        envoy_config(settings({name: "http://10.0.0.1"}))


@pytest.mark.parametrize("name", ["gorgo-ext-proc", "gorgo-any-replica", "gorgo-first-a"])
def test_a_name_that_a_cluster_of_ours_has_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=rf"^replicas\.{name}\.name: a cluster that gorgo-plugin"):
        envoy_config(settings({"a": "http://10.0.0.1", name: "http://10.0.0.2"}))


def test_an_empty_fleet_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"^replicas: at least one is needed"):
        envoy_config(Settings())


# The command


def test_the_command_writes_what_the_function_returns(tmp_path: Path) -> None:
    config, output = tmp_path / "gorgo.yaml", tmp_path / "envoy.yaml"
    config.write_text(yaml.safe_dump(settings(fleet(2)).model_dump()))
    for mode in MODES:
        arguments = ["envoy-config", "--config", str(config), "--mode", mode]
        printed = CliRunner().invoke(main, arguments)
        assert printed.exit_code == 0, printed.output
        assert printed.output == envoy_yaml(settings(fleet(2)), mode)
        assert CliRunner().invoke(main, [*arguments, "--output", str(output)]).output == ""
        assert output.read_text() == printed.output
        assert yaml.safe_load(printed.output) == envoy_config(settings(fleet(2)), mode)
