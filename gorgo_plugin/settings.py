"""Every setting once: its default, its unit and the reason for the default.

The same schema serves `gorgo.yaml`, LiteLLM's `routing_strategy_args` and library users. Unknown keys are refused, and
an error is one sentence that names the field.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gorgo_plugin.errors import SettingsError

Name = Annotated[str, Field(min_length=1, max_length=200)]


def _tcp_address(address: str) -> str:
    """`host:port`, with an IPv6 host in brackets."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535 or (":" in host and not host.startswith("[")):
        raise ValueError("expected host:port")
    return address


def _address(address: str) -> str:
    """`host:port` or `unix:/path`."""
    if address.startswith("unix:"):
        if not address.startswith("unix:/"):
            raise ValueError("expected unix:/path")
        return address
    return _tcp_address(address)


def _zmq_endpoint(endpoint: str) -> str:
    """`tcp://host:port` or `ipc://path`; the host may be `*`."""
    scheme, _, rest = endpoint.partition("://")
    if scheme == "tcp" and rest:
        _tcp_address(rest)
    elif scheme != "ipc" or not rest:
        raise ValueError("expected tcp://host:port or ipc://path")
    return endpoint


def _url_path(path: str) -> str:
    """Begins with a slash, which is added where it was left out."""
    if not path:
        raise ValueError("expected a path such as /health, or null")
    return path if path.startswith("/") else f"/{path}"


ZmqEndpoint = Annotated[str, AfterValidator(_zmq_endpoint)]
TcpAddress = Annotated[str, AfterValidator(_tcp_address)]
Address = Annotated[str, AfterValidator(_address)]
UrlPath = Annotated[str, AfterValidator(_url_path)]
PositiveMs = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]

# (W_rtt, W_queue) as published in the paper's second version; bounds of its search are [0.05, 2] and [0.05, 0.5].
PUBLISHED_WEIGHTS = {"art-chat": (0.276, 0.5), "wildchat": (2.0, 0.104)}


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True)


class KvEventsSettings(_Schema):
    """Where an engine publishes its KV-cache events (vLLM: `--kv-events-config`); needs `gorgo-plugin[kv-events]`."""

    endpoint: ZmqEndpoint
    """ZeroMQ address of the publisher, tcp://host:port or ipc://path; with `*` for the host (tcp://*:port) the gateway
    binds there and engines connect."""
    replay: ZmqEndpoint | None = None
    """Address of the publisher's replay socket; none given: events missed cannot be had again, and after a start of the
    gateway or a gap the index stays partial until the engine's cache is cleared."""
    topic: str = ""
    """Only events whose topic begins so are taken; vLLM's default topic is empty."""
    model: str | None = None
    """Whose prompts the blocks are; none given: those of every model the replica serves."""


class ReplicaSettings(_Schema):
    """One engine endpoint."""

    name: Name
    """Unique name; metrics and decisions use it."""
    region: str = "default"
    """Label shared by the replicas of one place."""
    url: str
    """Base URL of the engine, with scheme, host and port."""
    kv_tokens: Annotated[int, Field(ge=1)] = 500_000
    """Tokens the replica's KV cache holds; not given: what the engine's metrics say. The default is about what one
    80 GB GPU keeps for an 8B model."""
    models: list[str] | None = None
    """Models served here; none given: every model."""
    kv_events: KvEventsSettings | None = None
    """Where the engine tells which blocks it caches, which needs the model's own `tokenizer`; none given: they are
    estimated."""

    @field_validator("url")
    @classmethod
    def _has_host(cls, url: str) -> str:
        parts = urlsplit(url)
        try:
            parts.port  # noqa: B018 (the property raises on a port that is no number)
        except ValueError:
            raise ValueError("expected a port from 0 to 65535") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected http://host:port or https://host:port")
        return url


class ModelSettings(_Schema):
    """What differs for one model; a field left out falls back to the top-level setting of the same name."""

    tokenizer: str | None = None
    """File, folder or hub name of the model's tokenizer."""
    chat_template: str | None = None
    """Jinja template text, or the path of a file that holds it."""
    block_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Tokens of one KV block of the engine."""


class WeightSettings(_Schema):
    """The paper's weights (eq. 3). With terms in milliseconds 1.0 is neutral; `gorgo-paper` has units of its own."""

    rtt: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """W_rtt, the price of a millisecond of network."""
    queue: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """W_queue, the price of a millisecond (`gorgo-paper`: of a token) of work ahead."""


