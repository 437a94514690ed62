"""Coding agents: loops of short turns over contexts that grow, fork and are compacted.

A task is one session. Its first prompt is the agent's system prompt with its tools, which many tasks share, the
project's instructions, and the request; each further prompt adds the answer and the results of the tools that the
answer called. From time to time a turn starts sub-agents, which go on from the task's context in parallel and whose
findings come back as one result; and a context that grew too long is rewritten as the system prompt and a summary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gorgo_plugin.fleet.turns import Prefix, TokenTree, Turn


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """Sizes and rates; lengths in tokens."""

    window_s: float = 1500.0
    """Seconds of the window at a rate scale of 1."""
    batches_per_s: float = 0.18
    """Arrivals of tasks; each is one task, or a batch of them."""
    batch_share: float = 0.12
    """Share of the arrivals that are a batch: one person or one job starts several tasks on a project."""
    batch_tasks: tuple[int, int] = (3, 6)
    """Fewest and most tasks of a batch."""
    batch_spread_s: float = 2.0
    """Seconds over which a batch arrives."""
    agents: tuple[int, ...] = (9_000, 6_000, 3_500)
    """Tokens of the agents' system prompts, tools included."""
    projects: int = 30
    """Projects, each of one agent."""
    project_tokens: tuple[int, int] = (300, 3_000)
    """Shortest and longest instructions of a project."""
    request_tokens: float = 250.0
    """Median tokens of what a task is asked (log-normal)."""
    request_spread: float = 1.0
    """Sigma of it."""
    turns: float = 12.0
    """Mean turns of a task (geometric)."""
    result_tokens: float = 1_800.0
    """Median tokens of the tools' results of a turn (log-normal)."""
    result_spread: float = 1.1
    """Sigma of it."""
    longest_result_tokens: int = 10_000
    """Longest result: tools cut what is longer."""
    tool_s: float = 1.5
    """Median seconds that the tools of a turn take (log-normal)."""
    tool_spread: float = 1.2
    """Sigma of it: most read a file, some run the tests."""
    output_tokens: tuple[int, int] = (50, 300)
    """Fewest and most tokens of an answer."""
    context_tokens: int = 40_000
    """A context that would be longer is compacted."""
    summary_tokens: tuple[int, int] = (800, 2_000)
    """Shortest and longest summary that takes its place."""
    fork_share: float = 0.03
    """Share of the turns that start sub-agents."""
    forks: tuple[int, int] = (2, 4)
    """Fewest and most sub-agents at once."""
    fork_turns: float = 4.0
    """Mean turns of a sub-agent (geometric)."""


def agent_turns(seed: int, rate_scale: float = 1.0, settings: AgentSettings | None = None) -> list[Turn]:
    """Tasks that begin within `window_s / rate_scale` seconds, up to the end of them, in order of arrival.

    The same seed gives the same turns. A higher rate begins as many tasks in less time; each takes as long as before.
    """
    settings = settings or AgentSettings()
    rng = np.random.default_rng(seed)
    maker = _Tasks(rng, settings)
    window_s = settings.window_s / rate_scale
    starts_s = np.sort(rng.uniform(0.0, window_s, round(settings.batches_per_s * settings.window_s)))
    turns: list[Turn] = []
    number = 0
    for start_s in starts_s.tolist():
        project = maker.any_project()
        tasks = int(rng.integers(settings.batch_tasks[0], settings.batch_tasks[1] + 1))
        for _ in range(tasks if rng.random() < settings.batch_share else 1):
            late_s = rng.uniform(0.0, settings.batch_spread_s)
            turns += maker.task(f"task-{number}", project, start_s + late_s)
            number += 1
    return sorted((turn for turn in turns if turn.at_s < window_s), key=lambda turn: turn.at_s)


@dataclass(slots=True)
class _Loop:
    """One loop of an agent: what it knows, and when it last heard of it.

    Attributes:
        base: what a compacted context begins with.
        context: prompt and answer so far.
        history: answers in the context.
        free_s: when the last answer is there.
    """

    base: Prefix
    context: Prefix
    history: int
    free_s: float


class _Tasks:
    """Makes the turns of one task after the other."""

    def __init__(self, rng: np.random.Generator, settings: AgentSettings) -> None:
        self._rng = rng
        self._settings = settings
        self._tree = TokenTree()
        systems = [self._tree.grow(None, tokens) for tokens in settings.agents]
        self._projects = [
            self._tree.grow(systems[project % len(systems)], self._between(settings.project_tokens))
            for project in range(settings.projects)
        ]

    def any_project(self) -> Prefix:
        """The beginning that the tasks of some project share; a few projects have most of the tasks."""
        return self._projects[int(len(self._projects) * self._rng.uniform(0.0, 1.0) ** 2)]

    def task(self, session: str, project: Prefix, start_s: float) -> list[Turn]:
        """All turns of one task, its sub-agents' included."""
        settings = self._settings
        loop = _Loop(project, project, 0, start_s)
        turns = [self._turn(session, loop, self._length(settings.request_tokens, settings.request_spread), start_s)]
        for _ in range(int(self._rng.geometric(1.0 / settings.turns)) - 1):
            if self._rng.random() < settings.fork_share:
                turns += self._forked(session, loop)
            turns.append(self._go_on(session, loop))
        return turns

    def _forked(self, session: str, loop: _Loop) -> list[Turn]:
        """The turns of sub-agents that start where the loop is and run in parallel; it waits for the last."""
        turns: list[Turn] = []
        ends_s = [loop.free_s]
        for _ in range(self._between(self._settings.forks)):
            fork = _Loop(loop.base, loop.context, loop.history, loop.free_s)
            for _ in range(int(self._rng.geometric(1.0 / self._settings.fork_turns))):
                turns.append(self._go_on(session, fork))
            ends_s.append(fork.free_s)
        loop.free_s = max(ends_s)
        return turns

    def _go_on(self, session: str, loop: _Loop) -> Turn:
        """The next turn of a loop, after the tools that the last answer called."""
        settings = self._settings
        result = min(self._length(settings.result_tokens, settings.result_spread), settings.longest_result_tokens)
        if loop.context.tokens + result > settings.context_tokens:
            loop.context, loop.history = self._tree.grow(loop.base, self._between(settings.summary_tokens)), 0
        tools_s = self._rng.lognormal(np.log(settings.tool_s), settings.tool_spread)
        return self._turn(session, loop, result, loop.free_s + tools_s)

    def _turn(self, session: str, loop: _Loop, new_tokens: int, at_s: float) -> Turn:
        prompt = self._tree.grow(loop.context, new_tokens)
        turn = Turn(
            at_s, session, loop.history, prompt, self._tree.grow(prompt, self._between(self._settings.output_tokens))
        )
        loop.context, loop.history, loop.free_s = turn.whole, loop.history + 1, turn.answered_s
        return turn

    def _length(self, median: float, sigma: float) -> int:
        return 1 + round(self._rng.lognormal(np.log(median), sigma))

    def _between(self, limits: tuple[int, int]) -> int:
        return int(self._rng.integers(limits[0], limits[1] + 1))
