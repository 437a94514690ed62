"""A replica that takes requests and answers none, where no request is streamed."""

from __future__ import annotations

import heapq
import itertools
import random

import numpy as np
import pytest

from gorgo_plugin import Prompt, Router, Settings
from gorgo_plugin.signals import Silence

ALL = slice(0, 2)
MEAN_S = 4.0


def silence(rng: random.Random | None = None) -> Silence:
    """Of two replicas, that has seen answers of exponential length."""
    rng, table = rng or random.Random(0), Silence()
    table.grow(2)
    for _ in range(1000):
        table.asked(0, 0.0)
        table.ended(0, rng.expovariate(1 / MEAN_S))
    return table


def silent_after_s(table: Silence, from_s: float = 0.0) -> float:
    """When the first replica begins to owe an answer."""
    for at_s in np.arange(from_s, from_s + 500.0, 0.1):
        late_ms = table.late_ms(ALL, at_s)
        if late_ms is not None and late_ms[0] > 0.0:
            return float(at_s) - from_s
    raise AssertionError("it never does")


def test_a_replica_nobody_waits_for_owes_nothing() -> None:
    assert silence().late_ms(ALL, 1e9) is None


@pytest.mark.parametrize(("awaited", "expected_s"), [(1, 41.0), (4, 11.0), (40, 2.0)])
def test_the_more_await_an_answer_the_sooner_one_is_owed(awaited: int, expected_s: float) -> None:
    table = silence()
    for _ in range(awaited):
        table.asked(0, 0.0)
    assert silent_after_s(table) == pytest.approx(expected_s, rel=0.15)


def test_an_answer_owed_gets_dearer_with_every_second_and_at_that_replica_alone() -> None:
    table = silence()
    for _ in range(4):
        table.asked(0, 0.0)
    table.asked(1, 0.0)
    first, second = table.late_ms(ALL, 20.0), table.late_ms(ALL, 21.0)
    assert first is not None
    assert second is not None
    assert (second - first).tolist() == pytest.approx([1000.0, 0.0])
    assert first[1] == 0.0


def test_a_sign_of_life_begins_the_wait_anew() -> None:
    table = silence()
    for _ in range(4):
        table.asked(0, 0.0)
    table.heard(0, 100.0)
    assert silent_after_s(table, 100.0) == pytest.approx(10.0, rel=0.15)


def test_a_replica_whose_clients_have_all_left_is_tried_again() -> None:
    table = silence()
    table.asked(0, 0.0)
    assert table.late_ms(ALL, 100.0) is not None
    table.ended(0)
    assert table.late_ms(ALL, 101.0) is None


def test_rare_long_answers_are_waited_for() -> None:
    table, rng = Silence(), random.Random(0)
    table.grow(2)
    for _ in range(2000):
        table.asked(0, 0.0)
        table.ended(0, 60.0 if rng.random() < 0.05 else 0.2)
    table.asked(0, 0.0)
    assert silent_after_s(table) > 120.0


def test_answers_of_no_length_at_all_are_lengths_too() -> None:
    table = Silence()
    table.grow(2)
    for _ in range(100_000):
        table.asked(0, 0.0)
        table.ended(0, 0.0)
    table.asked(0, 0.0)
    assert 0.0 < silent_after_s(table) < 5.0


def requests_into_a_hung_replica(rate: float) -> int:
    """Of 10 minutes of requests that are not streamed, after the nearest replica has stopped to answer."""
    now_s, rng, sent = [0.0], random.Random(0), 0
    round_trips = {"near": 0.01, "far": 0.3}
    replicas = [{"name": name, "url": f"http://{name}:1"} for name in round_trips]
    router = Router(Settings.model_validate({"replicas": replicas}), clock=lambda: now_s[0])
    answers: list[tuple[float, int]] = []
    for number in itertools.count():
        now_s[0] = number / rate
        if now_s[0] > 660.0:
            return sent
        for name, rtt_s in round_trips.items():
            router.observe_rtt(name, rtt_s)
        while answers and answers[0][0] <= now_s[0]:
            router.finish(heapq.heappop(answers)[1])
        prompt = Prompt([rng.randrange(50_000) for _ in range(rng.randrange(100, 1500))], stream=False)
        decision = router.route(prompt)
        if decision.replica == "near" and now_s[0] >= 60.0:
            sent += 1
        else:
            heapq.heappush(answers, (now_s[0] + 0.2 + rng.expovariate(1 / MEAN_S), decision.flight_id))
    raise AssertionError


def test_a_hung_replica_gets_few_requests_though_none_is_streamed() -> None:
    assert requests_into_a_hung_replica(rate=2.0) < 60  # of 1,200; without a look at the silence it got 204