class ProbeSettings(_Schema):
    """How the round trip to each replica is measured, off the request path."""

    path: UrlPath | None = None
    """HTTP path to GET over a kept connection (one round trip plus the handler); none given: TCP connect."""
    interval_s: PositiveSeconds = 2.0
    """Seconds between probes of one replica; a probe is one packet pair, so this is cheap."""
    timeout_s: PositiveSeconds = 2.0
    """A probe without an answer after this long counts as failed; four times the longest usual round trip."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.3
    """EWMA weight of a new sample (paper v2)."""
    stale_after_s: PositiveSeconds = 15.0
    """Age from which a value is marked stale and its doubt priced; several missed probes."""
    prior_ms: PositiveMs = 150.0
    """Assumed round trip of a replica never measured, doubled by its doubt; between continents is typical."""


class RateSettings(_Schema):
    """What is believed of an engine's speed before its first answers."""

    ms_per_token: PositiveMs = 0.09
    """Milliseconds per uncached prompt token; the first paper measured 0.094 (8xA100, Mistral-7B)."""
    overhead_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0
    """Fixed milliseconds of a prefill, whatever its length."""


class MetricsSettings(_Schema):
    """How the engines' own gauges are read, for the baselines that need them, for restarts and for status."""

    path: UrlPath | None = "/metrics"
    """Path of the engine's Prometheus page; null: engines are not scraped."""
    interval_s: PositiveSeconds | None = None
    """Seconds between scrapes; none given: 1 where the policy reads gauges (the papers' rate), else 10."""
    timeout_s: PositiveSeconds = 2.0
    """A scrape without an answer after this long counts as failed."""


class HealthSettings(_Schema):
    """How long a replica that fails without answering is left out."""

    backoff_s: PositiveSeconds = 1.0
    """First pause after a failed attempt; doubles with each further failure in a row."""
    backoff_max_s: PositiveSeconds = 30.0
    """Longest pause; after it one attempt or probe decides."""


class TuningSettings(_Schema):
    """How the weights of `gorgo` and `gorgo-paper` are learned from what becomes of the requests they route."""

    mode: Literal["off", "online", "frozen", "propose"] = "off"
    """off; online: learns; frozen: takes the weights that a state file holds and keeps them; propose: applies nothing,
    but judges candidates by the router's predictions and shows in status what it would choose."""
    objective: Literal["ttft-p50", "ttft-p95", "ttft-p99", "e2e-p95"] = "ttft-p95"
    """What is minimised; the paper's p95 of TTFT."""
    path: str | None = None
    """With `frozen`: the state file to take the weights from, which is only read."""
    low: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.05
    """Least weight tried, as in the paper. In milliseconds 1 is neutral: this makes a term next to invisible."""
    high: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 20.0
    """Largest weight tried: as far from neutral on the other side."""
    sigma: Annotated[float, Field(gt=0, le=3)] = 0.7
    """First step, in log space: a factor of two. It grows and shrinks with success (the paper begins with 0.5)."""
    least_sigma: Annotated[float, Field(gt=0, le=3)] = 0.15
    """Smallest step: 15% of a weight, less changes hardly a decision. Above 0, so that the search never ends."""
    trial_requests: Annotated[int, Field(ge=16, le=10_000)] = 400
    """Requests after which a trial ends, whatever it has shown; it may hold some ten differing ones then."""
    least_samples: Annotated[int, Field(ge=2, le=1000)] = 8
    """Requests of each side, among those on which the two differ, before anything is concluded."""
    confidence_z: Annotated[float, Field(ge=0, le=6)] = 2.3
    """Standard errors by which a candidate must be better, or worse: one chance in a hundred that noise looks so."""
    tolerance_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Milliseconds of the objective that a candidate must gain besides; less is felt by nobody."""
    guard_margin: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share by which E2E p95 may rise, over all accepted steps together; less than that is hard to measure."""
    rest_requests: Annotated[int, Field(ge=0, le=1_000_000)] = 1000
    """Longest rest between trials, in requests. Rests begin with 16 and double with each trial that fails: a fleet
    whose weights are right is left in peace."""

    @field_validator("mode", mode="before")
    @classmethod
    def _yaml_reads_off_as_a_boolean(cls, mode: Any) -> Any:
        return "off" if mode is False else mode

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low: must be less than high, got {self.low:g} and {self.high:g}")
        if self.mode == "frozen" and self.path is None:
            raise ValueError("path: frozen takes its weights from a state file, but none is given")
        if self.mode == "propose" and self.objective == "e2e-p95":
            raise ValueError("objective: propose judges by predicted first tokens; expected one of TTFT, got e2e-p95")
        return self


