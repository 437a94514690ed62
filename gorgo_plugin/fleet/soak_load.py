"""The load of a soak: conversations of every kind at a steady rate, from clients some of which leave."""

from __future__ import annotations

import asyncio
import gzip
import math
import random
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from gorgo_plugin.fleet.gateway import MODEL
from gorgo_plugin.fleet.passages import Passage
from gorgo_plugin.prompt.endpoints import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES

CONVERSATIONS = 40  # under way at once
TURNS = 10  # of a conversation, on average
BODY_BYTES = (1_000, 80_000)  # a conversation begins anywhere between, and ends when it is longer
CHARS_PER_WORD = 5.1  # of the passages, with the space
QUESTION_WORDS = (10, 300)
REPLY_WORDS = (8, 60)  # at 20 ms a token: answers that last for 0.2 to 1.2 s
# From before the answer's headers to its end: the logarithm spreads the moments over all of its stages.
LEAVE_S = (0.002, 1.5)
REQUEST_TIMEOUT_S = 60.0  # of clients that stay; none waits a tenth of it
FAILURES_KEPT = 20

_ENDPOINTS = {CHAT: 10, COMPLETIONS: 3, MESSAGES: 4, RESPONSES: 3, EMBEDDINGS: 1}  # shares
_STREAMED = 0.75
_WITH_USAGE = 0.5  # of the streams
_PACKED = 0.03  # sent gzip-compressed
_ODD = 0.04  # not a prompt at all


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, and the status it must be answered with."""

    path: str
    body: bytes = b""
    expected: int = 200
    method: str = "POST"
    packed: bool = False


@dataclass
class _Conversation:
    name: str
    endpoint: str
    first_words: int
    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def chars(self) -> int:
        return sum(len(message["content"]) for message in self.messages)


class Talks:
    """The requests of a soak, one after the other; the same seed gives the same ones."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._rng = random.Random(seed)
        self._begun = 0
        self._active = [self._begin() for _ in range(CONVERSATIONS)]

    def next(self) -> Ask:
        """The next turn of one of the conversations, a new one among them; now and then something else."""
        rng = self._rng
        if rng.random() < _ODD:
            return self._odd()
        index = rng.randrange(CONVERSATIONS)
        if rng.random() < 1 / TURNS or self._active[index].chars > BODY_BYTES[1]:
            self._active[index] = self._begin()
        ask = self._turn(self._active[index])
        if rng.random() < _PACKED:
            return Ask(ask.path, gzip.compress(ask.body, compresslevel=1, mtime=0), packed=True)
        return ask

    def _begin(self) -> _Conversation:
        self._begun += 1
        endpoint = self._rng.choices(list(_ENDPOINTS), list(_ENDPOINTS.values()))[0]
        words = _log_uniform(self._rng, *BODY_BYTES) / CHARS_PER_WORD
        return _Conversation(f"soak/{self._seed}/{self._begun}", endpoint, round(words))

    def _turn(self, talk: _Conversation) -> Ask:
        rng, turn = self._rng, len(talk.messages)
        if turn:
            reply = Passage(f"{talk.name}/{turn}", rng.randint(*REPLY_WORDS))
            talk.messages.append({"role": "assistant", "content": reply.text})
        words = rng.randint(*QUESTION_WORDS) if turn else talk.first_words
        talk.messages.append({"role": "user", "content": Passage(f"{talk.name}/{turn + 1}", words).text})
        return Ask(talk.endpoint, msgspec.json.encode(self._body(talk)))

    def _body(self, talk: _Conversation) -> dict[str, Any]:
        rng, text = self._rng, "\n".join(message["content"] for message in talk.messages)
        body: dict[str, Any] = {"model": MODEL}
        if talk.endpoint == EMBEDDINGS:
            return body | {"input": text}
        body["max_output_tokens" if talk.endpoint == RESPONSES else "max_tokens"] = rng.randint(*REPLY_WORDS)
        field_name = {COMPLETIONS: "prompt", RESPONSES: "input"}.get(talk.endpoint, "messages")
        body[field_name] = text if talk.endpoint == COMPLETIONS else talk.messages
        if rng.random() < _STREAMED:
            body["stream"] = True
            if talk.endpoint in (CHAT, COMPLETIONS) and rng.random() < _WITH_USAGE:
                body["stream_options"] = {"include_usage": True}
        return body

    def _odd(self) -> Ask:
        """What holds no prompt: it must pass, and be answered by a replica as it deserves."""
        torn = msgspec.json.encode(self._body(self._active[0]))[:-1]
        return self._rng.choice(
            (
                Ask(CHAT, torn, expected=400),
                Ask(CHAT, b'{"model":"%s"}' % MODEL.encode(), expected=400),
                Ask("/v1/rerank", b'{"query":"x"}', expected=404),
                Ask("/v1/models", method="GET"),
            )
        )


@dataclass
class Counts:
    """What became of the requests.

    Attributes:
        sent: all.
        answered: in full, with the status that each must have.
        left: clients that left, by what they had seen of the answer by then.
        failed: all others.
        failures: what went wrong with the first of them.
    """

    sent: int = 0
    answered: int = 0
    left: dict[str, int] = field(default_factory=dict)
    failed: int = 0
    failures: list[str] = field(default_factory=list)

    def fail(self, what: str) -> None:
        """Count a failure."""
        self.failed += 1
        if len(self.failures) < FAILURES_KEPT:
            self.failures.append(what)


async def send_steadily(url: str, seconds: float, rate: float, leaving: float, seed: int, counts: Counts) -> None:
    """Send `rate` requests a second, whatever becomes of them, and wait for the last answers.

    Args:
        url: of the gateway.
        seconds: how long to send.
        rate: requests per second, evenly spaced.
        leaving: share of the clients that leave at a random moment, unless they have their answer by then.
        seed: of requests and of who leaves when.
        counts: kept up to date.
    """
    talks, rng = Talks(seed), random.Random(f"{seed} leaving")
    loop = asyncio.get_running_loop()
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with (
        aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session,
        asyncio.TaskGroup() as group,
    ):
        began_s = loop.time()
        for number in range(round(seconds * rate)):
            ask = talks.next()
            leave_s = _log_uniform(rng, *LEAVE_S) if rng.random() < leaving else None
            await asyncio.sleep(began_s + number / rate - loop.time())
            group.create_task(_send(session, ask, leave_s, counts))
            counts.sent += 1


async def _send(session: aiohttp.ClientSession, ask: Ask, leave_s: float | None, counts: Counts) -> None:
    headers = {"Content-Type": "application/json"} | ({"Content-Encoding": "gzip"} if ask.packed else {})
    seen, what = "nothing", f"{ask.method} {ask.path}"
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S if leave_s is None else leave_s):
            async with session.request(ask.method, ask.path, data=ask.body or None, headers=headers) as response:
                seen = "headers"
                async for _piece in response.content.iter_any():
                    seen = "part of the answer"
    except TimeoutError:
        if leave_s is None:
            counts.fail(f"{what}: not answered in full within {REQUEST_TIMEOUT_S:.0f} s")
        else:
            counts.left[seen] = counts.left.get(seen, 0) + 1
    except aiohttp.ClientError as error:
        counts.fail(f"{what}: {type(error).__name__}: {error}"[:200])
    else:
        if response.status == ask.expected:
            counts.answered += 1
        else:
            counts.fail(f"{what}: status {response.status}, not {ask.expected}")


def _log_uniform(rng: random.Random, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))
