"""Images, sounds and files: runs of pseudo-tokens that tell one from another."""

from typing import Any

import numpy as np
import pytest

from gorgo_plugin import Settings
from gorgo_plugin.prompt import PromptBuilder
from gorgo_plugin.prompt.builder import PSEUDO_TOKEN, PSEUDO_TOKENS_MAX

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
PNG = "iVBORw0KGgo="


@pytest.fixture(scope="module")
def builder() -> PromptBuilder:
    return PromptBuilder(Settings.model_validate({"prepare": {"image_tokens": 10}}), secret=b"test")


def tokens(builder: PromptBuilder, content: Any, endpoint: str = CHAT) -> list[int]:
    field = "input" if endpoint == RESPONSES else "messages"
    return builder.prepare({field: [{"role": "user", "content": content}]}, endpoint).tokens.tolist()


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def pseudo(ids: list[int]) -> list[int]:
    return [token for token in ids if token >= PSEUDO_TOKEN]


def test_an_image_is_a_run_of_its_own_ids_where_it_stands(builder: PromptBuilder) -> None:
    ids = tokens(
        builder, [{"type": "text", "text": "before"}, image("http://a/1.png"), {"type": "text", "text": "after"}]
    )
    run = pseudo(ids)
    assert len(run) == len(set(run)) == 10
    start = ids.index(run[0])
    assert ids[start : start + 10] == run
    assert 0 < start < len(ids) - 10


def test_equal_images_have_equal_ids_and_others_have_others(builder: PromptBuilder) -> None:
    first, again, other = (pseudo(tokens(builder, [image(url)])) for url in ("http://a/1", "http://a/1", "http://a/2"))
    assert first == again
    assert not set(first) & set(other)


def test_two_images_of_one_message_stand_in_their_order(builder: PromptBuilder) -> None:
    one, two = (pseudo(tokens(builder, [image(url)])) for url in ("http://a/1", "http://a/2"))
    assert pseudo(tokens(builder, [image("http://a/2"), image("http://a/1"), image("http://a/2")])) == two + one + two


@pytest.mark.parametrize(
    ("content", "endpoint"),
    [
        ([image(f"data:image/png;base64,{PNG}")], CHAT),
        ([{"type": "image_url", "image_url": f"data:image/png;base64,{PNG}"}], CHAT),
        ([{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}], MESSAGES),
        ([{"type": "input_image", "image_url": f"data:image/png;base64,{PNG}"}], RESPONSES),
        ([{"type": "input_audio", "input_audio": {"data": PNG, "format": "wav"}}], CHAT),
        ([{"type": "file", "file": {"file_data": PNG}}], CHAT),
        ([{"type": "input_file", "file_data": PNG}], RESPONSES),
        ([{"type": "document", "source": {"type": "base64", "data": PNG}}], MESSAGES),
    ],
)
def test_equal_bytes_have_equal_ids_in_every_dialect(builder: PromptBuilder, content: Any, endpoint: str) -> None:
    assert pseudo(tokens(builder, content, endpoint)) == pseudo(tokens(builder, [image(f"data:;base64,{PNG}")]))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "source": {"type": "url", "url": "http://a/1"}},
        {"type": "video_url", "video_url": {"url": "http://a/1"}},
        {"type": "audio_url", "audio_url": {"url": "http://a/1"}},
    ],
)
def test_what_is_named_by_a_url_is_told_apart_by_it(builder: PromptBuilder, part: Any) -> None:
    assert pseudo(tokens(builder, [part])) == pseudo(tokens(builder, [image("http://a/1")]))


def test_a_part_of_unknown_kind_is_told_apart_by_all_it_holds(builder: PromptBuilder) -> None:
    one, again, other = (pseudo(tokens(builder, [{"type": "hologram", "x": x}])) for x in (1, 1, 2))
    assert one == again
    assert len(one) == 10
    assert one != other


def test_a_prompt_with_an_image_is_not_exact(builder: PromptBuilder, tmp_path: Any) -> None:
    from tests import prompt_tokenizers as small

    folder = small.save(tmp_path, small.chatml(), small.CHATML)
    exact = PromptBuilder(Settings(tokenizer=folder), secret=b"test")
    for content, expected in (("Hi", True), ([{"type": "text", "text": "Hi"}, image("http://a/1")], False)):
        assert exact.prepare({"messages": [{"role": "user", "content": content}]}, CHAT).exact is expected


def test_an_image_in_an_earlier_turn_leaves_the_rest_cached(builder: PromptBuilder) -> None:
    messages = [{"role": "user", "content": [image("http://a/1"), {"type": "text", "text": "What is this?"}]}]
    builder.prepare({"messages": messages}, CHAT)
    assert builder.plan({"messages": messages}, CHAT).cold_chars == 0


def test_images_in_tool_results_count(builder: PromptBuilder) -> None:
    block = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
    assert (
        len(pseudo(tokens(builder, [{"type": "tool_result", "tool_use_id": "t", "content": [block]}], MESSAGES))) == 10
    )


def test_the_tokens_of_many_images_are_bounded() -> None:
    parts = [image(f"http://a/{k % 4000}") for k in range(5000)]
    prompt = PromptBuilder(Settings(), secret=b"test").prepare({"messages": [{"role": "user", "content": parts}]}, CHAT)
    images = int(np.count_nonzero(prompt.tokens >= PSEUDO_TOKEN))
    assert images == 5000 * (PSEUDO_TOKENS_MAX // 5000)


def test_ids_of_images_depend_on_the_secret() -> None:
    body = {"messages": [{"role": "user", "content": [image("http://a/1")]}]}
    one, other = (PromptBuilder(Settings(), secret=secret).prepare(body, CHAT).tokens for secret in (b"one", b"other"))
    assert len(one) == len(other)
    assert not np.array_equal(one, other)


def test_a_secret_of_any_length_serves() -> None:
    for secret in (b"", b"x" * 1000):
        assert len(PromptBuilder(Settings(), secret=secret).prepare({"prompt": "Hi"}, "/v1/completions")) > 0
