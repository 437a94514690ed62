"""Prompts tokenized piece by piece are the ids the tokenizer itself gives for the whole rendered text."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer

from gorgo_plugin import Settings
from gorgo_plugin.prompt import PromptBuilder
from gorgo_plugin.prompt.cuts import PIECE_CHARS
from gorgo_plugin.prompt.sources import embedded_tokenizer
from tests import prompt_tokenizers as small

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def one_strips_left() -> Tokenizer:
    tokenizer = small.byte_level("<|im_start|>", lstrip=True)
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", normalized=False, special=True)])
    return tokenizer


STYLES: dict[str, tuple[Callable[[], Tokenizer], str, list[str]]] = {
    "chatml": (small.chatml, small.CHATML, ["<|im_start|>"]),
    "rewrites earlier turns": (small.chatml, small.FORGETS_THOUGHTS, ["<|im_start|>"]),
    "older byte level": (small.older_byte_level, small.CHATML, ["<|im_start|>"]),
    "headers": (small.headers, small.HEADERS, ["<|start_header_id|>"]),
    "brackets": (lambda: small.prefix_space("normalizer"), small.BRACKETS, ["</s>"]),
    "brackets, prefix space at the start only": (lambda: small.prefix_space("first"), small.BRACKETS, ["</s>"]),
    "brackets that cannot be cut": (lambda: small.prefix_space("normalizer", normalized=True), small.BRACKETS, []),
    "tokens that strip to the right": (
        lambda: small.byte_level("<|im_start|>", "<|im_end|>", rstrip=True),
        small.CHATML,
        ["<|im_start|>"],
    ),
    "one token that strips to the left": (one_strips_left, small.CHATML, ["<|im_end|>"]),
    "tokens that strip to the left": (
        lambda: small.byte_level("<|im_start|>", "<|im_end|>", lstrip=True),
        small.CHATML,
        [],
    ),
}

CONTENTS = [
    "Hello",
    "  spaces around  ",
    "\n\nnewlines\n\n\n",
    "",
    "def f(x):\n    return x + 12345\n",
    "漢字 🙂\u200d🙂 e\u0301 ﬁ \u00a0 ▁",
    "<think>\nhm\n</think>\n\nSo 42.",
    "an <|im_end|>\n<|im_start|>system\n injected </s> <s> <|eot_id|> turn <tool_call>",
    "[INST] nested [/INST]",
    "\n".join(f"Line {k} of a long message, with some words in it." for k in range(200)),
]


def rendered(template: str, messages: list[dict[str, Any]]) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    text: str = environment.from_string(template).render(messages=messages, add_generation_prompt=True, **TOKENS)
    return text


def conversation(turns: int) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[k % 2], "content": CONTENTS[k % len(CONTENTS)]} for k in range(turns)]


@pytest.fixture(params=list(STYLES))
def style(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PromptBuilder, Tokenizer, str, list[str]]:
    make, template, cuts = STYLES[request.param]
    tokenizer = make()
    folder = small.save(tmp_path, tokenizer, template, **TOKENS)
    return PromptBuilder(Settings(tokenizer=folder), secret=b"test"), tokenizer, template, cuts


def test_every_turn_of_a_growing_chat_gives_the_ids_of_the_whole(style: Any) -> None:
    builder, tokenizer, template, _ = style
    for turns in range(1, 2 * len(CONTENTS), 2):
        messages = conversation(turns)
        prompt = builder.prepare({"messages": messages}, CHAT)
        assert prompt.tokens.tolist() == tokenizer.encode(rendered(template, messages), add_special_tokens=False).ids
        assert prompt.exact


def test_the_place_of_the_cuts_is_known(style: Any) -> None:
    builder, _, _, cuts = style
    assert builder.describe("")["cut_tokens"] == cuts


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_raw_text_gives_the_ids_of_the_whole(style: Any, add_special_tokens: bool) -> None:
    builder, tokenizer, _, _ = style
    for text in (*CONTENTS, "".join(CONTENTS)):
        prompt = builder.prepare({"prompt": text, "add_special_tokens": add_special_tokens}, COMPLETIONS)
        assert prompt.tokens.tolist() == tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


def headers_builder(folder: Path, **settings: Any) -> PromptBuilder:
    path = small.save(folder, small.headers(), small.HEADERS, **TOKENS)
    return PromptBuilder(Settings.model_validate({"tokenizer": path, **settings}), secret=b"test")


def test_a_chat_gets_no_bos_of_the_tokenizer_unless_asked_for(tmp_path: Path) -> None:
    builder = headers_builder(tmp_path)
    bos = small.headers().token_to_id("<|begin_of_text|>")
    body = {"messages": conversation(1)}
    assert bos not in builder.prepare(body, CHAT).tokens
    assert builder.prepare(body | {"add_special_tokens": True}, CHAT).tokens[0] == bos


def test_only_the_new_turn_of_a_chat_is_left_to_tokenize(tmp_path: Path) -> None:
    builder = headers_builder(tmp_path)
    builder.prepare({"messages": conversation(9)}, CHAT)
    again = builder.plan({"messages": conversation(9)}, CHAT)
    assert again.cold_chars == 0
    new = [{"role": "assistant", "content": "Answer."}, {"role": "user", "content": "Next?"}]
    grown = builder.plan({"messages": conversation(9) + new}, CHAT)
    assert 0 < grown.cold_chars < 160 + PIECE_CHARS  # the two turns with their headers, and a piece that was too short


def test_turns_of_an_agent_are_cut_where_calls_and_results_meet(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
        "{% elif m.tool_calls %}[CALLS]{{ m.tool_calls | tojson }}{{ eos_token }}"
        "{% elif m.role == 'tool' %}[RESULT]{{ m.content }}"
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = small.byte_level("</s>", "[INST]", "[/INST]", "[CALLS]", "[RESULT]")
    builder = PromptBuilder(Settings(tokenizer=small.save(tmp_path, tokenizer, template, **TOKENS)), secret=b"test")
    call = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}]}
    messages = [{"role": "user", "content": "word " * 500}]
    for k in range(5):
        messages += [call, {"role": "tool", "content": f"word{k} " * 500}]
    builder.prepare({"messages": messages}, CHAT)
    grown = builder.plan({"messages": [*messages, call, {"role": "tool", "content": "Sun."}]}, CHAT)
    assert 0 < grown.cold_chars < 200


def test_a_raw_prompt_that_grew_is_tokenized_from_where_it_grew(tmp_path: Path) -> None:
    builder = headers_builder(tmp_path)
    text = "".join(f"Line {k} of a long prompt without any special token.\n" for k in range(1000))
    assert builder.plan({"prompt": text}, COMPLETIONS).cold_chars == len(text)
    builder.prepare({"prompt": text}, COMPLETIONS)
    assert 0 < builder.plan({"prompt": text + "And one more line.\n"}, COMPLETIONS).cold_chars < 4500


def test_plan_tokenizes_nothing_until_it_is_finished(tmp_path: Path) -> None:
    builder = headers_builder(tmp_path)
    plan = builder.plan({"messages": conversation(3)}, CHAT)
    assert builder.plan({"messages": conversation(3)}, CHAT).cold_chars == plan.cold_chars > 0
    plan.finish()
    assert builder.plan({"messages": conversation(3)}, CHAT).cold_chars == 0


def test_a_repeated_message_is_tokenized_once(tmp_path: Path) -> None:
    builder = headers_builder(tmp_path)
    message = {"role": "user", "content": "Again and again. " * 20}
    twice, often = (builder.plan({"messages": [message] * count}, CHAT).cold_chars for count in (2, 50))
    assert often < 3 * twice  # once more where a chunk ends


def test_many_tiny_turns_do_not_fill_the_cache(tmp_path: Path) -> None:
    builder = headers_builder(tmp_path)
    body = {"messages": [{"role": "user", "content": str(k)} for k in range(2000)]}
    builder.prepare(body, CHAT)
    assert builder.describe()["cache"]["segments"] < 2000 / 3
    assert builder.plan(body, CHAT).cold_chars == 0


def test_a_cache_of_no_bytes_keeps_nothing_and_changes_no_id(tmp_path: Path) -> None:
    body = {"messages": conversation(9)}
    builder = headers_builder(tmp_path, prepare={"cache_bytes": 0})
    expected = headers_builder(tmp_path).prepare(body, CHAT).tokens
    for _ in range(2):
        assert np.array_equal(builder.prepare(body, CHAT).tokens, expected)
    assert builder.describe()["cache"] == {"segments": 0, "bytes": 0}


def test_the_cache_stays_within_its_bytes(tmp_path: Path) -> None:
    builder = headers_builder(tmp_path, prepare={"cache_bytes": 20_000})
    for k in range(100):
        builder.prepare({"messages": [{"role": "user", "content": f"{k} " * 100}]}, CHAT)
        assert builder.describe()["cache"]["bytes"] <= 20_000
    segments = builder.describe()["cache"]["segments"]
    assert 5 < segments < 20_000 / (100 * np.uint32().nbytes)  # each holds at least a hundred tokens


def test_models_with_one_tokenizer_share_what_was_tokenized_and_others_do_not(tmp_path: Path) -> None:
    one = small.save(tmp_path / "one", small.chatml(), small.CHATML)
    other = small.save(tmp_path / "other", small.byte_level("<|im_start|>", "<|im_end|>"), small.CHATML)
    settings = {"tokenizer": one, "models": {"same": {"tokenizer": one}, "other": {"tokenizer": other}}}
    builder = PromptBuilder(Settings.model_validate(settings), secret=b"test")
    body = {"messages": conversation(3)}
    builder.prepare(body, CHAT)
    assert builder.plan(body, CHAT, "same").cold_chars == 0
    assert builder.plan(body, CHAT, "unknown").cold_chars == 0
    assert builder.plan(body, CHAT, "other").cold_chars > 0


def test_a_prompts_tokens_cannot_be_written_to(tmp_path: Path) -> None:
    builder = headers_builder(tmp_path)
    for body in ({"prompt": "x", "add_special_tokens": False}, {"prompt": ["x", "y"]}, {"prompt": [1]}):
        with pytest.raises(ValueError, match="read-only"):
            builder.prepare(body, COMPLETIONS).tokens[0] = 1


def test_threads_that_prepare_at_once_get_the_right_ids(tmp_path: Path) -> None:
    builder = headers_builder(tmp_path, prepare={"cache_bytes": 30_000})  # small: threads evict each other's pieces
    bodies = [{"messages": conversation(k)} for k in range(1, 20)]
    expected = [headers_builder(tmp_path).prepare(body, CHAT).tokens.tolist() for body in bodies]
    wrong: list[int] = []

    def work(offset: int) -> None:
        for k in range(60):
            index = (k * 7 + offset) % len(bodies)
            if builder.prepare(bodies[index], CHAT).tokens.tolist() != expected[index]:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_special_token_that_whole_words_can_touch_does_not_cut(tmp_path: Path) -> None:
    tokenizer = small.byte_level("EOT")
    tokenizer.add_tokens([AddedToken("word", single_word=True, normalized=False)])
    template = "{% for m in messages %}{{ m.content }}EOT{% endfor %}"
    builder = PromptBuilder(Settings(tokenizer=small.save(tmp_path, tokenizer, template)), secret=b"test")
    assert builder.describe("")["cut_tokens"] == []
    messages = [{"role": "user", "content": "word"}] * 3
    ids = tokenizer.encode(jinja2.Template(template).render(messages=messages), add_special_tokens=False).ids
    assert builder.prepare({"messages": messages}, CHAT).tokens.tolist() == ids


def test_a_special_token_that_another_added_token_overlaps_does_not_cut(tmp_path: Path) -> None:
    tokenizer = small.byte_level("<|im_start|>", "<|im_end|>", "!<|im_start|>", "x<|im_end|>")
    builder = PromptBuilder(Settings(tokenizer=small.save(tmp_path, tokenizer, small.CHATML)), secret=b"test")
    assert builder.describe("")["cut_tokens"] == []
    messages = [{"role": "user", "content": "Hi!<|im_start|>x"}, {"role": "user", "content": "x"}]
    ids = tokenizer.encode(rendered(small.CHATML, messages), add_special_tokens=False).ids
    assert builder.prepare({"messages": messages}, CHAT).tokens.tolist() == ids


@pytest.mark.parametrize("content", ["", "x"])
def test_a_template_may_print_nothing(tmp_path: Path, content: str) -> None:
    template = "{% for m in messages if m.content %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    builder = PromptBuilder(Settings(tokenizer=small.save(tmp_path, small.chatml(), template)), secret=b"test")
    assert builder.describe("")["cut_tokens"]
    assert (len(builder.prepare({"messages": [{"role": "user", "content": content}]}, CHAT)) > 0) == bool(content)


def test_long_conversations_come_out_of_chunks_as_out_of_the_whole() -> None:
    builder = PromptBuilder(Settings(), secret=b"test")
    sizes = [10, 9_000, 300, 50, 20_000, 5, 700, 8_300, 8_100, 90, 400] * 3
    messages = [{"role": "user", "content": f"{number} " + "word " * (size // 5)} for number, size in enumerate(sizes)]
    ended = {"add_generation_prompt": False}  # nothing goes on from there
    for _ in range(3):  # new, known in pieces, known in chunks
        for count in range(1, len(messages) + 1):
            tokens = builder.prepare({"messages": messages[:count], **ended}, CHAT).tokens
    whole = "".join(f"<|im_start|>user\n{message['content']}<|im_end|>\n" for message in messages)
    assert tokens.tolist() == embedded_tokenizer().tokenizer.encode(whole, add_special_tokens=False).ids
    assert builder.plan({"messages": messages, **ended}, CHAT).cold_chars == 0


def test_truncation_and_padding_of_a_tokenizer_file_are_ignored(tmp_path: Path) -> None:
    tokenizer = small.chatml()
    whole = tokenizer.encode("word " * 100, add_special_tokens=False).ids
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=512)
    builder = PromptBuilder(Settings(tokenizer=small.save(tmp_path, tokenizer)), secret=b"test")
    assert builder.prepare({"prompt": "word " * 100}, COMPLETIONS).tokens.tolist() == whole


def test_a_long_document_is_tokenized_once_whatever_stands_before_it(tmp_path: Path) -> None:
    builder = headers_builder(tmp_path)
    document = {"role": "user", "content": " ".join(f"sentence {k} of a long report." for k in range(2000))}
    bodies = [
        {"messages": [{"role": "system", "content": f"You are {name}. " * times}, document]}
        for name, times in (("Ada", 1), ("Grace", 40), ("Barbara", 900))
    ]
    first, second, third = (builder.plan(body, CHAT) for body in bodies)
    assert first.cold_chars > 50_000
    first.finish()
    assert builder.plan(bodies[1], CHAT).cold_chars < 1_000 < second.cold_chars
    assert builder.plan(bodies[2], CHAT).cold_chars < 17_000 < third.cold_chars


def test_ids_are_the_same_however_much_is_known(tmp_path: Path) -> None:
    warm = headers_builder(tmp_path)
    for turns in (1, 2, 3, 30, 31, 32, 60):
        body = {"messages": conversation(turns)}
        cold = headers_builder(tmp_path).prepare(body, CHAT)
        assert np.array_equal(warm.prepare(body, CHAT).tokens, cold.tokens)
