"""A complete envoy.yaml from gorgo's settings: one cluster per replica, two filters, and the ways to fail over."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit

import yaml

from gorgo_plugin.envoy_ext_proc.names import (
    ATTEMPTS,
    CODE_DETAILS,
    DESTINATION_HEADER,
    METADATA_NAMESPACE,
    PICK_DESTINATIONS,
    PICK_KEY,
    REPLICA_HEADER,
    REPLICA_KEY,
    SERVICE,
    UPSTREAM_METADATA,
)
from gorgo_plugin.errors import SettingsError
from gorgo_plugin.prompt.endpoints import ENDPOINTS
from gorgo_plugin.settings import EnvoySettings, EnvoyTlsSettings, ReplicaSettings, Settings

Mode = Literal["composite", "override-host", "aggregate"]
Yaml = dict[str, Any]

SERVICE_CLUSTER = "gorgo-ext-proc"
ANY_CLUSTER = "gorgo-any-replica"
POOL_CLUSTER = "gorgo-pool"
FIRST = "gorgo-first-"  # prefix of the cluster that tries a replica first
ROUTING_FILTER = "gorgo.routing"
OBSERVING_FILTER = "gorgo.observing"

CONNECT_TIMEOUT_S = 3.0  # TCP and TLS take three round trips; the longest on Earth are about 0.4 s
SERVICE_CHECK_S = 1.0
MANY = 1_000_000  # circuit breakers: the default of 1024 streams, and of 3 retries, would be met by LLM traffic
FORWARDED_HEADERS = (":method", ":path", ":status", "content-encoding")  # no keys, no cookies

_TYPE = "type.googleapis.com/"
_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


def envoy_yaml(settings: Settings, mode: Mode = "composite") -> str:
    """The text of an envoy.yaml.

    Raises:
        SettingsError: the fleet cannot be put into an Envoy configuration of this mode; names the field.
    """
    text: str = yaml.safe_dump(envoy_config(settings, mode), sort_keys=False, width=120)
    return f"# Written by `gorgo envoy-config --mode {mode}`; write it anew when gorgo.yaml changes.\n{text}"


def envoy_config(settings: Settings, mode: Mode = "composite") -> Yaml:
    """The configuration as plain data; see `envoy_yaml`."""
    urls = {replica.name: _checked_url(replica, mode) for replica in settings.replicas}
    if not urls:
        raise SettingsError("replicas: at least one is needed to write an envoy.yaml")
    envoy = settings.envoy
    config: Yaml = {}
    if envoy.admin_listen is not None:
        config["admin"] = {"address": _socket_address(envoy.admin_listen)}
    config["static_resources"] = {
        "listeners": [_listener(settings, mode)],
        "clusters": [*_replica_clusters(settings, urls, mode), _service_cluster(envoy)],
    }
    return config


def _checked_url(replica: ReplicaSettings, mode: Mode) -> SplitResult:
    where, url = f"replicas.{replica.name}", urlsplit(replica.url)
    if url.path not in ("", "/") or url.query or "@" in url.netloc:
        raise SettingsError(f"{where}.url: Envoy sends requests to a host and port; give scheme, host and port only")
    if len(replica.name) > 60 or not replica.name.isprintable():
        raise SettingsError(f"{where}.name: it names a cluster of Envoy; at most 60 printable characters, please")
    if replica.name in (SERVICE_CLUSTER, ANY_CLUSTER) or replica.name.startswith(FIRST):
        raise SettingsError(f"{where}.name: a cluster that gorgo-plugin itself writes has it; another name, please")
    if mode == "override-host" and not _is_ip(url.hostname or ""):
        raise SettingsError(f"{where}.url: --mode override-host picks IP addresses; '{url.hostname}' is a name")
    return url


def port_of(url: SplitResult) -> int:
    """The port a replica's URL means."""
    return url.port if url.port is not None else {"http": 80, "https": 443}[url.scheme]


def address_of(url: SplitResult) -> str:
    """`host:port` of a replica, as a destination header names it."""
    host = url.hostname or ""
    return f"[{host}]:{port_of(url)}" if ":" in host else f"{host}:{port_of(url)}"


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


# The listener: which requests pass the filters, and where each goes


