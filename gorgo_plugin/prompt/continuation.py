"""Chats that go on: a body whose beginning was prepared before is read, rendered and tokenized from there.

Clients send a whole conversation with every turn. What they sent the last time, up to the end of its last message, is
found again by its length and hash; no text of theirs is kept. It takes a template that prints each message by itself,
whatever follows it, as ChatML does.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
import xxhash
from cachetools import LRUCache

from gorgo_plugin.prompt.bodies import SALTS
from gorgo_plugin.prompt.cache import ENTRY_BYTES
from gorgo_plugin.prompt.vocabulary import Ids

LONG_BYTES = 2048  # shorter bodies are read as fast as they are found
OBJECTS_LOOKED_AT = 512  # before one begins where the known part ended; code and tools are full of braces
HASHED = 4  # beginnings that end as a known one does; a second one of them is made to look so
CLOSINGS_LOOKED_AT = 8  # places where the list of messages may end
AFTER_BYTES = 64 * 1024  # of the fields after the messages
JSON_AS_OBJECTS = 6  # times its length is what JSON takes when it is decoded
_COMMA = ord(",")
_MARK_BYTES = 32  # in front of an end; enough to tell it from others at the same place

_SEED = secrets.randbits(64)
# A key that no body has, under which what follows the known messages is read.
_REST = secrets.token_hex(16)
_OPENING = f'{{"{_REST}":['.encode()
_CLOSED = f'{{"{_REST}":[0'.encode()


class Prepared(NamedTuple):
    """What a body's messages were prepared into.

    Attributes:
        model: name of the model it was prepared for.
        ids: of its messages, without the header of an answer.
        hashes: of the full blocks of `ids`, without a cache key.
        exact: whether the ids are the engine's own.
        messages: how many were read; of a body that goes on, those after the known ones.
    """

    model: str
    ids: Ids
    hashes: bytes
    exact: bool
    messages: int


class Known(NamedTuple):
    """The part of a body that was prepared before.

    Attributes:
        end: its length in bytes, up to the end of a message.
        digest: hash of its bytes.
        head: the fields in front of the messages.
        tools: as the body had them, wherever; they are rendered in front of the messages.
        aside_bytes: what these two take.
        model, ids, hashes, exact: as in `Prepared`.
        messages: how many there are.
    """

    end: int
    digest: int
    head: Mapping[str, Any]
    tools: Any
    aside_bytes: int
    model: str
    ids: Ids
    hashes: bytes
    exact: bool
    messages: int

    def rest(self, body: bytes) -> dict[str, Any] | None:
        """The fields of a body that begins like this, its `messages` being the new ones; None where it has others."""
        after = body[self.end :].lstrip()
        if not after.startswith((b",", b"]")):
            return None
        try:
            fields = msgspec.json.decode(_OPENING + after.removeprefix(b","))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        messages = fields.pop(_REST)
        if "messages" in fields or bool(messages) != after.startswith(b","):
            return None
        rest = {**self.head, "messages": messages, **fields}
        return rest if _same_json(rest.get("tools"), self.tools) else None


class Continuations:
    """Least recently used out first, bounded in bytes. Thread-safe."""

    def __init__(self, capacity_bytes: int) -> None:
        self._known: LRUCache[tuple[int, int], Known] = LRUCache(capacity_bytes, getsizeof=_size)
        self._lock = threading.Lock()

    def find(self, body: bytes) -> Known | None:
        """The longest part of a body that was prepared before."""
        if len(body) < LONG_BYTES:
            return None
        hashed = 0
        for end in _ends(body):
            key = end, _mark(body, end)
            with self._lock:
                known = self._known.get(key)
            if known is None:
                continue
            if _digest(body, end) == known.digest:
                return known
            hashed += 1
            if hashed == HASHED:
                break
        return None

    def remember(self, body: bytes, fields: Mapping[str, Any], prepared: Prepared, before: Known | None = None) -> None:
        """Keep what was prepared of a body.

        Args:
            body: as it came.
            fields: the same decoded; of one that was found here, what `Known.rest` gave.
            prepared: what became of it.
            before: what was found of it.
        """
        if len(body) < LONG_BYTES or (before is not None and not prepared.messages):
            return
        end = _end_of_messages(body, fields)
        if end is None:
            return
        names = list(fields)
        head = {name: fields[name] for name in names[: names.index("messages")]}
        if not head.keys().isdisjoint(SALTS):
            return  # a secret between a tenant and its engine is not kept
        messages = prepared.messages + (0 if before is None else before.messages)
        tools = fields.get("tools")
        if before is not None and (head, tools) == (before.head, before.tools):
            aside_bytes = before.aside_bytes
        else:
            aside_bytes = JSON_AS_OBJECTS * len(msgspec.json.encode((head, tools)))
        model, ids, hashes, exact, _ = prepared
        known = Known(end, _digest(body, end), head, tools, aside_bytes, model, ids, hashes, exact, messages)
        with self._lock:
            if _size(known) <= self._known.maxsize:
                self._known[end, _mark(body, end)] = known

    def describe(self) -> dict[str, int]:
        """How many there are, and what they take, as plain data."""
        with self._lock:
            return {"conversations": len(self._known), "bytes": int(self._known.currsize)}


def _ends(body: bytes) -> Iterator[int]:
    """Where the messages of a body that was sent before may end: those of the whole first, then ever shorter ones."""
    stop = len(body)
    for _ in range(CLOSINGS_LOOKED_AT):
        stop = body.rfind(b"}]", max(len(body) - LONG_BYTES, 0), stop)
        if stop < 0:
            break
        yield stop + 1
    stop = len(body)
    for _ in range(OBJECTS_LOOKED_AT):
        stop = body.rfind(b"{", 0, stop)
        if stop < 2:
            return
        end = stop - 1 if body[stop - 1] == _COMMA else stop - 2
        if body[end - 1 : end + 1] == b"},":
            yield end


def _digest(body: bytes, end: int) -> int:
    # Not Python's own hash, which takes fifteen times as long; whoever could make two bodies collide without the seed
    # would mislead the router about these bodies of theirs.
    return int(xxhash.xxh3_128_intdigest(memoryview(body)[:end], _SEED))


def _mark(body: bytes, end: int) -> int:
    return hash(body[max(end - _MARK_BYTES, 0) : end])


def _end_of_messages(body: bytes, fields: Mapping[str, Any]) -> int | None:
    """The length of a body up to the end of its last message; None where that cannot be told.

    Where the rest closes a list and the object around it, and has just the fields that follow the messages, the list
    is that of the messages.
    """
    names = list(fields)
    after = names[names.index("messages") + 1 :]
    stop = len(body)
    for _ in range(CLOSINGS_LOOKED_AT):
        at = body.rfind(b"]", max(len(body) - AFTER_BYTES, 0), stop)
        if at < 0:
            return None
        stop = at
        end = len(body[:at].rstrip()) if body[at - 1 : at].isspace() else at
        if body[end - 1 : end] != b"}":
            continue
        try:
            rest = msgspec.json.decode(_CLOSED + body[at:])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        if list(rest)[1:] == after:
            return end
    return None


def _same_json(one: Any, other: Any) -> bool:
    # Not by ==, to which 1 is true.
    return one is other or (one is not None and msgspec.json.encode(one) == msgspec.json.encode(other))


def _size(known: Known) -> int:
    return known.ids.nbytes + len(known.hashes) + known.aside_bytes + ENTRY_BYTES
