"""One core, two gateways: the same requests through both adapters, priced and decided alike."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

import grpc
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from gorgo_plugin import Decision, Prompt, Router, Settings
from gorgo_plugin.envoy_ext_proc.names import ATTEMPT_KEY, METADATA_NAMESPACE
from gorgo_plugin.envoy_ext_proc.processor import Processor
from gorgo_plugin.prompt.endpoints import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES
from gorgo_plugin.runtime import Runtime
from gorgo_plugin.runtime import runtime as runtime_module
from tests.litellm_proxy import deployment
from tests.stub_engine import Behaviour, streamed_answer, whole_answer

REPLICAS = {"near": "east", "near-too": "east", "far": "west"}
RTT_S = {"near": 0.01, "near-too": 0.012, "far": 0.16}
KV_TOKENS = 6_000  # so few that prefixes are evicted on the way
CALL_TYPES = {
    CHAT: "acompletion",
    COMPLETIONS: "atext_completion",
    EMBEDDINGS: "aembedding",
    RESPONSES: "aresponses",
    MESSAGES: "anthropic_messages",
}
TOOL = {
    "type": "function",
    "function": {"name": "tide", "description": "Height of the tide.", "parameters": {"type": "object"}},
}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Recorded:
    """One request as a client sent it, and what became of it.

    Attributes:
        status: of the engine's answer.
        cached: cached tokens the engine reports; None: it reports none.
    """

    endpoint: str
    body: dict[str, Any]
    status: int = 200
    cached: int | None = None

    @property
    def streams(self) -> bool:
        return self.body.get("stream") is True

    def pieces(self) -> list[str]:
        """The answer's body."""
        if self.streams:
            return list(streamed_answer(self.endpoint, self.body, Behaviour(cached_tokens=self.cached)))
        return [json.dumps(whole_answer(self.endpoint, self.body, self.cached))]


def said(topic: str, turn: int) -> str:
    return f"{topic}, part {turn}: " + " ".join(f"{topic}{turn * 31 + word}" for word in range(120))


