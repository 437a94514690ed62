"""What `make real-engine` decides before an engine runs, and from what one answered; no engine runs here."""

from __future__ import annotations

import platform
import sys

import numpy as np
import pytest

from tests.real_engine import checks, run
from tests.real_engine.conversations import Conversation, conversations
from tests.real_engine.engines import BLOCK_TOKENS
from tests.real_engine.gateway import Turn
from tests.real_engine.replay import Asked


def turn(tokens: int, estimated: int, cached: int, output: int = 0, replica: str = "alpha") -> Turn:
    return Turn(
        "chatml", replica, np.arange(tokens, dtype=np.uint32), estimated, 50.0, tokens, cached, output, 60.0, ""
    )


def asked(now: Turn, before: Turn | None = None, number: int = 1) -> Asked:
    return Asked(Conversation("c", "chatml", []), number, now, before)


def test_a_machine_without_a_build_of_the_engine_is_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    monkeypatch.setattr(sys, "argv", ["run"])
    assert run.main() == 77
    printed = capsys.readouterr().out
    assert printed.startswith("SKIPPED: ")
    assert "riscv64" in printed


def test_an_estimate_may_leave_out_an_answer_but_nothing_of_the_prompt() -> None:
    before = turn(100, 0, 0, output=80)  # 96 tokens of it fill blocks, 160 with its answer
    assert asked(turn(300, 96, 160), before).generated_cached_tokens == 160 - 96
    first = asked(turn(300, 0, 160), before)  # its report is the first that tells how answers come back
    assert checks.estimated([first, asked(turn(300, 96, 160), before)])[0].passed
    assert not checks.estimated([first, asked(turn(300, 0, 160), before)])[0].passed
    assert not checks.estimated([first, asked(turn(300, 160 + 2 * BLOCK_TOKENS, 160), before)])[0].passed


def test_the_last_token_of_an_answer_fills_no_block() -> None:
    assert asked(turn(300, 0, 0), turn(96, 0, 0, output=32)).generated_tokens == 0
    assert asked(turn(300, 0, 0), turn(96, 0, 0, output=33)).generated_tokens == BLOCK_TOKENS


def test_forgetting_counts_only_where_the_engine_had_evicted_something() -> None:
    before, full = turn(1000, 0, 0), {"alpha": 2.0, "beta": 2.0}
    assert checks.evicted([asked(turn(1100, 0, 0), before)], full, "chatml")[0].passed
    assert not checks.evicted([asked(turn(1100, 992, 0), before)], full, "chatml")[0].passed
    assert not checks.evicted([asked(turn(1100, 992, 992), before)], full, "chatml")[0].passed


def test_a_turn_that_left_its_replica_fails_the_check() -> None:
    stayed, left = turn(300, 96, 96), turn(300, 0, 0, replica="beta")
    begun = [asked(turn(100, 0, 0), None, 0), asked(turn(100, 0, 0, replica="beta"), None, 0)]
    assert all(row.passed for row in checks.returned([*begun, asked(stayed, begun[0].turn)]))
    assert not checks.returned([*begun, asked(left, begun[0].turn)])[0].passed


def test_conversations_are_the_same_for_the_same_seed() -> None:
    assert conversations(3) == conversations(3)
    assert conversations(3) != conversations(4)
