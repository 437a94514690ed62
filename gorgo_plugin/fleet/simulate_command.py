"""The command `gorgo simulate`."""

from __future__ import annotations

from pathlib import Path

import click

from gorgo_plugin.fleet.generated import NAMES
from gorgo_plugin.fleet.rows import ROWS


@click.command()
@click.option("--trace", type=click.Path(dir_okay=False, path_type=Path), help="Mooncake-format file.")
@click.option("--workload", type=click.Choice(NAMES), help="Generated requests, in place of a trace.")
@click.option(
    "--fleet",
    "fleet_file",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="YAML file of regions, engines, gateways, clients, links and events; examples/fleets has some.",
)
@click.option(
    "--policies", default="gorgo,least-request,prefix-cache,session-affinity", help="Comma-separated rows, or files."
)
@click.option("--time-scale", default=1.0, type=click.FloatRange(0.01, 1000), help="Stretches arrivals; 2 halves load.")
@click.option("--requests", "limit", type=click.IntRange(1), help="First requests served; without it all.")
@click.option("--seeds", default=1, type=click.IntRange(1, 1000), help="Runs of each row, each with its own seed.")
@click.option("--seed", "first_seed", default=0, type=click.IntRange(0), help="First of these seeds.")
@click.option("--jobs", type=click.IntRange(1), help="Processes; without it as many as there are processors.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="File the figures are written to.")
@click.option("--plots", type=click.Path(file_okay=False, path_type=Path), help="Folder of plots of the first seed.")
def simulate(
    trace: Path | None,
    workload: str | None,
    fleet_file: Path,
    policies: str,
    time_scale: float,
    limit: int | None,
    seeds: int,
    first_seed: int,
    jobs: int | None,
    out: Path | None,
    plots: Path | None,
) -> None:
    """Compare routing policies on a trace and a fleet of your own, in virtual time.

    The routers are those of the live gateways, the engines those of `gorgo mock-upstream`. The same command writes the
    same JSON. Ratios are to the first row.
    """
    import os

    import msgspec

    from gorgo_plugin.fleet.rows import rows_named
    from gorgo_plugin.fleet.simulation_plots import write_plots
    from gorgo_plugin.fleet.simulation_report import content, lines, table
    from gorgo_plugin.fleet.simulation_runs import Source, load
    from gorgo_plugin.fleet.simulation_show import run_with_bar
    from gorgo_plugin.fleet.terminal import wide_console
    from gorgo_plugin.fleet.topology import read_fleet

    if (trace is None) == (workload is None):
        raise click.UsageError("give either --trace or --workload")
    rows = rows_named([name.strip() for name in policies.split(",")])
    fleet = read_fleet(fleet_file)
    source = Source(trace, workload or "", time_scale, limit)
    count = len(load(source, first_seed, fleet.block_tokens))
    numbers = range(first_seed, first_seed + seeds)
    console = wide_console()
    outcomes = run_with_bar(console, rows, numbers, fleet, source, jobs or os.cpu_count() or 1, count)
    shown = lines(rows, outcomes)
    console.print(table(shown))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(msgspec.json.format(msgspec.json.encode(content(source, fleet, shown)), indent=1))
        console.print(f"Figures: {out}")
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
        console.print("Plots: " + ", ".join(str(path) for path in write_plots(plots, [runs[0] for runs in outcomes])))


simulate.epilog = (
    f"Rows: {', '.join(ROWS)}. A name that ends in .yaml is a file of a router's settings, as gorgo.yaml; its replicas "
    "are left out."
)
