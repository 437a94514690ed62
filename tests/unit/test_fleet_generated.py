from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from gorgo_plugin.fleet.agent_turns import agent_turns
from gorgo_plugin.fleet.chat_turns import ChatSettings, chat_turns
from gorgo_plugin.fleet.generated import NAMES, generate
from gorgo_plugin.fleet.requests import ReplayRequest
from gorgo_plugin.fleet.turns import TokenTree, Turn
from gorgo_plugin.fleet.workload import WorkloadError

SEEDS = range(6)
BLOCK_TOKENS = 16


def reuse(turns: Sequence[Turn]) -> float:
    """Share of the prompts' blocks that one endless cache, at first empty, would have held."""
    seen: set[int] = set()
    blocks = reused = 0
    for turn in turns:
        keys = turn.whole.block_keys(BLOCK_TOKENS)
        own = keys[: turn.prompt.tokens // BLOCK_TOKENS]
        blocks += len(own)
        reused += next((place for place, key in enumerate(own) if key not in seen), len(own))
        seen.update(keys)
    return reused / blocks


@cache
def chat_figures(seed: int) -> dict[str, float]:
    turns = chat_turns(seed)
    lengths = np.array([turn.prompt.tokens for turn in turns])
    users = len({turn.session for turn in turns})
    return {
        "requests": len(turns),
        "span_s": turns[-1].at_s - turns[0].at_s,
        "users": users,
        "requests_per_user": len(turns) / users,
        "median": float(np.median(lengths)),
        "mean": float(lengths.mean()),
        "p95": float(np.percentile(lengths, 95)),
        "longest": float(lengths.max()),
        "longest_output": max(turn.output_tokens for turn in turns),
        "multi_turn": float(np.mean([turn.history > 0 for turn in turns])),
        "reuse": reuse(turns),
    }


# Published of ART-Chat's windows; the tolerance is of one seed and of the mean over the seeds.
@pytest.mark.parametrize(
    ("figure", "published", "of_one", "of_mean"),
    [
        ("requests", 7_200, 0.02, 0.015),
        ("span_s", 1_800, 0.02, 0.015),
        ("users", 580, 0.02, 0.02),
        ("requests_per_user", 12.8, 0.02, 0.015),
        ("median", 5_638, 0.05, 0.025),
        ("mean", 6_877, 0.05, 0.025),
        ("p95", 19_886, 0.08, 0.025),
        ("multi_turn", 0.74, 0.03, 0.015),
        ("reuse", 0.788, 0.03, 0.015),
    ],
)
def test_chats_have_the_published_figures(figure: str, published: float, of_one: float, of_mean: float) -> None:
    found = [chat_figures(seed)[figure] for seed in SEEDS]
    assert found == pytest.approx([published] * len(found), rel=of_one)
    assert np.mean(found) == pytest.approx(published, rel=of_mean)


def test_chats_keep_the_published_limits() -> None:
    for seed in SEEDS:
        assert chat_figures(seed)["longest"] <= 24_000
        assert chat_figures(seed)["longest_output"] <= 128


@pytest.mark.parametrize("rate_scale", [1.0, 4.0])
def test_chats_arrive_evenly_once_the_first_users_are_there(rate_scale: float) -> None:
    at_s = np.array([turn.at_s for turn in chat_turns(0, rate_scale)])
    counts = np.histogram(at_s, 10, (0.0, 1_800.0 / rate_scale))[0] / (len(at_s) / 10)
    assert counts[1:-1] == pytest.approx([1.06] * 8, abs=0.06)
    assert min(counts[0], counts[-1]) > 0.5


def test_chats_arrive_as_much_faster_as_asked_for() -> None:
    faster = chat_turns(0, 3.0)
    assert len(faster) == chat_figures(0)["requests"]
    assert faster[-1].at_s == pytest.approx(chat_figures(0)["span_s"] / 3.0, rel=0.02)


def test_a_rate_that_leaves_no_time_for_answers_is_refused() -> None:
    with pytest.raises(WorkloadError, match="rate_scale: expected less than 12"):
        chat_turns(0, 12.0)


def test_the_chats_figures_follow_the_settings() -> None:
    turns = chat_turns(0, settings=ChatSettings(fresh_share=0.5))
    assert np.mean([turn.history > 0 for turn in turns]) < 0.55


def test_agents_reuse_most_of_contexts_of_tens_of_thousands_of_tokens() -> None:
    for seed in range(3):
        turns = agent_turns(seed)
        lengths = np.array([turn.prompt.tokens for turn in turns])
        assert 0.84 < reuse(turns) < 0.90
        assert 18_000 < np.median(lengths) < 25_000
        assert lengths.max() <= 40_000
        assert 50 <= min(turn.output_tokens for turn in turns) < max(turn.output_tokens for turn in turns) <= 300
        assert 4_000 < len(turns) < 7_000


def test_agents_compact_contexts_and_fork_in_parallel() -> None:
    by_session = sessions(agent_turns(0))
    lengths = [[turn.prompt.tokens for turn in turns] for turns in by_session.values()]
    assert any(max(one[:-1], default=0) > 38_000 and min(one[1:]) < 20_000 for one in lengths if len(one) > 10)
    continued = defaultdict(int)
    for turns in by_session.values():
        for turn in turns:
            continued[id(turn.prompt.before)] += turn.history > 0
    assert max(continued.values()) >= 3


def test_tasks_begin_as_much_faster_as_asked_for_and_take_as_long_as_before() -> None:
    slow, fast = ({turn.session for turn in agent_turns(0, scale)} for scale in (1.0, 2.0))
    assert len(fast) == pytest.approx(len(slow), rel=0.05)
    assert agent_turns(0, 2.0)[-1].at_s < 750.0
    first = [turns[:3] for turns in sessions(agent_turns(0, 2.0)).values()]
    assert np.mean([turns[1].at_s - turns[0].at_s for turns in first if len(turns) > 1]) > 4.0


def sessions(turns: Sequence[Turn]) -> dict[str, list[Turn]]:
    found: dict[str, list[Turn]] = defaultdict(list)
    for turn in turns:
        found[turn.session].append(turn)
    return found


@pytest.mark.parametrize("make", [chat_turns, agent_turns])
@pytest.mark.parametrize("rate_scale", [1.0, 3.0])
def test_no_turn_comes_before_the_answer_that_it_goes_on_from(make: object, rate_scale: float) -> None:
    turns = make(1, rate_scale)  # type: ignore[operator]
    answered_s = {id(turn.whole): turn.answered_s for turn in turns}
    continued = [turn for turn in turns if id(turn.prompt.before) in answered_s]
    assert len(continued) > len(turns) / 2
    assert min(turn.at_s - answered_s[id(turn.prompt.before)] for turn in continued) >= 0.0


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_requests_and_another_seed_others(name: str) -> None:
    first, again, other = (generate(name, seed) for seed in (3, 3, 4))
    assert [facts(request) for request in first] == [facts(request) for request in again]
    assert [facts(request) for request in first] != [facts(request) for request in other]
    for one, same in zip(first[::500], again[::500], strict=True):
        assert np.array_equal(one.tokens(), same.tokens())
        assert one.blocks() == same.blocks()


def facts(request: ReplayRequest) -> tuple[object, ...]:
    return request.at_s, request.prompt_tokens, request.output_tokens, request.session


@pytest.mark.parametrize("name", NAMES)
def test_requests_come_in_order_each_with_a_session_and_all_its_tokens(name: str) -> None:
    requests = generate(name, 0)
    assert all(earlier.at_s <= later.at_s for earlier, later in pairwise(requests))
    assert all(request.session for request in requests)
    for request in requests[::100]:
        total = request.prompt_tokens + request.output_tokens
        assert len(request.tokens()) == total
        assert len(request.blocks()) == total // BLOCK_TOKENS


@pytest.mark.parametrize("name", NAMES)
def test_block_keys_are_equal_where_and_only_where_all_tokens_up_to_there_are(name: str) -> None:
    chosen = generate(name, 2)[-400::4]
    keys = [request.blocks() for request in chosen]
    tokens = [request.tokens() for request in chosen]
    shared = 0
    for one in range(len(chosen)):
        for other in range(one):
            blocks = min(len(keys[one]), len(keys[other]))
            differing = np.nonzero(tokens[one][: blocks * BLOCK_TOKENS] != tokens[other][: blocks * BLOCK_TOKENS])[0]
            common = int(differing[0]) // BLOCK_TOKENS if len(differing) else blocks
            assert keys[one][:common] == keys[other][:common]
            assert not set(keys[one][common:]) & set(keys[other][common:])
            shared += common > 0
    assert shared > len(chosen)


@pytest.mark.parametrize("make", [chat_turns, agent_turns])
def test_a_prompt_holds_the_answer_before_it(make: object) -> None:
    turns = make(0)  # type: ignore[operator]
    by_answer = {id(turn.whole): turn for turn in turns}
    pairs = [(by_answer[id(turn.prompt.before)], turn) for turn in turns if id(turn.prompt.before) in by_answer]
    for earlier, later in pairs[::50]:
        assert np.array_equal(later.whole.ids()[: earlier.whole.tokens], earlier.whole.ids())
        assert earlier.session == later.session


def test_block_keys_follow_the_size_of_a_block() -> None:
    (first, *_), (same, *_) = (generate("agentic", 0, block_tokens=size) for size in (16, 64))
    assert len(same.blocks()) == len(first.tokens()) // 64
    assert list(same.blocks()) == list(first.blocks())[3::4]


def test_a_tree_never_hands_out_an_id_twice() -> None:
    tree = TokenTree()
    stem = tree.grow(None, 5)
    left, right = tree.grow(stem, 3), tree.grow(stem, 4)
    assert left.ids().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert right.ids().tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 11]


def test_an_unknown_workload_is_named_with_the_known_ones() -> None:
    with pytest.raises(WorkloadError, match="expected one of conversations, art-chat, agentic, got 'chat'"):
        generate("chat", 0)
    with pytest.raises(WorkloadError, match="rate_scale: expected a number above 0, got 0"):
        generate("art-chat", 0, rate_scale=0.0)
