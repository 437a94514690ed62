"""The command `gorgo bench`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from gorgo_plugin.fleet.statistics import Ratio


@click.group()
def bench() -> None:
    """Measure; each benchmark prints a table and writes its figures as JSON."""


@bench.command("litellm")
@click.option("--rounds", default=7, type=click.IntRange(1), help="Rounds; both proxies are measured in each.")
@click.option(
    "--out", default="out/bench-litellm", type=click.Path(path_type=Path), help="Folder for figures and logs."
)
def bench_litellm(rounds: int, out: Path) -> None:
    """What the plugin costs LiteLLM, against simple-shuffle on the same proxy."""
    import asyncio
    from dataclasses import asdict

    import msgspec
    from rich.table import Table

    from gorgo_plugin.fleet.bench_litellm import bench_loop, bench_overhead
    from gorgo_plugin.fleet.machine import machine
    from gorgo_plugin.fleet.terminal import wide_console

    console = wide_console()
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.watch"):
        old.unlink()
    with console.status("starting") as status:
        overheads = asyncio.run(bench_overhead(out, rounds, status.update, console.print))
        loops = asyncio.run(bench_loop(out, rounds, status.update))
    costs = Table(title=f"gorgo over simple-shuffle on the same LiteLLM, {rounds} interleaved rounds")
    for heading in ("load", "CPU", "in total", "throughput", "in total", "CPU ms a request", "p50 ms"):
        costs.add_column(heading, justify="left" if heading == "load" else "right")
    for row in overheads:
        costs.add_row(
            row.load,
            _interval(row.cpu_ratio),
            f"{row.cpu_ratio_total:.3f}",
            _interval(row.throughput_ratio),
            f"{row.throughput_ratio_total:.3f}",
            "{:.1f} / {:.1f}".format(*row.cpu_ms),
            "{:.1f} / {:.1f}".format(*row.p50_ms),
        )
    lags = Table(title="Event loop under 16 clients (ms)")
    for heading in ("proxy", "lag p50", "p99", "p99.9", "max", "own hold p99.9", "max", "its CPU p99.9", "max"):
        lags.add_column(heading, justify="left" if heading == "proxy" else "right")
    for loop in loops:
        name, *times = asdict(loop).values()
        lags.add_row(name, *("-" if ms is None else f"{ms:.1f}" for ms in times))
    console.print(costs, lags)
    figures = {"machine": machine(), "overhead": list(map(asdict, overheads)), "loop": list(map(asdict, loops))}
    (out / "bench-litellm.json").write_bytes(msgspec.json.format(msgspec.json.encode(figures)))
    console.print(f"Figures: {out / 'bench-litellm.json'}")


@bench.command("envoy")
@click.option("--rounds", default=7, type=click.IntRange(1), help="Rounds; all variants are measured in each.")
@click.option("--out", default="out/bench-envoy", type=click.Path(path_type=Path), help="Folder for figures and logs.")
def bench_envoy(rounds: int, out: Path) -> None:
    """What the external-processing service costs Envoy, against no filter and a service that does nothing."""
    import asyncio
    from dataclasses import asdict

    import msgspec
    from rich.table import Table

    from gorgo_plugin.fleet.bench_envoy import NO_FILTER, bench
    from gorgo_plugin.fleet.machine import machine
    from gorgo_plugin.fleet.terminal import wide_console

    console = wide_console()
    out.mkdir(parents=True, exist_ok=True)
    with console.status("starting") as status:
        results = asyncio.run(bench(out, rounds, status.update))
    table = Table(title=f"Envoy without a filter, with a service that does nothing, with gorgo; {rounds} rounds")
    for heading in ("load", "service", "CPU ms", "ratio", "in total", "p50 ms", "added", "p99 ms", "added", "req/s"):
        table.add_column(heading, justify="left" if heading in ("load", "service") else "right")
    for result in results:
        for variant, figures in result.figures.items():
            ours = variant == "gorgo"
            table.add_row(
                result.load if variant == NO_FILTER else "",
                variant,
                "-" if variant == NO_FILTER else f"{figures.cpu_ms:.2f}",
                _interval(result.cpu_ratio) if ours else "",
                f"{result.cpu_ratio_total:.3f}" if ours else "",
                f"{figures.p50_ms:.2f}",
                f"{figures.added_p50_ms:+.2f}",
                f"{figures.p99_ms:.2f}",
                f"{figures.added_p99_ms:+.2f}",
                f"{figures.requests_per_s:,.0f}",
            )
    console.print(table)
    content = {"machine": machine(), "results": list(map(asdict, results))}
    (out / "bench-envoy.json").write_bytes(msgspec.json.format(msgspec.json.encode(content)))
    console.print(f"Figures: {out / 'bench-envoy.json'}")


@bench.command("estimator")
@click.option("--quick", is_flag=True, help="Under a minute, with fewer prompts.")
@click.option("--rounds", type=click.IntRange(1), help="Rounds; both sides are measured in each.")
@click.option("--seed", default=0, type=click.IntRange(0), help="Seeds the prompts.")
@click.option(
    "--json",
    "file",
    default="out/bench-estimator/bench-estimator.json",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the figures.",
)
def bench_estimator(quick: bool, rounds: int | None, seed: int, file: Path) -> None:
    """How fast a prompt's cached tokens are estimated, against the package of the paper's authors.

    Lookups alone, decisions from token ids and from raw JSON, up to 100M cached tokens, and bytes per token. Takes
    about four minutes. The extra `bench` brings that package.
    """
    import dataclasses

    import msgspec

    from gorgo_plugin.fleet.bench_estimator import QUICK, Plan, measure
    from gorgo_plugin.fleet.bench_estimator_report import content, lines, table
    from gorgo_plugin.fleet.bench_estimator_sides import rival_package
    from gorgo_plugin.fleet.terminal import wide_console

    plan = dataclasses.replace(QUICK if quick else Plan(), seed=seed)
    plan = plan if rounds is None else dataclasses.replace(plan, rounds=rounds)
    console = wide_console()
    rival_package()
    with console.status("starting") as status:
        measured = measure(plan, status.update)
    rows = lines(measured)
    console.print(table(rows, measured))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(msgspec.json.format(msgspec.json.encode(content(rows, measured))))
    console.print(f"Figures: {file}")


@bench.command("accuracy")
@click.option("--trace", type=click.Path(dir_okay=False, exists=True, path_type=Path), help="Mooncake-format file.")
@click.option("--requests", type=click.IntRange(10), help="First requests replayed; without it 2000, of a trace all.")
@click.option(
    "--kv-tokens", type=click.IntRange(1), help="Cache of each engine; without it 300000, of a trace 2000000."
)
@click.option("--time-scale", default=2.0, type=click.FloatRange(0.1, 100), help="Stretches a trace's arrivals.")
@click.option("--seed", default=0, type=click.IntRange(0), help="Seeds workload, engines and networks.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="File the figures are written to.")
def bench_accuracy(
    trace: Path | None, requests: int | None, kv_tokens: int | None, time_scale: float, seed: int, out: Path | None
) -> None:
    """How true the estimate of cached tokens is to engines whose caches overflow.

    Replays a trace, or generated conversations, in virtual time through three model engines, once for each source of
    knowledge that the router may have.
    """
    from dataclasses import asdict

    import msgspec
    from rich.table import Table

    from gorgo_plugin.fleet.bench_accuracy import bench
    from gorgo_plugin.fleet.engine import PROFILES
    from gorgo_plugin.fleet.machine import machine
    from gorgo_plugin.fleet.mooncake import read_trace
    from gorgo_plugin.fleet.replay_inputs import conversation_requests, trace_requests
    from gorgo_plugin.fleet.terminal import wide_console
    from gorgo_plugin.fleet.workload import ConversationSettings, conversations

    console = wide_console()
    block_tokens = PROFILES["linear"].block_tokens
    if trace is None:
        workload = conversations(seed, ConversationSettings(requests or 2000, rate_per_s=3.0, turns=8.0, think_s=60.0))
        coming = conversation_requests(workload, block_tokens)
    else:
        coming = trace_requests(read_trace(trace), time_scale, block_tokens)[:requests]
    room = kv_tokens or (300_000 if trace is None else 2_000_000)
    with console.status("starting") as status:
        rows = bench(coming, room, seed=seed, say=status.update)
    table = Table(title=f"Estimated against true cached tokens, caches of {room:,} tokens, {len(coming):,} requests")
    headings = ("the router knows", "cached", "error", "over", "under", "mean of ratios", "p95", "within a block", "s")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == headings[0] else "right")
    for row in rows:
        shares = (row.error_share, row.over_share, row.under_share, row.mean_ratio, row.p95_ratio)
        table.add_row(
            row.source,
            f"{row.cached_share:.1%}",
            *(f"{share:.3%}" for share in shares),
            f"{row.within_block:.2%}",
            f"{row.wall_s:.0f}",
        )
    console.print(table)
    if out is not None:
        figures = {"machine": machine(), "kv_tokens": room, "rows": list(map(asdict, rows))}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(msgspec.json.format(msgspec.json.encode(figures)))
        console.print(f"Figures: {out}")


def _interval(ratio: Ratio) -> str:
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


@bench.command("hostile")
@click.option("--cold", default=200, type=click.IntRange(1), help="Cold prompts mixed into warm traffic.")
@click.option("--tokens", default=100_000, type=click.IntRange(1), help="Tokens of each, about.")
@click.option("--prefixes", default=1_000_000, type=click.IntRange(4), help="Prompts without a common prefix.")
@click.option("--out", default="out/bench-hostile", type=click.Path(path_type=Path), help="Folder for the figures.")
def bench_hostile(cold: int, tokens: int, prefixes: int, out: Path) -> None:
    """What cold and hostile prompts do to the event loop, to memory and to answers."""
    import asyncio
    from dataclasses import asdict

    import msgspec
    from rich.table import Table

    from gorgo_plugin.fleet.bench_hostile import bench_hostile, bench_stalls
    from gorgo_plugin.fleet.machine import machine
    from gorgo_plugin.fleet.terminal import wide_console

    console = wide_console()
    out.mkdir(parents=True, exist_ok=True)
    with console.status("starting") as status:
        loops = asyncio.run(bench_stalls(cold, tokens, status.update))
        hostile = asyncio.run(bench_hostile(prefixes, status.update))
    stalls = Table(title="Event loop (ms)")
    for heading in ("traffic", "late p50", "p99.9", "max", "warm p99", "cold p50", "max"):
        stalls.add_column(heading, justify="left" if heading == "traffic" else "right")
    for loop in loops:
        name, _, *times = asdict(loop).values()
        stalls.add_row(name, *("-" if ms is None else f"{ms:.1f}" for ms in times))
    cases = Table(title="Hostile prompts")
    for heading in ("case", "ms", "loop late ms", "memory kept MB", "answer"):
        cases.add_column(heading, justify="left" if heading in ("case", "answer") else "right")
    for row in hostile:
        cases.add_row(row.case, f"{row.ms:,.2f}", f"{row.stall_ms:,.1f}", f"{row.kept_mb:,.1f}", row.answer)
    console.print(stalls, cases)
    figures = {"machine": machine(), "loop": list(map(asdict, loops)), "hostile": list(map(asdict, hostile))}
    (out / "bench-hostile.json").write_bytes(msgspec.json.format(msgspec.json.encode(figures)))
    console.print(f"Figures: {out / 'bench-hostile.json'}")


@bench.command("routing")
@click.option("--trace", type=click.Path(dir_okay=False, exists=True, path_type=Path), help="Mooncake-format file.")
@click.option("--quick", is_flag=True, help="Two seeds and shorter runs: under 10 minutes on 4 cores.")
@click.option("--seeds", type=click.IntRange(1), help="Runs of every row; without it 5, with --quick 2.")
@click.option("--parts", help="Comma-separated parts of the benchmark; without it all.")
@click.option("--jobs", type=click.IntRange(1), help="Processes; without it as many as there are processors.")
@click.option(
    "--out",
    default="out/bench-routing",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the figures, and of every run's results, from which a run that was broken off goes on.",
)
def bench_routing(
    trace: Path | None, quick: bool, seeds: int | None, parts: str | None, jobs: int | None, out: Path
) -> None:
    """Every routing policy of the papers on three simulated fleets.

    The grid of workloads and fleets, a load sweep, held-out windows after tuning, weights at which the queue is free,
    predicted against measured latency, and fleets that change meanwhile. Takes under two hours on 4 cores.
    """
    import dataclasses

    import msgspec
    from rich.progress import Progress

    from gorgo_plugin.fleet.bench_routing import measure
    from gorgo_plugin.fleet.bench_routing_plan import PARTS, Plan, quick_plan
    from gorgo_plugin.fleet.bench_routing_report import content, tables
    from gorgo_plugin.fleet.terminal import wide_console

    names = _names(parts, PARTS, "--parts", "part") if parts else list(PARTS)
    plan = quick_plan(trace) if quick else Plan(trace)
    plan = plan if seeds is None else dataclasses.replace(plan, seeds=tuple(range(seeds)))
    console = wide_console()
    with Progress(console=console) as progress:
        task = progress.add_task("simulated runs")
        measured = measure(
            plan, names, out / "runs", jobs, lambda done, total: progress.update(task, completed=done, total=total)
        )
    for table in tables(measured):
        console.print(table)
    for sentence in measured.left_out:
        console.print(sentence)
    figures = out / "bench-routing.json"
    figures.write_bytes(msgspec.json.format(msgspec.json.encode(content(measured, plan)), indent=1))
    console.print(f"Figures: {figures}")


@bench.command("tuning")
@click.option("--kinds", default="recovery,stationary", show_default=True, help="Comma-separated kinds of runs.")
@click.option("--seeds", default=20, show_default=True, type=click.IntRange(1), help="Workloads of each kind.")
@click.option("--rate", default=5.0, show_default=True, type=click.FloatRange(0.1), help="Requests a second.")
@click.option("--jobs", type=click.IntRange(1), help="Processes; without it as many as there are processors.")
@click.option(
    "--json", "file", default="out/bench-tuning.json", type=click.Path(dir_okay=False, path_type=Path), help="Figures."
)
def bench_tuning(kinds: str, seeds: int, rate: float, jobs: int | None, file: Path) -> None:
    """What tuning the weights online gains from bad ones, and costs where they are right.

    Simulated, each workload with and without it. Takes about 7 minutes on 2 cores.
    """
    from dataclasses import asdict

    import msgspec
    from rich.progress import Progress

    from gorgo_plugin.fleet.bench_tuning import KINDS, means, measure, report
    from gorgo_plugin.fleet.machine import machine
    from gorgo_plugin.fleet.terminal import wide_console

    names = _names(kinds, KINDS, "--kinds", "kind")
    console = wide_console()
    with Progress(console=console) as progress:
        task = progress.add_task("workloads", total=len(names) * seeds)
        found = measure(names, seeds, rate, jobs, lambda: progress.advance(task))
    for name, outcomes in found.items():
        console.print("\n".join(report(name, outcomes)), highlight=False)
    figures = {
        "machine": machine(),
        "rate_per_s": rate,
        "means": {name: {what: asdict(mean) for what, mean in means(one).items()} for name, one in found.items()},
        "outcomes": {name: list(map(asdict, outcomes)) for name, outcomes in found.items()},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(msgspec.json.format(msgspec.json.encode(figures)))
    console.print(f"Figures: {file}")


def _names(given: str, known: Collection[str], option: str, what: str) -> list[str]:
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in known:
            raise click.BadParameter(f"unknown {what} '{name}'; known: {', '.join(known)}", param_hint=option)
    return names