class StateSettings(_Schema):
    """A file of what was learned (round trips, rates, token scales, weights), so that a restart is not a cold start."""

    path: str | None = None
    """File, such as /var/lib/gorgo/state.json; each worker writes its own beside it (state-0.json, state-1.json, ...).
    none given: nothing is kept."""
    interval_s: PositiveSeconds = 30.0
    """Seconds between writes, which are off the request path; one more is at the end. What a crash loses."""


class PrepareSettings(_Schema):
    """How request bodies become token ids."""

    encoder: Literal["fastest", "tokenizers"] = "fastest"
    """fastest: tiktoken where it gives a tokenizer's own ids, which is tried at start; else, or with `tokenizers`, that
    library alone."""
    inline_chars: Annotated[int, Field(ge=0)] = 4096
    """Unseen characters tokenized on the event loop (0.4 ms with tiktoken, 3 without); more go to a thread."""
    threads: Annotated[int, Field(ge=1, le=64)] = 2
    """Prompts that are prepared in threads at a time; as many threads more tokenize pieces of long ones."""
    estimate_above_chars: Annotated[int, Field(ge=1)] | None = 400_000
    """Unseen characters (about 100,000 tokens, 30 ms with tiktoken, 100 without) above which a prompt is routed on an
    estimate of its length; its tokens follow. null: none is."""
    cache_bytes: Annotated[int, Field(ge=0)] = 64 * 2**20
    """Bytes of tokenized messages kept, over all models; whole conversations may take half as much again."""
    image_tokens: Annotated[int, Field(ge=1, le=65536)] = 576
    """Tokens an image counts as (576: 336 pixels in patches of 14). Engines differ, so its prompt is not `exact`."""


class EnvoyTlsSettings(_Schema):
    """TLS between Envoy and the service; with `client_ca_file` mutual. All are paths of PEM files."""

    cert_file: str
    """Certificate the service shows."""
    key_file: str
    """Its key."""
    client_ca_file: str | None = None
    """Whose certificates Envoy must show; none given: any client may connect."""
    ca_file: str
    """What Envoy verifies the service by."""
    server_name: str = "gorgo"
    """Name in the service's certificate."""
    envoy_cert_file: str | None = None
    """Certificate Envoy shows, where `client_ca_file` wants one."""
    envoy_key_file: str | None = None
    """Its key."""

    @model_validator(mode="after")
    def _envoy_has_what_the_service_wants(self) -> Self:
        if (self.envoy_cert_file is None) != (self.envoy_key_file is None):
            raise ValueError("envoy_cert_file and envoy_key_file go together; one of them is missing")
        if self.client_ca_file is not None and self.envoy_cert_file is None:
            raise ValueError("with client_ca_file, envoy_cert_file and envoy_key_file are required")
        return self


