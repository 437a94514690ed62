"""From what the engines answered to the rows of the table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tests.real_engine.engines import BLOCK_TOKENS, NAMES
from tests.real_engine.gateway import Turn
from tests.real_engine.replay import Asked, Crossing

FORGOTTEN_SHARE = 0.5  # a conversation of which the engine found less than this of its history has been evicted


@dataclass(frozen=True, slots=True)
class Check:
    """One row: what was looked at, the figure, and whether it is as it must be (None: a figure without a verdict)."""

    name: str
    figure: str
    passed: bool | None = None


def counted(asked: Sequence[Asked]) -> list[Check]:
    """Local token counts against the engines'."""
    rows = []
    for model in sorted({one.turn.model for one in asked}):
        turns = [one.turn for one in asked if one.turn.model == model]
        equal = sum(len(turn.tokens) == turn.prompt_tokens for turn in turns)
        tokens = sum(turn.prompt_tokens for turn in turns)
        figure = f"{equal} of {len(turns)} prompts equal, {tokens:,} tokens"
        rows.append(Check(f"token count = usage.prompt_tokens, template '{model}'", figure, equal == len(turns)))
    return rows


def estimated(asked: Sequence[Asked]) -> list[Check]:
    """Estimated cached tokens against the reported ones, from prompts and usage alone.

    What an engine keeps of its own answers cannot be read from prompts: whether they come back as the same tokens is
    the client's, the template's and the tokenizer's doing. An estimate may leave them out, which only the second row
    counts as error, or expect them by what was reported before: the first report of a model group is left out.
    """
    first = {one.turn.model: one for one in reversed(asked) if one.before is not None}
    judged = [one for one in asked if one is not first.get(one.turn.model)]
    over = [one.turn.over_tokens for one in judged]
    least = [-BLOCK_TOKENS - one.generated_cached_tokens for one in judged]
    inside = sum(low <= tokens <= BLOCK_TOKENS for low, tokens in zip(least, over, strict=True))
    apart = f"{inside} of {len(over)}, most {max(over):+d}"
    whole = (
        f"{sum(abs(tokens) <= BLOCK_TOKENS for tokens in over)} of {len(over)}, least {min(over):+d}; {_error(judged)}"
    )
    return [
        Check("cached tokens: estimate within a block, answers apart", apart, inside == len(over)),
        Check("cached tokens: estimate within a block, answers counted", whole),
    ]


def _error(asked: Sequence[Asked]) -> str:
    over = np.array([one.turn.over_tokens for one in asked])
    share = np.abs(over).sum() / sum(one.turn.prompt_tokens for one in asked)
    return f"{np.count_nonzero(over == 0)} equal, mean |error| {share:.2%} of prompt tokens"


def exact(asked: Sequence[Asked], name: str, surprises: int = 0) -> Check:
    """Estimates that must be what the engine reports, to the token, but for so many that nothing could tell."""
    over = [one.turn.over_tokens for one in asked]
    wrong = sum(tokens != 0 for tokens in over)
    figure = f"{len(over) - wrong} of {len(over)} equal, most {max(over):+d} and {min(over):+d}"
    return Check(f"with KV events, estimate = reported: {name}", figure, wrong <= surprises)


def generated(asked: Sequence[Asked]) -> list[Check]:
    """How much of the answers the engines found again in the next prompt, and how much of that was expected."""
    kinds = {"words": "whole words", "headers": "whole words, trimmed", "chatml": "random tokens"}
    rows = []
    for model, kind in kinds.items():
        mine = [one for one in asked if one.turn.model == model]
        kept, found = sum(one.generated_tokens for one in mine), sum(one.generated_cached_tokens for one in mine)
        expected = sum(max(one.generated_cached_tokens + min(one.turn.over_tokens, 0), 0) for one in mine)
        figure = f"{found:,} of {kept:,} tokens ({found / max(kept, 1):.0%}), {expected:,} of them expected"
        rows.append(Check(f"answers of {kind} found cached a turn later", figure))
    return rows


def returned(asked: Sequence[Asked]) -> list[Check]:
    """Whether later turns went where the conversation is cached."""
    rows = []
    for name, later in (("second", [one for one in asked if one.number == 1]), ("later", [*asked])):
        pairs = [(one.turn.replica, one.before.replica) for one in later if one.before is not None]
        same = sum(now == before for now, before in pairs)
        figure = f"{same} of {len(pairs)} ({same / len(pairs):.0%})"
        rows.append(Check(f"{name} turns on the replica that has the conversation", figure, same == len(pairs)))
    first = [one.turn.replica for one in asked if one.before is None]
    spread = ", ".join(f"{first.count(name)} on {name}" for name in NAMES)
    rows.append(Check("conversations begun", spread, all(map(first.count, NAMES))))
    return rows


