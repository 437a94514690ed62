from __future__ import annotations

import gzip
import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from gorgo_plugin.fleet.block_cache import block_keys
from gorgo_plugin.fleet.mooncake import pick_window, read_trace, reuse_share, trace_requests
from gorgo_plugin.fleet.passages import WORDS, Passage, reply_passage
from gorgo_plugin.fleet.workload import ConversationSettings, WorkloadError, conversations, summarise


def test_a_shorter_passage_is_a_prefix_of_a_longer_one() -> None:
    long, short = Passage("a", 600), Passage("a", 100)
    assert long.text.startswith(short.text + " ")
    assert np.array_equal(long.ids[:100], short.ids)


def test_every_word_is_one_token_of_the_embedded_tokenizer() -> None:
    packed = resources.files("gorgo_plugin.prompt").joinpath("embedded.json.gz").read_bytes()
    tokenizer = Tokenizer.from_str(gzip.decompress(packed).decode())
    assert len(set(WORDS)) == 256
    assert [word for word in WORDS if len(tokenizer.encode(" " + word, add_special_tokens=False).ids) != 1] == []


def test_conversations_have_the_reuse_and_the_load_they_promise() -> None:
    for seed in range(4):
        summary = summarise(conversations(seed))
        assert summary.requests == 300
        assert 0.75 < summary.reuse < 0.87
        assert 0.22 < summary.prefill_load(0.09, 15.0, engines=3) < 0.4
        assert summary.prefill_load(0.09, 15.0, engines=1) > 0.7


def test_the_same_seed_gives_the_same_conversations_and_another_seed_others() -> None:
    assert conversations(3) == conversations(3)
    assert conversations(3)[0] != conversations(4)[0]


def test_a_turn_holds_the_turn_before_it_and_the_reply_to_it() -> None:
    by_session: dict[str, list[str]] = {}
    for request in conversations(0, ConversationSettings(requests=100)):
        turn = json.dumps(request.chat_messages())[:-1]
        earlier = by_session.setdefault(request.session, [])
        if earlier:
            assert turn.startswith(earlier[-1])
        earlier.append(turn + ', {"role": "assistant", "content": "' + request.reply().text)
    assert max(len(turns) for turns in by_session.values()) > 3


def test_arrivals_are_open_loop_at_the_rate_asked_for() -> None:
    gaps = np.diff(
        [request.at_s for request in conversations(0, ConversationSettings(requests=2_000, rate_per_s=20.0))]
    )
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 20.0, rel=0.1)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # exponential gaps: a Poisson process


def test_the_reply_depends_on_the_last_user_text_alone() -> None:
    assert reply_passage("hello", 20) == reply_passage("hello", 20)
    assert reply_passage("hello", 20).text != reply_passage("hello!", 20).text


def write_trace(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(at_ms: float, tokens: int, *ids: int, output: int = 5) -> dict[str, object]:
    return {"timestamp": at_ms, "input_length": tokens, "output_length": output, "hash_ids": list(ids)}


def chats(conversation_count: int, turns: int) -> list[object]:
    """Conversations whose turns lie 1,000 ms apart; block 0 is everybody's."""
    rows = []
    for conversation in range(conversation_count):
        ids = [0]
        for turn in range(turns):
            ids = [*ids, 1 + conversation * turns + turn]
            rows.append(row(turn * 1_000 + conversation * 5, 512 * len(ids), *ids))
    return rows


def test_a_traces_prompts_share_text_where_and_only_where_they_share_blocks(tmp_path: Path) -> None:
    rows: list[object] = [row(0, 1500, 0, 1, 2), row(5, 3000, 0, 1, 2, 3, 4, 5), row(9, 1024, 0, 6)]
    window = pick_window(read_trace(write_trace(tmp_path / "t", rows)), 3, min_reuse=0.0)
    first, second, third = (request.chat_messages()[0]["content"] for request in trace_requests(window, 1.0))
    words = [text.split(" ") for text in (first, second, third)]
    assert len(words[0]) == 1500
    assert words[1][:1500] == words[0]
    assert words[2][:512] == words[0][:512]
    assert sum(a == b for a, b in zip(words[2][512:], words[0][512:], strict=False)) < 20


def test_a_traces_token_ids_have_the_recorded_reuse(tmp_path: Path) -> None:
    records = read_trace(write_trace(tmp_path / "t", chats(20, 6)))
    seen: set[int] = set()
    tokens = hits = 0
    for request in trace_requests(pick_window(records, len(records), 0.0), 1.0):
        keys = block_keys(request.token_ids(), 16)
        hits += 16 * sum(key in seen for key in keys)
        tokens += len(request.token_ids())
        seen.update(keys)
    assert hits / tokens == pytest.approx(reuse_share(records), abs=0.02)


def test_a_window_is_lengthened_until_it_has_the_reuse_asked_for(tmp_path: Path) -> None:
    records = read_trace(write_trace(tmp_path / "t", chats(200, 6)))
    assert reuse_share(pick_window(records, 120, min_reuse=0.0).records) < 0.6
    window = pick_window(records, 120, min_reuse=0.7)
    assert len(window.records) == 120
    assert window.reuse == reuse_share(window.records) >= 0.7
    assert window.kept < 1.0


def test_a_window_without_the_reuse_asked_for_is_refused_with_the_best_there_is(tmp_path: Path) -> None:
    records = read_trace(write_trace(tmp_path / "t", [row(i, 1024, 0, i + 1) for i in range(50)]))
    with pytest.raises(WorkloadError, match="reuses 90%; the best 4"):
        pick_window(records, 10, min_reuse=0.9)
    with pytest.raises(WorkloadError, match="the trace has 50, 51 were asked for"):
        pick_window(records, 51)


def test_a_window_of_some_conversations_arrives_at_the_traces_rate_divided_by_the_stretch(tmp_path: Path) -> None:
    records = read_trace(write_trace(tmp_path / "t", chats(200, 6)))  # one every 5 ms
    window = pick_window(records, 300, min_reuse=0.7)
    requests = trace_requests(window, stretch=3.0)
    assert window.kept < 1.0
    assert requests[0].at_s == 0.0
    assert requests[-1].at_s / (len(requests) - 1) == pytest.approx(0.005 * 3.0, rel=0.05)


def test_a_session_is_a_conversations_first_block_that_is_not_everybodys(tmp_path: Path) -> None:
    records = read_trace(write_trace(tmp_path / "t", [*chats(5, 3), row(99, 100, 0)]))
    assert len({record.session for record in records}) == 6
    assert [record.session for record in records if record.hash_ids[1:2] == (1,)] == ["block-1"] * 3


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("[]", "line 1: expected one JSON object"),
        ("{", "line 1: expected one JSON object"),
        (json.dumps(row(0, 513, 0)), "513 tokens do not fill 1 blocks"),
        (json.dumps(row(0, 0)), "0 tokens do not fill 0 blocks"),
        (json.dumps({**row(0, 5, 0), "timestamp": "now"}), "timestamp: expected a number"),
        (json.dumps({**row(0, 5, 0), "hash_ids": [-1]}), "hash_ids: expected a list"),
        ("", "holds no request"),
    ],
)
def test_a_line_that_is_not_of_the_format_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line)
    with pytest.raises(WorkloadError, match=complaint):
        read_trace(path)


def test_a_trace_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"nothing\.jsonl: cannot be read"):
        read_trace(tmp_path / "nothing.jsonl")