def _listener(settings: Settings, mode: Mode) -> Yaml:
    envoy = settings.envoy
    ours = [REPLICA_HEADER, *([DESTINATION_HEADER] if mode == "override-host" else [])]
    manager: Yaml = {
        "stat_prefix": "gorgo",
        "stream_idle_timeout": _seconds(settings.flight_ttl_s),
        # Before the routes are looked at, or a client could choose its replica.
        "early_header_mutation_extensions": [
            _extension(
                "envoy.http.early_header_mutation.header_mutation",
                "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
                mutations=[{"remove": header} for header in ours],
            )
        ],
        "route_config": {
            "name": "gorgo",
            "virtual_hosts": [
                {
                    "name": "gorgo",
                    "domains": ["*"],
                    "request_headers_to_remove": [REPLICA_HEADER],
                    "retry_policy": _retry_policy(settings, mode),
                    "routes": _routes(settings, mode),
                }
            ],
        },
        "http_filters": [
            observing_filter(),
            routing_filter(envoy, mode),
            _extension("envoy.filters.http.router", "envoy.extensions.filters.http.router.v3.Router"),
        ],
    }
    connection_manager = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
    return {
        "name": "gorgo",
        "address": _socket_address(envoy.gateway_listen),
        "per_connection_buffer_limit_bytes": envoy.max_body_bytes,
        "filter_chains": [
            {"filters": [_extension("envoy.filters.network.http_connection_manager", connection_manager, **manager)]}
        ],
    }


def _retry_policy(settings: Settings, mode: Mode) -> Yaml:
    policy: Yaml = {
        "retry_on": "5xx,retriable-status-codes",
        "retriable_status_codes": [429],
        "num_retries": settings.envoy.retries,
        "retry_back_off": {"base_interval": "0.025s", "max_interval": "0.25s"},
    }
    if settings.envoy.try_idle_timeout_s is not None:
        policy["per_try_idle_timeout"] = _seconds(settings.envoy.try_idle_timeout_s)
    if mode == "aggregate":
        policy["retry_priority"] = _extension(
            "envoy.retry_priorities.previous_priorities",
            "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig",
            update_frequency=1,
        )
    return policy


def _routes(settings: Settings, mode: Mode) -> list[Yaml]:
    # Requests can take as long as the longest flight; `stream_idle_timeout` ends those that are stuck.
    action: Yaml = {"timeout": "0s", "auto_host_rewrite": True}
    if mode == "override-host":
        pool = {"cluster": POOL_CLUSTER, **action}
        chosen, unrouted = [], pool
    else:
        firsts = [FIRST + replica.name for replica in settings.replicas]
        chosen = [
            {
                "match": {
                    "prefix": "/",
                    "headers": [{"name": REPLICA_HEADER, "string_match": {"exact": replica.name}}],
                },
                "route": {"cluster": first, **action},
            }
            for replica, first in zip(settings.replicas, firsts, strict=True)
        ]
        # Without a decision the fleet is served evenly, each request with a replica to fail over to.
        even = {"clusters": [{"name": first, "weight": 1} for first in firsts]}
        unrouted = {"weighted_clusters": even, **action}
    off = {"@type": _TYPE + "envoy.config.route.v3.FilterConfig", "disabled": True}
    return [
        *chosen,
        {
            "match": {
                "safe_regex": {"regex": _paths_with_prompts()},
                "headers": [{"name": ":method", "string_match": {"exact": "POST"}}],
            },
            "route": unrouted,
        },
        {
            "match": {"prefix": "/"},
            "route": unrouted,
            "typed_per_filter_config": {OBSERVING_FILTER: off, ROUTING_FILTER: off},
        },
    ]


def _paths_with_prompts() -> str:
    bare = "|".join(path.removeprefix("/v1/") for path in ENDPOINTS)
    return f"(/v1)?/({bare})/*"


# The two filters


def observing_filter() -> Yaml:
    """Sends copies of the answer's pieces to the service and waits for nothing."""
    return _extension(
        "envoy.filters.http.ext_proc",
        "envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor",
        name=OBSERVING_FILTER,
        grpc_service=_grpc_service(),
        failure_mode_allow=True,
        observability_mode=True,
        processing_mode={
            "request_header_mode": "SKIP",
            "response_header_mode": "SKIP",
            "response_body_mode": "STREAMED",
            "response_trailer_mode": "SKIP",
        },
        metadata_options={"forwarding_namespaces": {"untyped": [METADATA_NAMESPACE]}},
    )


def routing_filter(envoy: EnvoySettings, mode: Mode = "composite") -> Yaml:
    """Sends each request to the service, and does as it answers."""
    return _extension(
        "envoy.filters.http.ext_proc",
        "envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor",
        name=ROUTING_FILTER,
        grpc_service=_grpc_service(mode),
        failure_mode_allow=True,
        allow_mode_override=True,
        disable_immediate_response=True,
        message_timeout=_seconds(envoy.message_timeout_s),
        max_message_timeout=_seconds(envoy.max_message_timeout_s),
        processing_mode={
            "request_header_mode": "SEND",
            "request_body_mode": "BUFFERED",
            "response_header_mode": "SEND",
            "response_body_mode": "NONE",
            "request_trailer_mode": "SKIP",
            "response_trailer_mode": "SKIP",
        },
        forward_rules={"allowed_headers": {"patterns": [{"exact": header} for header in FORWARDED_HEADERS]}},
        response_attributes=[UPSTREAM_METADATA, ATTEMPTS, CODE_DETAILS],
        metadata_options={"receiving_namespaces": {"untyped": [METADATA_NAMESPACE]}},
    )


