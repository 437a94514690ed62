"""The demo on a terminal: a progress bar while it runs, the table and the conclusion after it."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gorgo_plugin.fleet.demo import DemoSettings, Workload, load_workload, run_rows
from gorgo_plugin.fleet.gateway import GATEWAYS
from gorgo_plugin.fleet.report import conclusion, describe_workload, lines, table, write_json, write_plot
from gorgo_plugin.fleet.terminal import wide_console


async def show_demo(settings: DemoSettings) -> None:
    """Run the demo, print what it found and write it to `settings.out`.

    Raises:
        WorkloadError: the trace cannot be used.
        ProcessError: a replica or the gateway failed.
    """
    console = wide_console()
    workload = load_workload(settings)
    console.print(_described(workload))
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        total = progress.add_task("demo", total=len(settings.rows) * len(workload.requests))
        results = await run_rows(
            settings,
            workload,
            announce=lambda text: progress.update(total, description=text),
            on_done=lambda _row: progress.advance(total),
        )
    rows = lines(results)
    write_json(settings.out / "demo.json", settings, workload, results, rows)
    write_plot(settings.out / "demo.png", results, rows)
    console.print(table(rows, GATEWAYS[settings.gateway].title), "", conclusion(rows), sep="\n")
    console.print(f"Figures: {settings.out / 'demo.json'}  Plot: {settings.out / 'demo.png'}")


def _described(workload: Workload) -> str:
    figures = describe_workload(workload)
    text = (
        f"{figures['requests']} requests of {figures['sessions']} sessions over {figures['span_s']:.0f} s, "
        f"{figures['prompt_tokens'] / figures['requests']:,.0f} prompt tokens each, {figures['reuse']:.0%} reusable."
    )
    window = workload.window
    if window is not None:
        text += (
            f" Of the trace: whole conversations, {window.kept:.0%} of the requests of {window.span_ms / 1e3:,.0f} s "
            f"from request {window.first} on; block reuse {window.reuse:.0%}."
        )
    return text
