"""Whatever LiteLLM's hooks tell, in whatever order: each attempt's flight ends exactly once."""

from __future__ import annotations

import contextvars

from hypothesis import given, settings
from hypothesis import strategies as st

from gorgo_plugin import Prompt, Settings
from gorgo_plugin.litellm_strategy.ledger import Ledger, LiteLLMAttempt
from gorgo_plugin.runtime import Runtime
from gorgo_plugin.runtime.outcomes import Usage

REPLICAS = [{"name": name, "url": f"http://{name}:1"} for name in ("a", "b")]
RUNTIME = Runtime(Settings.model_validate({"replicas": REPLICAS}))
REQUESTS = 3
SDK = 2  # the request without a logging object
EVENTS = ("select", "dispatch", "first_token", "usage", "finish", "timeout", "rejected", "disconnect", "lose", "drop")


class LoggingObject:
    def __init__(self, call_id: str) -> None:
        self.litellm_call_id = call_id


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, REQUESTS - 1), st.sampled_from(EVENTS)), max_size=40))
def test_at_the_end_no_flight_is_open_and_none_was_ended_twice(events: list[tuple[int, str]]) -> None:
    ledger = Ledger()
    contexts = [contextvars.Context() for _ in range(REQUESTS)]
    logging: list[LoggingObject | None] = [None] * REQUESTS
    routed = RUNTIME.router.snapshot()["counters"]["routed"]
    selections = 0
    for number, event in events:
        if event == "select":
            selections += 1
            if logging[number] is None and number != SDK:
                logging[number] = LoggingObject(str(number))
            contexts[number].run(_select, ledger, str(number), logging[number])
        elif event == "drop":
            logging[number] = None
        else:
            contexts[number].run(_tell, ledger, event, str(number))
        assert all(count >= 0 for count in RUNTIME.router.snapshot()["flights"].values())
    for number in range(REQUESTS):
        logging[number] = None
        contexts[number].run(_tell, ledger, "disconnect", str(number))
    ledger.collect()
    snapshot = RUNTIME.router.snapshot()
    assert sum(snapshot["flights"].values()) == 0
    assert snapshot["counters"]["unknown_flights"] == 0
    assert snapshot["counters"]["routed"] == routed + selections
    assert len(ledger) == 0


def _select(ledger: Ledger, trace_id: str, logging: LoggingObject | None) -> None:
    request = ledger.begin({"litellm_trace_id": trace_id, "litellm_logging_obj": logging})
    prompt = Prompt(range(100), model="m")
    request.attempt = LiteLLMAttempt(RUNTIME, RUNTIME.router.route(prompt, request_id=request.request_id), prompt)


def _tell(ledger: Ledger, event: str, call_id: str) -> None:
    request = ledger.find(None)
    if request is None or request.attempt is None:
        return
    attempt = request.attempt
    if event == "dispatch":
        ledger.dispatch(call_id)
    elif event == "usage":
        attempt.usage(Usage(100, 16, 1))
    elif event in ("first_token", "finish", "lose"):
        getattr(attempt, event)()
    else:
        attempt.fail(event)
