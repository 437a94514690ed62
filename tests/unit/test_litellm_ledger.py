"""One record per attempt, ended exactly once."""

from __future__ import annotations

import contextvars
import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from gorgo_plugin import Prompt, Settings
from gorgo_plugin.litellm_strategy.ledger import Ledger, LiteLLMAttempt, Request
from gorgo_plugin.runtime import Runtime
from gorgo_plugin.runtime.outcomes import Usage


class LoggingObject:
    """Stands for LiteLLM's, of which only the identity and the call id matter."""

    def __init__(self, call_id: str = "call") -> None:
        self.litellm_call_id = call_id


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    replicas = [{"name": name, "url": f"http://{name}:1"} for name in ("a", "b")]
    runtime = Runtime(Settings.model_validate({"replicas": replicas, "health": {"backoff_s": 1e-6}}))
    yield runtime
    runtime.close()


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def attempt(runtime: Runtime, request: Request, unseen: bool = False) -> LiteLLMAttempt:
    prompt = Prompt(range(200), model="m")
    decision = runtime.router.route(prompt, request_id=request.request_id)
    request.attempt = LiteLLMAttempt(runtime, decision, prompt, unseen)
    return request.attempt


def open_flights(runtime: Runtime) -> int:
    return sum(runtime.router.snapshot()["flights"].values())


def test_the_logging_object_finds_the_request_over_its_attempts(ledger: Ledger, runtime: Runtime) -> None:
    logging = LoggingObject()
    request = ledger.begin({"litellm_logging_obj": logging})
    first = attempt(runtime, request)
    ledger.dispatch("call")
    assert ledger.find({"litellm_logging_obj": logging}) is request
    assert ledger.begin({"litellm_logging_obj": logging}) is request
    assert first.closed == "rejected"  # there is a selection again, so it must have failed
    assert open_flights(runtime) == 0


def test_another_logging_object_is_another_request(ledger: Ledger) -> None:
    one, other = LoggingObject(), LoggingObject()
    assert ledger.begin({"litellm_logging_obj": one}) is not ledger.begin({"litellm_logging_obj": other})


def test_an_sdk_call_keeps_its_request_over_its_attempts(ledger: Ledger) -> None:
    request = ledger.begin({"litellm_trace_id": "t"})
    assert ledger.begin({"litellm_trace_id": "t"}) is request
    assert ledger.begin({"litellm_trace_id": "u"}) is not request


def test_a_trace_id_seen_in_another_context_is_another_request(ledger: Ledger) -> None:
    request = ledger.begin({"litellm_trace_id": "t"})
    assert contextvars.Context().run(ledger.begin, {"litellm_trace_id": "t"}) is not request


def test_a_request_whose_logging_object_is_gone_is_over(ledger: Ledger, runtime: Runtime) -> None:
    logging = LoggingObject()
    lost = attempt(runtime, ledger.begin({"litellm_logging_obj": logging}))
    ledger.dispatch("call")
    del logging
    gc.collect()
    assert lost.closed is None  # the collector may run inside the router: nothing is done there
    ledger.collect()
    assert lost.closed == "disconnect"
    assert open_flights(runtime) == 0


def test_a_call_whose_end_nothing_tells_counts_as_answered_when_it_is_gone(ledger: Ledger, runtime: Runtime) -> None:
    logging = LoggingObject()
    lost = attempt(runtime, ledger.begin({"litellm_logging_obj": logging}), unseen=True)
    ledger.dispatch("call")
    del logging
    gc.collect()
    ledger.collect()
    assert lost.closed == "finished"


def test_the_logging_object_of_an_earlier_attempt_does_not_end_the_next(ledger: Ledger, runtime: Runtime) -> None:
    first, second = LoggingObject("1"), LoggingObject("2")
    request = ledger.begin({"litellm_trace_id": "t"})
    attempt(runtime, request)
    ledger.adopt(first)
    ledger.dispatch("1")
    ledger.begin({"litellm_trace_id": "t"})
    now = attempt(runtime, request)
    ledger.adopt(second)
    ledger.dispatch("2")
    del first
    gc.collect()
    ledger.collect()
    assert now.closed is None
    now.finish()


@pytest.mark.parametrize(("late_event_s", "closed"), [(1000.0, None), (0.0, "disconnect")])
def test_a_request_whose_context_is_gone_is_over_when_its_late_events_had_their_time(
    ledger: Ledger, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, late_event_s: float, closed: str | None
) -> None:
    monkeypatch.setattr("gorgo_plugin.litellm_strategy.ledger.LATE_EVENT_S", late_event_s)

    def select() -> LiteLLMAttempt:
        one = attempt(runtime, ledger.begin({"litellm_trace_id": "t"}))
        ledger.dispatch("call")
        return one

    dropped = contextvars.Context().run(select)
    gc.collect()
    ledger.collect()
    assert dropped.closed == closed
    assert ledger.of_call("call") is dropped
    dropped.fail("disconnect")


