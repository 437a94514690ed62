"""What a fleet is: engines, gateways and clients in regions, the links between them, and what happens to them when.

The schema of fleet files, whose unknown keys are refused and whose errors are one sentence that names the field; and
the fleet of the demo.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from gorgo_plugin.errors import GorgoError
from gorgo_plugin.fleet.engine import PROFILES, EngineProfile
from gorgo_plugin.settings import Name, describe, did_you_mean

# Traces hold longer prompts than the default profile takes, and a router may not refuse them.
LONGEST_TOKENS = 2**20

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Pair = Annotated[list[Name], Field(min_length=2, max_length=2)]
_ENGINE_FIELDS = {field.name: field.type for field in dataclasses.fields(EngineProfile)}


class FleetError(GorgoError, ValueError):
    """A fleet file cannot be read, or says what cannot be; one sentence that names the field."""


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True)


def _engine(value: Any) -> EngineProfile:
    """The engine that a profile's name, or a mapping of `profile` and what differs from it, stands for."""
    if isinstance(value, EngineProfile):
        return value
    given = {"profile": value} if isinstance(value, str) else value
    if not isinstance(given, dict):
        raise ValueError(f"expected the name of a profile or a mapping, got {value!r:.80}")
    changes = {"max_model_tokens": LONGEST_TOKENS, **given}
    name = changes.pop("profile", "linear")
    if name not in PROFILES:
        raise ValueError(f"unknown profile '{name}'{did_you_mean(str(name), PROFILES)}")
    for field, setting in changes.items():
        if field not in _ENGINE_FIELDS:
            raise ValueError(f"{field}: unknown setting{did_you_mean(str(field), _ENGINE_FIELDS)}")
        whole = _ENGINE_FIELDS[field] == "int"
        if isinstance(setting, bool) or not isinstance(setting, int if whole else (int, float)) or not setting >= 0:
            raise ValueError(f"{field}: expected a {'whole ' if whole else ''}number from 0, got {setting!r:.80}")
    return dataclasses.replace(PROFILES[name], **changes)


class FleetReplica(_Schema):
    """One engine."""

    name: Name
    """Unique name; what routers know it by."""
    region: Name
    """Where it is."""
    engine: Annotated[EngineProfile, BeforeValidator(_engine)] = _engine("linear")
    """What it is like: the name of a profile (linear, curved, tiny-cpu), or a mapping of `profile` and what differs
    from it, as `a_ms: 0.05` or `kv_tokens: 8000000`."""


class FleetGateway(_Schema):
    """One gateway, with a router of its own. Gateways do not know of each other's requests."""

    region: Name
    """Where it is; one gateway a region."""


class FleetClients(_Schema):
    """Those who send the requests, in one region."""

    region: Name
    """Where they are."""
    share: Positive = 1.0
    """Their part of the sessions, against that of the other regions."""
    gateway: Name | None = None
    """Region of the gateway they use; none given: the nearest."""


class Drift(_Schema):
    """A round trip that rises and falls slowly, as a sine from its mean at the start."""

    share: Annotated[float, Field(gt=0, lt=1)]
    """Largest deviation, as a share of the mean."""
    period_s: Positive
    """Seconds from one peak to the next."""


class Spikes(_Schema):
    """Short times in which a round trip is longer; Poisson arrivals."""

    per_hour: Positive
    """How many, on the average."""
    factor: Positive
    """How much longer it is meanwhile."""
    duration_s: Positive
    """Seconds one lasts."""


class FleetLink(_Schema):
    """The way between two regions, the same in both directions."""

    between: Pair
    """The two regions; twice the same for the way within it."""
    rtt_ms: NotNegative
    """Mean round trip."""
    jitter_ms: NotNegative = 0.0
    """Standard deviation of the round trip, packet by packet."""
    drift: Drift | None = None
    spikes: Spikes | None = None


class _Event(_Schema):
    at_s: NotNegative
    """When it begins, seconds from the start."""
    for_s: Positive | None = None
    """How long it lasts; none given: to the end."""


class RttEvent(_Event):
    """The round trip of a link changes."""

    kind: Literal["rtt"]
    """What happens."""
    between: Pair
    """The link's regions."""
    factor: Positive
    """How many times as long it is."""


class SlowEvent(_Event):
    """An engine slows down."""

    kind: Literal["slow"]
    """What happens."""
    replica: Name
    """Whose engine."""
    factor: Positive
    """How many times as long its steps take."""


class DownEvent(_Event):
    """A replica dies: its requests and its cache are lost, and connections to it are refused until it returns."""

    kind: Literal["down"]
    """What happens."""
    replica: Name
    """Which one."""


FleetEvent: TypeAlias = Annotated[RttEvent | SlowEvent | DownEvent, Field(discriminator="kind")]


