"""Settings that are valid and yet cannot be what was meant."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from gorgo_plugin.settings import ReplicaSettings, Settings, did_you_mean


def doubts(settings: Settings) -> list[str]:
    """One sentence for each, naming the field."""
    return [*_events_without_tokenizer(settings), *_models_nobody_serves(settings), *_engines_named_twice(settings)]


def _events_without_tokenizer(settings: Settings) -> Iterator[str]:
    """An engine names blocks by its own token ids, which the embedded tokenizer cannot give."""
    for replica in settings.replicas:
        if replica.kv_events is None:
            continue
        models = [replica.kv_events.model] if replica.kv_events.model else replica.models or list(settings.models)
        own = [settings.models[model].tokenizer for model in models if model in settings.models]
        if settings.tokenizer is None and not any(own):
            yield f"replicas: '{replica.name}' has kv_events, which have no effect without the model's own `tokenizer`"


def _models_nobody_serves(settings: Settings) -> Iterator[str]:
    if not settings.replicas or not all(replica.models for replica in settings.replicas):
        return
    served = {model for replica in settings.replicas for model in replica.models or ()}
    for model in settings.models:
        if model not in served:
            yield f"models: no replica serves '{model}'{did_you_mean(model, served)}"


def _engines_named_twice(settings: Settings) -> Iterator[str]:
    for one, other in combinations(settings.replicas, 2):
        if one.url.rstrip("/") == other.url.rstrip("/") and _share_a_model(one, other):
            names = f"'{one.name}' and '{other.name}'"
            yield f"replicas: {names} have one url; each is taken for an engine with a queue and a cache of its own"


def _share_a_model(one: ReplicaSettings, other: ReplicaSettings) -> bool:
    return not one.models or not other.models or not set(one.models).isdisjoint(other.models)
