"""One model's way from a conversation to text, and where its prompts may be cut."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise

import jinja2

from gorgo_plugin.errors import SettingsError
from gorgo_plugin.prefix import BlockHasher
from gorgo_plugin.prompt.conversation import Conversation, Message, tool_call
from gorgo_plugin.prompt.cuts import chunk_spans, cut_text
from gorgo_plugin.prompt.sources import EMBEDDED, TokenizerSource
from gorgo_plugin.prompt.template import ANSWER_HEADER, ChatTemplate, Mark, TemplateFailure, chatml
from gorgo_plugin.prompt.vocabulary import Vocabulary

_log = logging.getLogger("gorgo")

CHATML = "chatml"
# Marks of the turns of a trial conversation; letters only, so that every template and JSON leave them as they are.
_TURNS = ("gapalpha", "gapbravo", "gapcharlie", "gapdelta", "gapecho", "gapfoxtrot")


class PromptModel:
    """A vocabulary with a chat template.

    Attributes:
        vocabulary: what tokenizes.
        hasher: hashes the blocks of its prompts.
        cuts: special tokens in front of which prompts are cut; where there are none and words do not cut either,
            prompts are tokenized whole.
        answer_header: ids of what asks for an answer, where prompts can be gone on with message by message; else None.
        exact: whether the ids are the engine's own as far as the tokenizer goes.
    """

    def __init__(
        self,
        name: str,
        vocabulary: Vocabulary,
        source: TokenizerSource,
        template: tuple[str, str] | None,
        now: Callable[[], datetime],
        hasher: BlockHasher,
    ) -> None:
        """`template` is (text, origin) of a configured template; None: the tokenizer folder's, else ChatML.

        Raises:
            SettingsError: a template's syntax is wrong; which setting gave it is for the caller to say.
        """
        self._name = name
        self.vocabulary = vocabulary
        self.hasher = hasher
        self.exact = source.name != EMBEDDED
        texts = {"default": template[0]} if template is not None else source.templates
        self._origin = template[1] if template is not None else f"{source.name} (its folder)" if texts else CHATML
        self._templates = {kind: self._compiled(text, source, now) for kind, text in texts.items()}
        self._failures = 0
        self._lock = threading.Lock()
        self._spaces = vocabulary.cuts_spaces  # found out now: the trial takes longer than a request may
        self.cuts = self._choose_cuts()
        # ChatML prints each message by itself; of another template that cannot be known.
        goes_on = not self._templates and ANSWER_HEADER.startswith(self.cuts or ("none",))
        self.answer_header = vocabulary.encode([ANSWER_HEADER])[0] if goes_on else None

    def _compiled(self, text: str, source: TokenizerSource, now: Callable[[], datetime]) -> ChatTemplate:
        try:
            return ChatTemplate(text, source.variables, now)
        except jinja2.TemplateSyntaxError as error:
            raise SettingsError(f"no Jinja template: {error.message} (line {error.lineno})") from None

    def render(self, conversation: Conversation, mark: Mark) -> tuple[list[str], bool]:
        """(pieces of text, whether it is what the engine renders); ChatML where the template refuses a conversation."""
        # Templates by name are transformers' older form; `tool_use` is the one it takes where tools are given.
        kind = "tool_use" if conversation.tools and "tool_use" in self._templates else "default"
        template = self._templates.get(kind)
        if template is None:
            return chatml(conversation, mark), False
        try:
            return template.render(conversation, mark), True
        except TemplateFailure as failure:
            self._count_failure(failure)
            return chatml(conversation, mark), False

    def chunks(self, text: str) -> list[tuple[int, int]]:
        """(start, end) of chunks of many messages, cut where the tokenization is cut as well."""
        return chunk_spans(text, self.cuts, self._spaces)

    def cut(self, text: str) -> list[str]:
        """Pieces of about a message, cut where the tokenization is cut as well."""
        return cut_text(text, self.cuts, self._spaces)

    def _count_failure(self, failure: TemplateFailure) -> None:
        with self._lock:
            self._failures += 1
            first = self._failures == 1
        if first:  # once: clients would fill the log; without the template's words: they may quote the prompt
            _log.warning(
                "gorgo: the chat template of model '%s' refused a conversation (%s); such prompts are taken as ChatML",
                self._name,
                failure,
            )

    def _choose_cuts(self) -> tuple[str, ...]:
        trials = [text for text in (self._trial(chat) for chat in _trial_conversations()) if text is not None]
        cuts = self.vocabulary.choose_cuts([gap for text in trials for gap in _gaps(text)])
        if cuts and self.vocabulary.cuts_exactly(cuts, trials):
            return cuts
        reason = "joined pieces differ from the whole" if cuts else "no special tokens part them"
        instead = "cut between words alone" if self._spaces else "tokenized whole"
        _log.info("gorgo: messages of model '%s' are not remembered one by one (%s): %s", self._name, reason, instead)
        return ()

    def _trial(self, conversation: Conversation) -> str | None:
        template = self._templates.get("default")
        try:
            render = template.render if template else chatml
            return "".join(render(conversation, lambda _: ""))
        except TemplateFailure:
            return None  # not every template takes tools

    def describe(self) -> dict[str, object]:
        """What a status page shows of it, as plain data."""
        return {
            "tokenizer": self.vocabulary.source,
            "vocabulary_size": self.vocabulary.size,
            "chat_template": self._origin,
            "tokenized": "by-segment" if self.cuts or self._spaces else "whole",
            "cut_tokens": list(self.cuts),
            "cut_spaces": self._spaces,
            "exact": self.exact and bool(self._templates),
            "template_failures": self._failures,
        }


def _trial_conversations() -> tuple[Conversation, Conversation]:
    """A chat, and a chat with tool calls, whose turns can be found again in what a template makes of them."""
    one, two, three, four, five, six = _TURNS
    chat = [Message("user" if k % 2 == 0 else "assistant", turn) for k, turn in enumerate(_TURNS[:5])]
    calls = [tool_call(f"call0000{k}", "f", {"x": turn}) for k, turn in enumerate((two, four))]  # 9 letters: Mistral's
    agent = [
        Message("user", one),
        Message("assistant", "", {"tool_calls": calls[:1]}),
        Message("tool", three, {"tool_call_id": "call00000", "name": "f"}),
        Message("assistant", "", {"tool_calls": calls[1:]}),
        Message("tool", five, {"tool_call_id": "call00001", "name": "f"}),
        Message("assistant", six),
        Message("user", "gapgolf"),
    ]
    return Conversation(chat), Conversation(agent)


def _gaps(text: str) -> list[str]:
    """What stands between the turns of a trial conversation."""
    found = sorted((at, at + len(turn)) for turn in (*_TURNS, "gapgolf") if (at := text.find(turn)) >= 0)
    return [text[end:start] for (_, end), (start, _) in pairwise(found)]
