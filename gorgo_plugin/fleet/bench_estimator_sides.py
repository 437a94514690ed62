"""The two sides of `gorgo bench estimator`: this project's router, and the router of the paper's authors, `gorgo-lb`.

Each takes the same steps in the terms of its own documentation: decide, add the prompt to the index, count it as
dispatched; and at the end of the answer take it off again.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from gorgo_plugin.errors import GorgoError
from gorgo_plugin.fleet.bench_estimator_prompts import Ids, chatml
from gorgo_plugin.prefix import BlockHasher, PrefixIndex
from gorgo_plugin.router import Router
from gorgo_plugin.settings import Settings

RIVAL = "gorgo-lb==0.2.0"
BLOCK_TOKENS = 16
KV_TOKENS = 200_000_000  # of a replica: the rival never evicts, so neither side does
IN_FLIGHT = 8  # requests dispatched and not yet answered
REQUEST_EVERY_S = 0.02
PROBE_EVERY_S = 2.0
RTT_S = 0.02
CHAT = "/v1/chat/completions"
UNCOUNTED = 2  # decisions at the beginning of a sweep: the processor's caches hold what the other side left there
SECRET = b"bench"  # any: it keys the hashes

Encode = Callable[[str], list[int]]


class RivalMissing(GorgoError):
    """The rival's package is not installed."""

    def __init__(self) -> None:
        super().__init__(f"the comparison needs the package of the paper's authors: pip install '{RIVAL}'")


class Disagreement(GorgoError):
    """The two sides do not do the same work."""


def rival_package() -> Any:
    """The module of the rival's package.

    Raises:
        RivalMissing: it is not installed.
    """
    try:
        module = import_module("gorgo")
        module.RadixTrie  # noqa: B018 (another package may have the name)
    except (ImportError, AttributeError):
        raise RivalMissing from None
    return module


def replica_names(count: int) -> list[str]:
    """Names of a fleet."""
    return [f"replica-{number}" for number in range(count)]


class OurRouter:
    """A `Router` under a clock of its own: a request every 20 ms, a probe of every replica every 2 s."""

    def __init__(self, replicas: int) -> None:
        self._names = replica_names(replicas)
        fleet = [
            {"name": name, "region": name, "url": f"http://127.0.0.1/{name}", "kv_tokens": KV_TOKENS}
            for name in self._names
        ]
        settings = Settings.model_validate({"replicas": fleet, "block_tokens": BLOCK_TOKENS})
        self._now_s = self._probed_s = 0.0
        self.router = Router(settings, clock=lambda: self._now_s, secret=SECRET)
        self._open: deque[int] = deque()
        self._probe()

    def _probe(self) -> None:
        self._probed_s = self._now_s
        for number, name in enumerate(self._names):
            self.router.observe_rtt(name, RTT_S + 0.001 * (number % 3))

    def between(self, flight_id: int) -> int:
        """What happens between two decisions; nanoseconds of the end of one request (first token, finish)."""
        self._open.append(flight_id)
        self._now_s += REQUEST_EVERY_S
        if self._now_s - self._probed_s >= PROBE_EVERY_S:
            self._probe()
        if len(self._open) <= IN_FLIGHT:
            return 0
        ended, router = self._open.popleft(), self.router
        began = time.perf_counter_ns()
        router.first_token(ended)
        router.finish(ended)
        return time.perf_counter_ns() - began


class TheirRouter:
    """The rival's policy `gorgo` over its trie, with the counters its documentation leaves to the caller."""

    def __init__(self, replicas: int, encode: Encode | None = None) -> None:
        package = rival_package()
        self._names = replica_names(replicas)
        self.trie = package.RadixTrie()
        self._insert = self.trie.insert
        self._choose = package.get_policy("gorgo").fn
        self._context = package.RouteContext
        self._encode = encode
        self._metrics = {
            name: package.ReplicaSnapshot(
                num_running_reqs=0,
                num_queue_reqs=0,
                num_used_tokens=0,
                latency=RTT_S,
                network_rtt=RTT_S + 0.001 * (number % 3),
            )
            for number, name in enumerate(self._names)
        }
        self._tokens = dict.fromkeys(self._names, 0)
        self._uncached = dict.fromkeys(self._names, 0)
        self._requests = dict.fromkeys(self._names, 0)
        self._hyperparameters = package.make_default_store()
        self._open: deque[tuple[str, int]] = deque()

    def route(self, ids: list[int]) -> str:
        """Decide, insert and count; returns the target."""
        count = len(ids)
        context = self._context(
            replica_urls=self._names,
            metrics=self._metrics,
            endpoints_queued_tokens=self._tokens,
            endpoints_queued_uncached_tokens=self._uncached,
            endpoints_inflight_requests=self._requests,
            radix_trie=self.trie,
            token_ids=ids,
            request_tokens=count,
            hyperparameters=self._hyperparameters,
        )
        target: str = self._choose(context).target
        self._insert(ids, target)
        self._tokens[target] += count
        self._requests[target] += 1
        return target

    def route_body(self, body: bytes) -> tuple[str, int]:
        """Read a chat, tokenize its prompt as a whole and route it; returns the target and the number of tokens."""
        assert self._encode is not None
        ids = self._encode(chatml(json.loads(body)["messages"]))
        return self.route(ids), len(ids)

    def between(self, target: str, tokens: int) -> None:
        """What happens between two decisions: the oldest of the requests in flight ends."""
        self._open.append((target, tokens))
        if len(self._open) > IN_FLIGHT:
            ended, count = self._open.popleft()
            self._tokens[ended] -= count
            self._requests[ended] -= 1


