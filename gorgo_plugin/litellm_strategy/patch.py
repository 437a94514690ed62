"""Every private name of LiteLLM that this package relies on, and the proof that relying on them works.

LiteLLM validates strategy names against a list and dispatches by literals, so a new one needs its own methods extended.
Each is wrapped, none is copied: they keep doing what they do for every other strategy. From LiteLLM 1.109 on the
methods live on the class that `litellm.Router` delegates to, some under a `_core_` prefix.

`install` ends with one synthetic selection. Where that does not come out of our selector (a LiteLLM that moved its
core once more), everything is put back, and routers asking for gorgo get simple-shuffle: the gateway serves all the
same.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import random
import sys
import threading
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import litellm
from litellm.integrations.custom_logger import CustomLogger

from gorgo_plugin.errors import GorgoError

STRATEGY = "gorgo"
FALLBACK = "simple-shuffle"
# The arm of LiteLLM's dispatch that hands a selector all we need: model group, deployments, messages, input, kwargs.
LENT_STRATEGY = "latency-based-routing"
SELECTOR_ATTRIBUTE = "gorgo_selector"
SELF_TEST_TIMEOUT_S = 30.0  # a selection takes a millisecond; a machine that swaps must not start inactive

START_UP_ENDS_WITHIN_S = 10.0  # a server that refuses to start ends in a fraction of a second

_VALIDATORS = ("litellm.router_utils.routing_groups", "litellm.litellm_core_utils.routing_groups")
_SELECT = ("_select_deployment_async", "_select_deployment_sync")
_CALLBACK_LISTS = (
    "callbacks",
    "input_callback",
    "success_callback",
    "failure_callback",
    "_async_success_callback",
    "_async_failure_callback",
)


class Host(Protocol):
    """Who builds our selectors and follows the life of LiteLLM's routers."""

    def build(self, router: Any, args: Mapping[str, Any] | None) -> CustomLogger:
        """A selector for one use of the strategy in `router`."""

    def built(self, router: Any) -> None:
        """A router is ready. What this raises ends its construction."""

    def updating(self, router: Any, changes: Mapping[str, Any]) -> Mapping[str, Any]:
        """Settings are about to change; returns those that may."""

    def updated(self, router: Any, changes: Mapping[str, Any]) -> None:
        """Settings have changed."""

    async def answered(self, kwargs: Mapping[str, Any], answer: Any) -> Any:
        """An attempt of any strategy has an answer; returns it. What this raises fails the attempt."""

    def answers(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether the request is inside `answered`."""

    def replaced(self, args: Mapping[str, Any] | None) -> None:
        """A router asked for gorgo and gets LiteLLM's own strategy, because the patch is not effective."""


class IneffectiveError(Exception):
    """This LiteLLM cannot be extended the way we know; the text says why."""


def install(host: Host) -> str | None:
    """Make `routing_strategy: gorgo` work; returns None, or why it cannot on this LiteLLM."""
    undo: list[tuple[Any, str, Any]] = []
    try:
        _extend(host, undo)
        _self_test()
    except Exception as error:  # noqa: BLE001 (whatever an unknown LiteLLM raises, the gateway must start)
        while undo:
            owner, name, original = undo.pop()
            setattr(owner, name, original)
        _replace_strategy(host)
        detail = str(error) if isinstance(error, IneffectiveError) else f"{type(error).__name__}: {error}"
        return f"LiteLLM {version()} is not known to this version of gorgo-plugin ({detail:.300})"
    return None


def version() -> str:
    """LiteLLM's version."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    try:
        return version_of("litellm")
    except PackageNotFoundError:
        return "of unknown version"


# What the adapter asks of a router


def core_of(router: Any) -> Any:
    """The object that routes: a `litellm.Router` itself, from 1.109 on the one it delegates to."""
    return router.__dict__.get("_core", router)


def model_list(router: Any) -> Sequence[Mapping[str, Any]]:
    """The deployments of a router, as it holds them."""
    return _member(router, "model_list") or ()


def routing_context(router: Any, model: str) -> tuple[str | None, Any]:
    """(strategy, selector) that serve a model group."""
    strategy, selector = router._get_routing_context(model)
    return strategy, selector


def default_selector(router: Any) -> Any:
    """The selector of the default group, None when that does not use gorgo."""
    return getattr(router, SELECTOR_ATTRIBUTE, None)


def routing_group_of(router: Any, model: str) -> str | None:
    """The routing group a model group belongs to, None for the default."""
    group = getattr(router, "_model_to_group", {}).get(model)
    return None if group is None else str(group)


def routing_settings(router: Any) -> tuple[str | None, Mapping[str, Any], Any]:
    """(routing_strategy, routing_strategy_args, routing_groups) of a router as they are now."""
    strategy = router._normalize_strategy(_member(router, "routing_strategy"))
    return strategy, router.routing_strategy_args or {}, getattr(router, "_routing_groups_input", None)


def simple_shuffle(
    router: Any, model: str, deployments: Sequence[Mapping[str, Any]], kwargs: Mapping[str, Any]
) -> Mapping[str, Any]:
    """LiteLLM's own choice among deployments: by weight, rpm or tpm where given, else at random."""
    from litellm.router_strategy.simple_shuffle import simple_shuffle as shuffle

    known: dict[str, Callable[[], Any]] = {
        "llm_router_instance": lambda: router,  # up to 1.102
        "resolve_model_alias": lambda: _member(router, "get_model_from_alias"),
        "healthy_deployments": lambda: deployments,
        "model": lambda: model,
        "request_kwargs": lambda: kwargs,
    }
    try:
        chosen: Mapping[str, Any] = shuffle(**{name: known[name]() for name in inspect.signature(shuffle).parameters})
    except Exception:  # noqa: BLE001 (weights that are no numbers, or a parameter of a later LiteLLM)
        return random.choice(deployments)
    return chosen


def register(callback: CustomLogger) -> None:
    """Have a callback's hooks called; in the SDK nobody else sees to it."""
    if callback not in litellm.callbacks:
        litellm.callbacks.append(callback)


# The proxy around the router


def in_proxy() -> bool:
    """Whether this process is LiteLLM's proxy."""
    return "litellm.proxy.proxy_server" in sys.modules


def add_route(path: str, answer: Callable[[], Any]) -> None:
    """Serve what `answer` returns to GETs of a path of the proxy, behind any of LiteLLM's keys."""
    from fastapi import Depends
    from litellm.proxy.auth.user_api_key_auth import user_api_key_auth

    _serve(path, answer, "GET", Depends(user_api_key_auth))


def add_admin_question(path: str, answer: Callable[[object], Awaitable[Mapping[str, Any]]]) -> None:
    """Answer what proxy admins POST to a path as JSON; the plugin's own errors become a 400 with their sentence."""
    import fastapi
    from litellm.proxy._types import LitellmUserRoles
    from litellm.proxy.auth.user_api_key_auth import user_api_key_auth

    async def admins_only(caller: Any = fastapi.Depends(user_api_key_auth)) -> None:  # noqa: B008 (FastAPI's form)
        if getattr(caller, "user_role", None) != LitellmUserRoles.PROXY_ADMIN:
            raise fastapi.HTTPException(403, "only for proxy admins: it tells what others have cached")

    async def question(asked: Any = fastapi.Body()) -> Mapping[str, Any]:  # noqa: B008 (FastAPI's form)
        try:
            return await answer(asked)
        except GorgoError as error:
            raise fastapi.HTTPException(400, str(error)) from None

    _serve(path, question, "POST", fastapi.Depends(admins_only))


def _serve(path: str, answer: Callable[..., Any], method: str, guard: Any) -> None:
    """Add a route to the proxy; once, however often called."""
    app = sys.modules["litellm.proxy.proxy_server"].app
    if not any(getattr(route, "path", None) == path for route in app.router.routes):
        app.add_api_route(path, answer, methods=[method], dependencies=[guard], response_model=None)


def end_start_up_without_traceback() -> None:
    """Where a start of the proxy is about to end by an error of ours, let its server print the error's sentence alone.

    What is on the stack then is LiteLLM's start-up, some 250 lines of it. Harmless should the process live on.
    """
    server = sys.modules.get("litellm.proxy.proxy_server")
    if server is None or getattr(server, "llm_router", None) is not None or hasattr(sys, "tracebacklimit"):
        return
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return
    sys.tracebacklimit = 0
    loop.call_later(START_UP_ENDS_WITHIN_S, functools.partial(delattr, sys, "tracebacklimit"))


def on_proxy_shutdown(stop: Callable[[], Any]) -> None:
    """Await `stop` when the proxy shuts down; once, however often called."""
    server = sys.modules.get("litellm.proxy.proxy_server")
    shutdown = getattr(server, "proxy_shutdown_event", None)
    if server is None or shutdown is None or getattr(shutdown, "gorgo", False):
        return

    @functools.wraps(shutdown)
    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        await stop()
        return await shutdown(*args, **kwargs)

    wrapped.gorgo = True  # type: ignore[attr-defined]
    server.proxy_shutdown_event = wrapped  # type: ignore[attr-defined]


# The extension


def _core_class() -> Any:
    """The class whose methods route: `litellm.Router`, from 1.109 on the one it delegates to."""
    return getattr(litellm.Router, "_core_class", litellm.Router)


def _member(router: Any, name: str) -> Any:
    """An attribute of a router under its name, or with the `_core_` prefix of 1.109."""
    core = f"_core_{name}"
    return getattr(router, core) if hasattr(router, core) else getattr(router, name)


def _method_name(owner: Any, *names: str) -> str:
    for name in names:
        if callable(getattr(owner, name, None)):
            return name
    raise IneffectiveError(f"its router has no {' or '.join(names)}")


def _extend(host: Host, undo: list[tuple[Any, str, Any]]) -> None:
    core = _core_class()

    def put(owner: Any, name: str, value: Any) -> None:
        undo.append((owner, name, inspect.getattr_static(owner, name)))
        setattr(owner, name, value)

    _extend_validation(core, put)
    build = _method_name(core, "_build_strategy_selector")
    put(core, build, _building(getattr(core, build), host))
    for name in _SELECT:
        put(core, _method_name(core, name), _selecting(getattr(core, name)))
    # Up to 1.105 the outer method holds the comparison with literals, later the inner one.
    available = _method_name(core, "_async_get_available_deployment", "async_get_available_deployment")
    put(core, available, _through_view(getattr(core, available)))
    call = _method_name(core, "make_call")
    put(core, call, _calling(getattr(core, call), host))
    fall_back = _method_name(core, "async_function_with_fallbacks_common_utils")
    put(core, fall_back, _falling_back(getattr(core, fall_back), host))
    put(core, "__init__", _constructing(core.__init__, host))
    update = _method_name(core, "_core_update_settings", "update_settings")
    put(core, update, _updating(getattr(core, update), host))


def _like(wrapper: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper with the face of the original: LiteLLM reads the signature of its own router."""
    functools.update_wrapper(wrapper, original)
    wrapper.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return wrapper


def _extend_validation(core: Any, put: Callable[[Any, str, Any], None]) -> None:
    attributes = dict(core._DEFAULT_SELECTOR_ATTR_BY_STRATEGY)
    put(core, "_DEFAULT_SELECTOR_ATTR_BY_STRATEGY", {**attributes, STRATEGY: SELECTOR_ATTRIBUTE})
    if hasattr(core, "_OVERRIDABLE_ROUTING_STRATEGIES"):
        put(core, "_OVERRIDABLE_ROUTING_STRATEGIES", frozenset({*core._OVERRIDABLE_ROUTING_STRATEGIES, STRATEGY}))
    name = _method_name(core, "_validate_routing_strategy")
    static = inspect.getattr_static(core, name)
    if isinstance(static, staticmethod):
        put(core, name, staticmethod(_validating(static.__func__)))
    else:
        put(core, name, _validating(static))
    for module in filter(None, map(sys.modules.get, _VALIDATORS)):
        put(module, "validate_routing_strategy", _validating(module.validate_routing_strategy))


def _validating(original: Callable[..., Any]) -> Callable[..., Any]:
    def validate(*args: Any, **kwargs: Any) -> Any:
        if STRATEGY in args or STRATEGY in kwargs.values():
            return None
        return original(*args, **kwargs)

    return _like(validate, original)


def _building(original: Callable[..., Any], host: Host) -> Callable[..., Any]:
    def build(self: Any, strategy: Any, routing_strategy_args: Any, *args: Any, **kwargs: Any) -> Any:
        if strategy != STRATEGY:
            return original(self, strategy, routing_strategy_args, *args, **kwargs)
        return _probe.get() or host.build(self, routing_strategy_args)

    return _like(build, original)


def _selecting(original: Callable[..., Any]) -> Callable[..., Any]:
    def select(self: Any, *args: Any, strategy: Any = None, **kwargs: Any) -> Any:  # a coroutine where it was one
        return original(self, *args, strategy=LENT_STRATEGY if strategy == STRATEGY else strategy, **kwargs)

    return _like(select, original)


class _RouterView:
    """A router as seen by one method of its own, which sends strategies it has no literal for down the sync path."""

    routing_strategy = LENT_STRATEGY
    _core_routing_strategy = LENT_STRATEGY

    def __init__(self, router: Any) -> None:
        self.__dict__["_router"] = router

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_router"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_router"], name, value)


def _through_view(original: Callable[..., Any]) -> Callable[..., Any]:
    def available(self: Any, *args: Any, **kwargs: Any) -> Any:  # a coroutine
        seen = _RouterView(self) if _member(self, "routing_strategy") == STRATEGY else self
        return original(seen, *args, **kwargs)

    return _like(available, original)


def _calling(original: Callable[..., Any], host: Host) -> Callable[..., Any]:
    async def call(self: Any, *args: Any, **kwargs: Any) -> Any:  # once for each attempt, so what it raises is retried
        return await host.answered(kwargs, await original(self, *args, **kwargs))

    return _like(call, original)


def _falling_back(original: Callable[..., Any], host: Host) -> Callable[..., Any]:
    async def fall_back(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A stream turns to another model group by itself; an attempt that fails is retried in its own first.
        if "e" in kwargs and host.answers(kwargs.get("kwargs") or {}):
            raise kwargs["e"]
        return await original(self, *args, **kwargs)

    return _like(fall_back, original)


def _constructing(original: Callable[..., Any], host: Host) -> Callable[..., Any]:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if _probe.get() is None:
            host.built(self)

    return _like(init, original)


def _updating(original: Callable[..., Any], host: Host) -> Callable[..., Any]:
    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        changes = host.updating(self, kwargs)
        try:
            return original(self, *args, **changes)
        finally:
            host.updated(self, changes)

    return _like(update, original)


# Without effect: only public names


def _replace_strategy(host: Host) -> None:
    """Let routers that ask for gorgo have simple-shuffle, so that an unknown LiteLLM starts and serves."""
    router = litellm.Router
    init, update = router.__init__, router.update_settings

    def replaced_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **_without_gorgo(kwargs, host))

    def replaced_update(self: Any, **kwargs: Any) -> Any:
        return update(self, **_without_gorgo(kwargs, host))

    router.__init__ = _like(replaced_init, init)
    router.update_settings = _like(replaced_update, update)


def _without_gorgo(kwargs: Mapping[str, Any], host: Host) -> dict[str, Any]:
    changed = dict(kwargs)
    if changed.get("routing_strategy") == STRATEGY:
        host.replaced(changed.get("routing_strategy_args"))
        changed |= {"routing_strategy": FALLBACK, "routing_strategy_args": {}}
    groups = changed.get("routing_groups")
    if groups:
        changed["routing_groups"] = [_group_without_gorgo(group, host) for group in groups]
    return changed


def _group_without_gorgo(group: Any, host: Host) -> Any:
    if not isinstance(group, Mapping):
        group = group.model_dump()
    if group.get("routing_strategy") != STRATEGY:
        return group
    host.replaced(group.get("routing_strategy_args"))
    return {**group, "routing_strategy": FALLBACK, "routing_strategy_args": None}


# The proof


class _ProbeSelector(CustomLogger):  # type: ignore[misc]  # what LiteLLM lists among its callbacks must be one
    """Chooses the last deployment, and remembers that it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, Any, Any]] = []

    async def async_get_available_deployments(self, *args: Any, **kwargs: Any) -> Any:
        return self._choose("async", **kwargs)

    def get_available_deployments(self, *args: Any, **kwargs: Any) -> Any:
        return self._choose("sync", **kwargs)

    def _choose(
        self, how: str, healthy_deployments: Any, messages: Any = None, request_kwargs: Any = None, **_: Any
    ) -> Any:
        self.asked.append((how, messages, request_kwargs))
        return healthy_deployments[-1]