def _grpc_service(mode: Mode = "composite") -> Yaml:
    service: Yaml = {"envoy_grpc": {"cluster_name": SERVICE_CLUSTER}}
    if mode == "override-host":
        service["initial_metadata"] = [{"key": PICK_KEY, "value": PICK_DESTINATIONS}]
    return service


# The clusters


def _replica_clusters(settings: Settings, urls: Mapping[str, SplitResult], mode: Mode) -> list[Yaml]:
    envoy = settings.envoy
    if mode == "override-host":
        return [_pool(envoy, urls)]
    clusters = [_replica_cluster(name, {name: url}, envoy) for name, url in urls.items()]
    last_resort = _replica_cluster(ANY_CLUSTER, urls, envoy, checked=False)
    kind = _composite if mode == "composite" else _aggregate
    firsts = [
        {
            "name": FIRST + replica.name,
            "connect_timeout": _seconds(CONNECT_TIMEOUT_S),
            "lb_policy": "CLUSTER_PROVIDED",
            "cluster_type": kind([*_failover_order(replica, settings.replicas), ANY_CLUSTER]),
            "circuit_breakers": _circuit_breakers(),
        }
        for replica in settings.replicas
    ]
    return [*clusters, last_resort, *firsts]


def _failover_order(first: ReplicaSettings, replicas: Sequence[ReplicaSettings]) -> list[str]:
    """The replica, those of its region, then the others as they are listed: nearest first, says the documentation."""
    others = [replica for replica in replicas if replica.name != first.name]
    return [first.name, *(one.name for one in sorted(others, key=lambda other: other.region != first.region))]


def _composite(clusters: Sequence[str]) -> Yaml:
    return _extension(
        "envoy.clusters.composite",
        "envoy.extensions.clusters.composite.v3.ClusterConfig",
        clusters=[{"name": name} for name in clusters],
    )


def _aggregate(clusters: Sequence[str]) -> Yaml:
    return _extension(
        "envoy.clusters.aggregate", "envoy.extensions.clusters.aggregate.v3.ClusterConfig", clusters=list(clusters)
    )


def _replica_cluster(name: str, urls: Mapping[str, SplitResult], envoy: EnvoySettings, checked: bool = True) -> Yaml:
    cluster: Yaml = {
        "name": name,
        "type": "STRICT_DNS",
        "dns_lookup_family": "V4_PREFERRED",
        "connect_timeout": _seconds(CONNECT_TIMEOUT_S),
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [_endpoint(replica, url) for replica, url in urls.items()]}],
        },
        **_upstream(envoy, urls),
    }
    return cluster | (_checks(envoy) if checked else {})


def _pool(envoy: EnvoySettings, urls: Mapping[str, SplitResult]) -> Yaml:
    round_robin = _extension(
        "envoy.load_balancing_policies.round_robin",
        "envoy.extensions.load_balancing_policies.round_robin.v3.RoundRobin",
    )
    override_host = _extension(
        "envoy.load_balancing_policies.override_host",
        "envoy.extensions.load_balancing_policies.override_host.v3.OverrideHost",
        override_host_sources=[{"header": DESTINATION_HEADER}],
        fallback_policy={"policies": [{"typed_extension_config": round_robin}]},
    )
    pool = _replica_cluster(POOL_CLUSTER, urls, envoy)
    pool["type"] = "STATIC"
    del pool["dns_lookup_family"]
    return pool | {"load_balancing_policy": {"policies": [{"typed_extension_config": override_host}]}}


def _endpoint(replica: str, url: SplitResult) -> Yaml:
    host = url.hostname or ""
    address = {"socket_address": {"address": host, "port_value": port_of(url)}}
    metadata = {METADATA_NAMESPACE: {REPLICA_KEY: replica}}
    if url.scheme == "https":
        metadata["envoy.transport_socket_match"] = {REPLICA_KEY: replica}
    return {
        "endpoint": {
            "address": address,
            "hostname": url.netloc,
            "health_check_config": {"hostname": url.netloc},
        },
        "metadata": {"filter_metadata": metadata},
    }