class EnvoySettings(_Schema):
    """The external-processing service, and the envoy.yaml that `gorgo envoy-config` writes for it."""

    listen: Address = "127.0.0.1:50051"
    """Where the service listens for Envoy: host:port, or unix:/path of a socket."""
    status_listen: TcpAddress | None = "127.0.0.1:9191"
    """Where `/metrics`, `/gorgo/status` and `/gorgo/explain` are served, without a key: keep it private. null: nowhere.
    """
    tls: EnvoyTlsSettings | None = None
    """TLS between Envoy and the service; none given: plain text, which a loopback or a Unix socket does not leave."""
    request_stream_usage: bool = False
    """Ask for the usage of streams whose client did not: exact learning, one more chunk for the client, and every chunk
    is read by the service."""
    max_body_bytes: Annotated[int, Field(ge=65_536, le=1_073_741_824)] = 32 * 2**20
    """Largest request body, compressed or not. Envoy answers 413 to a longer one; one that unpacks to more is served
    unrouted."""
    message_timeout_s: PositiveSeconds = 0.25
    """How long Envoy waits for the service before it serves a request unrouted."""
    max_message_timeout_s: PositiveSeconds = 2.0
    """How long the service may ask Envoy to wait for a long prompt it has never seen."""
    drain_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    """After SIGTERM: seconds in which the service is reported as not serving and still serves; two health checks."""
    grace_s: PositiveSeconds = 30.0
    """After that: seconds in which requests under way may end before their streams are closed."""
    gateway_listen: TcpAddress = "127.0.0.1:10000"
    """Where the generated Envoy listens for clients."""
    admin_listen: TcpAddress | None = "127.0.0.1:9901"
    """Where the generated Envoy serves its admin page; null: nowhere."""
    health_path: UrlPath | None = "/health"
    """What the generated Envoy asks replicas to see whether they are well; null: nothing."""
    health_interval_s: PositiveSeconds = 2.0
    """Seconds between those questions; two unanswered ones take a replica out."""
    retries: Annotated[int, Field(ge=0, le=10)] = 2
    """How often Envoy tries a request elsewhere that has no response headers yet."""
    try_idle_timeout_s: PositiveSeconds | None = None
    """Seconds without a byte after which Envoy tries elsewhere; none given: never, as a long answer that is not
    streamed is silent for minutes."""
    replica_idle_s: PositiveSeconds = 4.0
    """Idle connections to replicas are closed after this long; less than the 5 s after which vLLM's server closes them,
    or a request meets a closing connection. Raise it together with VLLM_HTTP_TIMEOUT_KEEP_ALIVE."""
    replica_ca_file: str = "/etc/ssl/certs/ca-certificates.crt"
    """What Envoy verifies https replicas by."""

    @model_validator(mode="after")
    def _timeouts_are_in_order(self) -> Self:
        if self.max_message_timeout_s < self.message_timeout_s:
            raise ValueError("max_message_timeout_s: must not be less than message_timeout_s")
        return self


