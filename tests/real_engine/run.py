"""Checks against two real vLLM engines behind the real LiteLLM proxy: `make real-engine`.

Exit status 0: all is as it must be; 1: something is not; 77: the engines cannot be had here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Awaitable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from gorgo_plugin.fleet.machine import machine
from gorgo_plugin.fleet.processes import ProcessError
from gorgo_plugin.fleet.terminal import wide_console
from tests.real_engine import checks
from tests.real_engine.checks import Check
from tests.real_engine.conversations import TURNS, Conversation, conversations, fresh_conversations
from tests.real_engine.engines import KV_TOKENS, Engine, engines
from tests.real_engine.environment import Unavailable, engine_python, versions
from tests.real_engine.gateway import Gateway, RequestFailed, Turn, gateway
from tests.real_engine.model import word_ids, write_model
from tests.real_engine.replay import AT_ONCE, LONG_ROUNDS, MARGIN_PROMPTS, Asked, Replay, cross, flood, flooded, play

SKIPPED = 77  # what automake and others take for a test that could not be run
TIME_LIMIT_S = 600.0
FOLLOWED_WITHIN_S = 10.0  # a replay of all events takes a tenth of a second
COLD_TURNS = 16  # the first answers pay for warm-up, and the rates are not learned yet


class Run:
    """One run: its engines, the folder for models, configurations and logs, and what it found."""

    def __init__(self, running: list[Engine], model: Path, folder: Path, seed: int) -> None:
        self._engines = running
        self._model = model
        self._folder = folder
        self._words = word_ids(model)
        self._seed = seed
        self.rows: list[Check] = []
        self.turns: dict[str, list[Turn]] = {}

    def _gateway(self, name: str, own: dict[str, dict[str, Any]], **more: Any) -> Any:
        return gateway(self._engines, self._model, self._folder, name, self._words, own, **more)

    def _note(self, phase: str, asked: list[Asked]) -> None:
        self.turns[phase] = [one.turn for one in asked]

    async def sized(self) -> None:
        """Caches of known size: counts, estimates, affinity, load, eviction, predictions."""
        rng = random.Random(self._seed)
        own = {engine.name: {"kv_tokens": KV_TOKENS} for engine in self._engines}
        async with self._gateway("sized", own) as proxy:
            talks = conversations(self._seed)
            replay = Replay(proxy)
            asked = await play(replay, talks, TURNS)
            self._note("conversations", asked)
            self.rows += checks.counted(asked)
            self.rows += checks.estimated(asked)
            self.rows += checks.generated(asked)
            self.rows += checks.returned(asked)
            crossings = [await cross(proxy, rng) for _ in range(LONG_ROUNDS)]
            self.turns["crossings"] = [turn for one in crossings for turn in (one.long, *one.shorts)]
            self.rows += checks.crossed(crossings)
            self.turns["flood"] = await flood(proxy, rng, "chatml")
            late = await replay.round(talks)
            self._note("after the flood", late)
            self.rows += checks.evicted(late, flooded(self.turns["flood"]), "chatml")
            new = fresh_conversations(rng)
            await play(replay, new, 1)
            await flood(proxy, rng, "words", MARGIN_PROMPTS)
            late = await replay.round(rng.sample(new, len(new)))
            self._note("at the margin", late)
            self.rows.append(checks.at_the_margin(late))
            warm = [*self.turns["conversations"][COLD_TURNS:], *self.turns["crossings"], *self.turns["after the flood"]]
            self.rows.append(checks.predicted(warm))

    async def oversized(self) -> tuple[Replay, list[Conversation]]:
        """Caches believed far larger than they are: only usage tells what was evicted. Returns its conversations."""
        rng = random.Random(self._seed + 1)
        own: dict[str, dict[str, Any]] = {engine.name: {"kv_tokens": 100 * KV_TOKENS} for engine in self._engines}
        async with self._gateway("oversized", own, metrics={"path": None}) as proxy:
            talks = fresh_conversations(rng)
            replay = Replay(proxy)
            await play(replay, talks, 1)
            await flood(proxy, rng, "words")
            first = await replay.round(reversed(talks))
            second = await replay.round(talks)
            self._note("oversized", first + second)
            self.rows += checks.corrected(first, second)
        return replay, talks

    async def told(self, replay: Replay, talks: list[Conversation]) -> None:
        """KV events: a gateway that starts late, new conversations, overflow, a cleared cache, a restart."""
        rng = random.Random(self._seed + 2)
        events = {
            engine.name: {"kv_events": {"endpoint": engine.events, "replay": engine.replay}} for engine in self._engines
        }
        async with self._gateway("told", events) as proxy:
            replay.at(proxy)
            await self._followed(proxy)
            await self._exact("a gateway that starts late", replay.round(talks))
            new = conversations(self._seed + 2)
            await self._exact("new conversations", play(replay, new, TURNS, at_once=1))
            await flood(proxy, rng, "words", MARGIN_PROMPTS)
            await self._exact("a cache that begins to overflow", replay.round(new))
            for engine in self._engines:
                await engine.reset_cache()
                await engine.step("words")  # it tells that it cleared its cache with the events of its next step
            await flood(proxy, rng, "words", AT_ONCE)
            await self._exact("a cache that was cleared", replay.round(new))
            await self._engines[0].restart()
            # Its events tell of the restart with its first step: the request before that is priced by the old cache.
            await self._exact("an engine that was restarted", replay.round(new), surprises=1)

    async def _followed(self, proxy: Gateway) -> None:
        """Await that the gateway knows both caches from their events."""
        started_s, followed = time.monotonic(), False
        while not followed and time.monotonic() - started_s < FOLLOWED_WITHIN_S:
            replicas = (await proxy.status())["replicas"].values()
            followed = all(replica["cache"]["source"] == "kv-events" for replica in replicas)
            await asyncio.sleep(0.05)
        figure = f"after {time.monotonic() - started_s:.1f} s" if followed else "not in time"
        self.rows.append(Check("with KV events, a gateway that starts late knows the caches", figure, followed))

    async def _exact(self, name: str, turns: Awaitable[list[Asked]], surprises: int = 0) -> None:
        asked = await turns
        self._note(f"told: {name}", asked)
        self.rows.append(checks.exact(asked, name, surprises))


async def run(python: Path, folder: Path, seed: int) -> Run:
    """All phases, one after the other.

    Raises:
        Unavailable: the engines do not start.
        ProcessError: the proxy does not, or one of them ended.
        RequestFailed: a request was answered with an error.
        TimeoutError: it took longer than the time limit.
    """
    model = folder / "model"
    write_model(model)
    async with asyncio.timeout(TIME_LIMIT_S), engines(python, model, folder) as running:
        found = Run(running, model, folder, seed)
        await found.sized()
        await found.told(*await found.oversized())
        return found


def table(rows: list[Check]) -> Table:
    """The rows for the terminal."""
    shown = Table(title="Two vLLM engines behind LiteLLM", show_lines=False)
    for heading in ("check", "figure", "verdict"):
        shown.add_column(heading)
    for row in rows:
        shown.add_row(row.name, row.figure, {True: "ok", False: "FAILED", None: "-"}[row.passed])
    return shown


def main() -> int:
    """Run the checks and print what they found; returns the exit status."""
    parser = argparse.ArgumentParser(description="Checks against two real vLLM engines behind the real LiteLLM proxy.")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--seed", type=int, default=0, help="seeds the conversations and the floods")
    parser.add_argument("--folder", type=Path, help="where models, configurations and logs stay; default: nowhere")
    arguments = parser.parse_args()
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gorgo-real-engine-") as temporary:
        folder: Path = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            python = engine_python()
            found = asyncio.run(run(python, folder.absolute(), arguments.seed))
        except Unavailable as error:
            print(f"SKIPPED: {error}")
            return SKIPPED
        except (ProcessError, RequestFailed, TimeoutError) as error:
            print(f"FAILED: {type(error).__name__}: {error}")
            return 1
    elapsed_s = time.monotonic() - started_s
    console = wide_console()
    used = versions(python)
    console.print(table(found.rows))
    console.print(", ".join(f"{name} {number}" for name, number in used.items()) + f"; {elapsed_s:.0f} s")
    if arguments.json is not None:
        figures = {
            "machine": machine(),
            "engine": used,
            "seconds": round(elapsed_s, 1),
            "checks": [asdict(row) for row in found.rows],
            "turns": {phase: [turn.figures() for turn in turns] for phase, turns in found.turns.items()},
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(figures, indent=1))
    return 1 if any(row.passed is False for row in found.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
