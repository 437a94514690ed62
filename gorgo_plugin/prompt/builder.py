"""Request body to `Prompt`: read, render, cut, look up what is known, tokenize the rest."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from hashlib import sha256
from itertools import chain
from math import isfinite
from typing import Any, NamedTuple

import msgspec
import numpy as np

from gorgo_plugin.decision import Prompt, token_array
from gorgo_plugin.errors import GorgoError, PromptError, SettingsError
from gorgo_plugin.prefix import Blocks, block_hasher
from gorgo_plugin.prompt.bodies import RawPrompts, Request, parse, read_request
from gorgo_plugin.prompt.cache import SegmentCache
from gorgo_plugin.prompt.continuation import Continuations, Known, Prepared
from gorgo_plugin.prompt.conversation import Conversation, Media, as_text, plain_texts
from gorgo_plugin.prompt.endpoints import CHAT, endpoint_of
from gorgo_plugin.prompt.model import PromptModel
from gorgo_plugin.prompt.recall import EMPTY, GoneOn, Recall, Recalled, Stretch
from gorgo_plugin.prompt.sources import TokenizerSource, embedded_tokenizer, read_template, read_tokenizer
from gorgo_plugin.prompt.vocabulary import Ids, Spread, Vocabulary, read_only
from gorgo_plugin.settings import ModelSettings, Settings

DIGEST_BYTES = 16  # two of 2**64 media or salts would share a digest by chance
PSEUDO_TOKEN = 0x8000_0000  # ids from here on stand for media: no vocabulary reaches so far
# All the media of one prompt together; a tiny part of a body could else stand for any number of tokens.
PSEUDO_TOKENS_MAX = 1_000_000
CONTINUATIONS_SHARE = 2  # they may take half as much again as the messages by themselves
WRITTEN_CHARS = 1_000_000  # of a mapping that is written as JSON, in one go of up to some milliseconds
_ONE_VALUE = (str, int, bool, type(None))
_MARKER = re.compile("(\ue000[0-9a-f]{32}\ue001)")


class Plan:
    """A prompt half prepared: what was seen before is looked up, the rest waits to be tokenized."""

    __slots__ = ("_finish", "_recalled")

    def __init__(self, recalled: Recalled | GoneOn, finish: Callable[[Ids, int], Prompt]) -> None:
        self._recalled = recalled
        self._finish = finish

    @property
    def cold_chars(self) -> int:
        """Characters `finish` has to tokenize; 0: all were seen."""
        return self._recalled.cold_chars

    def finish(self, spread: Spread = map) -> Prompt:
        """Tokenize what is missing, remember it and return the prompt. Releases the GIL while it tokenizes much.

        `spread` maps a function over batches of much text: that of an executor takes several at a time.
        """
        return self._finish(self._recalled.ids(spread), 0)

    def estimate(self) -> Prompt:
        """The prompt as far as it was seen before, with the length of the rest estimated; tokenizes nothing."""
        return self._finish(*self._recalled.estimate())


def _go_on() -> None:
    """No pause."""


class _Chat(NamedTuple):
    """A chat as it came, its fields, and what of it was prepared before; then the fields are those of the rest."""

    body: bytes
    fields: Mapping[str, Any]
    known: Known | None = None


class PromptBuilder:
    """Turns request bodies into prompts, each model with its tokenizer and chat template. Thread-safe."""

    def __init__(self, settings: Settings, *, secret: bytes, now: Callable[[], datetime] = datetime.now) -> None:
        """Load every tokenizer and template the settings name.

        `secret` keys the digests of media and salts and the hashes of blocks; `now` serves templates that print the
        date.

        Raises:
            SettingsError: one of them cannot be read; names the setting.
        """
        self._secret = sha256(secret).digest()
        self._hash_secret, self._block_tokens = secret, settings.block_tokens
        self._image_tokens = settings.prepare.image_tokens
        self._fastest = settings.prepare.encoder == "fastest"
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
            read = Vocabulary(source.tokenizer, source.name, number=len(loaded), fastest=self._fastest)
            loaded[wanted.tokenizer] = read, source
        vocabulary, source = loaded[wanted.tokenizer]
        template = read_template(wanted.chat_template, template_field) if wanted.chat_template else None
        hasher = block_hasher(wanted.block_tokens or self._block_tokens, self._hash_secret)
        try:
            return PromptModel(name, vocabulary, source, template, self._now, hasher)
        except SettingsError as error:
            field = template_field if template is not None else f"{tokenizer_field}: the chat template of its folder"
            raise SettingsError(f"{field}: {error}") from None

    def prepare(self, body: bytes | Mapping[str, Any], endpoint: str, model: str | None = None) -> Prompt:
        """Turn a body into a prompt.

        Raises:
            PromptError: as `plan` does.
        """
        return self.plan(body, endpoint, model).finish()

    def plan(
        self,
        body: bytes | Mapping[str, Any],
        endpoint: str,
        model: str | None = None,
        pause: Callable[[], None] = _go_on,
    ) -> Plan:
        """Read and render a body and look up what of it was tokenized before: everything but the tokenizing.

        `pause` is called between the steps; each holds the GIL for about a millisecond per 400 KB.

        Raises:
            PromptError: the endpoint holds no prompt, or the body none that can be read; names the field.
        """
        try:
            written = self._written(body, model) if endpoint_of(endpoint) == CHAT else None
            if written is not None:
                pause()
                return self._plan_chat(written, model, pause)
            request = read_request(body, endpoint)
            pause()
            return self._plan(request, request.model if model is None else model, pause)
        except GorgoError:
            raise
        except Exception as error:  # a mapping may hold objects of any behaviour
            raise PromptError(f"body: cannot be read as a prompt ({type(error).__name__})") from error

    def _written(self, body: bytes | Mapping[str, Any], name: str | None) -> bytes | None:
        """A chat as JSON, in which the known part of a conversation is found; None where it is read as it is.

        To write a mapping takes a fraction of what it takes to render messages and to look them up one by one. It is
        done where nothing but texts is in it, so that what is written is what was given, and as long as was weighed.
        """
        if type(body) is bytes:
            return body
        if type(body) is not dict or not _is_plain(body):
            return None
        model = self._models.get(as_text(body.get("model")) if name is None else name, self._default)
        if model.answer_header is None:
            return None
        try:
            return msgspec.json.encode(body)
        except ValueError:  # half a surrogate pair, or a number of too many digits
            return None

    def _plan_chat(self, body: bytes, name: str | None, pause: Callable[[], None]) -> Plan:
        """From where the last request of this conversation ended, if it was seen; else from its beginning."""
        known = self._continuations.find(body)
        rest = None if known is None else known.rest(body)
        if known is not None and rest is not None:
            request = read_request(rest, CHAT, known.messages)
            if known.model == (request.model if name is None else name) and _goes_on(request.content):
                return self._plan(request, known.model, pause, _Chat(body, rest, known))
        pause()
        fields = parse(body)
        pause()
        request = read_request(fields, CHAT)
        return self._plan(request, request.model if name is None else name, pause, _Chat(body, fields))

    def _plan(self, request: Request, name: str, pause: Callable[[], None], chat: _Chat | None = None) -> Plan:
        model, content = self._models.get(name, self._default), request.content
        known = None if chat is None else chat.known
        if known is not None and isinstance(content, Conversation):
            content.tools = None  # they stand in front of the messages, in what is known
        if isinstance(content, Conversation):
            stretches, exact = self._conversation_stretches(model, content)
            if not _goes_on(content):
                chat = None
        else:
            stretches, exact = self._raw_stretches(model, content)
        pause()
        if known is not None:
            exact = exact and known.exact
            recalled = self._recall.go_on(model, known.ids, stretches)
        else:
            recalled = self._recall.look_up(model, stretches)
        return Plan(recalled, partial(self._prompt, request, name, model, exact, known, chat))

    def _prompt(
        self,
        request: Request,
        name: str,
        model: PromptModel,
        exact: bool,
        known: Known | None,
        chat: _Chat | None,
        ids: Ids,
        estimated_tokens: int,
    ) -> Prompt:
        """The prompt of a request, whose ids are there now but for the last `estimated_tokens`."""
        hashes = model.hasher.hashes(ids, known=b"" if known is None else known.hashes)
        if chat is not None and model.answer_header is not None and not estimated_tokens:
            self._keep(chat, request, name, model, exact, ids, hashes)
        # Hashed: a salt is a secret between a tenant and its engine.
        cache_key = self._digest(repr(request.salts).encode(), b"salt").hex() if request.salts else ""
        return Prompt(
            ids,
            model=name,
            stream=request.stream,
            max_output_tokens=request.max_output_tokens,
            affinity_key=request.affinity_key,
            cache_key=cache_key,
            exact=exact,
            estimated_tokens=estimated_tokens,
            blocks=Blocks(model.hasher, model.hasher.salted(hashes, cache_key)),
        )

    def _keep(
        self, chat: _Chat, request: Request, name: str, model: PromptModel, exact: bool, ids: Ids, hashes: bytes
    ) -> None:
        """Remember a chat's messages for the request that goes on from them."""
        header = model.answer_header
        assert header is not None
        assert isinstance(request.content, Conversation)
        end = len(ids) - len(header)
        if ids[end:].tobytes() == header.tobytes():
            prepared = Prepared(name, ids[:end], hashes[: model.hasher.size(end)], exact, len(request.content.messages))
            self._continuations.remember(chat.body, chat.fields, prepared, chat.known)

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