class Fleet(_Schema):
    """Engines, gateways and clients, and what lies between them."""

    replicas: Annotated[list[FleetReplica], Field(min_length=1)]
    """The engines."""
    gateways: Annotated[list[FleetGateway], Field(min_length=1)]
    """One central gateway, or several: one per region, as a rule."""
    clients: list[FleetClients] = []
    """Where requests come from; none given: from where the gateways are, in equal parts and at no distance."""
    links: list[FleetLink] = []
    """Ways between regions. Every gateway needs one to each replica's region but its own, clients one to their gateway.
    """
    local_rtt_ms: NotNegative = 1.0
    """Mean round trip within a region that has no link to itself."""
    events: list[FleetEvent] = []
    """What happens meanwhile."""

    @field_validator("replicas")
    @classmethod
    def _replicas_go_together(cls, replicas: list[FleetReplica]) -> list[FleetReplica]:
        _refuse_twice((replica.name for replica in replicas), "two replicas are named '{}'; names must be unique")
        sizes = {replica.engine.block_tokens for replica in replicas}
        if len(sizes) > 1:
            raise ValueError(f"engines of one model share one block_tokens, got {', '.join(map(str, sorted(sizes)))}")
        return replicas

    @field_validator("gateways")
    @classmethod
    def _one_gateway_a_region(cls, gateways: list[FleetGateway]) -> list[FleetGateway]:
        _refuse_twice((gateway.region for gateway in gateways), "two gateways are in '{}'; one a region")
        return gateways

    @field_validator("clients")
    @classmethod
    def _one_entry_a_region(cls, clients: list[FleetClients]) -> list[FleetClients]:
        _refuse_twice((one.region for one in clients), "clients in '{}' are listed twice; once a region")
        return clients

    @field_validator("links")
    @classmethod
    def _one_link_a_pair(cls, links: list[FleetLink]) -> list[FleetLink]:
        _refuse_twice((" and ".join(sorted(link.between)) for link in links), "'{}' are linked twice; once a pair")
        return links

    @model_validator(mode="after")
    def _what_is_named_exists(self) -> Self:
        gateways = {gateway.region for gateway in self.gateways}
        for index, one in enumerate(self.clients):
            if one.gateway is not None:
                _require(f"clients.{index}.gateway", "gateway in", one.gateway, gateways)
        for index, event in enumerate(self.events):
            if isinstance(event, RttEvent):
                if self.link(*event.between) is None:
                    raise ValueError(f"events.{index}.between: no link between {' and '.join(event.between)}")
            else:
                _require(f"events.{index}.replica", "replica", event.replica, {one.name for one in self.replicas})
        return self

    @model_validator(mode="after")
    def _everybody_is_reached(self) -> Self:
        regions = [gateway.region for gateway in self.gateways]
        for region in regions:
            for replica in self.replicas:
                self.require_link(region, replica.region)
        for one in self.clients:
            for gateway in [one.gateway] if one.gateway is not None else regions:
                self.require_link(one.region, gateway)
        return self

    @classmethod
    def model_validate(cls, obj: Any, **kwargs: Any) -> Self:
        """Validate a mapping.

        Raises:
            FleetError: one sentence naming the first field at fault and what would be right.
        """
        try:
            return super().model_validate(obj, **kwargs)
        except ValidationError as error:
            raise FleetError(describe(error, cls)) from None

    def link(self, one: str, other: str) -> FleetLink | None:
        """The link between two regions, the implied one within a region; None where there is none."""
        for link in self.links:
            if sorted(link.between) == sorted((one, other)):
                return link
        return FleetLink(between=[one, other], rtt_ms=self.local_rtt_ms) if one == other else None

    def require_link(self, one: str, other: str) -> FleetLink:
        """The link between two regions.

        Raises:
            FleetError: there is none.
        """
        link = self.link(one, other)
        if link is None:
            raise FleetError(f"links: none between '{one}' and '{other}', which requests go between")
        return link

    @property
    def block_tokens(self) -> int:
        """Tokens of a KV block of its engines."""
        return self.replicas[0].engine.block_tokens

    @property
    def regions(self) -> list[str]:
        """Regions with replicas, in the order of the file."""
        return list(dict.fromkeys(replica.region for replica in self.replicas))


def _refuse_twice(names: Iterable[str], message: str) -> None:
    for twice in _repeated(names):
        raise ValueError(message.format(twice))


def _repeated(names: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            yield name
        seen.add(name)


def _require(field: str, kind: str, name: str, known: set[str]) -> None:
    if name not in known:
        raise ValueError(f"{field}: unknown {kind} '{name}'{did_you_mean(name, known)}")


def read_fleet(path: Path) -> Fleet:
    """Read a fleet file.

    Raises:
        FleetError: it cannot be read, or a field is wrong; names the file and the field.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FleetError(f"fleet {path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where is not None else ""
        raise FleetError(f"fleet {path}{line}: is not YAML") from None
    try:
        return Fleet.model_validate(content)
    except FleetError as error:
        raise FleetError(f"fleet {path}: {error}") from None


def demo_fleet(**engine: Any) -> Fleet:
    """The demo's fleet: one gateway and three regions; `engine` is what differs from the default profile."""
    return Fleet.model_validate(
        {
            "gateways": [{"region": "gateway"}],
            "replicas": [{"name": region.name, "region": region.name, "engine": engine} for region in REGIONS],
            "links": [
                {"between": ["gateway", region.name], "rtt_ms": region.rtt_ms, "jitter_ms": region.jitter_ms}
                for region in REGIONS
            ],
        }
    )


@dataclass(frozen=True, slots=True)
class Region:
    """One region with one replica; round trip and its standard deviation as seen from the gateway."""

    name: str
    rtt_ms: float
    jitter_ms: float


# The paper's means from a gateway beside the first region.
REGIONS = (
    Region("us-east", 37.0, 2.0),
    Region("eu-central", 279.0, 8.0),
    Region("ap-northeast", 456.0, 12.0),
)


def mock_command(region: Region, seed: int, kv_tokens: int, model: str, stream_interval: int) -> Sequence[str]:
    """The command line of a region's mock replica; each gets a seed of its own."""
    return (
        sys.executable,
        "-c",
        "from gorgo_plugin.cli import main; main()",
        "mock-upstream",
        f"--name={region.name}",
        f"--model={model}",
        f"--rtt-ms={region.rtt_ms}",
        f"--jitter-ms={region.jitter_ms}",
        f"--kv-tokens={kv_tokens}",
        f"--stream-interval={stream_interval}",
        f"--seed={seed * len(REGIONS) + REGIONS.index(region)}",
    )
