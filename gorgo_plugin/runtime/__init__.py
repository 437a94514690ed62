"""What a live gateway adds around the Router: probes, scrapes, metrics, status, and threads for long prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gorgo_plugin.runtime.runtime import Runtime

__all__ = ["Runtime"]


def __getattr__(name: str) -> Any:
    # Lazy: `Runtime` needs prometheus_client and aiohttp, which come with an extra; `gorgo explain` works without them.
    if name != "Runtime":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gorgo_plugin.runtime.runtime import Runtime

    return Runtime
