"""The command `gorgo`. A command's module is imported when asked for, and imports what it needs as it runs."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import click

from gorgo_plugin.errors import GorgoError


class _Lazy(NamedTuple):
    """Where a command lives, and the extra of the package it needs ("" for none)."""

    module: str
    attribute: str
    extra: str = ""


COMMANDS = {
    "bench": _Lazy("gorgo_plugin.fleet.bench_commands", "bench", "demo"),
    "demo": _Lazy("gorgo_plugin.fleet.commands", "demo", "demo"),
    "envoy-config": _Lazy("gorgo_plugin.envoy_ext_proc.commands", "envoy_config", "envoy"),
    "explain": _Lazy("gorgo_plugin.explain", "explain", "litellm"),
    "ext-proc": _Lazy("gorgo_plugin.envoy_ext_proc.commands", "ext_proc", "envoy"),
    "mock-upstream": _Lazy("gorgo_plugin.fleet.commands", "mock_upstream", "demo"),
    "simulate": _Lazy("gorgo_plugin.fleet.simulate_command", "simulate", "demo"),
    "soak": _Lazy("gorgo_plugin.fleet.soak_command", "soak", "demo"),
}


class LazyGroup(click.Group):
    """Finds commands in `COMMANDS`; turns the package's own errors and missing extras into one sentence."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now."""
        lazy = COMMANDS.get(cmd_name)
        if lazy is None:
            return None
        command: click.Command = getattr(importlib.import_module(lazy.module), lazy.attribute)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command.

        Raises:
            ClickException: the command needs an extra that is not installed, or ended in an error of this package.
        """
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            lazy = COMMANDS.get(ctx.invoked_subcommand or "")
            if lazy is None or not lazy.extra or (error.name or "").startswith("gorgo_plugin"):
                raise
            needed = f"pip install 'gorgo-plugin[{lazy.extra}]'"
            raise click.ClickException(f"'{error.name}' is not installed; this command needs: {needed}") from None
        except GorgoError as error:
            raise click.ClickException(str(error)) from None


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="gorgo-plugin")
def main() -> None:
    """GORGO: routes each LLM request to the replica that will answer first."""
