"""Conversation to text: a model's Jinja chat template in a sandbox, or ChatML where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gorgo_plugin.prompt.conversation import Content, Conversation, Media, Message, stable_json

RENDERED_CHARS = 64_000_000  # about 16M tokens, above every context window; what exceeds it is a template gone wild
REPEATED_ITEMS = 1_000_000  # longest string or list a template may make by `*`; indents and separators are short
ANSWER_HEADER = "<|im_start|>assistant\n"  # of ChatML
LARGEST_EXPONENT = 64  # templates compute no powers

_DICT_ATTRIBUTES = frozenset(dir(dict))

Mark = Callable[[Media], str]  # the text that stands for a medium until its pseudo-tokens replace it


class TemplateFailure(Exception):
    """The template cannot render this conversation."""


class _Generation(Extension):
    """`{% generation %}`: marks the answers for training; rendering ignores it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """No attribute of Python's own, no mutation, and no operator that makes much out of little."""

    intercepted_binops = frozenset({"*", "**"})

    def getattr(self, obj: Any, attribute: str) -> Any:
        # `message.role` asks a dict for an attribute it has not, again and again; the item is what comes of it.
        if type(obj) is dict and attribute in obj and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        # For these types the many checks of the sandbox come to this one; templates ask it a dozen times a message.
        if type(obj) in (str, LoopContext):
            return not attr.startswith("_")
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            if not isinstance(right, int | float) or abs(right) > LARGEST_EXPONENT:
                raise TemplateFailure("power too large")
        else:
            for items, times in ((left, right), (right, left)):
                repeats = isinstance(items, str | list | tuple) and isinstance(times, int)
                if repeats and len(items) * times > REPEATED_ITEMS:
                    raise TemplateFailure("repetition too long")
        return super().call_binop(context, operator, left, right)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # As in transformers: jinja's own filter would escape `<`, `>`, `&` and `'` for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _environment(now: Callable[[], datetime]) -> jinja2.Environment:
    """The environment chat templates are written for: that of transformers."""
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"], cache_size=0
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: now().strftime(format)
    return environment


class ChatTemplate:
    """A compiled chat template with the variables that stay the same (`bos_token`, `eos_token`, ...).

    Raises:
        jinja2.TemplateSyntaxError: the text is no template.
    """

    def __init__(self, text: str, variables: Mapping[str, Any], now: Callable[[], datetime]) -> None:
        self._template = _environment(now).from_string(text)
        self._variables = dict(variables)
        self._takes_parts = self._shows("first", "second")
        # Some templates of multimodal models read lists of parts only, and print nothing of a plain string.
        self._needs_parts = self._takes_parts and not self._shows("first")

    def _shows(self, *texts: str) -> bool:
        """Whether the template prints these texts: several as a list of parts, one as a string."""
        content: Any = texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]
        try:
            printed = self._run({"messages": [{"role": "user", "content": content}], "add_generation_prompt": True})
        except TemplateFailure:
            return False
        shown = "".join(printed)
        # A template that knows no parts prints the list itself.
        return all(text in shown for text in texts) and "'type'" not in shown and '"type"' not in shown

    def render(self, conversation: Conversation, mark: Mark) -> list[str]:
        """Render a conversation, in the pieces that the template prints.

        Raises:
            TemplateFailure: the template refuses or cannot render it, or prints beyond all bounds.
        """
        printed = self._run(
            {
                "tools": conversation.tools,
                "documents": None,
                "add_generation_prompt": conversation.add_generation_prompt,
                **conversation.template_args,
                "messages": [self._variable(message, mark) for message in conversation.messages],
            }
        )
        return left_open(printed, conversation, mark)

    def _variable(self, message: Message, mark: Mark) -> dict[str, Any]:
        content = message.content
        if self._needs_parts or (self._takes_parts and not isinstance(content, str)):
            parts = [content] if isinstance(content, str) else content
            texts = [part if isinstance(part, str) else mark(part) for part in parts]
            parts_of_text = [{"type": "text", "text": text} for text in texts]
            return {"role": message.role, "content": parts_of_text, **message.extras}
        return {"role": message.role, "content": flat(content, mark), **message.extras}

    def _run(self, variables: dict[str, Any]) -> list[str]:
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(self._variables | variables):
                size += len(piece) + 1  # so that endless empty output ends as well
                if size > RENDERED_CHARS:
                    raise TemplateFailure("output too long")
                pieces.append(piece)
        except Exception as error:  # templates meet values of every shape and fail in every way
            raise TemplateFailure(type(error).__name__) from error
        return pieces


def flat(content: Content, mark: Mark) -> str:
    """A content as one string; parts are joined by a newline, as vLLM does for templates that know no parts."""
    if isinstance(content, str):
        return content
    return "\n".join(part if isinstance(part, str) else mark(part) for part in content)


def left_open(printed: list[str], conversation: Conversation, mark: Mark) -> list[str]:
    """Cut what follows the last message's content, where the answer is to go on from it."""
    if not conversation.continue_final:
        return printed
    text = "".join(printed)
    final = flat(conversation.messages[-1].content, mark).strip()
    at = text.rfind(final)
    return [text[: at + len(final)] if final and at >= 0 else text]


def chatml(conversation: Conversation, mark: Mark) -> list[str]:
    """Render ChatML in pieces, with tools and tool calls the way the Hermes and Qwen templates write them."""
    printed: list[str] = []  # not joined: the text may be long, and most of it is known
    if conversation.tools:
        tools = "\n".join(stable_json(tool) for tool in conversation.tools)
        printed += ("<|im_start|>system\n# Tools\n", tools, "<|im_end|>\n")
    headers: dict[str, str] = {}  # one string a role, which is hashed once
    for message in conversation.messages:
        content, role = message.content, message.role
        text = content if isinstance(content, str) else flat(content, mark)
        if "tool_calls" in message.extras:
            text += "".join(
                f"\n<tool_call>\n{stable_json(call['function'])}\n</tool_call>" for call in message.extras["tool_calls"]
            )
        header = headers.get(role) or headers.setdefault(role, f"<|im_start|>{role}\n")
        printed += (header, text, "<|im_end|>\n")
    if conversation.add_generation_prompt:
        printed.append(ANSWER_HEADER)
    return left_open(printed, conversation, mark)
