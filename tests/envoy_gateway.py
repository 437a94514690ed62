"""Starting the real Envoy and the real external-processing service in front of replicas, and asking them."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import trustme
import yaml

from gorgo_plugin import Settings
from gorgo_plugin.envoy_ext_proc.envoy_yaml import POOL_CLUSTER, Mode, envoy_config
from gorgo_plugin.fleet.processes import free_port
from tests.litellm_proxy import ROOT, wait_until
from tests.stub_engine import Behaviour, StubEngine

START_TIMEOUT_S = 60.0
ENVOY = shutil.which("envoy", path=str(Path(sys.executable).parent)) or "envoy"
# Names under .localhost mean this machine (RFC 6761), but not every resolver knows; Envoy's does.
SERVE = """
import socket
resolve = socket.getaddrinfo
def getaddrinfo(host, *args, **kwargs):
    name = host.decode() if isinstance(host, bytes) else host
    return resolve("127.0.0.1" if name and name.endswith(".localhost") else host, *args, **kwargs)
socket.getaddrinfo = getaddrinfo
from gorgo_plugin.cli import main
main()
"""
QUICK: dict[str, Any] = {
    "response_headers": "debug",
    "metrics": {"path": None},
    "probe": {"interval_s": 0.2},
    "health": {"backoff_s": 0.2, "backoff_max_s": 0.5},
}
# A machine that stalls any process for a second must neither leave requests unrouted nor replicas out: two health
# checks in a row that time out do that, and the replicas live in the process that asks.
QUICK_ENVOY: dict[str, Any] = {
    "message_timeout_s": 2.0,
    "health_interval_s": 0.5,
    "drain_s": 1.5,
    "grace_s": 5.0,
}


class Gateway:
    """One Envoy with its service."""

    def __init__(self, folder: Path, replicas: Sequence[Mapping[str, Any]], mode: Mode = "composite", **changes: Any):
        self.folder, self.mode = folder, mode
        folder.mkdir(parents=True, exist_ok=True)
        names = ("listen", "status_listen", "gateway_listen", "admin_listen")
        listeners = {name: f"127.0.0.1:{free_port()}" for name in names}
        envoy = {**QUICK_ENVOY, **listeners, **changes.pop("envoy", {})}
        self.content = {"replicas": list(replicas), **QUICK, **changes, "envoy": envoy}
        self.settings = Settings.model_validate(self.content)
        self.url = f"http://{self.settings.envoy.gateway_listen}"
        self.admin_url = f"http://{self.settings.envoy.admin_listen}"
        self.status_url = f"http://{self.settings.envoy.status_listen}"
        self.service: subprocess.Popen[bytes] | None = None
        self.envoy: subprocess.Popen[bytes] | None = None
        self.client = httpx.Client(base_url=self.url, timeout=30.0)
        self.looking = httpx.Client(timeout=10.0)

    def start_service(self) -> None:
        """Start `gorgo ext-proc` and wait until it listens."""
        config = self.folder / "gorgo.yaml"
        config.write_text(yaml.safe_dump(self.content))
        with (self.folder / "ext-proc.log").open("ab") as log:
            self.service = subprocess.Popen(
                [sys.executable, "-c", SERVE, "ext-proc", "--config", str(config)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self.service.stdout is not None
        line = self.service.stdout.readline()
        assert line, self.log_text()
        json.loads(line)

    def start_envoy(self) -> None:
        """Start Envoy and wait until it serves."""
        content = envoy_config(self.settings, self.mode)
        for cluster in content["static_resources"]["clusters"]:
            if "health_checks" in cluster:  # else Envoy's workers learn up to 1 s later what its admin page tells
                cluster["common_lb_config"]["update_merge_window"] = "0s"
        config = self.folder / "envoy.yaml"
        config.write_text(yaml.safe_dump(content, sort_keys=False))
        with (self.folder / "envoy.log").open("ab") as log:
            self.envoy = subprocess.Popen(
                [ENVOY, "-c", str(config), "--concurrency", "2", "-l", "warn", "--use-dynamic-base-id"],
                stdout=log,
                stderr=log,
            )
        wait_until(self._envoy_ready, START_TIMEOUT_S, "Envoy to be ready", self.log_text)

    def wait_for_service(self) -> None:
        """Wait until Envoy's health check has found the service."""
        wait_until(lambda: self.healthy("gorgo-ext-proc"), 15.0, "Envoy to find the service", self.log_text)

    def wait_for_replicas(self) -> None:
        """Wait until Envoy's health checks have passed all replicas."""
        names = [POOL_CLUSTER] if self.mode == "override-host" else [one.name for one in self.settings.replicas]
        for name in names:
            wait_until(lambda name=name: self.healthy(name), 15.0, f"{name} to be well", self.log_text)

    def healthy(self, cluster: str) -> bool:
        """Whether Envoy's health check holds a cluster's one host for well."""
        text = self.looking.get(f"{self.admin_url}/clusters").text
        flags = [line for line in text.splitlines() if line.startswith(f"{cluster}::") and "::health_flags::" in line]
        return bool(flags) and all(line.endswith("::healthy") for line in flags)

    def _envoy_ready(self) -> bool:
        assert self.envoy is not None
        assert self.envoy.poll() is None, self.log_text()
        try:
            return self.looking.get(f"{self.admin_url}/ready").status_code == 200
        except httpx.TransportError:
            return False

    def signal_service(self, number: signal.Signals) -> None:
        """Send the service a signal."""
        assert self.service is not None
        self.service.send_signal(number)

    def reload(self, **changes: Any) -> None:
        """Write gorgo.yaml anew, its settings as they were at the start but for `changes`, and have it read."""
        envoy = {**self.content["envoy"], **changes.pop("envoy", {})}
        content = {**self.content, **changes, "envoy": envoy}
        (self.folder / "gorgo.yaml").write_text(yaml.safe_dump(content))
        log = self.folder / "ext-proc.log"
        before = log.read_text().count("settings reloaded")
        self.signal_service(signal.SIGHUP)
        wait_until(lambda: log.read_text().count("settings reloaded") > before, 10.0, "the reload", self.log_text)

    def kill_service(self) -> None:
        """End the service without a chance to say so."""
        assert self.service is not None
        self.service.kill()
        self.service.wait(10)
        if self.service.stdout is not None:
            self.service.stdout.close()

    def close(self) -> None:
        """End both."""
        self.client.close()
        self.looking.close()
        for process in (self.envoy, self.service):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait(10)
        if self.service is not None and self.service.stdout is not None:
            self.service.stdout.close()

    def post(self, body: Any, path: str = "/v1/chat/completions", **kwargs: Any) -> httpx.Response:
        """POST a JSON body, or bytes as they are."""
        if isinstance(body, bytes):
            kwargs["headers"] = {"content-type": "application/json", **kwargs.get("headers", {})}
            return self.client.post(path, content=body, **kwargs)
        return self.client.post(path, json=body, **kwargs)

    def status(self) -> dict[str, Any]:
        """/gorgo/status of the service."""
        answer = self.looking.get(f"{self.status_url}/gorgo/status")
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    def explain(self, body: Mapping[str, Any], endpoint: str = "/v1/chat/completions") -> dict[str, Any]:
        """/gorgo/explain of the service for a body."""
        answer = self.looking.post(f"{self.status_url}/gorgo/explain", json={"body": body, "endpoint": endpoint})
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    def health(self, replica: str) -> dict[str, Any]:
        """What the service holds of a replica's health."""
        return self.status()["replicas"][replica]["health"]  # type: ignore[no-any-return]

    def wait_until_available(self) -> None:
        """Wait until the service leaves no replica out."""
        wait_until(
            lambda: all(replica["health"]["available"] for replica in self.status()["replicas"].values()),
            15.0,
            "all replicas to be available",
            lambda: str(self.status()["replicas"]),
        )

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's series that have these labels."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        lines = self.looking.get(f"{self.status_url}/metrics").text.splitlines()
        series = [line for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in series if all(label in line for label in wanted))

    def wait_until_at_rest(self) -> None:
        """Wait until no flight and no stream is open."""
        wait_until(
            lambda: (now := self.status())["streams"] == 0 and sum(now["flights"].values()) == 0,
            15.0,
            "all flights and streams to end",
            lambda: str(self.status()["flights"]) + self.log_text(),
        )

    def log_text(self) -> str:
        """What both have written so far."""
        return "\n".join(
            path.read_text(errors="replace")[-3000:] for path in sorted(self.folder.glob("*.log")) if path.exists()
        )


