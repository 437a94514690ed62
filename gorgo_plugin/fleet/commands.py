"""The commands of the fleet: `gorgo mock-upstream` and `gorgo demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

_PROFILES = ("linear", "curved", "tiny-cpu")
_FAULTS = ("none", "error", "hang", "reset", "cut", "rate-limit", "die")
_ENGINE_OPTIONS = ("a_ms", "kv_tokens", "block_tokens", "max_running", "step_tokens")


@click.command()
@click.option("--name", default="mock", help="Name told in every answer.")
@click.option("--model", "models", multiple=True, default=("m",), help="Model served; give it again for more.")
@click.option("--host", default="127.0.0.1", help="Address to bind.")
@click.option("--port", default=0, type=click.IntRange(0, 65535), help="Port to bind; 0 takes a free one.")
@click.option("--rtt-ms", default=0.0, type=click.FloatRange(0), help="Injected round trip.")
@click.option("--jitter-ms", default=0.0, type=click.FloatRange(0), help="Standard deviation of the round trip.")
@click.option("--profile", default="linear", type=click.Choice(_PROFILES), help="What the engine is like.")
@click.option("--ms-per-token", "a_ms", type=click.FloatRange(0, min_open=True), help="Prefill per uncached token.")
@click.option("--kv-tokens", type=click.IntRange(1), help="Tokens the KV cache holds.")
@click.option("--block-tokens", type=click.IntRange(1), help="Tokens of a KV block.")
@click.option("--max-running", type=click.IntRange(1), help="Requests admitted at once.")
@click.option("--step-tokens", type=click.IntRange(1), help="Token budget of a step.")
@click.option("--stream-interval", default=1, type=click.IntRange(1), help="Tokens per streamed chunk.")
@click.option("--output-tokens", default=128, type=click.IntRange(1), help="Answer length without a cap.")
@click.option("--metrics-style", default="vllm", type=click.Choice(["vllm", "sglang"]), help="Names on /metrics.")
@click.option("--kv-events", help="Publish KV-cache events at this ZeroMQ address, as tcp://127.0.0.1:*.")
@click.option("--tokenizer", help="Tokenizer file or folder; without it the embedded one.")
@click.option("--chat-template", help="Chat template text or file.")
@click.option("--seed", default=0, help="Seeds the engine, the jitter and the faults.")
@click.option("--fault", "fault_kind", default="none", type=click.Choice(_FAULTS), help="How it fails from the start.")
@click.option("--fault-after", default=0, type=click.IntRange(0), help="Requests served before it fails.")
@click.option("--fault-count", type=click.IntRange(1), help="Requests that fail before it is well again.")
@click.option("--fault-probability", default=1.0, type=click.FloatRange(0, 1), help="Share of requests that fail.")
@click.option("--fault-health", is_flag=True, help="Let /health and the like fail as well.")
def mock_upstream(**options: Any) -> None:
    """Serve one mock replica over HTTP.

    It answers OpenAI and Anthropic requests as an engine with a prefix cache would, behind an injected network, and
    prints one line of JSON with its URL once it is ready.
    """
    import asyncio
    import dataclasses

    from gorgo_plugin.fleet.engine import PROFILES
    from gorgo_plugin.fleet.faults import Fault
    from gorgo_plugin.fleet.server import MockSettings, serve

    changes = {name: value for name in _ENGINE_OPTIONS if (value := options.pop(name)) is not None}
    fault = {name: options.pop(f"fault_{name}") for name in ("kind", "after", "count", "probability", "health")}
    try:
        profile = dataclasses.replace(PROFILES[options.pop("profile")], **changes)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    settings = MockSettings(profile=profile, fault=Fault.model_validate(fault), **options)
    try:
        asyncio.run(serve(settings))
    except OSError as error:
        where = f"--host {settings.host} --port {settings.port}"
        raise click.ClickException(f"{where}: {error.strerror or error}") from None


@click.command()
@click.option("--trace", type=click.Path(dir_okay=False, exists=True, path_type=Path), help="Mooncake-format file.")
@click.option("--requests", type=click.IntRange(10), help="Requests of a row; without it 300, with --trace 300.")
@click.option("--rows", help="Comma-separated rows; without it five, gorgo among them.")
@click.option("--gateway", default="litellm", type=click.Choice(["litellm", "envoy"]), help="The gateway in front.")
@click.option("--seed", default=0, type=click.IntRange(0), help="Seeds workload, engines and policies.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of results; without it out/demo, with --gateway envoy out/demo-envoy.",
)
@click.option("--workers", default=1, type=click.IntRange(1, 16), help="Processes of LiteLLM.")
@click.option("--time-scale", type=click.FloatRange(0.1, 100), help="Stretches arrivals; without it 1, with --trace 2.")
def demo(
    trace: Path | None,
    requests: int | None,
    rows: str | None,
    gateway: str,
    seed: int,
    out: Path | None,
    workers: int,
    time_scale: float | None,
) -> None:
    """Compare routing strategies on three mock regions behind the real LiteLLM or Envoy.

    Every row replays the same requests on fresh replicas at 37, 279 and 456 ms. Prints one table and writes demo.json,
    demo.png and the logs to the folder of results.
    """
    import asyncio

    from gorgo_plugin.fleet.demo import DemoSettings
    from gorgo_plugin.fleet.gateway import GATEWAYS
    from gorgo_plugin.fleet.show import show_demo

    front = GATEWAYS[gateway]
    names = tuple(name.strip() for name in rows.split(",")) if rows else front.default_rows
    unknown = [name for name in names if name not in front.rows]
    if unknown:
        raise click.BadParameter(f"unknown row '{unknown[0]}'; known: {', '.join(front.rows)}", param_hint="--rows")
    if gateway == "envoy" and workers != 1:
        raise click.BadParameter(f"{workers}: Envoy runs in one process; leave it out", param_hint="--workers")
    folder = out or Path("out/demo" if gateway == "litellm" else f"out/demo-{gateway}")
    settings = DemoSettings(trace, requests, names, seed, time_scale, folder, workers, gateway)
    try:
        asyncio.run(show_demo(settings))
    except asyncio.CancelledError:
        raise click.Abort from None
