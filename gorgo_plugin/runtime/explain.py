"""Why a request goes where it goes: the decision for one body, with every replica's terms, as data and as text."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from gorgo_plugin.decision import Cost, Prompt
from gorgo_plugin.errors import PromptError
from gorgo_plugin.router import Router
from gorgo_plugin.runtime.probes import Unreachable, measuring
from gorgo_plugin.settings import ProbeSettings, ReplicaSettings

REASONS = {
    "cheapest": "its score is the lowest",
    "near-tie": "drawn at random among replicas whose scores are nearly the same, so that bursts spread",
    "only-candidate": "no other replica may serve it",
    "best-was-tried": "the cheapest was tried for this request before",
    "best-is-unhealthy": "the cheapest does not answer at present",
    "all-unhealthy": "no replica answers at present; this one is the least bad",
    "least-loaded": "it has the least work",
    "fewest-in-flight": "it has the fewest requests in flight",
    "nearest": "its round trip is the shortest",
    "longest-prefix": "it has the longest part of the prompt cached",
    "affinity": "the session's hash points to it",
    "random": "drawn at random",
    "trial": "weights under test would rather have it there",
}


def question(asked: object) -> tuple[Mapping[str, Any], str, str | None]:
    """(body, endpoint, model) of what `gorgo explain` posts to a gateway: an object with `body`, `endpoint`, `model`.

    Raises:
        PromptError: it is something else.
    """
    if not isinstance(asked, Mapping) or not isinstance(asked.get("body"), Mapping):
        raise PromptError("body: expected an object with the request's body, its endpoint and its model")
    endpoint, model = asked.get("endpoint"), asked.get("model")
    if not isinstance(endpoint, str) or not isinstance(model, str | None):
        raise PromptError("endpoint, model: expected text")
    return asked["body"], endpoint, model


def explanation(router: Router, prompt: Prompt, endpoint: str) -> dict[str, Any]:
    """The decision that `router` would take for `prompt` now, as JSON-able data. Opens and teaches nothing.

    Raises:
        NoCandidates: no replica serves the prompt's model.
    """
    decision = router.explain(prompt)
    known = router.snapshot()
    return {
        "endpoint": endpoint,
        "model": prompt.model,
        "prompt_tokens": len(prompt),
        "exact": prompt.exact,
        "policy": known["policy"],
        "weights": known["weights"],
        "replica": decision.replica,
        "region": decision.region,
        "reason": decision.reason,
        "ranked": list(decision.ranked),
        "replicas": {
            name: {
                **asdict(decision.costs[name]),
                **{key: known["replicas"][name][key] for key in ("region", "latency", "health", "load")},
            }
            for name in decision.ranked
        },
    }


async def probe_once(router: Router, replicas: Sequence[ReplicaSettings], probe: ProbeSettings) -> dict[str, str]:
    """Measure the round trip to every replica at once and tell the router; returns name -> why not, of those that fail.

    Each probe ends within `probe.timeout_s`, so the whole takes no longer (twice that for a probe over HTTP).
    """

    async def one(replica: ReplicaSettings) -> str | None:
        async with measuring(replica, probe) as measure:
            try:
                router.observe_rtt(replica.name, await measure())
            except Unreachable as failure:
                router.set_health(replica.name, False)
                return failure.kind
        return None

    outcomes = await asyncio.gather(*map(one, replicas))
    return {replica.name: kind for replica, kind in zip(replicas, outcomes, strict=True) if kind is not None}


TERMS = tuple(field.name for field in fields(Cost) if field.name.endswith("_ms"))


def rows(explained: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A header and a row per replica, in failover order: every term in milliseconds, then tokens and what is known."""
    named_score = any(row["score"] != row["total_ms"] for row in explained["replicas"].values())
    header = ("", "replica", "region", *(term.replace("_", " ") for term in TERMS))
    tail = ("cached tokens", "uncached tokens", "RTT age", "in flight", "state")
    lines = [(*header, *(("score",) if named_score else ()), *tail)]
    for name, row in explained["replicas"].items():
        terms = [f"{row[term]:,.1f}" for term in TERMS]
        score = (f"{row['score']:,.4g}",) if named_score else ()
        load = row["load"]["waiting"] + row["load"]["decoding"]
        lines.append(
            (
                "→" if name == explained["replica"] else "",
                name,
                row["region"],
                *terms,
                *score,
                f"{row['cached_tokens']:,}",
                f"{row['uncached_tokens']:,}",
                _age(row["latency"]),
                str(load),
                "available" if row["health"]["available"] else "unavailable",
            )
        )
    return lines


def _age(latency: Mapping[str, Any]) -> str:
    if latency["rtt_ms"] is None:
        return "never measured"
    return f"{latency['age_s']:.1f} s{', stale' if latency['stale'] else ''}"


def summary(explained: Mapping[str, Any]) -> list[str]:
    """What the table is about, and the reason for the choice: two sentences."""
    counted = "counted with the engine's tokenizer" if explained["exact"] else "estimated"
    weights, reason = explained["weights"], explained["reason"]
    return [
        f"{explained['prompt_tokens']:,} prompt tokens ({counted}) of model '{explained['model']}' at "
        f"{explained['endpoint']}; policy {explained['policy']}, W_rtt {weights['rtt']:g}, "
        f"W_queue {weights['queue']:g}.",
        f"{explained['replica']} ({explained['region']}): {reason}, {REASONS.get(reason, 'see the policy')}.",
    ]


def plain_table(lines: Sequence[Sequence[str]]) -> str:
    """The rows as text, columns aligned; the first three to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
