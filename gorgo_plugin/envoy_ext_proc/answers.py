"""Answers as they pass by in pieces: where the first token is, and what usage the end reports."""

from __future__ import annotations

import re
from collections import deque

import msgspec

from gorgo_plugin.envoy_ext_proc.messages import text_of_piece
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


def shows_first_token(raw: bytes, endpoint: str) -> bool:
    """Whether a piece of a streamed answer, or a message with one, shows that the first token is there."""
    return _FIRST_TOKEN[endpoint] in raw if endpoint != EMBEDDINGS else False


class Tail:
    """The end of an answer, of which little more than `TAIL_BYTES` is held; and its beginning, where usage is there.

    An Anthropic stream reports its prompt in its first event, so that one is kept as well.
    """

    __slots__ = ("_head", "_keeps_head", "_messages", "_size")

    def __init__(self, endpoint: str) -> None:
        self._keeps_head = endpoint == MESSAGES
        self._head = b""
        self._messages: deque[bytes] = deque()
        self._size = 0

    def add(self, raw: bytes) -> None:
        """Take the observed message with the next piece."""
        if self._keeps_head and len(self._head) < USAGE_BYTES:
            self._head += text_of_piece(raw)[:USAGE_BYTES]
        self._messages.append(raw)
        self._size += len(raw)
        while self._size > TAIL_BYTES + len(self._messages[0]):
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
        for raw in reversed(self._messages):
            after.append(raw)
            if _USAGE in raw:  # as the last with one mostly does, it holds all of it
                found = _usage_in(b"".join(map(text_of_piece, reversed(after))))
                if found != _NONE:
                    return found
                break
        return _usage_in(b"".join(map(text_of_piece, self._messages)))  # it may be cut anywhere


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
