"""Whatever messages say, the pieces of a prompt join to the ids of the whole."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from gorgo_plugin import Settings
from gorgo_plugin.prompt import PromptBuilder, cuts, recall
from gorgo_plugin.prompt.cuts import chunk_spans, cut_text
from gorgo_plugin.prompt.sources import embedded_tokenizer
from gorgo_plugin.prompt.vocabulary import Vocabulary
from tests import prompt_tokenizers as small

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
STYLES = {
    "chatml": (small.chatml, small.CHATML),
    "chatml by tokenizers": (small.chatml, small.CHATML),
    "rewrites earlier turns": (small.composed, small.FORGETS_THOUGHTS),
    "older byte level": (small.older_byte_level, small.CHATML),
    "headers": (small.converted, small.HEADERS),
    "prefix space everywhere": (lambda: small.prefix_space("normalizer"), small.BRACKETS),
    "prefix space first": (lambda: small.prefix_space("first"), small.BRACKETS),
    "cannot be cut": (lambda: small.prefix_space("normalizer", normalized=True), small.BRACKETS),
    "strips to the right": (lambda: small.byte_level("<|im_start|>", "<|im_end|>", rstrip=True), small.CHATML),
}

# Text is put together from what tokenizers and templates could stumble over.
FRAGMENTS = st.sampled_from(
    [
        *("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "</s>", "<s>", "[INST]", "[/INST]"),
        *("<tool_call>", "<think>", "</think>", "<|", "|>", "<|im_", "user", "\nassistant\n", " ", "  ", "\n", "\n\n"),
        *(
            "\r\n",
            "\t",
            "a",
            " a",
            "A",
            "Hello",
            "'s",
            "123",
            "4",
            ".",
            "...",
            "é",
            "e\u0301",
            "\u0301",
            "漢",
            "🙂\u200d",
        ),
        *(" x", "x ", ". Y", "_ z", "' s", "\u00a0", "\u3000", "▁", "\ufeff", "\x00"),
    ]
)
TEXTS = st.lists(FRAGMENTS | st.text(max_size=8), max_size=12).map("".join)
LONG_TEXTS = st.lists(FRAGMENTS | st.sampled_from(["\nA", " next word", "x y"]), min_size=5, max_size=20).map(
    lambda fragments: "".join(fragments) * 60
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXTS | LONG_TEXTS}),
    min_size=1,
    max_size=6,
)


@cache
def style(name: str) -> tuple[PromptBuilder, Tokenizer, Any]:
    make, template = STYLES[name]
    tokenizer = make()
    with TemporaryDirectory() as folder:
        path = small.save(Path(folder), tokenizer, template, **TOKENS)
        encoder = "tokenizers" if "by tokenizers" in name else "fastest"
        given = {"tokenizer": path, "prepare": {"encoder": encoder}}
        builder = PromptBuilder(Settings.model_validate(given), secret=b"test")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return builder, tokenizer, environment.from_string(template)


@pytest.mark.parametrize("name", list(STYLES))
@settings(max_examples=60)
@given(messages=MESSAGES)
def test_a_chat_gives_the_ids_of_the_whole(name: str, messages: list[dict[str, str]]) -> None:
    builder, tokenizer, template = style(name)
    for count in (len(messages) // 2 + 1, len(messages), len(messages)):  # it grows, and comes again
        asked = messages[:count]
        text = template.render(messages=asked, add_generation_prompt=True, **TOKENS)
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert builder.prepare({"messages": asked}, "/v1/chat/completions").tokens.tolist() == expected
    assert builder.plan({"messages": messages}, "/v1/chat/completions").cold_chars == 0


@pytest.mark.parametrize("name", list(STYLES))
@settings(max_examples=40)
@given(text=TEXTS | LONG_TEXTS)
def test_raw_text_gives_the_ids_of_the_whole(name: str, text: str) -> None:
    builder, tokenizer, _ = style(name)
    assert builder.prepare({"prompt": text}, "/v1/completions").tokens.tolist() == tokenizer.encode(text).ids


@pytest.mark.parametrize("name", list(STYLES))
@settings(max_examples=30)
@given(text=TEXTS)
def test_the_shortest_pieces_join_as_well(name: str, text: str) -> None:
    builder, tokenizer, _ = style(name)
    described = builder.describe("")
    with patch.object(cuts, "LONG_CHARS", 1):
        pieces = cut_text(text, described["cut_tokens"], spaces=described["cut_spaces"], piece_chars=1)
    joined = [token for ids in Vocabulary(tokenizer, name).encode(pieces) for token in ids.tolist()]
    assert joined == tokenizer.encode(text, add_special_tokens=False).ids


@settings(max_examples=100)
@given(text=TEXTS | LONG_TEXTS, more=TEXTS | LONG_TEXTS, spaces=st.booleans())
def test_growing_moves_no_cut_but_the_last(text: str, more: str, spaces: bool) -> None:
    tokens = ["<|im_start|>", "</s>"]
    before = cut_text(text, tokens, spaces=spaces)
    after = cut_text(text + more, tokens, spaces=spaces)
    assert "".join(before) == text
    assert "".join(after) == text + more
    assert after[: len(before[:-1])] == before[:-1]


@settings(max_examples=200)
@given(text=TEXTS | LONG_TEXTS, more=TEXTS | LONG_TEXTS, spaces=st.booleans())
def test_growing_moves_no_chunk_but_those_of_the_last_message(text: str, more: str, spaces: bool) -> None:
    tokens = ["<|im_start|>", "</s>"]
    with patch.object(cuts, "CHUNK_CHARS", 40):
        before = chunk_spans(text + "</s>", tokens, spaces=spaces)
        after = chunk_spans(text + "</s>" + more, tokens, spaces=spaces)
    assert [start for start, _ in before] == [0, *(end for _, end in before[:-1])]
    assert before[-1][1] == len(text) + 4
    assert after[: len(before[:-1])] == before[:-1]


@settings(max_examples=60)
@given(messages=MESSAGES)
def test_the_embedded_tokenizer_gives_the_ids_of_the_whole(messages: list[dict[str, str]]) -> None:
    builder, tokenizer = embedded()
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    expected = tokenizer.encode("".join(turns) + "<|im_start|>assistant\n", add_special_tokens=False).ids
    assert builder.prepare({"messages": messages}, "/v1/chat/completions").tokens.tolist() == expected


@settings(max_examples=60)
@given(messages=MESSAGES)
def test_a_growing_conversation_gives_the_ids_of_the_whole_however_small_its_chunks(
    messages: list[dict[str, str]],
) -> None:
    builder, tokenizer = embedded()
    sizes = {"CHUNK_CHARS": 60, "LONG_CHARS": 30, "PIECE_CHARS": 8}
    with patch.multiple(recall, **sizes):
        for _ in range(3):  # new, known in pieces, known in chunks
            for count in range(1, len(messages) + 1):
                ids = builder.prepare({"messages": messages[:count]}, "/v1/chat/completions").tokens.tolist()
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    assert ids == tokenizer.encode("".join(turns) + "<|im_start|>assistant\n", add_special_tokens=False).ids


@cache
def embedded() -> tuple[PromptBuilder, Tokenizer]:
    return PromptBuilder(Settings(), secret=b"test"), embedded_tokenizer().tokenizer
