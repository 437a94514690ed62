"""The Router in a live gateway, shared by the adapters."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
import secrets
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, Literal, TypeVar

from gorgo_plugin.decision import Prompt
from gorgo_plugin.errors import PromptError, SettingsError
from gorgo_plugin.policies import POLICIES
from gorgo_plugin.prompt import Plan
from gorgo_plugin.prompt.conversation import plain_texts
from gorgo_plugin.prompt.endpoints import CHAT
from gorgo_plugin.router import Router
from gorgo_plugin.runtime import scraper, status
from gorgo_plugin.runtime.background import Background, Job
from gorgo_plugin.runtime.doubts import doubts
from gorgo_plugin.runtime.explain import explanation
from gorgo_plugin.runtime.hub import with_local_tokenizers
from gorgo_plugin.runtime.kv_events import KvEventJob, KvWatch, check_installed
from gorgo_plugin.runtime.metrics import Metrics, Reading
from gorgo_plugin.runtime.probes import ProbeJob, Watch
from gorgo_plugin.runtime.scraper import ScrapeJob
from gorgo_plugin.runtime.state_file import with_frozen_weights
from gorgo_plugin.runtime.state_keeper import Keeper
from gorgo_plugin.runtime.threads import LatePrompt, PromptThreads
from gorgo_plugin.settings import Settings

Body = bytes | Mapping[str, Any]
T = TypeVar("T")

_log = logging.getLogger(__name__)

# Characters of a body that are read on the event loop; reading a longer one, not only tokenizing it, goes to a thread.
PLAN_INLINE_CHARS = 256 * 1024
OBJECT_CHARS = 64  # what a small object takes to read, in characters of text that would take as long
STOP_TIMEOUT_S = 5.0  # a name lookup that hangs cannot be cancelled; its thread is a daemon and may outlive this
FLUSH_EVERY_S = 1.0
STEPS_EVERY_S = 2.0  # a trial takes many seconds
SWEEPS_PER_TTL = 10  # a lost flight is released at most a tenth of its time to live late


class Runtime:
    """A Router with what keeps it informed: probes, scrapes, metrics, and threads that prepare long prompts.

    Attributes:
        router: decides; its methods are thread-safe and take microseconds.
        settings: in force, as they were given (hub names unresolved).
        metrics: counts what the adapter reports.
        gateway: name of the host, for status.
        active, active_reason: whether the plugin is in effect, and why or why not.
        settings_error: why the last reload was refused; None when it was not.
    """

    def __init__(self, settings: Settings, *, gateway: str = "litellm") -> None:
        """Build the router.

        Raises:
            SettingsError: a setting cannot be used, or a tokenizer is out of reach.
        """
        check_installed(settings)
        usable = with_frozen_weights(with_local_tokenizers(settings))
        self._keeper, secret = Keeper(settings), secrets.token_bytes(32)
        build: Callable[[Mapping[str, Any] | None], Router] = functools.partial(_router, usable, secret)
        self.router = _warm(self._keeper.restored(settings, build))
        _log_doubts(settings)
        self.settings = settings
        self.gateway = gateway
        self.metrics = Metrics(settings)
        self.active, self.active_reason = settings.mode != "off", f"mode is {settings.mode}"
        self.settings_error: str | None = None
        self.started_s = time.monotonic()
        self._jobs: dict[Hashable, ProbeJob | ScrapeJob | KvEventJob] = {}
        self._threads: PromptThreads | None = None
        self._stopped = False
        self._background = Background(f"gorgo-{gateway}")
        # A gateway that drops its router without stopping it leaves no thread behind: nothing below holds this object.
        weakref.finalize(self, self._background.request_stop)
        self._watch_replicas()
        self.metrics.read_from(functools.partial(_readings, weakref.ref(self)))

    def ensure_started(self) -> None:
        """Start the background jobs unless they run; cheap enough for every request, from any thread or loop."""
        if not self._background.running and self.settings.mode != "off":
            self._background.ensure_started()

    async def stop(self) -> None:
        """End the background jobs, their connections and the threads. The runtime does not start again."""
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """`stop` for callers without an event loop."""
        self._stopped = True
        self._background.request_stop()
        self.metrics.close()
        if self._threads is not None:
            self._threads.close()
        if not self._background.join(STOP_TIMEOUT_S):
            _log.warning("gorgo: the background thread has not ended after %g s", STOP_TIMEOUT_S)
        self._keeper.close(self.router)

    async def prepare(
        self,
        body: Body,
        endpoint: str,
        model: str | None = None,
        waiting: Callable[[], None] | None = None,
        estimate: bool = True,
    ) -> Prompt:
        """Turn a request body into a prompt; long work is done in a thread, so that the event loop is not held.

        `waiting` is called when that happens. Where far more text is unseen than a request should wait for, and with
        `estimate`, the length of that is estimated and the prompt is a `LatePrompt`.

        Raises:
            PromptError: the body holds no prompt.
        """
        started = time.perf_counter()
        where: Literal["inline", "executor"] = "inline"
        settings, read = self.settings.prepare, functools.partial(self.router.builder.plan, body, endpoint, model)
        try:
            if longer_than(body, PLAN_INLINE_CHARS):
                where = "executor"
                plan = await self._in_thread(
                    lambda threads: threads.read(lambda pause: read(pause=pause)), read, waiting
                )
            else:
                plan = read()
            if estimate and plan.cold_chars > (settings.estimate_above_chars or math.inf):
                prompt = self._later(plan)
            elif plan.cold_chars <= settings.inline_chars:
                prompt = plan.finish()
            else:
                where = "executor"
                prompt = await self._in_thread(lambda threads: threads.finish(plan), plan.finish, waiting)
        except PromptError:
            self.metrics.prompt_error(model or "")
            raise
        self.metrics.prepared(time.perf_counter() - started, where)
        return prompt

    def prepare_sync(self, body: Body, endpoint: str, model: str | None = None) -> Prompt:
        """Turn a request body into a prompt, here and now.

        Raises:
            PromptError: the body holds no prompt.
        """
        started = time.perf_counter()
        try:
            prompt = self.router.prepare(body, endpoint, model)
        except PromptError:
            self.metrics.prompt_error(model or "")
            raise
        self.metrics.prepared(time.perf_counter() - started, "inline")
        return prompt

    def reload(self, settings: Settings) -> None:
        """Put new settings into force; the replicas that stay keep all their state.

        May take as long as a tokenizer takes to load, so call it from a thread where an event loop must go on.

        Raises:
            SettingsError: they cannot be used; the last good ones stay in force and `settings_error` says why.
        """
        try:
            check_installed(settings)
            self.router.reconfigure(with_frozen_weights(with_local_tokenizers(settings)))
        except SettingsError as error:
            self.refuse(str(error))
            raise
        _log_doubts(settings)
        if settings.prepare.threads != self.settings.prepare.threads:
            self._threads = None  # they end once the prompts under way are finished
        self.settings, self.settings_error = settings, None
        self.metrics.set_settings(settings)
        self._keeper.set_settings(settings, self.router)
        self._watch_replicas()

    def refuse(self, reason: str) -> None:
        """Remember that new settings were refused before they got here, for status and metrics."""
        self.settings_error = reason
        self.metrics.settings_refused()
        _log.error("gorgo: new settings refused, the last good ones stay: %s", reason)

    def set_active(self, active: bool, reason: str) -> None:
        """Say whether the plugin is in effect, and why or why not; for status and metrics."""
        self.active, self.active_reason = active, reason

    def status(self) -> dict[str, Any]:
        """The state as JSON-able data: no prompts, no keys, no userinfo of URLs."""
        return status.status(self)

    async def explain(self, body: Body, endpoint: str, model: str | None = None) -> dict[str, Any]:
        """What would be chosen for this body now, and every replica's price, as JSON-able data; routes nothing.

        It tells what is cached where, which no tenant may learn of another: only for administrators.

        Raises:
            PromptError: the body holds no prompt.
            NoCandidates: no replica serves the model.
        """
        prompt = await self.prepare(body, endpoint, model, estimate=False)
        return {
            "gateway": self.gateway,
            "worker": os.getpid(),
            "uptime_s": time.monotonic() - self.started_s,
            "mode": self.settings.mode,
            **explanation(self.router, prompt, endpoint),
        }

    def kept(self) -> dict[str, Any] | None:
        """The state file, when it was written and what went wrong; None where none is kept."""
        return self._keeper.describe()

    def watches(self, replica: str) -> Iterator[tuple[str, Watch | KvWatch]]:
        """("probe" | "scrape" | "kv_events", what became of it) for one replica."""
        for key, job in self._jobs.items():
            if job.replica.name == replica and isinstance(key, tuple):
                yield key[0], job.watch

    async def _in_thread(
        self, start: Callable[[PromptThreads], Future[T]], inline: Callable[[], T], waiting: Callable[[], None] | None
    ) -> T:
        """What the threads make of the work they are started on; done `inline` once they are stopped."""
        if self._stopped:
            return inline()
        if waiting is not None:
            waiting()
        try:
            future = start(self._started_threads())
        except RuntimeError:  # stopped by another thread just now
            return inline()
        return await asyncio.wrap_future(future)

    def _later(self, plan: Plan) -> Prompt:
        estimated = plan.estimate()
        whole = None if self._stopped else self._started_threads().later(plan)
        return estimated if whole is None else LatePrompt(estimated, whole)

    def _started_threads(self) -> PromptThreads:
        if self._threads is None:
            self._threads = PromptThreads(self.settings.prepare.threads)
        return self._threads

    def _watch_replicas(self) -> None:
        """Probe and scrape exactly the replicas of the settings; those that stay as they are keep their jobs."""
        settings, router, metrics = self.settings, self.router, self.metrics
        interval_s = scraper.interval_s(settings.metrics, POLICIES[settings.policy].reads_gauges)
        jobs: dict[Hashable, ProbeJob | ScrapeJob | KvEventJob] = {}
        for replica in settings.replicas:
            key: Hashable = ("probe", replica.name, replica.url, settings.probe)
            jobs[key] = self._jobs.get(key) or ProbeJob(replica, settings.probe, router, metrics.probe_failed)
            if settings.metrics.path is not None:
                blocks = frozenset(
                    settings.model_settings(model).block_tokens or settings.block_tokens
                    for model in replica.models or ("", *settings.models)
                )
                key = ("scrape", replica.name, replica.url, settings.metrics, interval_s, blocks)
                jobs[key] = self._jobs.get(key) or ScrapeJob(
                    replica, settings.metrics, interval_s, router, metrics.scrape_failed, blocks
                )
            if replica.kv_events is not None:
                key = ("kv_events", replica.name, replica.url, replica.kv_events)
                jobs[key] = self._jobs.get(key) or KvEventJob(
                    replica, replica.kv_events, router.engine_caches, metrics.kv_trouble, metrics.kv_events
                )
        self._jobs = jobs
        wanted: dict[Hashable, Job] = {key: job.run for key, job in jobs.items()}
        pause_s = settings.flight_ttl_s / SWEEPS_PER_TTL
        wanted["sweep", pause_s] = functools.partial(_sweep, router, pause_s)
        wanted["flush"] = functools.partial(_flush, metrics)
        if settings.state.path is not None:
            wanted["state", settings.state] = functools.partial(self._keeper.run, router, settings.state.interval_s)
        if settings.tuning.mode in ("online", "propose"):
            wanted["steps"] = functools.partial(_tell_steps, router)
        self._background.want(wanted)


def longer_than(body: Body, limit_chars: int) -> bool:
    """Whether the strings, lists and objects of a body weigh more than `limit_chars`, found without reading further."""
    if not isinstance(body, Mapping):
        return len(body) > limit_chars
    left, stack = limit_chars, list(body.values())
    while stack and left >= 0:
        value = stack.pop()
        if isinstance(value, str | bytes):
            left -= len(value)
        elif isinstance(value, dict):
            left -= OBJECT_CHARS
            stack.extend(value.values())
        elif isinstance(value, list | tuple):
            texts = plain_texts(value)
            left -= sum(map(len, texts)) + OBJECT_CHARS * len(value) if texts else len(value)
            left -= OBJECT_CHARS * bool(value and isinstance(value[0], list))  # lists in lists, however deep
            if not texts and value and not isinstance(value[0], int):  # token ids: as many as the list is long
                stack.extend(value)
    return left < 0


def _log_doubts(settings: Settings) -> None:
    for doubt in doubts(settings):
        _log.warning("gorgo: %s", doubt)


def _router(settings: Settings, secret: bytes, state: Mapping[str, Any] | None) -> Router:
    return Router(settings, secret=secret) if state is None else Router(settings, state=state, secret=secret)


def _warm(router: Router) -> Router:
    """Prepare one prompt per model: the first takes 50 ms, in which templates are compiled and code is imported."""
    for model in ("", *router.settings.models):
        with contextlib.suppress(PromptError):  # a template may refuse this very conversation
            router.prepare({"messages": [{"role": "user", "content": "hello"}]}, CHAT, model)
    return router


async def _sweep(router: Router, pause_s: float) -> None:
    """Release lost flights also while no request comes; the router itself looks only when it routes."""
    while True:
        await asyncio.sleep(pause_s)
        if lost := router.sweep():
            _log.warning("gorgo: released %d flights that nothing had ended", lost)


async def _tell_steps(router: Router) -> None:
    """Log the steps of the tuner; the router itself does not log."""
    told = 0
    while True:
        await asyncio.sleep(STEPS_EVERY_S)
        steps = (router.snapshot()["tuning"] or {}).get("steps", ())
        told = min(told, steps[-1]["number"] if steps else 0)  # a new tuner counts anew
        for step in steps:
            if step["number"] > told:
                told = step["number"]
                level = logging.INFO if step["ending"] == "accepted" else logging.DEBUG
                _log.log(level, "gorgo: tuning %s", status.step_line(step))


async def _flush(metrics: Metrics) -> None:
    """Count events also where nobody asks this process: in multi-process mode the counts are read from files."""
    while True:
        await asyncio.sleep(FLUSH_EVERY_S)
        metrics.flush()


def _readings(runtime: weakref.ref[Runtime]) -> Iterable[Reading]:
    alive = runtime()
    return () if alive is None else status.readings(alive)
