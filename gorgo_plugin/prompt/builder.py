"""Request body to `Prompt`: read, render, cut, look up what is known, tokenize the rest."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np

from gorgo_plugin.decision import Prompt, token_array
from gorgo_plugin.errors import GorgoError, PromptError, SettingsError
from gorgo_plugin.prompt.bodies import RawPrompts, Request, parse, read_request
from gorgo_plugin.prompt.cache import SegmentCache
from gorgo_plugin.prompt.continuation import Continuations, Known
from gorgo_plugin.prompt.conversation import Conversation, Media
from gorgo_plugin.prompt.endpoints import CHAT, endpoint_of
from gorgo_plugin.prompt.model import PromptModel
from gorgo_plugin.prompt.recall import EMPTY, Recall, Recalled, Stretch
from gorgo_plugin.prompt.sources import TokenizerSource, embedded_tokenizer, read_template, read_tokenizer
from gorgo_plugin.prompt.vocabulary import Ids, Vocabulary, read_only
from gorgo_plugin.settings import ModelSettings, Settings

DIGEST_BYTES = 16  # two of 2**64 media or salts would share a digest by chance
PSEUDO_TOKEN = 0x8000_0000  # ids from here on stand for media: no vocabulary reaches so far
# All the media of one prompt together; a tiny part of a body could else stand for any number of tokens.
PSEUDO_TOKENS_MAX = 1_000_000
CONTINUATIONS_SHARE = 2  # they may take half as much again as the messages by themselves
_MARKER = re.compile("(\ue000[0-9a-f]{32}\ue001)")


Keep = Callable[[str, Ids, bool, Ids], None]
"""Takes (model, ids of the header of an answer, whether the ids are the engine's own, the prompt's ids)."""


class Plan:
    """A prompt half prepared: what was seen before is looked up, the rest waits to be tokenized."""

    __slots__ = ("_build", "_keep", "_recalled")

    def __init__(
        self, recalled: Recalled, build: Callable[[Ids], Prompt], keep: Callable[[Ids], None] | None = None
    ) -> None:
        self._recalled = recalled
        self._build = build
        self._keep = keep

    @property
    def cold_chars(self) -> int:
        """Characters `finish` has to tokenize; 0: all were seen."""
        return self._recalled.cold_chars

    def finish(self) -> Prompt:
        """Tokenize what is missing, remember it and return the prompt. Releases the GIL while it tokenizes much."""
        ids = self._recalled.ids()
        if self._keep is not None:
            self._keep(ids)
        return self._build(ids)


class PromptBuilder:
    """Turns request bodies into prompts, each model with its tokenizer and chat template. Thread-safe."""

    def __init__(self, settings: Settings, *, secret: bytes, now: Callable[[], datetime] = datetime.now) -> None:
        """Load every tokenizer and template the settings name.

        `secret` keys the digests of media and salts; `now` serves templates that print the date.

        Raises:
            SettingsError: one of them cannot be read; names the setting.
        """
        self._secret = sha256(secret).digest()
        self._image_tokens = settings.prepare.image_tokens
        self._cache = SegmentCache(settings.prepare.cache_bytes)
        self._recall = Recall(self._cache)
        self._continuations = Continuations(settings.prepare.cache_bytes // CONTINUATIONS_SHARE)
        self._now = now
        loaded: dict[str | None, tuple[Vocabulary, TokenizerSource]] = {}
        self._default = self._load("", settings.model_settings(""), ModelSettings(), loaded)
        self._models = {
            name: self._load(name, settings.model_settings(name), own, loaded) for name, own in settings.models.items()
        }

    def _load(
        self,
        name: str,
        wanted: ModelSettings,
        own: ModelSettings,
        loaded: dict[str | None, tuple[Vocabulary, TokenizerSource]],
    ) -> PromptModel:
        prefix = f"models.{name}." if name else ""
        tokenizer_field = f"{prefix if own.tokenizer is not None else ''}tokenizer"
        template_field = f"{prefix if own.chat_template is not None else ''}chat_template"
        if wanted.tokenizer not in loaded:
            source = read_tokenizer(wanted.tokenizer, tokenizer_field) if wanted.tokenizer else embedded_tokenizer()
            loaded[wanted.tokenizer] = Vocabulary(source.tokenizer, source.name, number=len(loaded)), source
        vocabulary, source = loaded[wanted.tokenizer]
        template = read_template(wanted.chat_template, template_field) if wanted.chat_template else None
        try:
            return PromptModel(name, vocabulary, source, template, self._now)
        except SettingsError as error:
            field = template_field if template is not None else f"{tokenizer_field}: the chat template of its folder"
            raise SettingsError(f"{field}: {error}") from None

    def prepare(self, body: bytes | Mapping[str, Any], endpoint: str, model: str | None = None) -> Prompt:
        """Turn a body into a prompt.

        Raises:
            PromptError: as `plan` does.
        """
        return self.plan(body, endpoint, model).finish()

    def plan(self, body: bytes | Mapping[str, Any], endpoint: str, model: str | None = None) -> Plan:
        """Read and render a body and look up what of it was tokenized before: everything but the tokenizing.

        Raises:
            PromptError: the endpoint holds no prompt, or the body none that can be read; names the field.
        """
        try:
            if type(body) is bytes and endpoint_of(endpoint) == CHAT:
                return self._plan_chat(body, model)
            request = read_request(body, endpoint)
            return self._plan(request, request.model if model is None else model)
        except GorgoError:
            raise
        except Exception as error:  # a mapping may hold objects of any behaviour
            raise PromptError(f"body: cannot be read as a prompt ({type(error).__name__})") from error

    def _plan_chat(self, body: bytes, name: str | None) -> Plan:
        """From where the last request of this conversation ended, if it was seen; else from its beginning."""
        known = self._continuations.find(body)
        rest = None if known is None else known.rest(body)
        if known is not None and rest is not None:
            with contextlib.suppress(PromptError):  # said again below, with the message's number in the whole
                request = read_request(rest, CHAT)
                if known.model == (request.model if name is None else name):
                    return self._plan(request, known.model, known, partial(self._keep, body, rest, known))
        fields = parse(body)
        request = read_request(fields, CHAT)
        return self._plan(
            request, request.model if name is None else name, keep=partial(self._keep, body, fields, None)
        )

    def _plan(self, request: Request, name: str, known: Known | None = None, keep: Keep | None = None) -> Plan:
        model, content = self._models.get(name, self._default), request.content
        if isinstance(content, Conversation):
            # What stands in front of the messages is part of what is known.
            new = content if known is None else replace(content, tools=None)
            stretches, exact = self._conversation_stretches(model, new)
        else:
            stretches, exact = self._raw_stretches(model, content)
        if known is not None:
            stretches, exact = [known.ids, *stretches], exact and known.exact
        goes_on = isinstance(content, Conversation) and content.add_generation_prompt and not content.add_special_tokens
        build = partial(
            Prompt,
            model=name,
            stream=request.stream,
            max_output_tokens=request.max_output_tokens,
            affinity_key=request.affinity_key,
            # Hashed: a salt is a secret between a tenant and its engine.
            cache_key=self._digest(repr(request.salts).encode(), b"salt").hex() if request.salts else "",
            exact=exact,
        )
        recalled = self._recall.look_up(model, stretches)
        if keep is None or not goes_on or model.answer_header is None:
            return Plan(recalled, build)
        return Plan(recalled, build, partial(keep, name, model.answer_header, exact))

    def _keep(
        self,
        body: bytes,
        fields: Mapping[str, Any],
        known: Known | None,
        model: str,
        answer_header: Ids,
        exact: bool,
        ids: Ids,
    ) -> None:
        """Remember a chat's messages for the request that goes on from them."""
        messages = len(ids) - len(answer_header)
        if ids[messages:].tobytes() == answer_header.tobytes():
            self._continuations.remember(body, fields, model, ids[:messages], exact, known)

    def _conversation_stretches(self, model: PromptModel, conversation: Conversation) -> tuple[list[Stretch], bool]:
        media: dict[str, bytes] = {}

        def mark(medium: Media) -> str:
            digest = self._digest(medium.payload.encode("utf-8", "surrogatepass"), b"media")
            marker = f"\ue000{digest.hex()}\ue001"  # keyed, so that no text can imitate it
            media[marker] = digest
            return marker

        printed, faithful = model.render(conversation, mark)
        valid = all(map(str.isascii, printed)) or all(map(is_well_formed, printed))
        stretches: list[Stretch] = [printed]
        if media or not valid:
            text = well_formed("".join(printed))
            stretches = self._with_media(text, media) if media else [text]
        if conversation.add_special_tokens:
            before, after = model.vocabulary.affixes
            stretches = [before, *stretches, after]
        return stretches, model.exact and faithful and valid and conversation.exact and not media

    def _with_media(self, text: str, media: Mapping[str, bytes]) -> list[Stretch]:
        """Part text that holds the markers of media; each becomes its run of pseudo-tokens."""
        stretches = _MARKER.split(text)
        count = sum(stretch in media for stretch in stretches)
        length = min(self._image_tokens, max(1, PSEUDO_TOKENS_MAX // max(1, count)))
        runs = {marker: pseudo_tokens(digest, length) for marker, digest in media.items()}
        return [runs.get(stretch, stretch) for stretch in stretches]

    def _raw_stretches(self, model: PromptModel, prompts: RawPrompts) -> tuple[list[Stretch], bool]:
        stretches: list[Stretch] = []
        exact = True
        for item in prompts.items:
            if not isinstance(item, str):
                stretches.append(_token_ids(item, prompts.field))
                continue
            before, after = model.vocabulary.affixes if prompts.add_special_tokens else (EMPTY, EMPTY)
            valid = is_well_formed(item)
            stretches += [before, item if valid else well_formed(item), after]
            exact = exact and valid and model.exact
        return stretches, exact

    def _digest(self, data: bytes, kind: bytes) -> bytes:
        # SHA-256, because processors compute it: half the time of BLAKE2 on a large image.
        hashed = sha256(self._secret + kind + b"\0")
        hashed.update(data)
        return hashed.digest()[:DIGEST_BYTES]

    def describe(self, model: str | None = None) -> dict[str, Any]:
        """What prepares a model's prompts; without a model: every configured one ("" is the default) and the cache."""
        if model is not None:
            return self._models.get(model, self._default).describe()
        models = {name: entry.describe() for name, entry in {"": self._default, **self._models}.items()}
        cache = {"segments": len(self._cache), "bytes": self._cache.used_bytes}
        return {"models": models, "cache": cache, "continuations": self._continuations.describe()}


def pseudo_tokens(digest: bytes, count: int) -> Ids:
    """Ids that stand for a medium, shape (count,): equal for equal digests, far from every vocabulary's own."""
    start, step = (int.from_bytes(half, "big") for half in (digest[:8], digest[8:]))
    mixed = np.uint64(start) + np.arange(count, dtype=np.uint64) * np.uint64(step | 1)  # wraps at 2**64, as meant
    return read_only((mixed >> np.uint64(33)).astype(np.uint32) | np.uint32(PSEUDO_TOKEN))


def is_well_formed(text: str) -> bool:
    """Whether text is valid Unicode: JSON may hold surrogates without their other half."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def well_formed(text: str) -> str:
    """Text in which each lone surrogate is a replacement character."""
    return text if is_well_formed(text) else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _token_ids(item: Sequence[Any], field: str) -> Ids:
    try:
        return token_array(item)
    except PromptError as error:
        raise PromptError(f"{field}: {str(error).removeprefix('tokens: ')}") from None


def prepared_by(settings: Settings) -> tuple[Any, ...]:
    """The settings a `PromptBuilder` is built from."""
    prepare = settings.prepare
    shape = (settings.tokenizer, settings.chat_template, settings.models)
    return (*shape, prepare.cache_bytes, prepare.image_tokens)