def test_a_logging_object_made_after_the_choice_is_found_by_its_call_id(ledger: Ledger, runtime: Runtime) -> None:
    logging, other = LoggingObject("call"), LoggingObject("other")
    request = ledger.begin({"litellm_trace_id": "t"})
    mine = attempt(runtime, request)
    ledger.dispatch("call")
    assert ledger.find({"litellm_logging_obj": other}) is None
    assert ledger.find({"litellm_logging_obj": logging}) is request
    mine.finish()


def test_log_events_join_by_the_call_id(ledger: Ledger, runtime: Runtime) -> None:
    logging = LoggingObject()
    mine = attempt(runtime, ledger.begin({"litellm_logging_obj": logging}))
    ledger.dispatch("call")
    assert ledger.of_call("call") is mine
    assert ledger.of_call("other") is None
    assert ledger.of_call(None) is None
    mine.finish()


def test_events_of_a_call_id_that_two_calls_chose_belong_to_neither(ledger: Ledger, runtime: Runtime) -> None:
    one, other = LoggingObject(), LoggingObject()
    first = attempt(runtime, ledger.begin({"litellm_logging_obj": one}))
    ledger.dispatch("call")
    second = attempt(runtime, ledger.begin({"litellm_logging_obj": other}))
    ledger.dispatch("call")
    assert ledger.of_call("call") is None
    for each in (first, second):
        each.finish()


def test_a_call_that_another_callback_makes_on_the_way_is_not_the_attempt(ledger: Ledger, runtime: Runtime) -> None:
    mine = attempt(runtime, ledger.begin({"litellm_logging_obj": LoggingObject("mine")}))
    ledger.dispatch("of a guardrail")
    assert not mine.dispatched
    mine.fail("disconnect")


def test_an_attempt_ends_once(ledger: Ledger, runtime: Runtime) -> None:
    one = attempt(runtime, Request())
    one.dispatched = True
    one.finish()
    one.fail("timeout")
    one.finish()
    assert one.closed == "finished"
    assert runtime.router.snapshot()["counters"]["unknown_flights"] == 0


def test_what_litellm_never_sent_says_nothing_of_the_replica(runtime: Runtime) -> None:
    one = attempt(runtime, Request())
    one.fail("rejected")
    assert one.closed == "disconnect"
    health = runtime.router.snapshot()["replicas"][one.replica]["health"]
    assert health["failures_in_a_row"] == 0


@pytest.mark.parametrize(
    ("end", "usage", "believed"),
    [
        (lambda one: None, Usage(100, 0, 1), True),
        (lambda one: one.finish(), Usage(100, 0, 1), True),
        (lambda one: one.fail("disconnect"), Usage(100, 0, 1), False),
        (lambda one: one.finish(), Usage(0, 0, 0), False),
        (lambda one: one.finish(), Usage(), False),
    ],
)
def test_usage_is_believed_of_answers_only(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, end: Any, usage: Usage, believed: bool
) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(runtime.router, "usage", lambda flight, **counts: seen.append(counts))
    one = attempt(runtime, Request())
    one.dispatched = True
    end(one)
    one.usage(usage)
    one.usage(usage)
    assert len(seen) == believed
    one.fail("disconnect")


def test_a_request_forgets_nothing_of_its_logging_object_but_itself(ledger: Ledger) -> None:
    logging = LoggingObject()
    ledger.begin({"litellm_logging_obj": logging})
    assert len(ledger) == 1
    del logging
    gc.collect()
    assert len(ledger) == 0


def test_nothing_of_a_finished_request_is_kept(ledger: Ledger, runtime: Runtime) -> None:
    logging = LoggingObject()
    request = ledger.begin({"litellm_logging_obj": logging})
    prompt = request.prompts["/v1/completions", "m"] = Prompt(range(200), model="m")
    done = attempt(runtime, request)
    ledger.dispatch("call")
    request.finish(Usage(200, 0, 1))
    held = weakref.ref(prompt.tokens)
    records = weakref.ref(done)
    del prompt, done, request, logging
    contextvars.copy_context().run(ledger.begin, {})  # the next request
    ledger.collect()
    ledger.begin({})
    gc.collect()
    assert held() is None
    assert records() is None
    assert ledger.of_call("call") is None


def test_what_carries_no_logging_object_finds_nothing_outside_a_selection(ledger: Ledger) -> None:
    assert ledger.find({}) is None
    assert ledger.find(None) is None
    assert ledger.find({"litellm_logging_obj": SimpleNamespace()}) is None


def test_a_trace_id_that_a_caller_gives_to_a_conversation_does_not_join_its_requests(
    ledger: Ledger, runtime: Runtime
) -> None:
    def turns() -> None:
        request = ledger.begin({"litellm_trace_id": "mine"})
        attempt(runtime, request).dispatched = True
        assert ledger.begin({"litellm_trace_id": "mine"}) is request  # it must have failed: this is its retry
        attempt(runtime, request).dispatched = True
        request.finish(Usage())
        assert ledger.begin({"litellm_trace_id": "mine"}) is not request

    contextvars.copy_context().run(turns)
    assert open_flights(runtime) == 0
