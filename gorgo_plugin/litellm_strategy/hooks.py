"""The callback that LiteLLM's configuration names: what its hooks tell of an attempt goes to the ledger.

LiteLLM looks for some hooks in the class's own namespace, so they are all defined here, on the class itself.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Mapping
from datetime import datetime
from typing import Any

from litellm.integrations.custom_logger import CustomLogger

from gorgo_plugin.litellm_strategy.ledger import Request
from gorgo_plugin.litellm_strategy.outcomes import failure_kind
from gorgo_plugin.litellm_strategy.plugin import Plugin
from gorgo_plugin.runtime.outcomes import usage_of

# Calls whose streamed usage is always the engine's own. Elsewhere LiteLLM counts by itself unless it asked for usage.
_STREAMS_WITH_USAGE = frozenset({"anthropic_messages", "aresponses", "responses"})


class GorgoCallback(CustomLogger):  # type: ignore[misc]  # LiteLLM is not typed
    """Follows attempts from dispatch to their end. Each ending may be told several times; the first counts."""

    def __init__(self, plugin: Plugin) -> None:
        super().__init__()
        self._plugin = plugin
        self._ledger = plugin.ledger
        plugin.callback = self

    async def async_pre_call_deployment_hook(self, kwargs: dict[str, Any], call_type: Any) -> None:
        """LiteLLM is about to call the chosen deployment."""
        self._ledger.adopt(kwargs.get("litellm_logging_obj"))

    def log_pre_api_call(self, model: Any, messages: Any, kwargs: Mapping[str, Any]) -> None:
        """The request goes out now."""
        self._ledger.dispatch(kwargs.get("litellm_call_id"))

    async def async_post_call_success_deployment_hook(self, request_data: Any, response: Any, call_type: Any) -> None:
        """A deployment gave a whole answer."""
        request = self._ledger.find(request_data)
        if request is not None:
            request.finish(usage_of(response))

    async def async_post_call_failure_deployment_hook(
        self, request_data: Any, exception: BaseException, call_type: Any, fallback_depth: int | None = None
    ) -> None:
        """A deployment failed (LiteLLM 1.100 and later)."""
        request = self._ledger.find(request_data)
        if request is not None:
            request.fail(failure_kind(exception))

    async def async_post_call_failure_hook(
        self, request_data: Any, original_exception: Exception, user_api_key_dict: Any, traceback_str: Any = None
    ) -> None:
        """The proxy gives a request up."""
        request = self._ledger.find(request_data)
        if request is not None:
            request.give_up(original_exception)

    def async_post_call_streaming_iterator_hook(
        self, user_api_key_dict: Any, response: AsyncIterable[Any], request_data: Any
    ) -> AsyncIterable[Any]:
        """Watch a streamed answer on its way to the client."""
        request = self._ledger.find(request_data)
        return response if request is None or request.attempt is None else _watched(request, response)

    async def async_post_call_response_headers_hook(
        self, data: Any, user_api_key_dict: Any, response: Any, request_headers: Any = None
    ) -> dict[str, str] | None:
        """Headers of the answer to the client; none on errors."""
        return None if response is None else self._plugin.headers(self._ledger.find(data))

    async def async_log_success_event(
        self, kwargs: Mapping[str, Any], response_obj: Any, start_time: Any, end_time: Any
    ) -> None:
        """An answer is complete and counted; of a streamed one this may come after its end."""
        self._succeeded(kwargs, response_obj)

    def log_success_event(self, kwargs: Mapping[str, Any], response_obj: Any, start_time: Any, end_time: Any) -> None:
        """The same for the sync SDK, in a thread."""
        self._succeeded(kwargs, response_obj)

    async def async_log_failure_event(
        self, kwargs: Mapping[str, Any], response_obj: Any, start_time: Any, end_time: Any
    ) -> None:
        """An attempt failed; before 1.100 the only word of it."""
        self._failed(kwargs, end_time)

    def log_failure_event(self, kwargs: Mapping[str, Any], response_obj: Any, start_time: Any, end_time: Any) -> None:
        """The same for the sync SDK, in a thread."""
        self._failed(kwargs, end_time)

    def _succeeded(self, kwargs: Mapping[str, Any], response: Any) -> None:
        attempt = self._ledger.of_call(kwargs.get("litellm_call_id"))
        if attempt is None:
            return
        if _usage_is_the_engines(kwargs):
            attempt.usage(usage_of(response))
        attempt.finish()

    def _failed(self, kwargs: Mapping[str, Any], end_time: Any) -> None:
        attempt = self._ledger.of_call(kwargs.get("litellm_call_id"))
        error = kwargs.get("exception")
        if attempt is None or not isinstance(error, BaseException):
            return
        if isinstance(end_time, datetime) and end_time.timestamp() < attempt.opened_s:
            return  # of the attempt before, told late
        attempt.fail(failure_kind(error))


def _usage_is_the_engines(kwargs: Mapping[str, Any]) -> bool:
    if not kwargs.get("stream") or kwargs.get("call_type") in _STREAMS_WITH_USAGE:
        return True
    options = (kwargs.get("optional_params") or {}).get("stream_options")
    return isinstance(options, Mapping) and options.get("include_usage") is True


async def _watched(request: Request, response: AsyncIterable[Any]) -> AsyncIterator[Any]:
    """Pass a stream on. The attempt is looked up at its end, because a stream that breaks may go on elsewhere."""
    last = None
    try:
        async for last in response:
            yield last
    except BaseException as error:
        request.give_up(error)
        raise
    request.finish(usage_of(last))