def conversation(topic: str, turns: int, **fields: Any) -> Iterator[dict[str, Any]]:
    """The bodies of a chat that grows."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": said("rules", 0)}]
    for turn in range(turns):
        messages.append({"role": "user", "content": said(topic, turn)})
        yield {"model": "m", "messages": copy.deepcopy(messages), **fields}
        messages.append({"role": "assistant", "content": f"Answer {turn} on {topic}."})


def tool_conversation() -> Iterator[dict[str, Any]]:
    call = {"id": "c1", "type": "function", "function": {"name": "tide", "arguments": '{"at": "noon"}'}}
    messages: list[dict[str, Any]] = [{"role": "user", "content": said("tides", 0)}]
    yield {"model": "m", "messages": list(messages), "tools": [TOOL], "stream": True, "max_tokens": 64}
    messages += [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": said("level", 1)},
    ]
    yield {"model": "m", "messages": list(messages), "tools": [TOOL], "stream": True, "max_tokens": 64}
    picture = [{"type": "text", "text": said("picture", 2)}, PICTURE]
    yield {"model": "m", "messages": [*messages, {"role": "user", "content": picture}], "tools": [TOOL]}


def asking_usage(bodies: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return ({**body, "stream": True, "stream_options": {"include_usage": True}} for body in bodies)


def anthropic(bodies: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for body in bodies:
        system, *messages = body["messages"]
        yield {**body, "system": system["content"], "messages": messages, "max_tokens": 32}


def recorded() -> list[Recorded]:
    """Sessions of every endpoint, interleaved turn by turn."""
    ids = list(range(100, 900))
    sessions: list[list[Recorded]] = [
        [Recorded(CHAT, body, cached=16) for body in asking_usage(conversation("rivers", 4))],
        [Recorded(CHAT, body) for body in conversation("hills", 4, stream=True, user="someone")],
        [Recorded(CHAT, body, cached=0) for body in conversation("bridges", 3, cache_salt="one")],
        [Recorded(CHAT, body) for body in conversation("bridges", 3, cache_salt="two", stream=True)],
        [Recorded(CHAT, body) for body in tool_conversation()],
        [Recorded(MESSAGES, body, cached=32) for body in anthropic(conversation("lakes", 3, stream=True))],
        [Recorded(MESSAGES, body) for body in anthropic(conversation("lakes", 2))],
        [Recorded(RESPONSES, {"model": "m", "input": said("seas", turn), "stream": True}) for turn in (0, 0, 1)],
        [Recorded(RESPONSES, {"model": "m", "input": [{"role": "user", "content": said("bays", 1)}]}, cached=48)] * 2,
        [Recorded(COMPLETIONS, {"model": "m", "prompt": said("once", 0) * turns}) for turns in (1, 2, 3)],
        [Recorded(COMPLETIONS, {"model": "m", "prompt": ids[:count], "stream": True}) for count in (400, 600, 800)],
        [Recorded(EMBEDDINGS, {"model": "e", "input": [said("words", turn), "short"]}) for turn in (0, 1)],
        [Recorded(EMBEDDINGS, {"model": "e", "input": ids})] * 2,
        [Recorded(CHAT, body, status=500) for body in conversation("storms", 2, stream=True)],
        [Recorded(CHAT, body, status=400) for body in conversation("nonsense", 2)],
    ]
    longest = max(map(len, sessions))
    return [session[turn] for turn in range(longest) for session in sessions if turn < len(session)]


@dataclass
class Watched:
    """What a router was asked and said, as plain data."""

    prompts: list[Prompt] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)


def watched(router: Router, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Record every decision of a router, with its costs as they were then."""
    log, route = Watched(), router.route

    def recording(prompt: Prompt, *args: Any, **kwargs: Any) -> Decision:
        decision = route(prompt, *args, **kwargs)
        log.prompts.append(prompt)
        log.decisions.append(
            {
                "replica": decision.replica,
                "region": decision.region,
                "reason": decision.reason,
                "ranked": list(decision.ranked),
                "costs": {name: asdict(cost) for name, cost in decision.costs.items()},
            }
        )
        return decision

    monkeypatch.setattr(router, "route", recording)
    return log


@dataclass(eq=False)
class Logging:
    """What gorgo reads of LiteLLM's logging object."""

    call_type: str
    litellm_call_id: str


class Refused(Exception):
    """An engine's error as LiteLLM raises it."""

    def __init__(self, status_code: int) -> None:
        super().__init__(f"injected {status_code}")
        self.status_code = status_code


class LiteLLMSide:
    """Requests as LiteLLM's router and hooks tell of them."""

    def __init__(self, router: Any) -> None:
        from gorgo_plugin.litellm_strategy import callback, patch
        from gorgo_plugin.litellm_strategy.plugin import plugin

        self._router, self._callback, self._ledger = router, callback, plugin().ledger
        self.runtime: Runtime = plugin().adapter(router).shares[0].runtime
        _, self._selector = patch.routing_context(router, "m")
        self._count = 0

    async def begin(self, request: Recorded) -> Any:
        """Route it; returns what the endings below take."""
        self._count += 1
        call_id, fields = f"call-{self._count}", dict(request.body)
        model, messages, given = fields.pop("model"), fields.pop("messages", None), None
        if request.endpoint == COMPLETIONS:
            messages = [{"role": "user", "content": fields.pop("prompt")}]
        elif request.endpoint in (EMBEDDINGS, RESPONSES):
            given = fields.pop("input")
        logging_obj = Logging(CALL_TYPES[request.endpoint], call_id)
        fields["litellm_logging_obj"] = logging_obj
        group = [entry for entry in self._router.model_list if entry["model_name"] == model]
        await self._selector.async_get_available_deployments(model, group, messages, given, fields)
        self._callback.log_pre_api_call(model, messages, {"litellm_call_id": call_id})
        return logging_obj

    async def answer_begins(self, request: Recorded, logging_obj: Any) -> None:
        if request.status != 200:
            told = {"litellm_call_id": logging_obj.litellm_call_id, "exception": Refused(request.status)}
            await self._callback.async_log_failure_event(told, None, datetime.now(), datetime.now())
        elif request.streams:
            self._ledger.find({"litellm_logging_obj": logging_obj}).attempt.first_token()

    async def answer_ends(self, request: Recorded, logging_obj: Any) -> None:
        if request.status == 200:
            told = {
                "litellm_call_id": logging_obj.litellm_call_id,
                "call_type": logging_obj.call_type,
                "stream": request.streams,
                "optional_params": {"stream_options": request.body.get("stream_options")},
            }
            answer = whole_answer(request.endpoint, request.body, request.cached)
            await self._callback.async_log_success_event(told, answer, datetime.now(), datetime.now())