def _is_plain(body: Mapping[Any, Any]) -> bool:
    """Whether a chat is messages of a role and a text and fields of one value each, of `WRITTEN_CHARS` at most."""
    messages = body.get("messages")
    texts = plain_texts(messages) if type(messages) is list else []
    aside = [value for name, value in body.items() if name != "messages"]
    if not texts or {*map(type, body)} != {str}:
        return False
    if not all(type(value) in _ONE_VALUE or (type(value) is float and isfinite(value)) for value in aside):
        return False
    return sum(map(len, chain(texts, body, (value for value in aside if type(value) is str)))) <= WRITTEN_CHARS


def _goes_on(content: Conversation | RawPrompts) -> bool:
    """Whether a prompt is its messages one after the other and the header of an answer, with nothing around them."""
    return isinstance(content, Conversation) and content.add_generation_prompt and not content.add_special_tokens


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
    if is_well_formed(text):
        return text
    # Found all at once: a codec's error handler takes a quarter of a second for a million, and holds the GIL.
    codes = np.array([text], dtype=f"<U{len(text)}").view("<u4")
    kinds = codes & 0xFFFF_FC00
    high, low = kinds == 0xD800, kinds == 0xDC00
    paired = np.flatnonzero(high[:-1] & low[1:])
    codes[paired] = 0x10000 + ((codes[paired] & 0x3FF) << 10) + (codes[paired + 1] & 0x3FF)
    high[paired] = low[paired + 1] = False
    codes[high | low] = ord("\ufffd")
    return np.delete(codes, paired + 1).tobytes().decode("utf-32-le")


def _token_ids(item: Sequence[Any], field: str) -> Ids:
    try:
        return token_array(item)
    except PromptError as error:
        raise PromptError(f"{field}: {str(error).removeprefix('tokens: ')}") from None


def built_from(settings: Settings) -> tuple[Any, ...]:
    """The settings a `PromptBuilder` is built from."""
    prepare = settings.prepare
    shape = (settings.tokenizer, settings.chat_template, settings.block_tokens, settings.models)
    return (*shape, prepare.encoder, prepare.cache_bytes, prepare.image_tokens)
