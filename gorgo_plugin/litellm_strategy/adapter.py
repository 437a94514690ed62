"""gorgo in one LiteLLM Router: its selectors, the runtimes behind them, and the deployments they follow."""

from __future__ import annotations

import json
import logging
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gorgo_plugin.errors import GorgoError, SettingsError
from gorgo_plugin.litellm_strategy import patch
from gorgo_plugin.litellm_strategy.deployments import Deployment, Fleet, deployment_id, origin_of, read_fleet
from gorgo_plugin.litellm_strategy.selector import Selector
from gorgo_plugin.router import Router
from gorgo_plugin.runtime import Runtime
from gorgo_plugin.runtime.hub import with_local_tokenizers
from gorgo_plugin.runtime.state_file import with_frozen_weights
from gorgo_plugin.settings import Settings

FOLLOW_EVERY_S = 1.0  # a deployment removed elsewhere is probed this much longer; a changed one is noticed at once
ARGS = "routing_strategy_args"

_log = logging.getLogger("gorgo_plugin")


@dataclass(slots=True)
class Share:
    """One set of settings in force: its runtime serves every model group that is configured the same way."""

    runtime: Runtime
    models: frozenset[str]


@dataclass(frozen=True, slots=True)
class Use:
    """One way gorgo is configured: the arguments, the model groups they hold for, and where they stand."""

    args: Mapping[str, Any]
    models: frozenset[str]
    where: str

    @property
    def key(self) -> str:
        """The same for equal arguments."""
        return json.dumps(self.args, sort_keys=True, default=repr)


class Adapter:
    """Holds together what one LiteLLM Router needs.

    Attributes:
        settings_error: why the last change was refused; None when it was not.
    """

    def __init__(self, router: Any) -> None:
        self.settings_error: str | None = None
        self._router = weakref.ref(router)
        self._lock = threading.RLock()
        self._shares: dict[str, Share] = {}
        self._seen: Sequence[Any] = ()
        self._seen_s = 0.0
        self._warned_unpriced: set[str] = set()
        self._logged_errors: set[str] = set()
        self._lent: weakref.WeakSet[Selector] = weakref.WeakSet()  # selectors that serve single requests
        self._refused: weakref.WeakSet[Selector] = weakref.WeakSet()  # such whose settings cannot be used

    @property
    def router(self) -> Any:
        """LiteLLM's router, or its core; None when it is gone."""
        return self._router()

    @property
    def shares(self) -> Sequence[Share]:
        """What is in force, the default group's first."""
        return list(self._shares.values())

    def settle(self) -> None:
        """Bring runtimes and seats in line with what LiteLLM is configured to do.

        Raises:
            SettingsError: a setting or a deployment cannot be used; what was in force stays.
        """
        with self._lock:
            deployments = patch.model_list(self.router)
            self._seen, self._seen_s = _fingerprint(deployments), time.monotonic()
            users = self._users(deployments)
            uses = _merged(users.values())
            fleet, wanted = _read(deployments, uses)
            old, self._shares = self._shares, self._put_in_force(uses, wanted)
            for share in old.values():
                if all(share.runtime is not kept.runtime for kept in self._shares.values()):
                    _stop(share.runtime)
            for selector, use in users.items():
                selector.runtime, selector.seats = self._shares[use.key].runtime, fleet.seats
            self.settings_error = None
            self._warn_unpriced(fleet)

    def try_settle(self) -> None:
        """`settle` where nobody can be told of an error: the last good state stays, and log and status say so."""
        try:
            self.settle()
        except SettingsError as error:
            self.refuse(str(error))
        except Exception as error:  # noqa: BLE001 (an error of ours must not end an update of LiteLLM's settings)
            _log.exception("gorgo: changed settings could not be put in force")
            self.refuse(f"{type(error).__name__}: {error}")

    def check(self, changes: Mapping[str, Any]) -> None:
        """Whether LiteLLM's router may change its settings like this.

        Raises:
            SettingsError: gorgo could not run with them.
        """
        deployments = patch.model_list(self.router)
        uses = _merged(_uses_after(self.router, changes, {str(entry["model_name"]) for entry in deployments}))
        _, wanted = _read(deployments, uses)
        for key, use in uses.items():
            if key not in self._shares:  # new arguments: a tokenizer may be out of reach
                with _named(use.where):
                    Router(with_frozen_weights(with_local_tokenizers(wanted[key])))

    def refuse(self, reason: str) -> None:
        """Keep the last good state, and say so once."""
        if reason == self.settings_error:
            return
        self.settings_error = reason
        shares = self.shares
        for share in shares:
            share.runtime.refuse(reason)
        if not shares:
            _log.error("gorgo: new settings refused, the last good ones stay: %s", reason)

    def follow(self, selector: Selector, deployments: Iterable[Deployment]) -> None:
        """Notice deployments that were added, changed or removed since the last look."""
        now = time.monotonic()
        seats = selector.seats
        known = all(
            (seat := seats.get(deployment_id(deployment))) is not None and seat.origin == origin_of(deployment)
            for deployment in deployments
        )
        if known and now - self._seen_s < FOLLOW_EVERY_S:
            return
        with self._lock:
            self._seen_s = now
            if self._seen != _fingerprint(patch.model_list(self.router)):
                self.try_settle()

    def lend(self, selector: Selector) -> None:
        """Give a runtime to a selector that LiteLLM built for single requests (`routing_strategy` of a key or team)."""
        with self._lock:
            if selector.runtime is None and selector not in self._refused:
                self._lent.add(selector)
                self.try_settle()
                if selector.runtime is None:
                    self._lent.discard(selector)
                    self._refused.add(selector)

    def note_error(self, reason: str, error: Exception) -> None:
        """Log an error of ours that made LiteLLM choose, once a kind."""
        kind = f"{reason}: {type(error).__name__}"
        if kind not in self._logged_errors:
            self._logged_errors.add(kind)
            expected = isinstance(error, GorgoError)
            _log.warning(
                "gorgo: simple-shuffle serves where a request cannot be routed (%s: %s); further ones are only counted",
                reason,
                error,
                exc_info=None if expected else error,
            )

    def close(self) -> None:
        """End everything in the background."""
        with self._lock:
            for share in self.shares:
                share.runtime.close()
            self._shares = {}

    def _users(self, deployments: Sequence[Deployment]) -> dict[Selector, Use]:
        """The selectors in use and what they are used for."""
        names = dict.fromkeys(str(deployment["model_name"]) for deployment in deployments)
        models: dict[Selector, list[str]] = {}
        for name in names:
            _, selector = patch.routing_context(self.router, name)
            if isinstance(selector, Selector):
                models.setdefault(selector, []).append(name)
        models |= {selector: list(names) for selector in self._lent if selector not in models}
        groups = {selector: patch.routing_group_of(self.router, served[0]) for selector, served in models.items()}
        return {
            selector: Use(selector.args, frozenset(served), _where(groups[selector]))
            for selector, served in models.items()
        }

    def _put_in_force(self, uses: Mapping[str, Use], wanted: Mapping[str, Settings]) -> dict[str, Share]:
        shares: dict[str, Share] = {}
        orphans = {key: share for key, share in self._shares.items() if key not in uses}
        for key, use in uses.items():
            share = self._shares.get(key) or _claim(orphans, use.models)
            with _named(use.where):
                runtime = Runtime(wanted[key]) if share is None else share.runtime
                if runtime.settings != wanted[key]:
                    runtime.reload(wanted[key])
            runtime.settings_error = None
            mode = runtime.settings.mode
            runtime.set_active(mode != "off", f"mode is {mode}")
            runtime.ensure_started()
            shares[key] = Share(runtime, use.models)
        return shares

    def _warn_unpriced(self, fleet: Fleet) -> None:
        for model in fleet.unpriced():
            if model not in self._warned_unpriced:
                self._warned_unpriced.add(model)
                _log.warning(
                    "gorgo: model group '%s' has deployments without api_base: they cannot be priced and get their "
                    "share of the requests at random",
                    model,
                )