def _upstream(envoy: EnvoySettings, urls: Mapping[str, SplitResult]) -> Yaml:
    options = {
        "@type": _TYPE + _HTTP_OPTIONS,
        "common_http_protocol_options": {"idle_timeout": _seconds(envoy.replica_idle_s)},
        "explicit_http_config": {"http_protocol_options": {}},
    }
    upstream: Yaml = {
        "typed_extension_protocol_options": {_HTTP_OPTIONS: options},
        "circuit_breakers": _circuit_breakers(),
    }
    matches = [
        {
            "name": replica,
            "match": {REPLICA_KEY: replica},
            "transport_socket": _replica_tls(envoy, url.hostname or ""),
        }
        for replica, url in urls.items()
        if url.scheme == "https"
    ]
    return upstream | ({"transport_socket_matches": matches} if matches else {})


def _replica_tls(envoy: EnvoySettings, host: str) -> Yaml:
    san = {"san_type": "IP_ADDRESS" if _is_ip(host) else "DNS", "matcher": {"exact": host}}
    context: Yaml = {
        "common_tls_context": {
            "validation_context": {
                "trusted_ca": {"filename": envoy.replica_ca_file},
                "match_typed_subject_alt_names": [san],
            }
        }
    }
    return _tls_socket(context if _is_ip(host) else {"sni": host, **context})


def _checks(envoy: EnvoySettings) -> Yaml:
    """Health checks and outlier ejection. All hosts may be ejected, of one cluster one, and none panics."""
    checks: Yaml = {
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "outlier_detection": {
            "consecutive_5xx": 3,
            "interval": "1s",
            "base_ejection_time": "2s",
            "max_ejection_time": "30s",
            "max_ejection_percent": 100,
        },
    }
    if envoy.health_path is not None:
        checks["health_checks"] = [
            {
                "timeout": _seconds(envoy.health_interval_s),
                "interval": _seconds(envoy.health_interval_s),
                "unhealthy_threshold": 2,
                "healthy_threshold": 1,
                "no_traffic_interval": _seconds(envoy.health_interval_s),
                "http_health_check": {"path": envoy.health_path},
            }
        ]
    return checks


def _service_cluster(envoy: EnvoySettings) -> Yaml:
    cluster: Yaml = {
        "name": SERVICE_CLUSTER,
        "type": "STATIC" if envoy.listen.startswith("unix:") else "STRICT_DNS",
        "connect_timeout": "0.25s",
        "load_assignment": {
            "cluster_name": SERVICE_CLUSTER,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _socket_address(envoy.listen)}}]}],
        },
        "typed_extension_protocol_options": {
            _HTTP_OPTIONS: {
                "@type": _TYPE + _HTTP_OPTIONS,
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "circuit_breakers": _circuit_breakers(),
        "health_checks": [
            {
                "timeout": _seconds(SERVICE_CHECK_S),
                "interval": _seconds(SERVICE_CHECK_S),
                "no_traffic_interval": _seconds(SERVICE_CHECK_S),
                "unhealthy_threshold": 1,
                "healthy_threshold": 1,
                "grpc_health_check": {"service_name": SERVICE},
            }
        ],
    }
    return cluster | ({} if envoy.tls is None else {"transport_socket": _service_tls(envoy.tls)})


def _service_tls(tls: EnvoyTlsSettings) -> Yaml:
    context: Yaml = {
        "alpn_protocols": ["h2"],
        "validation_context": {
            "trusted_ca": {"filename": tls.ca_file},
            "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": tls.server_name}}],
        },
    }
    if tls.envoy_cert_file is not None:
        context["tls_certificates"] = [
            {
                "certificate_chain": {"filename": tls.envoy_cert_file},
                "private_key": {"filename": tls.envoy_key_file},
            }
        ]
    return _tls_socket({"sni": tls.server_name, "common_tls_context": context})


# Small parts


def _extension(extension: str, message: str, *, name: str = "", **fields: Any) -> Yaml:
    return {"name": name or extension, "typed_config": {"@type": _TYPE + message, **fields}}


def _tls_socket(context: Yaml) -> Yaml:
    return _extension(
        "envoy.transport_sockets.tls", "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext", **context
    )


def _circuit_breakers() -> Yaml:
    limits = ("max_connections", "max_pending_requests", "max_requests", "max_retries")
    return {"thresholds": [dict.fromkeys(limits, MANY)]}


def _socket_address(address: str) -> Yaml:
    if address.startswith("unix:"):
        return {"pipe": {"path": address.removeprefix("unix:")}}
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}


def _seconds(seconds: float) -> str:
    return f"{seconds:.6f}".rstrip("0").rstrip(".") + "s"