@contextlib.contextmanager
def running(
    folder: Path, replicas: Sequence[Mapping[str, Any]], mode: Mode = "composite", **changes: Any
) -> Iterator[Gateway]:
    """Envoy and the service while they serve; `changes` go into gorgo.yaml."""
    gateway = Gateway(folder, replicas, mode, **changes)
    try:
        gateway.start_service()
        gateway.start_envoy()
        gateway.wait_for_service()
        if gateway.settings.envoy.health_path is not None:
            gateway.wait_for_replicas()
        yield gateway
    finally:
        gateway.close()


def tls_for(ca: trustme.CA, host: str) -> ssl.SSLContext:
    """What a server needs to be `host`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(host).configure_cert(context)
    return context


@dataclass
class TlsFleet:
    """https replicas by hostname, each with a certificate for its own name.

    Attributes:
        engines: by name, the first label of the hostname.
        replicas, envoy: of gorgo.yaml.
    """

    engines: dict[str, StubEngine]
    replicas: list[dict[str, str]]
    envoy: dict[str, str]

    def behave(self, **behaviour: Any) -> None:
        """Have all engines answer so."""
        for engine in self.engines.values():
            engine.behaviour = Behaviour(**behaviour)

    def counts(self) -> dict[str, int]:
        """Requests that each engine got."""
        return {name: len(engine.requests) for name, engine in self.engines.items()}


@contextlib.contextmanager
def tls_fleet(folder: Path, hosts: Mapping[str, str]) -> Iterator[TlsFleet]:
    """Replicas while they serve; `hosts` are their names under .localhost, each with its region."""
    ca, ca_file = trustme.CA(), folder / "replica-ca.pem"
    folder.mkdir(parents=True, exist_ok=True)
    ca.cert_pem.write_to_path(str(ca_file))
    with contextlib.ExitStack() as stack:
        fleet = TlsFleet({}, [], {"replica_ca_file": str(ca_file)})
        for host, region in hosts.items():
            name = host.partition(".")[0]
            engine = stack.enter_context(StubEngine(name, tls=tls_for(ca, host), host=host))
            fleet.engines[name] = engine
            fleet.replicas.append({"name": name, "region": region, "url": engine.url})
        yield fleet
