"""Chat in the three dialects gateways speak: OpenAI chat completions, OpenAI responses, Anthropic messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gorgo_plugin.errors import PromptError
from gorgo_plugin.prompt.conversation import (
    NO_EXTRAS,
    Content,
    Conversation,
    Media,
    Message,
    Part,
    as_list,
    as_mapping,
    as_text,
    read_content,
    read_part,
    read_tools,
    stable_json,
    tool_call,
)

Body = Mapping[str, Any]


def read_chat(body: Body, known_messages: int = 0) -> Conversation:
    """Read an OpenAI chat body, with vLLM's further fields; `known_messages` were before those that it holds.

    Raises:
        PromptError: `messages` is missing, empty or holds what is no message.
    """
    items = _messages(body, at_least=not known_messages)
    continue_final = body.get("continue_final_message") is True
    template_args = {}
    if as_list(body.get("documents")) is not None:
        template_args["documents"] = body["documents"]
    if isinstance(body.get("reasoning_effort"), str):
        template_args["reasoning_effort"] = body["reasoning_effort"]
    template_args |= as_mapping(body.get("chat_template_kwargs")) or {}
    return Conversation(
        [_chat_message(item, index) for index, item in enumerate(items, known_messages)],
        tools=read_tools(body.get("tools")),
        template_args=template_args,
        add_generation_prompt=body.get("add_generation_prompt") is not False and not continue_final,
        continue_final=continue_final,
        add_special_tokens=body.get("add_special_tokens") is True,
    )


def _messages(body: Body, at_least: int = 1) -> Sequence[Any]:
    items = as_list(body.get("messages"))
    if items is None:
        raise PromptError("messages: expected a list of messages")
    if len(items) < at_least:
        raise PromptError("messages: expected at least one message")
    return items


def _object(value: Any, where: str) -> Body:
    found = as_mapping(value)
    if found is None:
        raise PromptError(f"{where}: expected an object, got {type(value).__name__}")
    return found


def _role(message: Body, where: str) -> str:
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise PromptError(f"{where}.role: expected a non-empty string")
    return role


def _chat_message(value: Any, index: int) -> Message:
    if type(value) is dict and len(value) == 2:  # most messages are so, and a prompt may hold a thousand
        role, content = value.get("role"), value.get("content")
        if type(role) is str and role and type(content) is str:
            return Message(role, content, NO_EXTRAS)
    where = f"messages[{index}]"
    message = _object(value, where)
    role = _role(message, where)
    return Message(role, read_content(message.get("content"), f"{where}.content"), _chat_extras(message, role))


def _chat_extras(message: Body, role: str) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if role == "assistant":
        calls = [_chat_call(call) for call in as_list(message.get("tool_calls")) or ()]
        legacy = as_mapping(message.get("function_call"))
        if legacy is not None and not calls:
            calls = [tool_call("", legacy.get("name"), legacy.get("arguments"))]
        if calls:
            extras["tool_calls"] = calls
        reasoning = as_text(message.get("reasoning_content")) or as_text(message.get("reasoning"))
        if reasoning:
            extras |= {"reasoning": reasoning, "reasoning_content": reasoning}
    elif isinstance(message.get("tool_call_id"), str):
        extras["tool_call_id"] = message["tool_call_id"]
    if isinstance(message.get("name"), str):
        extras["name"] = message["name"]
    return extras


def _chat_call(value: Any) -> dict[str, Any]:
    call = as_mapping(value) or {}
    function = as_mapping(call.get("function")) or {}
    return tool_call(call.get("id"), function.get("name"), function.get("arguments"))


def read_anthropic(body: Body) -> Conversation:
    """Read an Anthropic messages body; tool results become messages of the role `tool`.

    Raises:
        PromptError: `messages` is missing, empty or holds what is no message; a field of the wrong shape.
    """
    items = _messages(body)
    messages = []
    if body.get("system"):
        messages.append(Message("system", read_content(body["system"], "system")))
    for index, item in enumerate(items):
        where = f"messages[{index}]"
        message = _object(item, where)
        messages.extend(_anthropic_turn(_role(message, where), message.get("content"), f"{where}.content"))
    tools = read_tools(body.get("tools"))
    return Conversation(messages, tools=tools, exact=tools is None and not any(turn.extras for turn in messages))


def _anthropic_turn(role: str, content: Any, where: str) -> list[Message]:
    blocks = as_list(content)
    if blocks is None:
        return [Message(role, read_content(content, where))]
    results: list[Message] = []
    parts: list[Part] = []
    extras: dict[str, Any] = {}
    for index, value in enumerate(blocks):
        at = f"{where}[{index}]"
        block = as_mapping(value)
        kind = block.get("type") if block is not None else None
        if block is None or kind not in ("tool_use", "tool_result", "thinking", "redacted_thinking"):
            parts.append(read_part(value, at))
        elif kind == "tool_use":
            extras.setdefault("tool_calls", []).append(
                tool_call(block.get("id"), block.get("name"), block.get("input"))
            )
        elif kind == "tool_result":
            answer = read_content(block.get("content"), f"{at}.content")
            results.append(Message("tool", answer, {"tool_call_id": as_text(block.get("tool_use_id"))}))
        elif kind == "thinking":
            thought = extras.get("reasoning_content", "") + as_text(block.get("thinking"))
            extras |= {"reasoning": thought, "reasoning_content": thought}
    if parts or extras or not results:
        results.append(Message(role, _joined(parts), extras))
    return results


def _joined(parts: list[Part]) -> Content:
    if not parts:
        return ""
    only = parts[0]
    return only if len(parts) == 1 and isinstance(only, str) else parts


def read_responses(body: Body) -> Conversation:
    """Read an OpenAI responses body: `instructions`, then `input`.

    Raises:
        PromptError: `input` is neither a string nor a list of items; an item of the wrong shape.
    """
    messages = []
    if isinstance(body.get("instructions"), str) and body["instructions"]:
        messages.append(Message("system", body["instructions"]))
    given = body.get("input")
    items = as_list(given)
    if isinstance(given, str):
        messages.append(Message("user", given))
    elif items:
        _append_items(items, messages)
    elif items is None and given is not None:
        raise PromptError(f"input: expected a string or a list of items, got {type(given).__name__}")
    if not messages:
        raise PromptError("input: expected a string or at least one item")
    tools = read_tools(body.get("tools"))
    # What an earlier response held is known to the engine alone.
    exact = tools is None and not body.get("previous_response_id") and not any(turn.extras for turn in messages)
    return Conversation(messages, tools=tools, exact=exact)


def _append_items(items: Sequence[Any], messages: list[Message]) -> None:
    """Append the items of a responses input; reasoning and calls of one answer join into one assistant message."""
    open_answer: Message | None = None
    for index, value in enumerate(items):
        where = f"input[{index}]"
        item = {"role": "user", "content": value} if isinstance(value, str) else _object(value, where)
        kind = item.get("type")
        if kind in ("function_call", "custom_tool_call", "reasoning"):
            if open_answer is None:
                open_answer = Message("assistant", "")
                messages.append(open_answer)
            _extend_answer(open_answer, item, kind)
            continue
        if kind in ("function_call_output", "custom_tool_call_output"):
            answer = read_content(item.get("output"), f"{where}.output")
            messages.append(Message("tool", answer, {"tool_call_id": as_text(item.get("call_id"))}))
            open_answer = None
        elif kind == "message" or "role" in item:
            role = _role(item, where)
            content = read_content(item.get("content"), f"{where}.content")
            if role == "assistant" and open_answer is not None and "tool_calls" not in open_answer.extras:
                open_answer.content = content
            else:
                open_answer = Message(role, content)
                messages.append(open_answer)
            if role != "assistant":
                open_answer = None
        else:
            messages.append(Message("assistant", [Media(stable_json(dict(item)))]))  # a hosted tool's call, a reference
            open_answer = None


def _extend_answer(answer: Message, item: Body, kind: str) -> None:
    if kind == "reasoning":
        parts = [*(as_list(item.get("content")) or ()), *(as_list(item.get("summary")) or ())]
        thought = "\n".join(as_text((as_mapping(part) or {}).get("text")) for part in parts)
        answer.extras = {**answer.extras, "reasoning": thought, "reasoning_content": thought}
        return
    call = tool_call(item.get("call_id"), item.get("name"), item.get("arguments", item.get("input")))
    answer.extras = {**answer.extras, "tool_calls": [*answer.extras.get("tool_calls", ()), call]}
