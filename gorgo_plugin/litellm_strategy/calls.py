"""What LiteLLM hands a selector, read back into the request body a client sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gorgo_plugin.prompt.endpoints import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES, endpoint_of

# By the name LiteLLM gives the call, sync and async.
_ENDPOINT_OF_CALL = {
    "completion": CHAT,
    "acompletion": CHAT,
    "text_completion": COMPLETIONS,
    "atext_completion": COMPLETIONS,
    "embedding": EMBEDDINGS,
    "aembedding": EMBEDDINGS,
    "responses": RESPONSES,
    "aresponses": RESPONSES,
    "anthropic_messages": MESSAGES,
}

# Fields that change the prompt, its cache or its size. Not `metadata`: LiteLLM's own is in there too, and what a client
# puts there must not steer the choice.
_FIELDS = (
    "add_generation_prompt",
    "add_special_tokens",
    "cache_salt",
    "chat_template_kwargs",
    "continue_final_message",
    "documents",
    "instructions",
    "lora_path",
    "max_completion_tokens",
    "max_output_tokens",
    "max_tokens",
    "previous_response_id",
    "prompt_cache_key",
    "reasoning_effort",
    "safety_identifier",
    "system",
    "tools",
    "user",
)


@dataclass(frozen=True, slots=True)
class Call:
    """One call to be routed.

    Attributes:
        endpoint: one of the paths whose bodies hold a prompt.
        body: what the client sent, as far as it matters to the prompt.
        stream: whether it asked for a streamed answer.
        unseen: LiteLLM tells nothing of its end: streamed pass-through.
    """

    endpoint: str
    body: Mapping[str, Any]
    stream: bool
    unseen: bool = False


def read_call(messages: Any, given_input: Any, kwargs: Mapping[str, Any]) -> Call | None:
    """Read a call; None when it has no prompt (images, speech, files, ...).

    Args:
        messages, given_input: as the selector gets them. LiteLLM puts a completion's prompt into one message.
        kwargs: the rest of the call. Its logging object names the kind of call where there is one: through the proxy.
    """
    if "json" in kwargs and "endpoint" in kwargs:  # pass-through: the body as it came
        return _passed_through(kwargs)
    kind = getattr(kwargs.get("litellm_logging_obj"), "call_type", None)
    endpoint = _guessed(messages, given_input, kwargs) if kind is None else _ENDPOINT_OF_CALL.get(kind)
    if endpoint is None:
        return None
    extra = kwargs.get("extra_body")
    fields = {**extra, **kwargs} if isinstance(extra, Mapping) else kwargs
    body = {name: fields[name] for name in _FIELDS if fields.get(name) is not None}
    if endpoint in (EMBEDDINGS, RESPONSES):
        body["input"] = given_input
    else:
        body["messages"] = messages
    return Call(endpoint, body, kwargs.get("stream") is True)


def _passed_through(kwargs: Mapping[str, Any]) -> Call | None:
    endpoint, body = endpoint_of("/" + str(kwargs["endpoint"]).lstrip("/")), kwargs["json"]
    if endpoint is None or not isinstance(body, Mapping):
        return None
    kept = {name: value for name, value in body.items() if name != "metadata"}
    stream = body.get("stream") is True
    return Call(endpoint, kept, stream, unseen=stream)


def _guessed(messages: Any, given_input: Any, kwargs: Mapping[str, Any]) -> str | None:
    """The endpoint of an SDK call, which names none. A text completion looks like a chat of one user message."""
    if messages is None:
        if given_input is None:
            return None
        return RESPONSES if "input" in kwargs else EMBEDDINGS
    if "messages" in kwargs:
        return MESSAGES  # the one call whose messages are still among its arguments
    if not isinstance(messages, Sequence) or not messages or not isinstance(messages[0], Mapping):
        return None
    content = messages[0].get("content")
    raw = isinstance(content, list) and content and not isinstance(content[0], Mapping)
    return COMPLETIONS if raw else CHAT
