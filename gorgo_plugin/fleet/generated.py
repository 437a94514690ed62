"""Generated workloads by name."""

from __future__ import annotations

from gorgo_plugin.fleet.replay_inputs import conversation_requests
from gorgo_plugin.fleet.requests import ReplayRequest
from gorgo_plugin.fleet.workload import ConversationSettings, conversations

NAMES: tuple[str, ...] = ("conversations",)


def generate(name: str, seed: int, *, rate_scale: float, block_tokens: int) -> list[ReplayRequest]:
    """The requests of a generated workload, in order of arrival; the same seed gives the same.

    Args:
        name: one of `NAMES`.
        seed: of everything that is drawn.
        rate_scale: times the workload's own rate of arrivals.
        block_tokens: tokens of the engines' KV blocks.
    """
    settings = ConversationSettings(requests=2000, rate_per_s=ConversationSettings.rate_per_s * rate_scale)
    return conversation_requests(conversations(seed, settings), block_tokens)