# Set while the synthetic selections run, in their context only: what to build instead of a real selector.
_probe: ContextVar[_ProbeSelector | None] = ContextVar("gorgo_self_test", default=None)


def _self_test() -> None:
    """Route one request each way through a throwaway router.

    Raises:
        IneffectiveError: the choice was not our selector's.
    """
    failure: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(_route_synthetically())
        except BaseException as error:  # noqa: BLE001 (raised again below, in the caller's thread)
            failure.append(error)

    thread = threading.Thread(target=run, name="gorgo-self-test", daemon=True)  # this thread may have a running loop
    with _callbacks_restored():
        thread.start()
        thread.join(SELF_TEST_TIMEOUT_S)
    if thread.is_alive():
        raise IneffectiveError("the synthetic selection did not end")
    if failure:
        raise failure[0]


async def _route_synthetically() -> None:
    selector = _ProbeSelector()
    _probe.set(selector)
    deployments = [
        {
            "model_name": "gorgo-self-test",
            "litellm_params": {"model": "openai/none", "api_base": url, "api_key": "none"},
        }
        for url in ("http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1")
    ]
    group = {"group_name": "gorgo-self-test-group", "models": ["gorgo-self-test"], "routing_strategy": STRATEGY}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        await _check_choice(litellm.Router(model_list=deployments, routing_strategy=STRATEGY), selector)
        await _check_choice(litellm.Router(model_list=deployments, routing_groups=[group]), selector)