class Settings(_Schema):
    """The whole configuration of a router."""

    version: Literal[1] = 1
    """Version of this schema."""
    mode: Literal["on", "shadow", "off"] = "on"
    """on; shadow: decides and measures, the gateway's own choice stands; off: does nothing."""
    replicas: list[ReplicaSettings] = []
    """The fleet. LiteLLM fills it from `model_list`."""
    tokenizer: str | None = None
    """File, folder or hub name; none given: the embedded tokenizer, its counts scaled by what engines report."""
    chat_template: str | None = None
    """Jinja template text or file; none given: the tokenizer folder's own, else ChatML."""
    block_tokens: Annotated[int, Field(ge=1, le=4096)] = 16
    """Tokens of one KV block of the engine; vLLM's default is 16."""
    models: dict[str, ModelSettings] = {}
    """Per model, where models differ."""
    policy: str = "gorgo"
    """What picks the replica; `gorgo` or one of the baselines."""
    weights: WeightSettings | Literal["art-chat", "wildchat"] | None = None
    """`{rtt, queue}`, or a published pair by name; none given: 1 and 1 (`gorgo-paper`: art-chat)."""
    seed: int = 0
    """Seeds tie-breaking and random policies."""
    probe: ProbeSettings = ProbeSettings()
    rates: RateSettings = RateSettings()
    metrics: MetricsSettings = MetricsSettings()
    health: HealthSettings = HealthSettings()
    prepare: PrepareSettings = PrepareSettings()
    tuning: TuningSettings = TuningSettings()
    state: StateSettings = StateSettings()
    envoy: EnvoySettings = EnvoySettings()
    flight_ttl_s: PositiveSeconds = 900.0
    """A flight open longer than this is released by the sweep; longer than any gateway's request timeout."""
    response_headers: Literal["none", "region", "debug"] = "region"
    """`debug` adds what others have cached, which a tenant should not see: never by default."""

    @field_validator("mode", mode="before")
    @classmethod
    def _yaml_reads_on_and_off_as_booleans(cls, mode: Any) -> Any:
        return {True: "on", False: "off"}.get(mode, mode) if isinstance(mode, bool) else mode

    @field_validator("weights", mode="before")
    @classmethod
    def _weights_are_a_pair_or_a_published_name(cls, weights: Any) -> Any:
        published = isinstance(weights, str) and weights in PUBLISHED_WEIGHTS
        if not (published or weights is None or isinstance(weights, (dict, WeightSettings))):
            raise ValueError(f"expected {{rtt, queue}} or one of {', '.join(PUBLISHED_WEIGHTS)}, got {weights!r:.80}")
        return weights

    @field_validator("policy")
    @classmethod
    def _policy_exists(cls, policy: str) -> str:
        from gorgo_plugin.policies import POLICIES  # here, because policies read this module's weights

        if policy not in POLICIES:
            raise ValueError(f"unknown policy '{policy}'{did_you_mean(policy, POLICIES)}")
        return policy

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        seen: set[str] = set()
        for replica in self.replicas:
            if replica.name in seen:
                raise ValueError(f"replicas: two replicas are named '{replica.name}'; names must be unique")
            seen.add(replica.name)
        return self

    @model_validator(mode="after")
    def _what_is_tuned_can_be(self) -> Self:
        from gorgo_plugin.policies import POLICIES

        tuning = self.tuning
        if tuning.mode == "off":
            return self
        if not POLICIES[self.policy].weighted:
            weighted = ", ".join(name for name, policy in POLICIES.items() if policy.weighted)
            raise ValueError(
                f"tuning.mode: '{tuning.mode}' needs a policy with weights ({weighted}), policy is '{self.policy}'"
            )
        if tuning.mode != "frozen" and not all(tuning.low <= weight <= tuning.high for weight in self.weight_pair()):
            raise ValueError(
                f"weights: tuning starts between tuning.low ({tuning.low:g}) and tuning.high ({tuning.high:g}), "
                f"got rtt {self.weight_pair()[0]:g} and queue {self.weight_pair()[1]:g}"
            )
        return self

    @classmethod
    def model_validate(cls, obj: Any, **kwargs: Any) -> Self:
        """Validate a mapping.

        Raises:
            SettingsError: one sentence naming the first field at fault and what would be right.
        """
        try:
            return super().model_validate(obj, **kwargs)
        except ValidationError as error:
            raise SettingsError(describe(error, cls)) from None

    def weight_pair(self) -> tuple[float, float]:
        """(W_rtt, W_queue) in force, with published names resolved."""
        if isinstance(self.weights, WeightSettings):
            return self.weights.rtt, self.weights.queue
        if self.weights is not None:
            return PUBLISHED_WEIGHTS[self.weights]
        return self.neutral_weights()

    def neutral_weights(self) -> tuple[float, float]:
        """(W_rtt, W_queue) of the policy where nothing is set."""
        return PUBLISHED_WEIGHTS["art-chat"] if self.policy == "gorgo-paper" else (1.0, 1.0)

    def model_settings(self, model: str) -> ModelSettings:
        """The model's own settings with the top-level ones filled in."""
        own = self.models.get(model, ModelSettings())
        return ModelSettings(
            tokenizer=own.tokenizer if own.tokenizer is not None else self.tokenizer,
            chat_template=own.chat_template if own.chat_template is not None else self.chat_template,
            block_tokens=own.block_tokens if own.block_tokens is not None else self.block_tokens,
        )


def did_you_mean(word: str, known: Any) -> str:
    """` (did you mean 'x'?)`, or the known words when nothing is close."""
    names = sorted(str(name) for name in known)
    close = difflib.get_close_matches(word, names, n=1)
    return f" (did you mean '{close[0]}'?)" if close else f"; known: {', '.join(names)}"


def describe(error: ValidationError, schema: type[BaseModel]) -> str:
    """One sentence for a pydantic error: the field's path, what is wrong, what would be right."""
    first = error.errors(include_url=False)[0]
    location = [part for part in first["loc"] if part not in ("WeightSettings", "literal['art-chat','wildchat']")]
    path = ".".join(str(part) for part in location)
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"{path}: unknown setting{did_you_mean(str(location[-1]), _fields_at(schema, location[:-1]))}"
    if first["type"] == "missing":
        return f"{path}: required, but not given"
    value = first["input"]
    if first["type"] == "model_type":
        message = f"expected a mapping of settings, got {type(value).__name__}"
    elif first["type"] != "value_error" and not isinstance(value, (dict, list)):
        message = f"{message[:1].lower()}{message[1:]} (got {value!r:.80})"
    return f"{path}: {message}" if path else message


def _fields_at(schema: type[BaseModel], location: list[int | str]) -> list[str]:
    """Names of the fields of the nested schema that `location` leads to."""
    current: Any = schema
    for part in location:
        if isinstance(part, int):
            continue
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:
            continue
        current = _schema_in(field.annotation) or current
    return list(current.model_fields)


def _schema_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _schema_in(argument)
        if found is not None:
            return found
    return None