def _where(group: str | None) -> str:
    return f"router_settings.{ARGS}" if group is None else f"routing_groups.{group}.{ARGS}"


def _merged(uses: Iterable[Use]) -> dict[str, Use]:
    """Uses with equal arguments as one."""
    merged: dict[str, Use] = {}
    for use in uses:
        known = merged.get(use.key)
        merged[use.key] = use if known is None else Use(use.args, known.models | use.models, known.where)
    return merged


def _uses_after(router: Any, changes: Mapping[str, Any], models: set[str]) -> Iterator[Use]:
    """The uses of gorgo once LiteLLM has applied `changes` to its router's settings."""
    strategy, args, groups = patch.routing_settings(router)
    if changes.get("routing_strategy", strategy) != strategy:
        strategy, args = changes["routing_strategy"], {}  # LiteLLM starts a new strategy without the old one's
    args, groups = changes.get(ARGS, args), changes.get("routing_groups", groups)
    claimed: set[str] = set()
    for group in map(_as_mapping, groups or ()):
        if group.get("routing_strategy") == "priority":
            continue
        members = frozenset(map(str, group.get("models") or ()))
        claimed |= members
        if group.get("routing_strategy") == patch.STRATEGY:
            yield Use(group.get(ARGS) or {}, members, _where(str(group.get("group_name"))))
    if strategy == patch.STRATEGY:
        yield Use(args or {}, frozenset(models - claimed), _where(None))


def _as_mapping(group: Any) -> Mapping[str, Any]:
    if isinstance(group, Mapping):
        return group
    dumped = group.model_dump() if hasattr(group, "model_dump") else {}  # what is neither, LiteLLM refuses
    return dumped if isinstance(dumped, Mapping) else {}


def _read(deployments: Iterable[Deployment], uses: Mapping[str, Use]) -> tuple[Fleet, dict[str, Settings]]:
    """The deployments of all uses, and the settings of each.

    Raises:
        SettingsError: one of them cannot be used.
    """
    models = frozenset().union(*(use.models for use in uses.values()))
    fleet = read_fleet(deployments, models.__contains__)
    return fleet, {key: _settings(use, fleet) for key, use in uses.items()}


def _settings(use: Use, fleet: Fleet) -> Settings:
    if not isinstance(use.args, Mapping):
        raise SettingsError(f"{use.where}: expected settings by name, got {use.args!r:.80}")
    if "replicas" in use.args:
        raise SettingsError(f"{use.where}.replicas: not set here; the replicas are the deployments of model_list")
    replicas = [replica.model_dump() for replica in fleet.serving(use.models)]
    with _named(use.where):
        return Settings.model_validate({**use.args, "replicas": replicas})


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Let an error say where in LiteLLM's configuration the setting stands."""
    try:
        yield
    except SettingsError as error:
        raise SettingsError(f"{where}.{error}") from None


def _claim(orphans: dict[str, Share], models: frozenset[str]) -> Share | None:
    """What served these model groups with other arguments: what it has learned stays good."""
    for key, share in orphans.items():
        if not share.models.isdisjoint(models):
            return orphans.pop(key)
    return None


def _fingerprint(deployments: Iterable[Deployment]) -> list[Any]:
    return [(deployment_id(deployment), origin_of(deployment)) for deployment in deployments]


def _stop(runtime: Runtime) -> None:
    """End a runtime without waiting for its threads: this may be the event loop."""
    threading.Thread(target=runtime.close, name="gorgo-close", daemon=True).start()
