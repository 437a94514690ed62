"""Workloads: what arrives when, for which session, with which text.

A request is a list of messages made of passages, so that the same value serves a replay over HTTP (as text) and a
simulation (as token ids, without any tokenizer). This module generates multi-turn conversations; `mooncake` reads
recorded traces into the same values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gorgo_plugin.errors import GorgoError
from gorgo_plugin.fleet.block_cache import block_keys
from gorgo_plugin.fleet.passages import WORDS, Passage, reply_passage

_ROLE_IDS = {role: len(WORDS) + index for index, role in enumerate(("system", "user", "assistant"))}
_REUSE_BLOCK_TOKENS = 16


class WorkloadError(GorgoError, ValueError):
    """A trace cannot be read, or a workload of the kind asked for cannot be made from it."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat: its role and its passages, joined by spaces."""

    role: str
    passages: tuple[Passage, ...]

    @property
    def text(self) -> str:
        """The content as text."""
        return " ".join(passage.text for passage in self.passages)


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request of a workload.

    Attributes:
        at_s: arrival, seconds from the start of the workload.
        session: key of the conversation or user it belongs to.
        output_tokens: tokens to generate.
        messages: the prompt.
    """

    at_s: float
    session: str
    output_tokens: int
    messages: tuple[Message, ...]

    def chat_messages(self) -> list[dict[str, str]]:
        """The prompt as the `messages` of a chat completion."""
        return [{"role": message.role, "content": message.text} for message in self.messages]

    def token_ids(self) -> NDArray[np.uint32]:
        """The prompt in the token ids of a tokenizer whose tokens are words, one more per message; shape (n,)."""
        parts: list[NDArray[np.uint32]] = []
        for message in self.messages:
            parts.append(np.array([_ROLE_IDS[message.role]], dtype=np.uint32))
            parts += [passage.ids for passage in message.passages]
        parts.append(np.array([_ROLE_IDS["assistant"]], dtype=np.uint32))
        return np.concatenate(parts)

    def reply(self) -> Passage:
        """What a mock engine answers."""
        return reply_passage(self.messages[-1].text, self.output_tokens)


@dataclass(frozen=True)
class ConversationSettings:
    """Sizes and rates of generated conversations; lengths in words, which are tokens of the embedded tokenizer.

    The defaults resemble the paper's evaluation windows (6,900 tokens a prompt, 79% reuse). With every reuse there is,
    three engines of 0.09 ms per uncached token spend between a quarter and a third of their time on prefill, beside
    their decoding; one alone would spend four fifths and queue.
    """

    requests: int = 300
    """Requests altogether."""
    rate_per_s: float = 7.0
    """Poisson arrivals per second."""
    turns: float = 16.0
    """Mean turns of a conversation (geometric)."""
    think_s: float = 2.5
    """Shortest time between two turns of one conversation; replies take about two seconds."""
    apps: int = 4
    """Applications, each with a system prompt that all its users share."""
    system_words: int = 1500
    """Words of a system prompt."""
    document_share: float = 0.35
    """Share of conversations that begin with a long document."""
    document_words: tuple[int, int] = (4000, 10000)
    """Shortest and longest document."""
    question_words: int = 450
    """Median words of a question (log-normal)."""
    question_spread: float = 0.8
    """Sigma of the question's log-normal."""
    output_tokens: tuple[int, int] = (30, 120)
    """Fewest and most tokens of an answer; the paper capped its runs at 128."""


@dataclass
class _Conversation:
    session: str
    turns_left: int
    ready_at_s: float
    messages: list[Message] = field(default_factory=list)


