"""What is asked of the engines, phase by phase; each returns what came of it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.real_engine.conversations import Conversation, prose
from tests.real_engine.engines import BLOCK_TOKENS, KV_TOKENS, NAMES
from tests.real_engine.gateway import Gateway, Turn

AT_ONCE = 4  # conversations begin four at a time, so that both engines get some
LONG_CHARS = 21_000  # 6,000 to 7,500 tokens: seconds of prefill on one core
FLOOD_PROMPTS = 24  # of that length: about twice what both caches hold
MARGIN_PROMPTS = 11  # of that length: with the conversations before them a little more than both hold
SHORT_PROMPTS = 3  # sent while a long one is in flight
LONG_ROUNDS = 4
SEEN_WITHIN_S = 10.0  # a dispatched request shows in the status


@dataclass(frozen=True, slots=True)
class Asked:
    """One turn of a conversation, and the turn before it."""

    conversation: Conversation
    number: int
    turn: Turn
    before: Turn | None

    @property
    def generated_tokens(self) -> int:
        """Tokens of the answer before this turn that fill blocks which the engine could have kept."""
        if self.before is None:
            return 0
        prompt = len(self.before.tokens)
        return _blocks(prompt + max(self.before.output_tokens - 1, 0)) - _blocks(prompt)

    @property
    def generated_cached_tokens(self) -> int:
        """Of these, tokens that the engine found cached."""
        if self.before is None:
            return 0
        return max(self.turn.cached_tokens - _blocks(_shared(self.before, self.turn)), 0)


def _blocks(tokens: int) -> int:
    return tokens // BLOCK_TOKENS * BLOCK_TOKENS


def _shared(one: Turn, other: Turn) -> int:
    """Leading tokens two prompts share."""
    length = min(len(one.tokens), len(other.tokens))
    differ = np.flatnonzero(one.tokens[:length] != other.tokens[:length])
    return int(differ[0]) if len(differ) else length


class Replay:
    """Conversations at one gateway, each with its last turn."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._last: dict[int, Asked] = {}

    async def turn(self, conversation: Conversation) -> Asked:
        """Ask a conversation's next question."""
        before = self._last.get(id(conversation))
        number = 0 if before is None else before.number + 1
        turn = await self._gateway.ask(conversation.model, conversation.ask(number), conversation.tools)
        conversation.answer(turn.text)
        asked = Asked(conversation, number, turn, None if before is None else before.turn)
        self._last[id(conversation)] = asked
        return asked

    async def round(self, conversations: Iterable[Conversation], at_once: int = 1) -> list[Asked]:
        """One turn of each, in order, so many at a time."""
        gate = asyncio.Semaphore(at_once)

        async def one(conversation: Conversation) -> Asked:
            async with gate:
                return await self.turn(conversation)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(conversation)) for conversation in conversations]
        return [task.result() for task in tasks]

    def at(self, gateway: Gateway) -> None:
        """Go on at another gateway."""
        self._gateway = gateway


async def play(
    replay: Replay, conversations: Sequence[Conversation], turns: int, at_once: int = AT_ONCE
) -> list[Asked]:
    """So many turns of each: the first ones several at once, later ones one by one, so that nobody need wait."""
    asked = await replay.round(conversations, at_once)
    for _ in range(turns - 1):
        asked += await replay.round(conversations)
    return asked


async def flood(gateway: Gateway, rng: random.Random, model: str, prompts: int = FLOOD_PROMPTS) -> list[Turn]:
    """Long prompts that share nothing; by default as many as fill both caches anew."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(text: str) -> Turn:
        async with gate:
            return await gateway.ask(model, _fresh(text), max_tokens=2)

    texts = [long_text(rng) for _ in range(prompts)]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(text)) for text in texts]
    return [task.result() for task in tasks]


def long_text(rng: random.Random) -> str:
    """Thousands of tokens nobody has sent before."""
    return f"{rng.getrandbits(64):016x} " + prose(rng, LONG_CHARS)


def _fresh(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@dataclass(frozen=True, slots=True)
class Crossing:
    """A long prompt and the short ones that were sent while it was in flight."""

    long: Turn
    shorts: list[Turn]
    in_time: bool  # the long one had no first token when the last short one had been answered


async def cross(gateway: Gateway, rng: random.Random) -> Crossing:
    """Send a long prompt, and while it is in flight short ones, one after the other."""
    sent_s = time.monotonic()
    task = asyncio.create_task(gateway.ask("words", _fresh(long_text(rng)), max_tokens=2))
    await _until_in_flight(gateway, task)
    shorts = []
    for _ in range(SHORT_PROMPTS):
        text = f"{rng.getrandbits(64):016x} " + prose(rng, 300)
        shorts.append(await gateway.ask("words", _fresh(text), max_tokens=2))
    answered_ms = (time.monotonic() - sent_s) * 1e3
    long = await task
    return Crossing(long, shorts, answered_ms < long.ttft_ms)


async def _until_in_flight(gateway: Gateway, task: asyncio.Task[Turn]) -> None:
    deadline_s = time.monotonic() + SEEN_WITHIN_S
    while not task.done() and time.monotonic() < deadline_s:
        flights = (await gateway.status())["flights"]
        if sum(flights.get(name, 0) for name in NAMES):
            return
        await asyncio.sleep(0.005)


def flooded(turns: Sequence[Turn]) -> dict[str, float]:
    """How often a flood filled each engine's cache."""
    return {
        name: sum(turn.prompt_tokens - turn.cached_tokens for turn in turns if turn.replica == name) / KV_TOKENS
        for name in NAMES
    }
