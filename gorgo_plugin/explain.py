"""`gorgo explain`: where one request would go, and why."""

from __future__ import annotations

import asyncio
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import click
import yaml

from gorgo_plugin.errors import GorgoError, PromptError, SettingsError
from gorgo_plugin.prompt import ENDPOINTS, endpoint_of
from gorgo_plugin.prompt.endpoints import CHAT, COMPLETIONS, RESPONSES
from gorgo_plugin.router import Router
from gorgo_plugin.runtime.explain import explanation, plain_table, probe_once, rows, summary
from gorgo_plugin.runtime.hub import with_local_tokenizers
from gorgo_plugin.runtime.state_file import with_frozen_weights
from gorgo_plugin.settings import Settings

REQUEST_TIMEOUT_S = 10.0  # a gateway tokenizes even a very long prompt in a few
STATUS_PATH = "/gorgo/status"

_File = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option("--config", type=_File, help="gorgo.yaml, or a LiteLLM config. Not needed with --status-url.")
@click.option("--request", "request_file", required=True, type=_File, help="The request's body, as JSON.")
@click.option("--endpoint", help="Path it is sent to; told from the body when left out.")
@click.option("--status-url", help="A running gateway, whose learned state counts: http://gateway:4000/gorgo/status.")
@click.option("--key", envvar="GORGO_KEY", show_envvar=True, help="The gateway's key, where it asks for one.")
@click.option("--state", type=_File, help="A saved status page to take the learned state from.")
@click.option("--probe/--no-probe", default=True, help="Without a learned state: measure the round trips now.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(
    config: Path | None,
    request_file: Path,
    endpoint: str | None,
    status_url: str | None,
    key: str | None,
    state: Path | None,
    probe: bool,
    as_json: bool,
) -> None:
    """Show where one request would go, and why: every replica's terms in milliseconds.

    With --status-url the running gateway answers for itself, with what it has measured, learned and believes cached.
    Otherwise the settings are taken from --config and the round trips measured now.
    """
    body = _object(request_file, PromptError)
    path = _endpoint(endpoint, body)
    explained = None
    notes: list[str] = []
    if status_url is not None:
        explained, learned = _ask_gateway(status_url, key, path, body)
        if explained is None:
            notes.append(f"{_shown(status_url)} explains no requests itself: what it believes cached is left out.")
    else:
        learned = None if state is None else _object(state, SettingsError)
    if explained is None:
        if config is None:
            raise click.UsageError("--config is needed: without it only a running gateway's --status-url can answer")
        explained, more = _explain_here(config, path, body, learned, probe)
        notes += more
    _print(explained, notes, as_json)


def _explain_here(
    config: Path, endpoint: str, body: Mapping[str, Any], learned: Mapping[str, Any] | None, probe: bool
) -> tuple[dict[str, Any], list[str]]:
    """The explanation by a router of our own, and what to know about it."""
    settings = read_settings(config, str(body.get("model", "")))
    router = Router(with_frozen_weights(with_local_tokenizers(settings)), state=learned)
    notes = []
    if learned is not None:
        notes.append("Round trips and rates are the gateway's; its queues and caches are not known here.")
    elif probe:
        failed = asyncio.run(probe_once(router, settings.replicas, settings.probe))
        notes += [f"{name} did not answer its probe ({kind})." for name, kind in sorted(failed.items())]
        notes.append("Round trips measured now; rates are the configured priors, queues and caches are empty.")
    else:
        notes.append("Nothing was measured: all that counts is the configured priors.")
    return explanation(router, router.prepare(body, endpoint), endpoint), notes


def read_settings(config: Path, model: str) -> Settings:
    """Settings from a gorgo.yaml or, told by its `model_list`, from a LiteLLM config, where `model`'s group counts.

    Raises:
        SettingsError: the file is not YAML, or a setting cannot be used.
    """
    try:
        loaded = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{config}: not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(loaded, dict):
        raise SettingsError(f"{config}: expected settings by name")
    return _litellm_settings(loaded, model) if "model_list" in loaded else Settings.model_validate(loaded)


def _litellm_settings(config: Mapping[str, Any], model: str) -> Settings:
    """What a LiteLLM config says for the routing group of one model."""
    from gorgo_plugin.litellm_strategy.deployments import read_fleet  # imports LiteLLM, which takes seconds

    router = config.get("router_settings") or {}
    groups = router.get("routing_groups") or ()
    group = next((group for group in groups if model in (group.get("models") or ())), router)
    strategy, args = group.get("routing_strategy"), group.get("routing_strategy_args") or {}
    if strategy != "gorgo":
        raise SettingsError(
            f"router_settings: model '{model}' is routed by '{strategy or 'simple-shuffle'}', not by gorgo"
        )
    names = {str(deployment.get("model_name")) for deployment in config["model_list"]}
    if model not in names:
        raise SettingsError(f"model_list: no deployment of model '{model}'; known: {', '.join(sorted(names))}")
    fleet = read_fleet(_resolved(config["model_list"]), lambda name: name == model)
    return Settings.model_validate({**args, "replicas": [replica.model_dump() for replica in fleet.serving([model])]})