class Lookups(NamedTuple):
    """Nanoseconds of one lookup each; `theirs` is empty where they have no index."""

    hashing: list[int]
    ours: list[int]
    theirs: list[int]


class Indexes:
    """The two indexes by themselves, with the same prompts at the same replicas."""

    def __init__(self, replicas: int, rival: bool = True) -> None:
        """Two empty ones; ours alone without `rival`."""
        self._names = replica_names(replicas)
        self._hasher = BlockHasher(BLOCK_TOKENS, SECRET)
        self._ours = PrefixIndex()
        for slot in range(replicas):
            self._ours.set_capacity(slot, KV_TOKENS // BLOCK_TOKENS)
        self._theirs = rival_package().RadixTrie() if rival else None

    def add(self, ids: Ids, slot: int) -> None:
        """Note that the replica has the prompt."""
        self._ours.credit(slot, self._hasher.hashes(ids))
        if self._theirs is not None:
            self._theirs.insert(ids.tolist(), self._names[slot])

    def our_match(self, ids: Ids) -> tuple[int, int, list[int]]:
        """Nanoseconds of our hashing and of our lookup of one prompt, and the blocks that each replica has."""
        began = time.perf_counter_ns()
        hashes = self._hasher.hashes(ids)
        hashed = time.perf_counter_ns()
        found = self._ours.blocks(hashes, len(self._names))
        ended = time.perf_counter_ns()
        return hashed - began, ended - hashed, found.astype(int).tolist()

    def their_match(self, ids: Ids) -> tuple[int, list[int]]:
        """Nanoseconds of their match of one prompt, given as a list, and the full blocks that each replica has."""
        assert self._theirs is not None
        tokens = ids.tolist()  # what their trie reads fastest: half the time of an array("I"), a third of numpy's
        began = time.perf_counter_ns()
        found: dict[str, int] = self._theirs.cached_prefix_lengths(tokens, self._names)
        return time.perf_counter_ns() - began, [found[name] // BLOCK_TOKENS for name in self._names]


def look_up(indexes: Indexes, prompts: Sequence[Ids], rival: bool, ours_first: bool) -> Lookups:
    """Look the prompts up in our index, and without a pause in theirs; the first `UNCOUNTED` are not counted.

    Raises:
        Disagreement: the two found different blocks.
    """
    theirs = [] if ours_first or not rival else [indexes.their_match(ids) for ids in prompts]
    ours = [indexes.our_match(ids) for ids in prompts]
    if ours_first and rival:
        theirs = [indexes.their_match(ids) for ids in prompts]
    for (_, _, here), (_, there) in zip(ours, theirs, strict=False):
        if here != there:
            raise Disagreement("the two indexes do not find the same blocks of a prompt")
    counted = ours[UNCOUNTED:]
    return Lookups([one[0] for one in counted], [one[1] for one in counted], [one[0] for one in theirs[UNCOUNTED:]])


def fastest_encode(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[str, Encode]:
    """The faster of the tokenizer's two ways to encode a whole text, and its name; tried on `texts` in turn."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch_fast(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    ways: dict[str, Encode] = {"encode": encode, "encode_batch_fast": encode_batch_fast}
    times: dict[str, list[int]] = {name: [] for name in ways}
    for text in texts:
        for name, way in ways.items():
            began = time.perf_counter_ns()
            way(text)
            times[name].append(time.perf_counter_ns() - began)
    fastest = min(times, key=lambda name: sorted(times[name])[len(texts) // 2])
    return fastest, ways[fastest]
