"""The answers of a mock replica in the shapes of the five endpoints, whole and as server-sent events.

Each dialect turns the same four moments of an answer (begun, first text, more text, ended) into bytes.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from gorgo_plugin.prompt.endpoints import CHAT, COMPLETIONS, MESSAGES, RESPONSES

_EMBEDDING_DIMENSIONS = 8  # clients check that a vector is there, not what it means


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one answer; `cached` of the prompt's tokens came from the prefix cache."""

    prompt: int
    cached: int
    output: int

    def openai(self) -> dict[str, Any]:
        """As vLLM reports it with `--enable-prompt-tokens-details`."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.output,
            "total_tokens": self.prompt + self.output,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    def responses(self) -> dict[str, Any]:
        """As the responses endpoint names it."""
        return {
            "input_tokens": self.prompt,
            "input_tokens_details": {"cached_tokens": self.cached},
            "output_tokens": self.output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt + self.output,
        }

    def anthropic(self) -> dict[str, Any]:
        """As Anthropic counts: what was read from the cache is not part of the input tokens."""
        return {
            "input_tokens": self.prompt - self.cached,
            "cache_read_input_tokens": self.cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": self.output,
        }


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What every part of one answer repeats.

    Attributes:
        id: bare id, without the endpoint's prefix.
        model: the model's name as the request gave it.
        replica: name of the mock replica, sent as `system_fingerprint` where there is such a field.
        created_s: Unix time.
        stop: why the answer ends: "length" when the request capped it, else "stop".
        include_usage: whether a streamed answer ends with a usage chunk (`stream_options.include_usage`).
    """

    id: str
    model: str
    replica: str
    created_s: int
    stop: str
    include_usage: bool = False


class Answer(Protocol):
    """One answer in the shape of an endpoint; each text piece brings the space that separates it from the last."""

    def begin(self) -> bytes:
        """What is sent with the headers, before any token exists."""

    def first(self, text: str, usage: Usage) -> bytes:
        """The first content."""

    def more(self, text: str) -> bytes:
        """Further content."""

    def end(self, text: str, usage: Usage) -> bytes:
        """What follows the last content; `text` is the whole answer."""

    def whole(self, text: str, usage: Usage) -> dict[str, Any]:
        """The body of an answer that is not streamed."""