class Context:
    """A gRPC stream whose other end is the test."""

    def __init__(self, processor: Processor) -> None:
        self._asked: asyncio.Queue[Any] = asyncio.Queue()
        self._answered: asyncio.Queue[bytes] = asyncio.Queue()
        self.task = asyncio.ensure_future(processor.process(None, self))

    async def read(self) -> Any:
        return await self._asked.get()

    async def write(self, answer: bytes) -> None:
        self._answered.put_nowait(answer)

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def send(self, message: Any) -> None:
        self._asked.put_nowait(message if message is grpc.aio.EOF else message.SerializeToString())

    async def ask(self, message: Any) -> Any:
        """Send a message and await its answer."""
        self.send(message)
        return pb.ProcessingResponse.FromString(await asyncio.wait_for(self._answered.get(), 5))

    async def close(self) -> None:
        """End the stream as Envoy does."""
        self.send(grpc.aio.EOF)
        await asyncio.wait_for(self.task, 5)


class EnvoySide:
    """Requests as Envoy's two streams tell of them."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._processor = Processor(runtime)

    async def begin(self, request: Recorded) -> tuple[Context, Context, str]:
        """Route it; returns the routing stream, the observing stream and the attempt's id."""
        routing = Context(self._processor)
        await routing.ask(with_headers("request_headers", {":method": "POST", ":path": request.endpoint}))
        message = pb.ProcessingRequest()
        message.request_body.body, message.request_body.end_of_stream = json.dumps(request.body).encode(), True
        answer = await routing.ask(message)
        attempt = answer.dynamic_metadata.fields[METADATA_NAMESPACE].struct_value.fields[ATTEMPT_KEY].string_value
        return routing, Context(self._processor), attempt

    async def answer_begins(self, request: Recorded, open_: tuple[Context, Context, str]) -> None:
        routing, observing, attempt = open_
        await routing.ask(with_headers("response_headers", {":status": str(request.status)}))
        if request.streams and request.status == 200:
            *pieces, _ = request.pieces()
            for piece in pieces:
                observing.send(piece_of(attempt, piece, last=False))
            await settled()

    async def answer_ends(self, request: Recorded, open_: tuple[Context, Context, str]) -> None:
        routing, observing, attempt = open_
        observing.send(piece_of(attempt, request.pieces()[-1], last=True))
        await asyncio.wait_for(observing.task, 5)
        await routing.close()


def with_headers(kind: str, headers: dict[str, str]) -> Any:
    message = pb.ProcessingRequest()
    for name, value in headers.items():
        getattr(message, kind).headers.headers.add(key=name, raw_value=value.encode())
    return message


def piece_of(attempt: str, piece: str, last: bool) -> Any:
    message = pb.ProcessingRequest(observability_mode=True)
    message.response_body.body, message.response_body.end_of_stream = piece.encode(), last
    fields = message.metadata_context.filter_metadata[METADATA_NAMESPACE].fields
    fields[ATTEMPT_KEY].string_value = attempt
    return message


async def settled() -> None:
    """Let what is ready to run, run."""
    for _ in range(20):
        await asyncio.sleep(0)


