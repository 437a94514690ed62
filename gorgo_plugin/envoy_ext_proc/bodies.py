"""Request bodies as Envoy hands them over: unpacked through a cap, and asked to report their usage."""

from __future__ import annotations

import re
import zlib
from typing import Any

import msgspec

from gorgo_plugin.errors import PromptError
from gorgo_plugin.prompt.endpoints import CHAT, COMPLETIONS

_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # of zlib: 15 is the largest window, 16 more means gzip
_OPTION = b'"include_usage"'  # in a JSON text's strings the quotes would be escaped
_ASKED = re.compile(rb'"include_usage"\s*:\s*true')
_OPENING = re.compile(rb"\s*\{\s*")
_ASKING = b'"stream_options":{"include_usage":true}'


def unpacked(body: bytes, encoding: str, limit_bytes: int) -> bytes:
    """The body as the client meant it; one that is not compressed is handed back as it is.

    Raises:
        PromptError: an encoding nobody here reads, damaged data, or more than `limit_bytes` come out of it.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in _WINDOW_BITS:
        raise PromptError(f"content-encoding: '{encoding:.40}' is not read here; gzip and deflate are")
    unpacking = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        text = unpacking.decompress(body, limit_bytes + 1)
    except zlib.error as error:
        raise PromptError(f"body: damaged {encoding} data ({error})") from None
    if len(text) > limit_bytes:
        raise PromptError(f"body: more than {limit_bytes} bytes when unpacked")
    if not unpacking.eof:
        raise PromptError(f"body: {encoding} data that ends too early")
    return text


def stream_reports_usage(body: bytes, endpoint: str) -> bool:
    """Whether the stream that answers this body ends with its usage: chats and completions do when asked to."""
    if endpoint not in (CHAT, COMPLETIONS):
        return True
    start = body.rfind(_OPTION)  # most clients send it after the messages
    return start >= 0 and _ASKED.match(body, start) is not None


def asking_for_usage(body: bytes, endpoint: str) -> bytes | None:
    """The body of a streamed request, with its usage asked for; None where that cannot or need not be done.

    The rest of the body stays as it is, byte for byte, unless the client set other `stream_options`.
    """
    if stream_reports_usage(body, endpoint):
        return None
    if b'"stream_options"' in body:
        return _with_option(body)
    opening = _OPENING.match(body)
    if opening is None:
        return None
    rest = body[opening.end() :]
    return body[: opening.end()] + _ASKING + (b"" if rest.startswith(b"}") else b",") + rest


def _with_option(body: bytes) -> bytes | None:
    try:
        fields: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None  # the engine will say what is wrong with it
    if not isinstance(fields, dict):
        return None
    options = fields.get("stream_options")
    if options is None:
        options = {}
    if not isinstance(options, dict) or "include_usage" in options:  # a client may refuse it
        return None
    return msgspec.json.encode({**fields, "stream_options": {**options, "include_usage": True}})
