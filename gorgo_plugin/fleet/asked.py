"""What a request asks of a mock replica, read from its body and checked as vLLM checks it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

_CAPS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


class RequestRefused(Exception):
    """A request the replica answers with an error; `status` is the HTTP status, `param` the field at fault."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


@dataclass(frozen=True, slots=True)
class Asked:
    """A request's body and what was read from it.

    Attributes:
        body: the decoded JSON object.
        model: the model it names.
        cap: most tokens to generate, None when it sets none.
        stream: whether the answer is streamed.
        include_usage: whether the stream ends with a usage chunk.
        last_text: what the answer's text follows from: the last user message, the prompt or the input.
    """

    body: Mapping[str, Any]
    model: str
    cap: int | None
    stream: bool
    include_usage: bool
    last_text: str


def read_asked(raw: bytes, models: tuple[str, ...]) -> Asked:
    """Read a body.

    Raises:
        RequestRefused: 400 when it is no JSON object or a field has the wrong type, 404 when the model is not served.
    """
    body = decode_object(raw)
    model = body.get("model", models[0])
    if not isinstance(model, str):
        raise RequestRefused(400, f"model: expected a string, got {type(model).__name__}", "model")
    if model not in models:
        raise RequestRefused(404, f"The model `{model:.200}` does not exist.", "model")
    options = body.get("stream_options")
    return Asked(
        body=body,
        model=model,
        cap=_cap(body),
        stream=body.get("stream") is True,
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
        last_text=_last_text(body),
    )


def decode_object(raw: bytes) -> dict[str, Any]:
    """Decode a JSON object.

    Raises:
        RequestRefused: 400, anything else.
    """
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestRefused(400, f"body: not valid JSON ({error})") from None
    if not isinstance(body, dict):
        raise RequestRefused(400, "body: expected a JSON object")
    return body


def _cap(body: Mapping[str, Any]) -> int | None:
    for name in _CAPS:
        value = body.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RequestRefused(400, f"{name}: expected a whole number from 1, got {value!r:.80}", name)
        return value
    return None


def _last_text(body: Mapping[str, Any]) -> str:
    for field in ("messages", "input"):
        items = body.get(field)
        if isinstance(items, list):
            users = [item for item in items if isinstance(item, dict) and item.get("role") == "user"]
            if users:
                return _text(users[-1].get("content"))
    return _text(body.get("prompt", body.get("input")))


def _text(content: Any) -> str:
    """A string, or the texts of a list of parts; token ids and the like as they print."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and isinstance(content[0], dict):
        texts = (part.get("text") for part in content if isinstance(part, dict))
        return " ".join(text for text in texts if isinstance(text, str))
    return repr(content)
