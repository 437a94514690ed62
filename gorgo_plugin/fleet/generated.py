"""Generated workloads by name, as requests of a replay."""

from __future__ import annotations

from dataclasses import replace

from gorgo_plugin.fleet.agent_turns import agent_turns
from gorgo_plugin.fleet.chat_turns import chat_turns
from gorgo_plugin.fleet.replay_inputs import conversation_requests
from gorgo_plugin.fleet.requests import ReplayRequest
from gorgo_plugin.fleet.turns import turn_requests
from gorgo_plugin.fleet.workload import ConversationSettings, WorkloadError, conversations

NAMES: tuple[str, ...] = ("conversations", "art-chat", "agentic")
_CONVERSATIONS = ConversationSettings(requests=2_000)  # five minutes


def generate(name: str, seed: int, *, rate_scale: float = 1.0, block_tokens: int = 16) -> list[ReplayRequest]:
    """The workload of that name: requests in order of arrival, the same for the same seed.

    Args:
        name: one of `NAMES`.
        seed: of everything drawn.
        rate_scale: multiplies the rate of arrivals, in as much less time. Turns still await the answers before them.
        block_tokens: tokens of an engine's block, for the requests' block keys.

    Raises:
        WorkloadError: the name is none of these, or the rate leaves no time for answers.
    """
    if not 0.0 < rate_scale < float("inf"):
        raise WorkloadError(f"rate_scale: expected a number above 0, got {rate_scale}")
    if name == "conversations":
        settings = replace(_CONVERSATIONS, rate_per_s=_CONVERSATIONS.rate_per_s * rate_scale)
        return conversation_requests(conversations(seed, settings), block_tokens)
    if name == "art-chat":
        return turn_requests(chat_turns(seed, rate_scale), block_tokens)
    if name == "agentic":
        return turn_requests(agent_turns(seed, rate_scale), block_tokens)
    raise WorkloadError(f"workload: expected one of {', '.join(NAMES)}, got {name!r}")
