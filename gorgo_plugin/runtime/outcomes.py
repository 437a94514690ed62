"""What an engine's answer says of an attempt, in whichever gateway: its usage, and what its status means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from gorgo_plugin.router import MOST_PROMPT_TOKENS

_INVALID = frozenset({400, 413, 422})  # the request's own fault; the replica is well
_TIMEOUT = frozenset({408, 504})


class Usage(NamedTuple):
    """Tokens as an engine counted them; None where it does not say."""

    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None


def kind_of_status(status: Any) -> str:
    """The kind of failure, as `Router.fail` takes it, that an error's HTTP status means."""
    if status in _INVALID:
        return "invalid"
    return "timeout" if status in _TIMEOUT else "rejected"


def usage_of(answer: Any) -> Usage:
    """Usage in any of the shapes: OpenAI chat and completions, embeddings, responses, Anthropic messages.

    Args:
        answer: a whole answer or the last event of a stream, as a mapping or as an object with such attributes.
    """
    usage = field(answer, "usage")
    if usage is None:
        usage = field(field(answer, "response"), "usage")  # the event that completes a responses stream
    if usage is None:
        return Usage()
    prompt = field(usage, "prompt_tokens")
    if prompt is not None:
        cached = _count(field(field(usage, "prompt_tokens_details"), "cached_tokens"))
        if cached == 0 and field(usage, "cache_read_input_tokens") is not None:
            cached = None  # LiteLLM's own reading of an Anthropic answer says 0 also where the engine said nothing
        return Usage(_count(prompt), cached, _count(field(usage, "completion_tokens")))
    prompt, output = _count(field(usage, "input_tokens")), _count(field(usage, "output_tokens"))
    read = _count(field(usage, "cache_read_input_tokens"))
    if read is None:
        return Usage(prompt, _count(field(field(usage, "input_tokens_details"), "cached_tokens")), output)
    # Anthropic's input tokens are those that were neither read from the cache nor written to it.
    written = _count(field(usage, "cache_creation_input_tokens")) or 0
    return Usage(None if prompt is None else prompt + read + written, read, output)


def field(holder: Any, name: str) -> Any:
    """A field of a mapping or an object; None where there is none."""
    if holder is None:
        return None
    if type(holder) is dict or isinstance(holder, Mapping):  # the first takes a tenth of the time
        return holder.get(name)
    return getattr(holder, name, None)


def _count(value: Any) -> int | None:
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if 0 <= value <= MOST_PROMPT_TOKENS else None
