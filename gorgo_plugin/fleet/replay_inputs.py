"""Traces and generated conversations as requests of a replay: token ids and block keys, made without any text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from gorgo_plugin.fleet.block_cache import block_keys, finer_keys
from gorgo_plugin.fleet.mooncake import BLOCK_TOKENS, TraceRecord
from gorgo_plugin.fleet.requests import ReplayRequest
from gorgo_plugin.fleet.workload import WorkloadRequest

# A block that more requests than this share is a preamble: that a prompt begins with it says nothing of its history.
_COMMON_SHARE = 0.01


def conversation_requests(requests: Sequence[WorkloadRequest], block_tokens: int) -> list[ReplayRequest]:
    """Generated conversations. A turn's prompt holds the answers before it, so their blocks are found again."""
    return [_conversation_request(request, block_tokens) for request in requests]


def _conversation_request(request: WorkloadRequest, block_tokens: int) -> ReplayRequest:
    def tokens() -> NDArray[np.uint32]:
        return np.concatenate([request.token_ids(), request.reply().ids])

    def blocks() -> list[int]:
        return block_keys(tokens(), block_tokens)

    return ReplayRequest(request.at_s, len(request.token_ids()), request.output_tokens, tokens, blocks, request.session)


def trace_requests(records: Sequence[TraceRecord], stretch: float, block_tokens: int) -> list[ReplayRequest]:
    """A trace, its time stretched `stretch` times, as token ids that are equal where, and only where, it shares blocks.

    The answer of a request is, where a later prompt goes on from it (see `continued_by`), what that prompt holds there;
    otherwise it is like nothing else.
    """
    start_ms = records[0].at_ms
    return [
        ReplayRequest(
            (record.at_ms - start_ms) * stretch / 1e3,
            record.input_tokens,
            record.output_tokens,
            partial(_trace_tokens, path, record.input_tokens + record.output_tokens),
            partial(finer_keys, path, record.input_tokens + record.output_tokens, BLOCK_TOKENS, block_tokens),
            record.session,
        )
        for record, path in zip(records, block_paths(records), strict=True)
    ]


def continued_by(records: Sequence[TraceRecord]) -> dict[int, int]:
    """Which request each request is continued by: index -> index of the next turn, for those that have one.

    The last block of a prompt is rarely full and so has an id of its own: whether the next turn keeps it, and the
    answer behind it, the trace does not say outright. A prompt is taken for the next turn of the latest one all of
    whose full blocks it begins with, the last of them no common preamble, if it is longer by the answer at least.
    Lengths bear that out: half of such prompts of the published trace exceed prompt and answer together by less than 30
    tokens.
    """
    counts = Counter(identity for record in records for identity in record.hash_ids)
    common = {identity for identity, count in counts.items() if count > _COMMON_SHARE * len(records)}
    latest: dict[int, int] = {}  # last full block -> the latest request that ends there
    found: dict[int, int] = {}
    for index, record in enumerate(records):
        for depth in range(len(record.hash_ids), 0, -1):
            earlier = latest.get(record.hash_ids[depth - 1])
            if earlier is None or earlier in found:
                continue
            if record.input_tokens >= records[earlier].input_tokens + records[earlier].output_tokens:
                found[earlier] = index
                break
        full = record.input_tokens // BLOCK_TOKENS
        if full and record.hash_ids[full - 1] not in common:
            latest[record.hash_ids[full - 1]] = index
    return found


def block_paths(records: Sequence[TraceRecord]) -> list[list[int]]:
    """One number from 0 for each trace block of prompt and answer, per request; equal numbers are equal prefixes."""
    numbers: dict[int, int] = {}
    for record in records:
        for identity in record.hash_ids:
            numbers.setdefault(identity, len(numbers))
    fresh = iter(range(len(numbers), 2**62))
    following = continued_by(records)
    paths: list[list[int]] = [[] for _ in records]
    for index in range(len(records) - 1, -1, -1):  # the last turn first: it says what the earlier ones answered
        record = records[index]
        needed = math.ceil((record.input_tokens + record.output_tokens) / BLOCK_TOKENS)
        if index in following:
            paths[index] = paths[following[index]][:needed]
        else:
            own = [numbers[identity] for identity in record.hash_ids]
            paths[index] = own + _take(fresh, needed - len(own))
    return paths


def _take(numbers: Iterator[int], count: int) -> list[int]:
    return [next(numbers) for _ in range(count)]


def _trace_tokens(path: Sequence[int], tokens: int) -> NDArray[np.uint32]:
    numbers = np.array(path, dtype=np.uint32) * np.uint32(BLOCK_TOKENS)
    ids: NDArray[np.uint32] = np.add.outer(numbers, np.arange(BLOCK_TOKENS, dtype=np.uint32)).reshape(-1)
    return ids[:tokens]
