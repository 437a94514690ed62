"""gorgo in one LiteLLM process: its routers, whether the patch is effective, status and headers."""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Mapping
from typing import Any

from gorgo_plugin.errors import NoCandidates, SettingsError
from gorgo_plugin.litellm_strategy import patch, streams
from gorgo_plugin.litellm_strategy.adapter import ARGS, Adapter, Share
from gorgo_plugin.litellm_strategy.ledger import Ledger, Request
from gorgo_plugin.litellm_strategy.outcomes import failure_kind
from gorgo_plugin.litellm_strategy.selector import Selector
from gorgo_plugin.runtime import Runtime
from gorgo_plugin.runtime.explain import question
from gorgo_plugin.settings import Settings

STATUS_PATH = "/gorgo/status"
EXPLAIN_PATH = "/gorgo/explain"
ROUTING_KEYS = frozenset({"routing_strategy", ARGS, "routing_groups"})

_log = logging.getLogger("gorgo_plugin")


class Plugin:
    """The host that `patch` calls, one a process.

    Attributes:
        ledger: the attempts under way.
        callback: whose hooks feed the ledger.
        inactive: why the patch is not effective on this LiteLLM; None when it is.
    """

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.callback: Any = None
        self.inactive: str | None = None
        self._adapters: weakref.WeakKeyDictionary[Any, Adapter] = weakref.WeakKeyDictionary()
        self._refused: weakref.WeakSet[Any] = weakref.WeakSet()  # routers in the middle of an update we refused
        self._idle: Runtime | None = None  # says that it is inactive, in metrics and status

    def install(self) -> None:
        """Extend LiteLLM, and say so where that has no effect."""
        self.inactive = patch.install(self)
        if self.inactive is not None:
            _log.error("gorgo is inactive, LiteLLM's own simple-shuffle serves: %s", self.inactive)

    def adapter(self, router: Any) -> Adapter | None:
        """What a `litellm.Router` has of gorgo; None when it does not use it."""
        return self._adapters.get(patch.core_of(router))

    # What patch calls

    def build(self, router: Any, args: Mapping[str, Any] | None) -> Selector:
        """A selector; it gets its settings when the router is ready."""
        adapter = self._adapters.get(router)
        if adapter is None:
            adapter = self._adapters[router] = Adapter(router)
        return Selector(adapter, self.ledger, args)

    def built(self, router: Any) -> None:
        """A router is ready: put its settings in force.

        Raises:
            SettingsError: one sentence naming the field; it ends the start of the gateway.
        """
        adapter = self._adapters.get(router)
        if adapter is None:
            return
        self._join()
        try:
            adapter.settle()
        except SettingsError:
            patch.end_start_up_without_traceback()
            raise
        except Exception as error:  # noqa: BLE001 (an error of ours: the gateway starts, simple-shuffle serves)
            _log.exception("gorgo is inactive, LiteLLM's own simple-shuffle serves")
            adapter.refuse(f"{type(error).__name__}: {error}")

    def updating(self, router: Any, changes: Mapping[str, Any]) -> Mapping[str, Any]:
        """Let through the changes of settings that gorgo can run with; the others are kept from LiteLLM too."""
        if ROUTING_KEYS.isdisjoint(changes):
            return changes
        adapter = self._adapters.get(router) or Adapter(router)
        try:
            adapter.check(changes)
        except SettingsError as error:
            self._adapters[router] = adapter
            self._refused.add(router)
            self._join()
            adapter.refuse(str(error))
            return {name: value for name, value in changes.items() if name not in ROUTING_KEYS}
        except Exception:  # noqa: BLE001 (what LiteLLM makes of such changes is its own affair)
            _log.exception("gorgo: changed settings could not be checked")
        return changes

    def updated(self, router: Any, changes: Mapping[str, Any]) -> None:
        """Put changed settings in force."""
        adapter = self._adapters.get(router)
        if router in self._refused:
            self._refused.discard(router)
        elif adapter is not None:
            self._join()
            selector = patch.default_selector(router)
            if ARGS in changes and isinstance(selector, Selector):
                selector.args = changes[ARGS] or {}  # early releases keep a selector when only its arguments change
            adapter.try_settle()

    async def answered(self, kwargs: Mapping[str, Any], answer: Any) -> Any:
        """See an attempt through to its first token where gorgo routed it and the answer is a stream."""
        request = self.ledger.find(kwargs) if isinstance(answer, AsyncIterator) else None
        attempt = None if request is None else request.attempt
        if request is None or attempt is None or attempt.closed is not None or not attempt.streamed:
            return answer
        request.answering = True
        try:
            stream, content = await streams.begin(answer)
        except BaseException as error:
            request.fail(failure_kind(error))
            raise
        finally:
            request.answering = False
        if content and request.attempt is not None:  # perhaps another one: some streams begin anew by themselves
            request.attempt.first_token()
        return stream

    def answers(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a request's stream is still without its first token."""
        request = self.ledger.find(kwargs)
        return request is not None and request.answering

    def replaced(self, args: Mapping[str, Any] | None) -> None:
        """A router gets simple-shuffle in our place: say in metrics and status that gorgo is inactive."""
        if self._idle is None:
            try:
                settings = Settings.model_validate({**(args or {}), "replicas": []})
            except SettingsError as error:
                _log.error("gorgo: %s.%s", ARGS, error)
                settings = Settings()
            self._idle = Runtime(settings)
            self._idle.set_active(False, self.inactive or "")
        self._join()

    # What the callback asks

    def headers(self, request: Request | None) -> dict[str, str] | None:
        """Headers of an answer, by `response_headers`; None for an answer that gorgo did not route."""
        if request is None or request.attempt is None:
            return None
        return request.attempt.headers() or None

    def status(self) -> dict[str, Any]:
        """What `/gorgo/status` answers: the state of the default group, `flights` over all, the others beside it."""
        self.ledger.collect()
        adapters = list(self._adapters.values())
        shares = [share for adapter in adapters for share in adapter.shares]
        refused = next((error for adapter in adapters if (error := adapter.settings_error) is not None), None)
        about = {"version": patch.version(), "requests": len(self.ledger)}
        if not shares:
            reason = self.inactive or refused or "no model group uses gorgo"
            idle = self._idle.status() if self._idle is not None else {"flights": {}}
            return {**idle, "active": False, "reason": reason, "settings_error": refused, "litellm": about}
        return {**_merged_status(shares), "settings_error": refused, "litellm": about}

    async def explain(self, asked: object) -> dict[str, Any]:
        """What `/gorgo/explain` answers to `{body, endpoint, model}`: where the request would go now, and why.

        Raises:
            PromptError: the question or the body in it cannot be read.
            NoCandidates: no model group of that name uses gorgo.
        """
        body, endpoint, model = question(asked)
        group = model if model is not None else str(body.get("model", ""))
        for adapter in list(self._adapters.values()):
            for share in adapter.shares:
                if group in share.models:
                    return await share.runtime.explain(body, endpoint, group)
        raise NoCandidates(f"model: '{group:.80}' is no model group that gorgo routes")

    async def stop(self) -> None:
        """End everything in the background."""
        for adapter in list(self._adapters.values()):
            await asyncio.to_thread(adapter.close)

    def _join(self) -> None:
        """Be heard by LiteLLM, and by its proxy where this is one."""
        if self.callback is not None:
            patch.register(self.callback)
        if patch.in_proxy():
            patch.add_route(STATUS_PATH, _status_route)
            patch.add_admin_question(EXPLAIN_PATH, self.explain)
        patch.on_proxy_shutdown(self.stop)


def _merged_status(shares: list[Share]) -> dict[str, Any]:
    states = [(share, share.runtime.status()) for share in shares]
    first = states[0][1]
    flights: dict[str, int] = {}
    for _, state in states:
        for replica, count in state["flights"].items():
            flights[replica] = flights.get(replica, 0) + count
    merged = {**first, "flights": flights, "model_groups": sorted(shares[0].models)}
    if len(states) > 1:
        merged["others"] = [{**state, "model_groups": sorted(share.models)} for share, state in states[1:]]
    return merged


_lock = threading.Lock()
_plugin: Plugin | None = None


def plugin() -> Plugin:
    """The plugin of this process; the first call extends LiteLLM."""
    global _plugin
    with _lock:
        if _plugin is None:
            _plugin = Plugin()
            _plugin.install()
        return _plugin


async def _status_route() -> dict[str, Any]:
    return plugin().status()
