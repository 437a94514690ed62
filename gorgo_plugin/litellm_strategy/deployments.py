"""LiteLLM's `model_list` read as a fleet: which deployment stands for which replica."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, ValidationError

from gorgo_plugin.errors import SettingsError
from gorgo_plugin.settings import KvEventsSettings, Name, ReplicaSettings, describe

Deployment = Mapping[str, Any]
LIKE_GORGO = 0.8  # `gorg` and `Gorgo` are (difflib's ratio); LiteLLM keeps whatever else users note in `model_info`


class DeploymentSettings(BaseModel):
    """What a deployment says of its replica, under `model_info.gorgo`."""

    model_config = ReplicaSettings.model_config  # as strict as the settings it becomes

    name: Name | None = None
    """Name of the replica; none given: host:port of `api_base`."""
    region: str | None = None
    """Label shared by the replicas of one place."""
    kv_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens the replica's KV cache holds; not given: what the engine's metrics say."""
    kv_events: KvEventsSettings | None = None
    """Where the engine tells which blocks it caches, which needs the model's own `tokenizer`; none given: they are
    estimated."""


@dataclass(frozen=True, slots=True)
class Seat:
    """One deployment in a fleet.

    Attributes:
        replica: name of its replica; None: it has no `api_base`, so it is served but cannot be priced.
        model: its `model_name`.
        origin: what the seat was read from; a deployment that no longer matches it has changed.
    """

    replica: str | None
    model: str
    origin: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Fleet:
    """The deployments of the model groups in question, by their ids, and the replicas they stand for."""

    seats: Mapping[str, Seat]
    replicas: Sequence[ReplicaSettings]

    def serving(self, models: Iterable[str]) -> list[ReplicaSettings]:
        """The replicas of some model groups."""
        wanted = frozenset(models)
        return [replica for replica in self.replicas if not wanted.isdisjoint(replica.models or ())]

    def unpriced(self) -> list[str]:
        """Model groups with a deployment that has no `api_base`."""
        return sorted({seat.model for seat in self.seats.values() if seat.replica is None})


def read_fleet(model_list: Iterable[Deployment], served: Callable[[str], bool]) -> Fleet:
    """Read the deployments of the model groups for which `served` holds; the others are not looked at.

    Raises:
        SettingsError: an unknown or wrong setting under `model_info.gorgo`, an `api_base` that is no URL, one replica
            name twice in a model group, or for two URLs.
    """
    seats: dict[str, Seat] = {}
    drafts: dict[str, _Draft] = {}
    for index, deployment in enumerate(model_list):
        model = str(deployment.get("model_name"))
        if not served(model):
            continue
        where = f"model_list.{index} ({model})"
        own = _own_settings(deployment, where)
        api_base = api_base_of(deployment)
        name = None if api_base is None else own.name or _host_and_port(api_base, where)
        if name is not None and api_base is not None:
            drafts.setdefault(name, _Draft(name)).add(model, own, base_url(api_base), where)
        seats[deployment_id(deployment)] = Seat(name, model, origin_of(deployment))
    return Fleet(seats, [draft.finish() for draft in drafts.values()])


def deployment_id(deployment: Deployment) -> str:
    """LiteLLM's own id of a deployment."""
    return str((deployment.get("model_info") or {}).get("id"))


def api_base_of(deployment: Deployment) -> str | None:
    """Where the deployment is reached, None when LiteLLM's provider code alone knows."""
    api_base = (deployment.get("litellm_params") or {}).get("api_base")
    return api_base if isinstance(api_base, str) and api_base else None


def origin_of(deployment: Deployment) -> tuple[Any, ...]:
    """What a seat depends on, comparable."""
    own = (deployment.get("model_info") or {}).get("gorgo")
    return deployment.get("model_name"), api_base_of(deployment), repr(own) if own else None


def base_url(api_base: str) -> str:
    """The engine's base URL: `api_base` without the `/v1` of its API, and without a query."""
    bare = api_base.split("?", 1)[0].split("#", 1)[0].rstrip("/")
    return bare.removesuffix("/v1").rstrip("/")


class _Draft:
    """A replica as put together from the deployments that name it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._models: dict[str, str] = {}  # model group -> where it was seen
        self._url: str | None = None
        self._region: str | None = None
        self._kv_tokens: int | None = None
        self._kv_events: KvEventsSettings | None = None

    def add(self, model: str, own: DeploymentSettings, url: str, where: str) -> None:
        if model in self._models:
            raise SettingsError(
                f"{where}: the replica name '{self.name}' is taken by {self._models[model]} of the same group; "
                "give each its own model_info.gorgo.name"
            )
        if self._url is not None and self._url != url:
            other = next(iter(self._models.values()))
            raise SettingsError(
                f"{where}: the replica name '{self.name}' stands for another api_base in {other}; "
                "give each its own model_info.gorgo.name"
            )
        self._models[model] = where
        self._url = _checked_url(self.name, url, where)
        self._region = self._same("region", self._region, own.region, where)
        self._kv_tokens = self._same("kv_tokens", self._kv_tokens, own.kv_tokens, where)
        self._kv_events = self._same("kv_events", self._kv_events, own.kv_events, where)

    def finish(self) -> ReplicaSettings:
        given = {"region": self._region, "kv_tokens": self._kv_tokens, "kv_events": self._kv_events}
        return ReplicaSettings.model_validate(
            {
                "name": self.name,
                "url": self._url,
                "models": sorted(self._models),
                **{key: value for key, value in given.items() if value is not None},
            }
        )

    def _same(self, key: str, known: Any, given: Any, where: str) -> Any:
        if known is not None and given is not None and known != given:
            other = next(iter(self._models.values()))
            raise SettingsError(
                f"{where}.model_info.gorgo.{key}: the replica '{self.name}' has {known!r} in {other}, here {given!r}"
            )
        return known if given is None else given


def _own_settings(deployment: Deployment, where: str) -> DeploymentSettings:
    info = deployment.get("model_info") or {}
    if "gorgo" in (deployment.get("litellm_params") or {}):
        raise SettingsError(f"{where}.litellm_params.gorgo: belongs under model_info")
    if misspelt := difflib.get_close_matches("gorgo", [str(key) for key in info if key != "gorgo"], 1, LIKE_GORGO):
        raise SettingsError(f"{where}.model_info.{misspelt[0]}: did you mean 'gorgo'?")
    own = info.get("gorgo")
    if own is None:
        return DeploymentSettings()
    prefix = f"{where}.model_info.gorgo"
    if not isinstance(own, Mapping):
        raise SettingsError(f"{prefix}: expected settings by name, got {own!r:.80}")
    try:
        return DeploymentSettings.model_validate(dict(own))
    except ValidationError as error:
        raise SettingsError(f"{prefix}.{describe(error, DeploymentSettings)}") from None


def _checked_url(name: str, url: str, where: str) -> str:
    try:
        ReplicaSettings.model_validate({"name": name, "url": url})
    except ValidationError as error:
        message = describe(error, ReplicaSettings).partition(": ")[2]
        raise SettingsError(f"{where}.litellm_params.api_base: {message}") from None
    return url


def _host_and_port(api_base: str, where: str) -> str:
    """`host:port`, the default name of a replica."""
    _checked_url("unnamed", api_base, where)
    parts = urlsplit(api_base)
    host = f"[{parts.hostname}]" if parts.hostname and ":" in parts.hostname else parts.hostname
    return f"{host}:{parts.port or (443 if parts.scheme == 'https' else 80)}"
