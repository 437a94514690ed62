"""The command `gorgo soak`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.table import Table

    from gorgo_plugin.fleet.soak import SoakResult, SoakSettings


@click.command()
@click.option("--minutes", default=10.0, type=click.FloatRange(0.05), help="Minutes of load.")
@click.option("--rate", default=20.0, type=click.FloatRange(0.1), help="Requests per second, evenly spaced.")
@click.option("--leaving", default=0.2, type=click.FloatRange(0, 1), help="Share of clients that leave at any moment.")
@click.option("--seed", default=0, type=click.IntRange(0), help="Seeds requests, leaving and replicas.")
@click.option("--out", default="out/soak", type=click.Path(file_okay=False, path_type=Path), help="Folder of results.")
def soak(minutes: float, rate: float, leaving: float, seed: int, out: Path) -> None:
    """Load the service behind the real Envoy for minutes, and see that nothing piles up.

    Conversations of all kinds, always with new text, and clients that leave. The service runs with a message cache of
    4 MiB and replicas of 100,000 tokens, so that both bounds are reached within two minutes and memory is flat after
    them. Writes soak.json and the logs to the folder of results. Exit status 1 when memory grew over the second half
    (runs of less than 3 minutes are too short to tell), when a flight or a stream stayed open, or when a request
    failed other than by its client's leaving.
    """
    import asyncio
    from dataclasses import asdict

    import msgspec

    from gorgo_plugin.fleet.machine import machine
    from gorgo_plugin.fleet.soak import Sample, SoakSettings, faults, verdict
    from gorgo_plugin.fleet.soak import soak as run
    from gorgo_plugin.fleet.soak_load import Counts
    from gorgo_plugin.fleet.terminal import wide_console

    console = wide_console()
    settings = SoakSettings(minutes, rate, leaving, seed, out)
    with console.status("starting replicas, the service and Envoy") as status:

        def sampled(sample: Sample, counts: Counts) -> None:
            status.update(f"{sample.at_s:.0f} s: {counts.sent} requests, {sample.rss_mb:.0f} MB")

        try:
            result = asyncio.run(run(settings, sampled))
        except asyncio.CancelledError:
            raise click.Abort from None
    console.print(_table(settings, result))
    console.print(verdict(result))
    figures = {
        "machine": machine(),
        "settings": asdict(settings) | {"out": str(out)},
        "verdict": verdict(result),
        "faults": faults(result),
        **asdict(result),
    }
    (out / "soak.json").write_bytes(msgspec.json.format(msgspec.json.encode(figures)))
    console.print(f"Figures: {out / 'soak.json'}")
    if faults(result):
        raise click.exceptions.Exit(1)


def _table(settings: SoakSettings, result: SoakResult) -> Table:
    from rich.table import Table

    from gorgo_plugin.fleet.soak import CACHE_BYTES, KV_TOKENS

    counts, rest = result.counts, result.rest
    half = result.judged[0]
    table = Table(title=f"{settings.minutes:g} minutes at {settings.rate:g} requests/s", show_header=False)
    left = ", ".join(f"{count} having seen {seen}" for seen, count in sorted(counts.left.items()))
    rows = {
        "requests": f"{counts.sent} sent, {counts.answered} answered, {counts.failed} failed, {rest.routed} routed",
        "clients that left": f"{sum(counts.left.values())}{f' ({left})' if left else ''}",
        "at half-time": f"message cache {half.cache_bytes / CACHE_BYTES:.0%} full, "
        f"{half.index_tokens:,} tokens in the index for replicas of {KV_TOKENS:,}",
        "most at once": f"{max(one.flights for one in result.samples)} flights, "
        f"{max(one.streams for one in result.samples)} streams",
        "at the end": f"{rest.flights} flights, {rest.streams} streams, {rest.swept_flights} flights swept",
    }
    for name, trend in (("memory of the service", result.trend), ("memory of Envoy", result.envoy_trend)):
        if trend is not None:
            rows[name] = f"{trend.median_mb:.1f} MB, {trend.mb_per_hour:+.1f} MB/h, {trend.percent:+.2f}% in the half"
    first, last = result.samples[0], result.samples[-1]
    rows["file descriptors"] = f"{first.descriptors} at first, {half.descriptors} at half-time, {last.descriptors} last"
    rows["threads"] = f"{first.threads} at first, {half.threads} at half-time, {last.threads} last"
    for name, text in rows.items():
        table.add_row(name, text)
    return table
