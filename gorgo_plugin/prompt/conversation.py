"""What every dialect of chat is read into: messages of text and media, tools in OpenAI's function form.

Readers are tolerant of what engines tolerate and refuse, naming the field, what has no meaning. Mappings, pydantic
objects and plain JSON values are all accepted, because gateways hand over any of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from types import MappingProxyType
from typing import Any

import msgspec
from pydantic import BaseModel

from gorgo_plugin.errors import PromptError

TEXT_KINDS = {"text", "input_text", "output_text", "refusal", "summary_text", "reasoning_text"}
# Where the parts of the dialects keep an image, a sound or a file, or the name of one.
_PAYLOAD_FIELDS = ("data", "url", "file_data", "image_url", "file_url", "file_id", "uuid")


@dataclass(frozen=True, slots=True)
class Media:
    """An image, a sound or a file inside a message; `payload` identifies it: its URL, base64 text or file id."""

    payload: str


ROLE_CHARS = 64  # a longer role is a text that has to be weighed
_turn = itemgetter("role", "content")
Part = str | Media
Content = str | list[Part]


NO_EXTRAS: Mapping[str, Any] = MappingProxyType({})


@dataclass(slots=True)
class Message:
    """One turn; `extras` are further fields a chat template may read (`name`, `tool_calls`, `tool_call_id`, ...)."""

    role: str
    content: Content
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Conversation:
    """A chat, whatever its dialect.

    Attributes:
        messages: the turns, oldest first.
        tools: OpenAI function tools; None when there are none.
        template_args: further variables for the chat template (`documents`, `chat_template_kwargs`).
        add_generation_prompt: end with the header of the answer.
        continue_final: leave the last message open, so that the answer goes on from it.
        add_special_tokens: let the tokenizer add its own special tokens; a chat template has them already.
        exact: no part of it was translated in a way engines differ on.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    template_args: dict[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final: bool = False
    add_special_tokens: bool = False
    exact: bool = True


def as_mapping(value: Any) -> Mapping[str, Any] | None:
    """A mapping or pydantic object as a mapping; None for anything else."""
    if value is None:  # as most optional fields are; asking pydantic takes microseconds
        return None
    if isinstance(value, (dict, Mapping)):
        return value
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_none=True)
    return None


def as_list(value: Any) -> Sequence[Any] | None:
    """A list or tuple; None for anything else."""
    return value if isinstance(value, list | tuple) else None


def as_text(value: Any) -> str:
    """A string as it is; "" for anything else."""
    return value if isinstance(value, str) else ""


def plain_texts(messages: Sequence[Any]) -> list[str]:
    """The contents of messages that are a short role and a text, as most are; nothing where one is not.

    A prompt may have a thousand of them, so there is no loop in Python.
    """
    if not messages or type(messages[0]) is not dict:  # token ids may be a million
        return []
    if {*map(type, messages)} != {dict} or {*map(len, messages)} != {2}:
        return []
    try:
        roles, contents = zip(*map(_turn, messages), strict=True)
    except KeyError:
        return []
    plain = {*map(type, roles), *map(type, contents)} == {str} and max(map(len, roles)) <= ROLE_CHARS
    return list(contents) if plain else []


def stable_json(value: Any) -> str:
    """Compact JSON of anything: what cannot be written in it stands as the name of its type."""
    try:
        return msgspec.json.encode(value, enc_hook=lambda odd: f"<{type(odd).__name__}>").decode()
    except (TypeError, ValueError, RecursionError):
        return f"<{type(value).__name__}>"


def read_content(value: Any, where: str) -> Content:
    """Read the `content` of a message: a string, null, one part or a list of parts.

    Raises:
        PromptError: anything else.
    """
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    items = as_list(value)
    if items is None:
        items = [value] if as_mapping(value) is not None else None
    if items is None:
        raise PromptError(f"{where}: expected a string or a list of parts, got {type(value).__name__}")
    parts = [read_part(item, f"{where}[{index}]") for index, item in enumerate(items)]
    if len(parts) == 1 and isinstance(parts[0], str):
        return parts[0]
    return parts or ""


def read_part(value: Any, where: str) -> Part:
    """Read one part of a message: text, or anything else as media.

    Raises:
        PromptError: neither a string nor an object, or a text part without text.
    """
    if isinstance(value, str):
        return value
    part = as_mapping(value)
    if part is None:
        raise PromptError(f"{where}: expected an object with a type, got {type(value).__name__}")
    kind = as_text(part.get("type"))
    if kind in TEXT_KINDS or (not kind and "text" in part):
        text = part.get("refusal") if kind == "refusal" else part.get("text")
        if not isinstance(text, str):
            raise PromptError(f"{where}.text: expected a string, got {type(text).__name__}")
        return text
    source = as_mapping(part.get("source"))
    if source is not None and source.get("type") == "text" and isinstance(source.get("data"), str):
        return as_text(source["data"])  # a plain-text document
    payload = _payload(part, kind)
    # Without its header a data URI equals the base64 text other dialects hold.
    return Media(payload.partition(",")[2] if payload.startswith("data:") else payload)


def _payload(part: Mapping[str, Any], kind: str) -> str:
    for holder in (part.get(kind), part.get("source"), part):
        if isinstance(holder, str):
            return holder
        inner = as_mapping(holder)
        if inner is None:
            continue
        for name in _PAYLOAD_FIELDS:
            value = inner.get(name)
            if isinstance(value, str) and value:
                return value
    return stable_json(dict(part))


def read_arguments(value: Any) -> Any:
    """A tool call's arguments as an object, which chat templates write out as JSON (vLLM does the same)."""
    if not isinstance(value, str):
        return value if value is not None else {}
    if not value:
        return {}
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def tool_call(call_id: Any, name: Any, arguments: Any) -> dict[str, Any]:
    """A tool call in OpenAI's form, its arguments as an object."""
    function = {"name": as_text(name), "arguments": read_arguments(arguments)}
    return {"id": as_text(call_id), "type": "function", "function": function}


def function_tool(function: Mapping[str, Any], parameters: Any) -> dict[str, Any]:
    """A tool in OpenAI's form, its fields in the order in which vLLM hands them to the template."""
    known = {"name": function.get("name"), "description": function.get("description"), "parameters": parameters}
    left_out = {*known, "type", "input_schema", "cache_control"}
    further = {name: value for name, value in function.items() if name not in left_out}
    return {"type": "function", "function": known | further}


def read_tools(value: Any, where: str = "tools") -> list[dict[str, Any]] | None:
    """Read tools of any dialect: OpenAI's nested and flat functions, Anthropic's `input_schema`.

    Raises:
        PromptError: not a list of objects.
    """
    if value is None:
        return None
    items = as_list(value)
    if items is None:
        raise PromptError(f"{where}: expected a list of tools, got {type(value).__name__}")
    tools = []
    for index, item in enumerate(items):
        tool = as_mapping(item)
        if tool is None:
            raise PromptError(f"{where}[{index}]: expected an object, got {type(item).__name__}")
        function = as_mapping(tool.get("function"))
        if function is not None:
            tools.append(function_tool(function, function.get("parameters")))
        else:
            tools.append(function_tool(tool, tool.get("input_schema", tool.get("parameters"))))
    return tools or None