def _data(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def _event(kind: str, value: dict[str, Any]) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode({"type": kind, **value}) + b"\n\n"


class _OpenAIAnswer:
    """What chat and text completions have in common."""

    prefix: str
    chunk_object: str
    whole_object: str

    def __init__(self, head: AnswerHead) -> None:
        self._head = head

    def _envelope(self, kind: str, choices: list[Any], **more: Any) -> dict[str, Any]:
        head = self._head
        return {
            "id": self.prefix + head.id,
            "object": kind,
            "created": head.created_s,
            "model": head.model,
            "system_fingerprint": head.replica,
            "choices": choices,
            **more,
        }

    def _choice(self, text: str, role: bool, finish_reason: str | None) -> dict[str, Any]:
        raise NotImplementedError

    def _whole_choice(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def begin(self) -> bytes:
        return b""

    def first(self, text: str, usage: Usage) -> bytes:
        return _data(self._envelope(self.chunk_object, [self._choice(text, True, None)]))

    def more(self, text: str) -> bytes:
        return _data(self._envelope(self.chunk_object, [self._choice(text, False, None)]))

    def end(self, text: str, usage: Usage) -> bytes:
        last = _data(self._envelope(self.chunk_object, [self._choice("", False, self._head.stop)]))
        if self._head.include_usage:
            last += _data(self._envelope(self.chunk_object, [], usage=usage.openai()))
        return last + b"data: [DONE]\n\n"

    def whole(self, text: str, usage: Usage) -> dict[str, Any]:
        return self._envelope(self.whole_object, [self._whole_choice(text)], usage=usage.openai())


class ChatAnswer(_OpenAIAnswer):
    """`/v1/chat/completions`."""

    prefix = "chatcmpl-"
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def _choice(self, text: str, role: bool, finish_reason: str | None) -> dict[str, Any]:
        delta = ({"role": "assistant"} if role else {}) | ({"content": text} if text else {})
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}

    def _whole_choice(self, text: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": self._head.stop}


class CompletionAnswer(_OpenAIAnswer):
    """`/v1/completions`."""

    prefix = "cmpl-"
    chunk_object = "text_completion"
    whole_object = "text_completion"

    def _choice(self, text: str, role: bool, finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def _whole_choice(self, text: str) -> dict[str, Any]:
        return self._choice(text, False, self._head.stop)


class ResponsesAnswer:
    """`/v1/responses`, whose stream says that it began long before the first token."""

    def __init__(self, head: AnswerHead) -> None:
        self._head = head
        self._sequence = 0

    def _response(self, status: str, text: str | None, usage: Usage | None) -> dict[str, Any]:
        head = self._head
        return {
            "id": f"resp_{head.id}",
            "object": "response",
            "created_at": head.created_s,
            "status": status,
            "model": head.model,
            "output": [] if text is None else [self._item("completed", text)],
            "usage": None if usage is None else usage.responses(),
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {"replica": head.replica},
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
        }

    def _item(self, status: str, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [self._part(text)]
        return {
            "id": f"msg_{self._head.id}",
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _numbered(self, kind: str, **fields: Any) -> bytes:
        self._sequence += 1
        return _event(kind, {"sequence_number": self._sequence - 1, **fields})

    def _in_item(self, kind: str, **fields: Any) -> bytes:
        return self._numbered(kind, item_id=f"msg_{self._head.id}", output_index=0, **fields)

    def begin(self) -> bytes:
        response = self._response("in_progress", None, None)
        return self._numbered("response.created", response=response) + self._numbered(
            "response.in_progress", response=response
        )

    def first(self, text: str, usage: Usage) -> bytes:
        added = self._numbered("response.output_item.added", output_index=0, item=self._item("in_progress", None))
        part = self._in_item("response.content_part.added", content_index=0, part=self._part(""))
        return added + part + self.more(text)

    def more(self, text: str) -> bytes:
        return self._in_item("response.output_text.delta", content_index=0, delta=text, logprobs=[])

    def end(self, text: str, usage: Usage) -> bytes:
        return (
            self._in_item("response.output_text.done", content_index=0, text=text, logprobs=[])
            + self._in_item("response.content_part.done", content_index=0, part=self._part(text))
            + self._numbered("response.output_item.done", output_index=0, item=self._item("completed", text))
            + self._numbered("response.completed", response=self._response("completed", text, usage))
        )

    def whole(self, text: str, usage: Usage) -> dict[str, Any]:
        return self._response("completed", text, usage)


class MessagesAnswer:
    """`/v1/messages`, Anthropic's."""

    def __init__(self, head: AnswerHead) -> None:
        self._head = head

    @property
    def _stop_reason(self) -> str:
        return "max_tokens" if self._head.stop == "length" else "end_turn"

    def _message(self, content: list[Any], stop_reason: str | None, usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": f"msg_{self._head.id}",
            "type": "message",
            "role": "assistant",
            "model": self._head.model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": None,
            "usage": usage,
        }

    def begin(self) -> bytes:
        return b""

    def first(self, text: str, usage: Usage) -> bytes:
        start = _event("message_start", {"message": self._message([], None, usage.anthropic())})
        block = _event("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}})
        return start + block + self.more(text)

    def more(self, text: str) -> bytes:
        return _event("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": text}})

    def end(self, text: str, usage: Usage) -> bytes:
        delta = {"stop_reason": self._stop_reason, "stop_sequence": None}
        return (
            _event("content_block_stop", {"index": 0})
            + _event("message_delta", {"delta": delta, "usage": usage.anthropic()})
            + _event("message_stop", {})
        )

    def whole(self, text: str, usage: Usage) -> dict[str, Any]:
        return self._message([{"type": "text", "text": text}], self._stop_reason, usage.anthropic())


def embedding_body(model: str, inputs: int, base64_encoded: bool, usage: Usage) -> dict[str, Any]:
    """The body of an answer of `/v1/embeddings`: the same small vector for each input."""
    vector: Any = [1.0 / _EMBEDDING_DIMENSIONS] * _EMBEDDING_DIMENSIONS
    if base64_encoded:
        vector = base64.b64encode(struct.pack(f"<{_EMBEDDING_DIMENSIONS}f", *vector)).decode()
    return {
        "object": "list",
        "model": model,
        "data": [{"object": "embedding", "index": index, "embedding": vector} for index in range(inputs)],
        "usage": {"prompt_tokens": usage.prompt, "total_tokens": usage.prompt, "completion_tokens": 0},
    }


ANSWERS: dict[str, Callable[[AnswerHead], Answer]] = {
    CHAT: ChatAnswer,
    COMPLETIONS: CompletionAnswer,
    RESPONSES: ResponsesAnswer,
    MESSAGES: MessagesAnswer,
}


def error_body(status: int, message: str, param: str | None = None, anthropic: bool = False) -> dict[str, Any]:
    """An error as vLLM shapes it (`{"error": {message, type, param, code}}`), or as Anthropic does."""
    kinds = {400: "BadRequestError", 404: "NotFoundError", 429: "RateLimitError", 403: "PermissionDeniedError"}
    kind = kinds.get(status, "InternalServerError")
    if anthropic:
        return {"type": "error", "error": {"type": kind, "message": message}}
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}