def conversations(seed: int, settings: ConversationSettings | None = None) -> list[WorkloadRequest]:
    """Multi-turn conversations with open-loop Poisson arrivals; the same seed gives the same requests."""
    settings = settings or ConversationSettings()
    rng = np.random.default_rng(seed)
    # A Poisson process of which the number of arrivals is known: so every seed takes equally long.
    arrivals = np.sort(rng.uniform(0.0, settings.requests / settings.rate_per_s, settings.requests))
    active: list[_Conversation] = []
    requests = []
    started = 0
    for at_s in arrivals.tolist():
        ready = [conversation for conversation in active if conversation.ready_at_s <= at_s]
        # One request in `turns` starts a conversation, so that as many begin as end.
        if not ready or rng.random() < 1.0 / settings.turns:
            conversation = _start(f"{seed}/{started}", rng, settings)
            active.append(conversation)
            started += 1
        else:
            conversation = ready[int(rng.integers(len(ready)))]
        requests.append(_take_turn(conversation, at_s, rng, settings))
        if conversation.turns_left == 0:
            active.remove(conversation)
    return requests


def _start(name: str, rng: np.random.Generator, settings: ConversationSettings) -> _Conversation:
    app = int(rng.integers(settings.apps))
    conversation = _Conversation(f"user-{name}", int(rng.geometric(1.0 / settings.turns)), 0.0)
    conversation.messages.append(Message("system", (Passage(f"app/{app}", settings.system_words),)))
    if rng.random() < settings.document_share:
        words = int(rng.integers(*settings.document_words))
        conversation.messages.append(Message("user", (Passage(f"document/{name}", words),)))
        conversation.messages.append(Message("assistant", (Passage(f"noted/{name}", 8),)))
    return conversation


def _take_turn(
    conversation: _Conversation, at_s: float, rng: np.random.Generator, settings: ConversationSettings
) -> WorkloadRequest:
    words = rng.lognormal(np.log(settings.question_words), settings.question_spread)
    key = f"question/{conversation.session}/{len(conversation.messages)}"
    conversation.messages.append(Message("user", (Passage(key, max(5, round(words))),)))
    output_tokens = int(rng.integers(settings.output_tokens[0], settings.output_tokens[1] + 1))
    request = WorkloadRequest(at_s, conversation.session, output_tokens, tuple(conversation.messages))
    conversation.messages.append(Message("assistant", (request.reply(),)))
    conversation.turns_left -= 1
    conversation.ready_at_s = at_s + settings.think_s + float(rng.exponential(settings.think_s))
    return request


@dataclass(frozen=True, slots=True)
class WorkloadSummary:
    """What a workload is like, counted in words as tokens.

    Attributes:
        requests: number of requests.
        sessions: number of sessions.
        span_s: seconds from the first to the last arrival.
        prompt_tokens: tokens of all prompts.
        output_tokens: tokens of all answers.
        reuse: share of the prompt tokens that one endless cache would have held.
    """

    requests: int
    sessions: int
    span_s: float
    prompt_tokens: int
    output_tokens: int
    reuse: float

    def prefill_load(self, ms_per_token: float, overhead_ms: float, engines: int) -> float:
        """Share of the engines' time that prefill takes when every reuse there is happens."""
        uncached = self.prompt_tokens * (1 - self.reuse)
        return (uncached * ms_per_token + self.requests * overhead_ms) / 1e3 / self.span_s / engines


def summarise(requests: Sequence[WorkloadRequest]) -> WorkloadSummary:
    """Count a workload and measure its prefix reuse in blocks of 16 tokens, replies included."""
    seen: set[int] = set()
    prompt_tokens = reused_tokens = 0
    for request in requests:
        prompt = request.token_ids()
        keys = block_keys(np.concatenate([prompt, request.reply().ids]), _REUSE_BLOCK_TOKENS)
        matched = 0
        for key in keys[: (len(prompt) - 1) // _REUSE_BLOCK_TOKENS]:
            if key not in seen:
                break
            matched += 1
        seen.update(keys)
        prompt_tokens += len(prompt)
        reused_tokens += matched * _REUSE_BLOCK_TOKENS
    return WorkloadSummary(
        requests=len(requests),
        sessions=len({request.session for request in requests}),
        span_s=requests[-1].at_s - requests[0].at_s,
        prompt_tokens=prompt_tokens,
        output_tokens=sum(request.output_tokens for request in requests),
        reuse=reused_tokens / prompt_tokens,
    )
