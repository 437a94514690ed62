"""Request body to `Prompt`: the endpoints' bodies, chat templates, tokenizers and the cache of tokenized messages."""

from gorgo_plugin.prompt.builder import Plan, PromptBuilder, built_from
from gorgo_plugin.prompt.endpoints import ENDPOINTS, endpoint_of

__all__ = ["ENDPOINTS", "Plan", "PromptBuilder", "built_from", "endpoint_of"]
