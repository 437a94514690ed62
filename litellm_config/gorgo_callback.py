"""For LiteLLM 1.84 to 1.93, which load callbacks from a file beside the configuration only.

There the line is `callbacks: ["gorgo_callback.callback"]`; later releases import the package by its own name.
"""

from gorgo_plugin.litellm_strategy import callback

__all__ = ["callback"]
