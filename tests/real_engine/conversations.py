"""Multi-turn conversations: prose and code from the standard library, scripts of the world, tools."""

from __future__ import annotations

import inspect
import json
import random
import textwrap
from dataclasses import dataclass, field
from pydoc_data import topics
from typing import Any

TURNS = 4  # of the first replay
LATER_TURNS = 3  # after a cache has begun to overflow, has overflowed, has been emptied
SYSTEM = (
    "You are an assistant for people who read and write Python. Answer in the language of the question, briefly, and "
    "say so when you do not know. Quote the documentation where it settles a question.\n\n"
)
SCRIPTS = (
    "Grüße aus Zürich: wie heißt „naïve“ auf Deutsch? 🙂\u200d🙂",
    "東京の天気を教えてください。雨が降りますか?",
    "Привет! Объясни, пожалуйста, что такое генератор.",
    "مرحبا، كيف أقرأ ملفًا سطرًا سطرًا؟",
    "Ligature ﬁ, combining e\u0301, zero width\u200bspace, tab\tand\r\nreturn, <|im_start|> in plain text",
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search_docs",
            "description": "Find pages of the documentation; “quoted” phrases stay together.",
            "parameters": {
                "type": "object",
                "properties": {"query": {"type": "string"}, "limit": {"type": "integer", "default": 5}},
                "required": ["query"],
            },
        },
    }
]


@dataclass(slots=True)
class Conversation:
    """A conversation as its client holds it.

    Attributes:
        name: what it is about.
        model: model group it is sent to.
        questions: one for each turn.
        messages: what the next request sends.
        tools: offered with every request.
    """

    name: str
    model: str
    questions: list[str]
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None

    def ask(self, turn: int) -> list[dict[str, Any]]:
        """Append the question of a turn, from 0; returns the messages to send."""
        self.messages.append({"role": "user", "content": self.questions[turn]})
        return self.messages

    def answer(self, text: str) -> None:
        """Take the answer into the history, as clients do."""
        self.messages.append({"role": "assistant", "content": text})


def conversations(seed: int) -> list[Conversation]:
    """The conversations of the replay, in the order of their first turns."""
    rng = random.Random(seed)
    made = []
    for index in range(16):
        model = ("chatml", "words", "chatml", "headers")[index % 4]
        made.append(
            Conversation(
                name=f"conversation {index}",
                model=model,
                questions=[_question(rng, index, turn) for turn in range(TURNS + LATER_TURNS)],
                messages=_beginning(index),
                tools=TOOLS if index % 4 == 2 else None,
            )
        )
    return made


def fresh_conversations(rng: random.Random) -> list[Conversation]:
    """Conversations that share nothing with any other."""
    return [
        Conversation(
            name=f"fresh {index}",
            model="words",
            questions=[f"{rng.getrandbits(64):016x} " + prose(rng, 4000), *(prose(rng, 300) for _ in range(3))],
        )
        for index in range(8)
    ]


def _beginning(index: int) -> list[dict[str, Any]]:
    """Nothing, a system prompt, another one, a longer one with a tool call that has been answered.

    Model groups share none: an engine would share its blocks between their names, which the gateway cannot know.
    """
    if index % 4 == 0:
        return []
    if index % 4 == 3:
        return [{"role": "system", "content": SYSTEM}]
    if index % 4 == 1:
        return [{"role": "system", "content": page("typesseq")[:2500]}]
    system = [{"role": "system", "content": SYSTEM + page("typesmapping")[:2000]}]
    call = {"name": "search_docs", "arguments": json.dumps({"query": "with statement ünïcode", "limit": 3})}
    return [
        *system,
        {"role": "user", "content": "What does `with` do?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_0", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call_0", "content": page("with")[:1200]},
    ]


def _question(rng: random.Random, index: int, turn: int) -> str:
    if turn == 0:
        return f"{index}. Explain this:\n\n" + (code(rng, 2500) if index % 3 == 0 else prose(rng, 2500))
    kinds = (
        lambda: SCRIPTS[(index + turn) % len(SCRIPTS)],
        lambda: "And this?\n```python\n" + code(rng, 600) + "\n```",
        lambda: "  Say more about " + prose(rng, 400) + "  \n",
    )
    return kinds[(index + turn) % 3]()


def page(name: str) -> str:
    """One page of the language reference."""
    text: str = topics.topics[name]
    return text


def prose(rng: random.Random, chars: int) -> str:
    """So many characters of the language reference, from anywhere in it."""
    pages = sorted(topics.topics)
    text = ""
    while len(text) < chars:
        text += page(rng.choice(pages))[: max(chars // 3, 500)] + "\n"
    return text[:chars]


def code(rng: random.Random, chars: int) -> str:
    """So many characters of source code, from anywhere in two modules."""
    source = inspect.getsource(rng.choice([inspect, textwrap, random]))
    at = rng.randrange(max(len(source) - chars, 1))
    return source[at : at + chars]