def _resolved(value: Any) -> Any:
    """LiteLLM's `os.environ/NAME` replaced by what the variable holds here, empty where it is not set."""
    if isinstance(value, str) and value.startswith("os.environ/"):
        return os.environ.get(value.removeprefix("os.environ/"), "")
    if isinstance(value, dict):
        return {name: _resolved(inner) for name, inner in value.items()}
    return [_resolved(inner) for inner in value] if isinstance(value, list) else value


def _ask_gateway(
    status_url: str, key: str | None, endpoint: str, body: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """(the gateway's own explanation, None), or (None, its status) where it does not explain."""
    url = status_url if urlsplit(status_url).path.strip("/") else urljoin(status_url, STATUS_PATH)
    asked = {"endpoint": endpoint, "model": body.get("model"), "body": body}
    explained = _request(urljoin(url, "explain"), key, asked)
    return (
        (explained, None) if explained is not None else (None, _of_model(_request(url, key, None), body.get("model")))
    )


def _of_model(status: dict[str, Any] | None, model: Any) -> dict[str, Any] | None:
    """The part of a status page that holds for the model: a gateway may route its model groups in several ways."""
    states = () if status is None else (status, *status.get("others", ()))
    return next((state for state in states if model in state.get("model_groups", ())), status)


def _request(url: str, key: str | None, payload: Any) -> dict[str, Any] | None:
    """The JSON object a gateway answers; None when it does not know the path of a POST.

    Raises:
        GorgoError: no answer, or not the one asked for.
    """
    if urlsplit(url).scheme not in ("http", "https") or "@" in urlsplit(url).netloc:
        raise SettingsError(f"--status-url: expected http:// or https://, the key in --key, got {_shown(url)!r}")
    request = urllib.request.Request(url, headers={"Accept": "application/json"})
    if payload is not None:
        request.data = json.dumps(payload).encode()
        request.add_header("Content-Type", "application/json")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            if payload is not None and error.code in (404, 405):
                return None
            refused = " (is --key right?)" if error.code in (401, 403) else ""
            raise GorgoError(f"{_shown(url)} answered {error.code}{refused}{_detail(error)}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise GorgoError(f"{_shown(url)} gave no usable answer: {reason}") from None
    if not isinstance(answer, dict):
        raise GorgoError(f"{_shown(url)} answered something else than a JSON object")
    return answer


def _detail(error: urllib.error.HTTPError) -> str:
    """What the answer says about the error, in one line."""
    try:
        answer = json.load(error)
        said = answer.get("detail") or answer.get("error")
        said = said.get("message", said) if isinstance(said, dict) else said
    except (ValueError, AttributeError, OSError):
        said = None
    return f": {' '.join(str(said).split())[:300]}" if said else ""


def _endpoint(given: str | None, body: Mapping[str, Any]) -> str:
    if given is not None:
        endpoint = endpoint_of(given)
        if endpoint is None:
            raise PromptError(f"--endpoint: {given!r} takes no prompt; known: {', '.join(ENDPOINTS)}")
        return endpoint
    for field, endpoint in (("messages", CHAT), ("prompt", COMPLETIONS), ("input", RESPONSES)):
        if field in body:
            return endpoint
    raise PromptError("body: has none of messages, prompt and input, so its endpoint cannot be told; give --endpoint")


def _object(file: Path, error_type: type[GorgoError]) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise error_type(f"{file}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise error_type(f"{file}: expected a JSON object")
    return value


def _shown(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


def _print(explained: Mapping[str, Any], notes: list[str], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({**explained, "notes": notes}, indent=2))
        return
    about, reason = summary(explained)
    click.echo(about)
    click.echo()
    _print_table(rows(explained))
    click.echo()
    for line in (reason, *notes):
        click.echo(line)


def _print_table(lines: list[tuple[str, ...]]) -> None:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:  # comes with an extra
        click.echo(plain_table(lines))
        return
    console = Console()
    if not console.is_terminal:
        click.echo(plain_table(lines))
        return
    table = Table(box=box.SIMPLE)
    for column, name in enumerate(lines[0]):
        table.add_column(name, justify="left" if column < 3 else "right")
    for line in lines[1:]:
        table.add_row(*line, style="bold" if line[0] else None)
    console.print(table)
