"""The commands `gorgo ext-proc` and `gorgo envoy-config`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from gorgo_plugin.settings import Settings

_config = click.option(
    "--config",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="gorgo.yaml, in the schema of docs/settings.md.",
)


@click.command("ext-proc")
@_config
def ext_proc(config: Path) -> None:
    """Serve Envoy's external processing: decide for each request which replica it goes to.

    Prints one line of JSON with its addresses once it is ready. SIGHUP reads the file anew, SIGTERM ends the service
    once Envoy has turned away from it.
    """
    import asyncio
    import json
    import logging
    import signal

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to read anew

    import uvloop

    from gorgo_plugin.envoy_ext_proc.server import serve

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    settings = _read(config)

    def ready(addresses: dict[str, Any]) -> None:
        click.echo(json.dumps(addresses))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings, lambda: _read(config), ready))


@click.command("envoy-config")
@_config
@click.option(
    "--mode",
    default="composite",
    type=click.Choice(["composite", "override-host", "aggregate"]),
    help="How Envoy picks the replica. override-host: for replicas given by IP address, follows the whole ranking; "
    "aggregate: for Envoy before 1.40.",
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="File to write; without it, printed.")
def envoy_config(config: Path, mode: Any, output: Path | None) -> None:
    """Write a complete envoy.yaml for the fleet of a gorgo.yaml."""
    from gorgo_plugin.envoy_ext_proc.envoy_yaml import envoy_yaml

    text = envoy_yaml(_read(config), mode)
    if output is None:
        click.echo(text, nl=False)
    else:
        output.write_text(text)


def _read(path: Path) -> Settings:
    """The settings of a file.

    Raises:
        SettingsError: it is no YAML mapping, or a field is wrong.
    """
    import yaml

    from gorgo_plugin.envoy_ext_proc.unique_keys import load_yaml
    from gorgo_plugin.errors import SettingsError
    from gorgo_plugin.settings import Settings

    try:
        content = load_yaml(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: expected a mapping of settings")
    try:
        settings = Settings.model_validate(content)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from None
    if not settings.replicas:
        raise SettingsError(f"{path}: replicas: at least one is needed")
    return settings
