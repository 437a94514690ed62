"""Routes each LLM request to the replica that will answer first: network, queue and prefill in milliseconds."""

from gorgo_plugin.decision import Cost, Decision, Prompt
from gorgo_plugin.errors import GorgoError, NoCandidates, PromptError, SettingsError
from gorgo_plugin.router import Router
from gorgo_plugin.settings import Settings

__version__ = "0.1.0"

__all__ = [
    "Cost",
    "Decision",
    "GorgoError",
    "NoCandidates",
    "Prompt",
    "PromptError",
    "Router",
    "Settings",
    "SettingsError",
]