async def _check_choice(router: Any, selector: _ProbeSelector) -> None:
    core = core_of(router)
    messages = [{"role": "user", "content": "self-test"}]
    for how in ("async", "sync"):
        kwargs: dict[str, Any] = {}
        select = _member(core, "async_get_available_deployment" if how == "async" else "get_available_deployment")
        chosen = select(model="gorgo-self-test", messages=messages, request_kwargs=kwargs)
        chosen = await chosen if inspect.isawaitable(chosen) else chosen
        if not selector.asked or selector.asked[-1][:2] != (how, messages) or selector.asked[-1][2] is not kwargs:
            raise IneffectiveError(f"a synthetic {how} selection did not reach gorgo")
        if not str(chosen["litellm_params"]["api_base"]).startswith("http://127.0.0.1:2"):
            raise IneffectiveError(f"a synthetic {how} selection did not come out as gorgo chose")


@contextmanager
def _callbacks_restored() -> Iterator[None]:
    """Undo what a throwaway router adds to LiteLLM's global callbacks."""
    kept = {name: getattr(litellm, name) for name in _CALLBACK_LISTS if hasattr(litellm, name)}
    copies = {name: list(value) for name, value in kept.items() if isinstance(value, list)}
    try:
        yield
    finally:
        for name, value in kept.items():
            if name in copies:
                value[:] = copies[name]  # the same list: others may hold it
            setattr(litellm, name, value)
