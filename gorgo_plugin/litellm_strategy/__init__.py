"""LiteLLM adapter. `litellm_settings.callbacks: ["gorgo_plugin.litellm_strategy.callback"]` switches it on."""

from __future__ import annotations

from typing import Any

_callback: Any = None


def __getattr__(name: str) -> Any:
    # Lazy, because it imports LiteLLM and extends it: nobody gets that who only reads a configuration.
    global _callback
    if name != "callback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _callback is None:
        from gorgo_plugin.litellm_strategy.hooks import GorgoCallback
        from gorgo_plugin.litellm_strategy.plugin import plugin

        _callback = GorgoCallback(plugin())
    return _callback
