"""A request body, bytes or mapping, read into what it asks: its prompt and what else routing needs to know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from gorgo_plugin.errors import PromptError
from gorgo_plugin.prompt.conversation import Conversation, as_list, as_mapping, as_text
from gorgo_plugin.prompt.dialects import read_anthropic, read_chat, read_responses
from gorgo_plugin.prompt.endpoints import CHAT, COMPLETIONS, EMBEDDINGS, ENDPOINTS, MESSAGES, RESPONSES, endpoint_of

NAME_CHARS = 256  # of a model, session or user name; longer ones are cut, so that no client can fill tables with them
SALTS = ("cache_salt", "lora_path")  # vLLM's field and SGLang's
# The narrowest name of who asks comes first.
_AFFINITY_FIELDS = ("prompt_cache_key", "session_id", "metadata", "user", "safety_identifier")
MAX_OUTPUT_TOKENS = 2**31 - 1  # caps above are as good as none

Ids = Sequence[Any]


@dataclass(frozen=True, slots=True)
class RawPrompts:
    """Prompts no chat template touches: text or token ids.

    A batch is one `RawPrompts` of several items. They become one prompt, one after the other: vLLM runs them all on
    the replica that gets the request and reports the sum as `usage.prompt_tokens`, so the sum is the work to count.
    """

    items: list[str | Ids]
    add_special_tokens: bool = True
    field: str = "prompt"


class Request(NamedTuple):
    """What a body asks.

    Attributes:
        content: the conversation, or raw prompts.
        model: the body's model, "" when it names none.
        stream: whether it asks for a streamed answer.
        max_output_tokens: its output cap, None when it sets none.
        affinity_key: its cache key, session or user, the first that is there; None without any.
        salts: (field, value) of what separates its cache from that of the same text.
    """

    content: Conversation | RawPrompts
    model: str = ""
    stream: bool = False
    max_output_tokens: int | None = None
    affinity_key: str | None = None
    salts: tuple[tuple[str, str], ...] = ()


def read_request(body: bytes | Mapping[str, Any], endpoint: str, known_messages: int = 0) -> Request:
    """Read a body sent to `endpoint`. Of a chat whose first messages were read before, `messages` are the others.

    Raises:
        PromptError: the endpoint holds no prompt, the body is no JSON object or one of its fields has a wrong shape.
    """
    known = endpoint_of(endpoint)
    if known is None:
        raise PromptError(f"endpoint: '{endpoint:.80}' holds no prompt; known: {', '.join(ENDPOINTS)}")
    fields = parse(body) if isinstance(body, (bytes, bytearray, memoryview)) else as_mapping(body)
    if fields is None:
        raise PromptError(f"body: expected a JSON object, got {type(body).__name__}")
    return Request(
        read_chat(fields, known_messages) if known == CHAT else _CONTENT_READERS[known](fields),
        model=_name(fields.get("model")),
        stream=fields.get("stream") is True,
        max_output_tokens=_max_output_tokens(fields),
        affinity_key=_affinity_key(fields),
        salts=_salts(fields),
    )


def parse(body: bytes | bytearray | memoryview) -> Mapping[str, Any]:
    """Decode a JSON object.

    Raises:
        PromptError: not UTF-8, not JSON, nested too deeply, or no object.
    """
    try:
        decoded = msgspec.json.decode(body)
    except UnicodeDecodeError:
        raise PromptError("body: not valid UTF-8") from None
    except RecursionError:
        raise PromptError("body: JSON nested too deeply") from None
    except msgspec.DecodeError as error:
        raise PromptError(f"body: not valid JSON ({error})") from None
    if not isinstance(decoded, dict):
        raise PromptError(f"body: expected a JSON object, got {_json_kind(decoded)}")
    return decoded


def _json_kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _read_completion(body: Mapping[str, Any]) -> RawPrompts:
    # LiteLLM hands a completion's prompt over as the content of messages; it stays raw text.
    if body.get("prompt") is None and as_list(body.get("messages")):
        contents = [(as_mapping(message) or {}).get("content") for message in body["messages"]]
        items = [item for content in contents for item in _raw_items(content, "messages.content")]
    else:
        items = _raw_items(body.get("prompt"), "prompt")
    return RawPrompts(items, body.get("add_special_tokens") is not False)


def _read_embedding(body: Mapping[str, Any]) -> RawPrompts | Conversation:
    if body.get("input") is None and as_list(body.get("messages")):
        return read_chat(body)  # vLLM's embeddings of chats
    items = _raw_items(body.get("input"), "input")
    return RawPrompts(items, body.get("add_special_tokens") is not False, field="input")


def _raw_items(value: Any, where: str) -> list[str | Ids]:
    """One text, one list of token ids, or a batch of either, as a list of items."""
    if isinstance(value, str):
        return [value]
    items = as_list(value)
    if not items:
        raise PromptError(f"{where}: expected text, token ids, or a list of either")
    if isinstance(items[0], int):
        return [items]
    for index, item in enumerate(items):
        if not isinstance(item, str) and as_list(item) is None:
            raise PromptError(f"{where}[{index}]: expected text or a list of token ids, got {type(item).__name__}")
    return list(items)


_CONTENT_READERS: dict[str, Callable[[Mapping[str, Any]], Conversation | RawPrompts]] = {
    COMPLETIONS: _read_completion,
    RESPONSES: read_responses,
    EMBEDDINGS: _read_embedding,
    MESSAGES: read_anthropic,
}


def _salts(body: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    if body.keys().isdisjoint(SALTS):  # as most are
        return ()
    return tuple((name, value) for name in SALTS if isinstance(value := body.get(name), str))


def _max_output_tokens(body: Mapping[str, Any]) -> int | None:
    for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        value = body.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_OUTPUT_TOKENS:
            return value
    return None


def _affinity_key(body: Mapping[str, Any]) -> str | None:
    """Who asks: the cache key it chose, the session, the user."""
    if body.keys().isdisjoint(_AFFINITY_FIELDS):
        return None
    for field in _AFFINITY_FIELDS:
        value = body.get(field)
        if value is None:
            continue
        for named in _metadata_names(value) if field == "metadata" else (value,):
            if name := _name(named):
                return name
    return None


def _metadata_names(value: Any) -> tuple[Any, Any]:
    metadata = as_mapping(value) or {}
    return metadata.get("session_id"), metadata.get("user_id")  # the second is Anthropic's place for it


def _name(value: Any) -> str:
    """A string of bounded length that can be encoded; "" for what is no string."""
    return as_text(value)[:NAME_CHARS].encode("utf-8", "replace").decode()
