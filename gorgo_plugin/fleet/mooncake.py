"""Traces in Mooncake's format as workloads: real arrivals and lengths, and text with exactly the recorded sharing.

A line is one request: `timestamp` (ms), `input_length` and `output_length` (tokens), and `hash_ids`, one id for each
512 tokens of the prompt, equal ids being equal prefixes. The text itself was never published; here each id names a
passage, so that two prompts share text where, and only where, the recorded ones shared blocks.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gorgo_plugin.fleet.passages import Passage
from gorgo_plugin.fleet.workload import Message, WorkloadError, WorkloadRequest

BLOCK_TOKENS = 512
_MESSAGE_BLOCKS = 4  # blocks of one message: long enough that templates add nothing, short enough that turns share some
_UNIVERSAL_SHARE = 0.5  # a block in more requests than this is a common preamble and tells no conversation apart
_WINDOW_SAMPLES = 8  # draws of conversations tried per window before a longer one is taken
_LENGTH_TOLERANCE = 0.1  # a window whose prompts are longer or shorter by more would be another load than the trace


@dataclass(frozen=True, slots=True)
class TraceRecord:
    """One line of a trace: arrival in milliseconds, lengths in tokens, block ids, and the session derived from them."""

    at_ms: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]
    session: str


@dataclass(frozen=True, slots=True)
class TraceWindow:
    """A part of a trace.

    Attributes:
        records: the requests, in order of arrival.
        reuse: share of their prompt tokens that one endless, at first empty cache would have held.
        span_ms: milliseconds from the start to the end of the stretch of trace they were taken from.
        kept: share of that stretch's requests that are in the window (whole conversations).
        first: index of the stretch's first request in the trace.
    """

    records: tuple[TraceRecord, ...]
    reuse: float
    span_ms: float
    kept: float
    first: int


def read_trace(path: Path) -> list[TraceRecord]:
    """Read a trace, in order of arrival.

    Raises:
        WorkloadError: the file cannot be read, or a line is not what the format says; names the line and the field.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"trace {path}: cannot be read: {error}") from None
    rows = [_parse(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise WorkloadError(f"trace {path}: holds no request")
    rows.sort(key=lambda row: row[0])
    counts = Counter(identity for _at, _in, _out, ids in rows for identity in set(ids))
    universal = {identity for identity, count in counts.items() if count > _UNIVERSAL_SHARE * len(rows)}
    return [
        TraceRecord(at_ms, tokens, output, ids, _session(ids, universal, index))
        for index, (at_ms, tokens, output, ids) in enumerate(rows)
    ]


def _session(ids: tuple[int, ...], universal: set[int], index: int) -> str:
    """The first block that is not everybody's; a prompt of nothing but common blocks is a session of its own."""
    return next((f"block-{identity}" for identity in ids if identity not in universal), f"request-{index}")


def _parse(path: Path, number: int, line: str) -> tuple[float, int, int, tuple[int, ...]]:
    where = f"trace {path}, line {number}"
    try:
        row: Any = json.loads(line)
    except ValueError:
        raise WorkloadError(f"{where}: expected one JSON object") from None
    if not isinstance(row, dict):
        raise WorkloadError(f"{where}: expected one JSON object")
    for name in ("timestamp", "input_length", "output_length"):
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise WorkloadError(f"{where}: {name}: expected a number from 0, got {value!r:.80}")
    ids = row.get("hash_ids")
    if not isinstance(ids, list) or not all(isinstance(identity, int) and identity >= 0 for identity in ids):
        raise WorkloadError(f"{where}: hash_ids: expected a list of whole numbers from 0")
    tokens, output = int(row["input_length"]), int(row["output_length"])
    if tokens < 1 or not len(ids) * BLOCK_TOKENS - BLOCK_TOKENS < tokens <= len(ids) * BLOCK_TOKENS:
        raise WorkloadError(f"{where}: {tokens} tokens do not fill {len(ids)} blocks of {BLOCK_TOKENS}")
    return float(row["timestamp"]), tokens, max(1, output), tuple(ids)


def pick_window(records: Sequence[TraceRecord], count: int, min_reuse: float = 0.35, seed: int = 0) -> TraceWindow:
    """`count` requests whose prefix reuse is at least `min_reuse`.

    The turns of a conversation lie minutes apart, so a few hundred consecutive requests hold few second turns. Whole
    conversations are therefore drawn from a stretch of the trace, the shortest that gives the reuse asked for
    (`count` requests, twice as many, and so on); all turns of a drawn conversation that lie in it are kept. Of the
    draws, the first with that reuse whose mean prompt is within a tenth of the trace's is taken.

    Raises:
        WorkloadError: the trace has fewer requests, or no stretch gives that reuse; names the best found.
    """
    if count > len(records):
        raise WorkloadError(f"requests: the trace has {len(records)}, {count} were asked for")
    rng = np.random.default_rng(seed)
    usual_tokens = _mean_tokens(records)
    best = 0.0
    length = count
    while True:
        length = min(length, len(records))
        for first in dict.fromkeys(range(0, len(records) - length + 1, max(1, length // 2))):
            for _ in range(1 if length == count else _WINDOW_SAMPLES):
                window = _draw(records, first, length, count, rng)
                if abs(_mean_tokens(window.records) / usual_tokens - 1) > _LENGTH_TOLERANCE:
                    continue
                if window.reuse >= min_reuse:
                    return window
                best = max(best, window.reuse)
        if length == len(records):
            raise WorkloadError(f"min_reuse: no window of {count} requests reuses {min_reuse:.0%}; the best {best:.0%}")
        length *= 2


def _mean_tokens(records: Sequence[TraceRecord]) -> float:
    return sum(record.input_tokens for record in records) / len(records)


def _draw(records: Sequence[TraceRecord], first: int, length: int, count: int, rng: np.random.Generator) -> TraceWindow:
    stretch = records[first : first + length]
    by_session: dict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(stretch):
        by_session[record.session].append(index)
    sessions = list(by_session.values())
    kept: list[int] = []
    for position in rng.permutation(len(sessions)).tolist():
        if len(kept) >= count:
            break
        kept += sessions[position]
    chosen = tuple(stretch[index] for index in sorted(kept)[:count])
    return TraceWindow(chosen, reuse_share(chosen), stretch[-1].at_ms - stretch[0].at_ms, count / length, first)


def reuse_share(records: Sequence[TraceRecord]) -> float:
    """Share of the prompt tokens that one endless, at first empty cache would have held."""
    seen: set[int] = set()
    tokens = reused = 0
    for record in records:
        matched = 0
        for identity in record.hash_ids:
            if identity not in seen:
                break
            matched += 1
        seen.update(record.hash_ids)
        tokens += record.input_tokens
        reused += min(matched * BLOCK_TOKENS, record.input_tokens - 1)
    return reused / tokens


def trace_requests(window: TraceWindow, stretch: float, max_output_tokens: int | None = None) -> list[WorkloadRequest]:
    """The window as requests with text, arriving at the trace's rate slowed down `stretch` times.

    Where the window keeps a share of the conversations, time is shortened by that share, so that the rate of arrivals
    stays the trace's.
    """
    scale_s = window.kept * stretch / 1e3
    start_ms = window.records[0].at_ms
    return [
        WorkloadRequest(
            (record.at_ms - start_ms) * scale_s,
            record.session,
            min(record.output_tokens, max_output_tokens or record.output_tokens),
            _messages(record),
        )
        for record in window.records
    ]


def _messages(record: TraceRecord) -> tuple[Message, ...]:
    """Blocks in groups by position, so that prompts with equal blocks have equal messages."""
    sizes = [BLOCK_TOKENS] * (len(record.hash_ids) - 1)
    sizes.append(record.input_tokens - sum(sizes))
    passages = [Passage(f"block/{identity}", tokens) for identity, tokens in zip(record.hash_ids, sizes, strict=True)]
    groups = [passages[start : start + _MESSAGE_BLOCKS] for start in range(0, len(passages), _MESSAGE_BLOCKS)]
    return tuple(Message("user", tuple(group)) for group in groups)