Sides = tuple[LiteLLMSide, EnvoySide]


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[Sides, Clock]]]:
    """Both adapters on equal settings and one clock, with nothing in the background."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    from gorgo_plugin.litellm_strategy import callback

    runtimes: list[Runtime] = []

    def build(**args: Any) -> tuple[Sides, Clock]:
        clock = Clock()

        def router(settings: Settings, secret: bytes) -> Router:
            del secret  # a gateway draws one; hashes under it would differ
            return Router(settings, clock=clock, secret=b"shared by both")

        monkeypatch.setattr(runtime_module, "Router", router)
        monkeypatch.setattr(Runtime, "ensure_started", lambda self: None)
        own = {"kv_tokens": KV_TOKENS}
        litellm_router = litellm.Router(
            model_list=[
                deployment(model, f"http://127.0.0.1:{port}", name=name, region=region, **own)
                for model in ("m", "e")
                for port, (name, region) in enumerate(REPLICAS.items(), start=1)
            ],
            routing_strategy="gorgo",
            routing_strategy_args={"metrics": {"path": None}, **args},
        )
        one = LiteLLMSide(litellm_router)
        runtimes.append(one.runtime)
        settings = Settings.model_validate(one.runtime.settings.model_dump())
        runtimes.append(Runtime(settings, gateway="envoy"))
        for runtime in runtimes:
            for name, rtt_s in RTT_S.items():
                runtime.router.observe_rtt(name, rtt_s)
        return (one, EnvoySide(runtimes[-1])), clock

    yield build
    litellm.callbacks[:] = [known for known in litellm.callbacks if known is not callback]
    for runtime in runtimes:
        runtime.close()


async def replay(sides: Sides, clock: Clock, requests: list[Recorded]) -> None:
    """Send every request through both; the one after it is routed while it waits for its first token."""
    waiting: list[tuple[Recorded, list[Any]]] = []

    async def finish_oldest() -> None:
        request, opened = waiting.pop(0)
        clock.now_s += 0.05
        for side, open_ in zip(sides, opened, strict=True):
            await side.answer_begins(request, open_)
        clock.now_s += 0.2
        for side, open_ in zip(sides, opened, strict=True):
            await side.answer_ends(request, open_)

    for number, request in enumerate(requests):
        clock.now_s += 0.03
        waiting.append((request, [await side.begin(request) for side in sides]))
        if len(waiting) > number % 4:
            await finish_oldest()
    while waiting:
        await finish_oldest()


@pytest.mark.parametrize("policy", ["gorgo", "gorgo-paper", "session-affinity", "prefix-cache", "random"])
async def test_the_same_requests_are_decided_and_priced_alike(
    sides: Callable[..., tuple[Sides, Clock]], monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    both, clock = sides(policy=policy, seed=7)
    logs = [watched(side.runtime.router, monkeypatch) for side in both]
    requests = recorded()
    await replay(both, clock, requests)

    litellm_log, envoy_log = logs
    assert len(litellm_log.decisions) == len(envoy_log.decisions) == len(requests)
    for number, (request, *decisions) in enumerate(
        zip(requests, litellm_log.decisions, envoy_log.decisions, strict=True)
    ):
        assert decisions[0] == decisions[1], f"request {number}: {request}"
    assert {decision["replica"] for decision in envoy_log.decisions} == set(REPLICAS)
    cached = [cost["cached_tokens"] for decision in envoy_log.decisions for cost in decision["costs"].values()]
    assert max(cached) > 100
    for side in both:
        assert sum(side.runtime.router.snapshot()["flights"].values()) == 0


async def test_the_same_requests_are_read_as_the_same_prompts(
    sides: Callable[..., tuple[Sides, Clock]], monkeypatch: pytest.MonkeyPatch
) -> None:
    both, clock = sides()
    logs = [watched(side.runtime.router, monkeypatch) for side in both]
    requests = recorded()
    await replay(both, clock, requests)
    for request, one, other in zip(requests, logs[0].prompts, logs[1].prompts, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist(), request
        for name in ("model", "stream", "max_output_tokens", "affinity_key", "cache_key", "exact"):
            assert getattr(one, name) == getattr(other, name), (name, request)


async def test_both_have_learned_the_same(sides: Callable[..., tuple[Sides, Clock]]) -> None:
    both, clock = sides()
    await replay(both, clock, recorded())
    one, other = (side.runtime.router.snapshot() for side in both)
    assert one == other
    assert any(model["samples"] for replica in one["replicas"].values() for model in replica["models"].values())