def crossed(crossings: Sequence[Crossing]) -> list[Check]:
    """Whether short prompts avoided the replica with a long one in flight."""
    during = [crossing for crossing in crossings if crossing.in_time]
    shorts = [(short.replica, crossing.long.replica) for crossing in during for short in crossing.shorts]
    away = sum(short != long for short, long in shorts)
    long_ms = statistics.median(crossing.long.ttft_ms for crossing in crossings)
    short_ms = statistics.median(short.ttft_ms for crossing in crossings for short in crossing.shorts)
    tokens = statistics.median(crossing.long.prompt_tokens for crossing in crossings)
    figure = (
        f"{away} of {len(shorts)} beside {len(during)} prompts of {tokens:,.0f} tokens; "
        f"TTFT {short_ms:.0f} ms beside {long_ms:,.0f}"
    )
    return [Check("a long prompt in flight sends others away", figure, bool(shorts) and away == len(shorts))]


def at_the_margin(asked: Sequence[Asked]) -> Check:
    """Estimates when a cache has just begun to overflow."""
    wrong = sum(one.turn.over_tokens > BLOCK_TOKENS for one in asked)
    gone = sum(_was_evicted(one) for one in asked)
    figure = f"{wrong} of {len(asked)} too high by more than a block, {gone} had been evicted; {_error(asked)}"
    return Check("a cache that begins to overflow", figure)


def evicted(asked: Sequence[Asked], filled: Mapping[str, float], flooded: str) -> list[Check]:
    """Whether an overfilled cache was forgotten, its size being known.

    The verdict is on the model group that overfilled it. The others are other names of the same model in the same
    cache, which the gateway cannot know.
    """
    rows: list[Check] = []
    for mine, name in (
        ([one for one in asked if one.turn.model == flooded], "an overfilled cache is forgotten: its size known"),
        ([one for one in asked if one.turn.model != flooded], "the same for other names in the same cache"),
    ):
        wrong = sum(one.turn.over_tokens > BLOCK_TOKENS for one in mine)
        gone = sum(_was_evicted(one) for one in mine)
        figure = f"{wrong} of {len(mine)} too high by more than a block, {gone} had been evicted"
        rows.append(Check(name, figure, wrong == 0 < gone if not rows else None))
    times = ", ".join(f"{name} {times:.1f} times" for name, times in filled.items())
    return [replace(rows[0], figure=f"{rows[0].figure}; filled {times}"), rows[1]]


def corrected(first: Sequence[Asked], second: Sequence[Asked]) -> list[Check]:
    """Whether usage taught what was evicted, the size being taken for far more than it is.

    Engines evict what was least recently used, so one missing block tells that all that was last used before it is
    gone. The conversations came back latest first: one surprise per replica then tells of all the others.
    """
    wrong = [one for one in first if one.turn.over_tokens > BLOCK_TOKENS]
    gone = sum(_was_evicted(one) for one in first)
    most = max(sum(one.turn.replica == name for one in wrong) for name in NAMES)
    figure = (
        f"{len(wrong)} of {len(first)} estimates too high, at most {most} for a replica, before usage had told; "
        f"{gone} had been evicted"
    )
    again = [one.turn.over_tokens for one in second]
    still = sum(over > BLOCK_TOKENS for over in again)
    return [
        Check("an overfilled cache is forgotten: told by usage", figure, 0 < most <= 1),
        Check("the turn after", f"{still} of {len(again)} estimates too high, most {max(again):+d}", still == 0),
    ]


def _was_evicted(one: Asked) -> bool:
    return one.before is not None and one.turn.cached_tokens < FORGOTTEN_SHARE * one.before.prompt_tokens


def predicted(turns: Sequence[Turn]) -> Check:
    """Predicted against actual TTFT; what the client sees holds the proxy's own time before the dispatch as well."""
    said = np.array([turn.predicted_ms for turn in turns])
    was = np.array([turn.ttft_ms for turn in turns])
    late = was - said
    error, offset = np.median(np.abs(late)), np.median(late)
    around = np.median(np.abs(late - offset))
    correlation = float(np.corrcoef(_ranks(said), _ranks(was))[0, 1])
    figure = (
        f"median |error| {error:.0f} ms of {np.median(was):.0f}, {around:.0f} around its median {offset:+.0f}; "
        f"rank correlation {correlation:.3f}, {len(turns)} requests"
    )
    return Check("predicted against actual TTFT", figure)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.intp]:
    """Ranks from 0; ties keep their order, which in a few hundred real times there are hardly any of."""
    return np.argsort(np.argsort(values, kind="stable"), kind="stable")
