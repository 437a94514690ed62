from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from gorgo_plugin.fleet.bench_accuracy import SOURCES, Accuracy, bench, summarise
from gorgo_plugin.fleet.mooncake import TraceRecord
from gorgo_plugin.fleet.replay_inputs import block_paths, continued_by, conversation_requests, trace_requests
from gorgo_plugin.fleet.requests import ReplayRequest, Served
from gorgo_plugin.fleet.workload import ConversationSettings, conversations

KV_TOKENS = 120_000  # a sixth of what the conversations would fill


def requests() -> list[ReplayRequest]:
    settings = ConversationSettings(400, rate_per_s=1.5, turns=6.0, think_s=30.0, document_share=0.1)
    return conversation_requests(conversations(0, settings), 16)


@cache
def accuracy(name: str) -> Accuracy:
    return bench(requests(), KV_TOKENS, [source for source in SOURCES if source.name == name])[0]


def test_with_usage_the_estimate_is_true_to_engines_that_evict() -> None:
    row = accuracy("usage")
    assert row.requests == 400
    assert 0.1 < row.cached_share < 0.7
    assert row.error_share < 0.02
    assert row.within_block > 0.95


def test_with_kv_events_the_estimate_is_truer_still() -> None:
    assert accuracy("KV events and usage").error_share < 0.005


def test_reports_make_up_for_a_cache_size_told_wrong() -> None:
    with_usage = accuracy("usage, cache told 30% too large")
    assert with_usage.error_share < 0.5 * accuracy("no feedback, cache told 30% too large").error_share


def test_an_index_that_never_evicts_is_far_from_the_truth() -> None:
    assert accuracy("never evicting, no feedback").over_share > 0.05


def test_a_replay_repeats_itself() -> None:
    (again,) = bench(requests(), KV_TOKENS, [source for source in SOURCES if source.name == "usage"])
    first = accuracy("usage")
    assert (again.error_share, again.cached_share) == (first.error_share, first.cached_share)


def test_figures_tell_over_from_under() -> None:
    served = [
        Served(index, 0.0, "here", "here", 1000, estimated_tokens=estimated, cached_tokens=cached)
        for index, (estimated, cached) in enumerate([(500, 400), (0, 16)])
    ]
    row = summarise("row", served, 16, 0.0)
    assert (row.error_share, row.over_share, row.under_share) == pytest.approx((0.058, 0.05, 0.008))
    assert row.within_block == 0.5


def record(at_ms: float, tokens: int, output: int, *ids: int) -> TraceRecord:
    return TraceRecord(at_ms, tokens, output, ids, "session")


# A turn of 1,100 tokens and 200 of answer, the turn after it, and a prompt that shares its first block only.
RECORDS = [record(0, 1100, 200, 1, 2, 3), record(1e3, 1400, 10, 1, 2, 4), record(2e3, 1100, 10, 1, 5, 6)]


def test_the_next_turn_of_a_trace_is_the_one_that_holds_prompt_and_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gorgo_plugin.fleet.replay_inputs._COMMON_SHARE", 0.9)
    assert continued_by(RECORDS) == {0: 1}
    paths = block_paths(RECORDS)
    assert paths[0] == paths[1]
    assert paths[2][0] == paths[0][0]
    assert not set(paths[2][1:]) & set(paths[0])


def test_a_prompt_too_short_to_hold_the_answer_is_no_next_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gorgo_plugin.fleet.replay_inputs._COMMON_SHARE", 0.9)
    assert continued_by([RECORDS[0], record(1e3, 1250, 10, 1, 2, 4)]) == {}


def test_tokens_and_block_keys_of_a_trace_are_equal_in_the_same_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gorgo_plugin.fleet.replay_inputs._COMMON_SHARE", 0.9)
    coming = trace_requests(RECORDS, 2.0, 16)
    assert [request.at_s for request in coming] == [0.0, 2.0, 4.0]
    for one in coming:
        assert len(one.tokens()) == one.prompt_tokens + one.output_tokens
        for other in coming:
            blocks = min(len(one.blocks()), len(other.blocks()))
            same_keys = np.array(one.blocks()[:blocks]) == np.array(other.blocks()[:blocks])
            tokens = [request.tokens()[: blocks * 16].reshape(-1, 16) for request in (one, other)]
            assert (same_keys == (tokens[0] == tokens[1]).all(axis=1)).all()
