from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from gorgo_plugin.cli import main
from gorgo_plugin.fleet.bench_estimator import COLD, LOOKUP, Measured, Plan, Samples, measure, sized_lookup
from gorgo_plugin.fleet.bench_estimator_index import Memory, cached, prompts
from gorgo_plugin.fleet.bench_estimator_prompts import SYSTEM_PROMPTS, Chat, Writer, chatml, conversation_ids
from gorgo_plugin.fleet.bench_estimator_report import CASES, Goal, content, lines, table
from gorgo_plugin.fleet.bench_estimator_sides import OurRouter, fastest_encode
from gorgo_plugin.fleet.terminal import wide_console
from gorgo_plugin.prompt.sources import embedded_tokenizer

TINY = Plan(
    rounds=2,
    prompt_tokens=1_000,
    conversations=4,
    chats=3,
    earlier_chats=2,
    fleets=(2, 3),
    sizes=(2_000, 20_000),
    rival_tokens=2_000,
    lookups=3,
    memory_tokens=20_000,
)


@pytest.fixture(scope="module")
def writer() -> Writer:
    return Writer(embedded_tokenizer().tokenizer)


def made_up(plan: Plan) -> Measured:
    """A run in which they took ten times as long, and a tenth longer in the larger fleet."""
    samples = {}
    for case in (*CASES, *map(sized_lookup, plan.sizes)):
        for place, replicas in enumerate(plan.fleets):
            ours = [1_000 + 100 * place] * 20
            samples[case, replicas] = Samples(ours, [10 * one for one in ours])
    memory = [Memory(side, n, 1_000, size) for n in plan.fleets for side, size in (("ours", 500), ("theirs", 3_500))]
    return Measured(plan, samples, memory, "encode", (990, 1_010))


def test_a_conversation_is_the_same_whenever_it_is_asked_for_and_another_for_another_seed() -> None:
    assert conversation_ids(3, 500, seed=1).tolist() == conversation_ids(3, 500, seed=1).tolist()
    assert conversation_ids(3, 500, seed=1).tolist() != conversation_ids(3, 500, seed=2).tolist()


def test_conversations_share_a_system_prompt_with_every_eighth_and_no_more() -> None:
    one, other, eighth = (conversation_ids(n, 500, seed=0) for n in (0, 1, SYSTEM_PROMPTS))
    assert one[:50].tolist() == eighth[:50].tolist()
    assert one[50:].tolist() != eighth[50:].tolist()
    assert one[:50].tolist() != other[:50].tolist()


def test_a_chat_grows_by_an_answer_and_a_question(writer: Writer) -> None:
    chat = Chat(writer, 0, 600, seed=0)
    before = list(chat.messages)
    chat.grow()
    assert chat.messages[:-2] == before
    assert [message["role"] for message in chat.messages[-2:]] == ["assistant", "user"]


def test_a_chat_that_is_to_be_cold_shares_no_message_with_another(writer: Writer) -> None:
    warm, cold = Chat(writer, 0, 600, seed=0), Chat(writer, SYSTEM_PROMPTS, 600, seed=0, shared_system=False)
    texts = [{message["content"] for message in chat.messages} for chat in (warm, cold)]
    assert texts[0].isdisjoint(texts[1])
    assert Chat(writer, SYSTEM_PROMPTS, 600, seed=0).messages[0] == warm.messages[0]


def test_both_sides_get_the_same_token_ids_of_a_chat(writer: Writer) -> None:
    chat = Chat(writer, 0, 600, seed=0)
    prompt = OurRouter(2).router.prepare(chat.body, "/v1/chat/completions")
    text = chatml(json.loads(chat.body)["messages"])
    _, encode = fastest_encode(embedded_tokenizer().tokenizer, [text])
    assert prompt.tokens.tolist() == encode(text)


def test_cached_tokens_are_counted_once_at_each_replica_that_holds_them() -> None:
    held: dict[int, set[bytes]] = {}
    for replica, ids in prompts(20_000, 200, 3, seed=0):
        prefixes = (ids[:end].tobytes() for end in range(1, len(ids) + 1))
        held.setdefault(replica, set()).update(prefixes)
    assert cached(20_000, 200, 3) == sum(map(len, held.values()))


@pytest.mark.parametrize(
    ("values", "at_most", "verdict"),
    [
        ((15.0,), False, "goal"),
        ((8.0,), False, "floor"),
        ((15.0, 7.9), False, "missed"),
        ((8.0,), True, "goal"),
        ((9.0,), True, "floor"),
        ((8.0, 16.0), True, "missed"),
    ],
)
def test_the_worst_value_decides_what_is_met(values: tuple[float, ...], at_most: bool, verdict: str) -> None:
    goal, floor = (8, 15) if at_most else (15, 8)
    assert Goal(goal, floor, at_most=at_most).verdict(*values) == verdict


def test_every_case_has_a_row_for_each_fleet_with_the_ratio_of_theirs_to_ours() -> None:
    rows = {(row.label, row.replicas): row for row in lines(made_up(TINY))}
    for case in CASES:
        for replicas in TINY.fleets:
            row = rows[case, replicas]
            assert row.ratio is not None
            assert row.ratio.value == pytest.approx(10)
    assert rows[LOOKUP, 2].verdict == "missed"
    assert rows[COLD, 2].verdict == "goal"
    assert rows["memory at 0.001M cached tokens", 2].verdict == "floor"
    assert rows[f"{LOOKUP}: 3 replicas over 2", 3].verdict == "goal"


def test_the_table_and_the_file_hold_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    measured = made_up(TINY)
    rows = lines(measured)
    wide_console().print(table(rows, measured))
    printed = capsys.readouterr().out
    assert all(row.label in printed for row in rows)
    written = json.loads(json.dumps(content(rows, measured)))
    assert [row["label"] for row in written["rows"]] == [row.label for row in rows]
    assert {"machine", "rival", "plan", "encoder", "chat_tokens", "rows", "memory"} == written.keys()


def test_the_table_is_whole_where_the_output_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    measured = made_up(Plan())
    wide_console().print(table(lines(measured), measured))
    printed = capsys.readouterr().out
    assert "theirs p50" in printed
    assert "…" not in printed


def test_without_the_package_of_the_authors_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gorgo", None)
    result = CliRunner().invoke(main, ["bench", "estimator"])
    assert result.exit_code == 1
    assert result.output == (
        "Error: the comparison needs the package of the paper's authors: pip install 'gorgo-lb==0.2.0'\n"
    )


def test_a_small_run_measures_every_case_on_both_sides() -> None:
    pytest.importorskip("gorgo", reason="gorgo-lb, of the extra `bench`, is not installed")
    measured = measure(TINY, lambda _: None)
    rows = lines(measured)
    assert all(np.isfinite(row.ours).all() for row in rows)
    compared = {row.label for row in rows if row.theirs is not None}
    assert compared >= {LOOKUP, COLD, sized_lookup(2_000)}
    assert sized_lookup(20_000) not in compared
    assert len(measured.samples[COLD, 3].ours) == TINY.rounds * TINY.chats
