"""Answers as they pass by in pieces: where the first token is, and what usage the end reports."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable

import msgspec

from gorgo_plugin.prompt.endpoints import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES
from gorgo_plugin.runtime.outcomes import Usage, usage_of

TAIL_BYTES = 64 * 1024  # kept of an answer; usage stands in its last event, or near the end of its JSON
USAGE_BYTES = 4096  # longer than any engine's usage object

# What the first piece with a token holds. Responses and messages open their streams before there is one.
_FIRST_TOKEN = {CHAT: b"data:", COMPLETIONS: b"data:", RESPONSES: b".delta", MESSAGES: b"content_block_delta"}
_NONE = Usage()
_USAGE = b'"usage"'
# An object under that key; in a string of the answer itself the quotes would be escaped.
_NAMED = re.compile(rb'"usage"\s*:\s*(?=\{)')
_OPENING_USAGE = re.compile(rb'"message_start".*?(?<!\\)"usage"\s*:\s*(?=\{)', re.DOTALL)


def shows_first_token(piece: bytes, endpoint: str) -> bool:
    """Whether a piece of a streamed answer shows that the first token is there."""
    return _FIRST_TOKEN[endpoint] in piece if endpoint != EMBEDDINGS else False


class Tail:
    """The end of an answer, of which little more than `TAIL_BYTES` is held; and its beginning, where usage is there.

    An Anthropic stream reports its prompt in its first event, so that one is kept as well.
    """

    __slots__ = ("_head", "_keeps_head", "_messages", "_piece_of", "_size")

    def __init__(self, endpoint: str, piece_of: Callable[[bytes], bytes]) -> None:
        """`piece_of` finds in a message the piece it holds; it is asked of few."""
        self._piece_of = piece_of
        self._keeps_head = endpoint == MESSAGES
        self._head = b""
        self._messages: deque[bytes] = deque()
        self._size = 0

    def add(self, message: bytes) -> None:
        """Take the message with the next piece."""
        if self._keeps_head and len(self._head) < USAGE_BYTES:
            self._head += self._piece_of(message)[:USAGE_BYTES]
        self._messages.append(message)
        self._size += len(message)
        while self._size - len(self._messages[0]) > TAIL_BYTES:
            self._size -= len(self._messages.popleft())

    def usage(self) -> Usage:
        """What the answer reports; nothing where it does not."""
        found = self._last_usage()
        opening = _OPENING_USAGE.search(self._head) if self._keeps_head else None
        if opening is None:
            return found
        prompt = _usage_at(self._head, opening.end())
        return Usage(prompt.prompt_tokens, prompt.cached_tokens, found.output_tokens)

    def _last_usage(self) -> Usage:
        after: list[bytes] = []
        for message in reversed(self._messages):
            after.append(message)
            if _USAGE in message:  # as the last with one mostly does, it holds all of it
                found = self._usage_of(reversed(after))
                return found if found != _NONE else self._usage_of(self._messages)
        return self._usage_of(self._messages)  # one may be cut in the middle of its name

    def _usage_of(self, some: Iterable[bytes]) -> Usage:
        return _usage_in(b"".join(map(self._piece_of, some)))


def _usage_in(text: bytes) -> Usage:
    """The last usage in the text of an answer."""
    at = len(text)
    while (at := text.rfind(_USAGE, 0, at)) >= 0:
        named = _NAMED.match(text, at)
        if named is not None and text[at - 1 : at] != b"\\":
            found = _usage_at(text, named.end())
            if found != _NONE:
                return found
    return _NONE


def _usage_at(text: bytes, start: int) -> Usage:
    """The usage object that begins at `start`."""
    end = start
    while (end := text.find(b"}", end, start + USAGE_BYTES) + 1) > 0:
        if text.count(b"{", start, end) == text.count(b"}", start, end):
            try:
                return usage_of({"usage": msgspec.json.decode(text[start:end])})
            except (msgspec.DecodeError, UnicodeDecodeError):
                return _NONE
    return _NONE
