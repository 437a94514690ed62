"""Where tokenizers and templates are read from, and what a wrong one is answered with."""

import gzip
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from gorgo_plugin import Settings, SettingsError
from gorgo_plugin.prompt import PromptBuilder, train_embedded
from gorgo_plugin.prompt.sources import embedded_tokenizer
from gorgo_plugin.prompt.vocabulary import Vocabulary
from tests import prompt_tokenizers as small

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "Hi"}]}


def build(**settings: Any) -> PromptBuilder:
    return PromptBuilder(Settings.model_validate(settings), secret=b"test")


def text(builder: PromptBuilder, body: Any = HI, model: str | None = None) -> str:
    return small.chatml().decode(builder.prepare(body, CHAT, model).tokens.tolist(), skip_special_tokens=False)


def test_a_tokenizer_is_read_from_a_folder_or_its_file(tmp_path: Path) -> None:
    folder = small.save(tmp_path, small.chatml(), "A{{ messages[0].content }}")
    assert text(build(tokenizer=folder)) == text(build(tokenizer=f"{folder}/tokenizer.json")) == "AHi"


def test_a_file_by_another_name_comes_without_the_folders_template(tmp_path: Path) -> None:
    folder = Path(small.save(tmp_path, small.chatml(), "A{{ messages[0].content }}"))
    (folder / "tokenizer.json").rename(folder / "mine.json")
    assert build(tokenizer=str(folder / "mine.json")).describe("")["chat_template"] == "chatml"


def test_a_template_file_of_the_folder_goes_before_its_configuration(tmp_path: Path) -> None:
    folder = small.save(tmp_path, small.chatml(), "configured")
    (tmp_path / "chat_template.jinja").write_text("filed", encoding="utf-8")
    assert text(build(tokenizer=folder)) == "filed"


def test_of_named_templates_default_serves_and_tool_use_where_tools_are(tmp_path: Path) -> None:
    folder = small.save(tmp_path, small.chatml())
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}), encoding="utf-8")
    builder = build(tokenizer=folder)
    assert text(builder) == "plain"
    assert text(builder, HI | {"tools": [{"function": {"name": "f"}}]}) == "tools"


def test_a_configured_template_goes_before_the_folders(tmp_path: Path) -> None:
    folder = small.save(tmp_path / "t", small.chatml(), "folder")
    file = tmp_path / "mine.jinja"
    file.write_text("from file {{ messages[0].content }}", encoding="utf-8")
    assert text(build(tokenizer=folder, chat_template="given {{ messages[0].content }}")) == "given Hi"
    assert text(build(tokenizer=folder, chat_template=str(file))) == "from file Hi"


@pytest.mark.parametrize("token", ["<|endoftext|>", {"content": "<|endoftext|>", "lstrip": False}])
def test_special_tokens_reach_the_template_in_both_forms(tmp_path: Path, token: Any) -> None:
    folder = small.save(tmp_path, small.chatml(), "{{ bos_token }}x", bos_token=token, eos_token=None)
    assert text(build(tokenizer=folder)) == "<|endoftext|>x"


def test_special_tokens_are_also_read_from_their_own_file(tmp_path: Path) -> None:
    folder = small.save(tmp_path, small.chatml(), "{{ eos_token }}x")
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}', encoding="utf-8")
    assert text(build(tokenizer=folder)) == "<|im_end|>x"


def test_a_model_takes_its_own_settings_and_others_the_top_ones(tmp_path: Path) -> None:
    folder = small.save(tmp_path, small.chatml(), "top")
    builder = build(tokenizer=folder, models={"m": {"chat_template": "own {{ bos_token }}"}, "n": {"block_tokens": 8}})
    assert text(builder, model="m") == "own "
    assert text(builder, model="n") == text(builder, model="unknown") == "top"
    assert text(builder, HI | {"model": "m"}) == "own "


def test_describe_tells_where_each_models_prompts_come_from(tmp_path: Path) -> None:
    folder = small.save(tmp_path, small.chatml(), small.CHATML)
    described = build(models={"m": {"tokenizer": folder}}).describe()
    assert set(described["models"]) == {"", "m"}
    assert described["models"][""]["tokenizer"] == "embedded"
    assert described["models"]["m"] == {
        "tokenizer": f"{folder}/tokenizer.json",
        "encoder": f"tiktoken {version('tiktoken')}",
        "vocabulary_size": small.chatml().get_vocab_size(),
        "chat_template": f"{folder}/tokenizer.json (its folder)",
        "tokenized": "by-segment",
        "cut_tokens": ["<|im_start|>"],
        "cut_spaces": True,
        "exact": True,
        "template_failures": 0,
    }
    json.dumps(described)


# Errors


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "/no/such/folder", "a\0b", "~nobody-of-this-name/x", "x" * 10_000])
def test_a_name_that_is_no_file_is_refused_by_setting(name: str) -> None:
    with pytest.raises(
        SettingsError, match=r"^tokenizer: '.{1,200}' is neither a file nor a folder \(models of the Hug"
    ):
        build(tokenizer=name)
    with pytest.raises(SettingsError, match=r"^models\.m\.tokenizer: "):
        build(models={"m": {"tokenizer": name}})


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^tokenizer: folder '.*' holds no tokenizer\.json$"):
        build(tokenizer=str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe", b'{"model": {"type": "Unheard"}}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(SettingsError, match=r"^models\.m\.tokenizer: '.*' is no tokenizer\.json that can be read"):
        build(models={"m": {"tokenizer": str(tmp_path)}})


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[1]"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_broken_configuration_beside_the_tokenizer_is_refused(tmp_path: Path, file: str, content: bytes) -> None:
    folder = small.save(tmp_path, small.chatml())
    (tmp_path / file).write_bytes(content)
    with pytest.raises(SettingsError, match=rf"^tokenizer: '.*{file}' "):
        build(tokenizer=folder)


def test_a_template_that_is_neither_text_nor_file_is_refused(tmp_path: Path) -> None:
    for wrong in ("no-such-file.jinja", str(tmp_path)):
        with pytest.raises(
            SettingsError, match=r"^chat_template: '.*' is neither a file nor the text of a Jinja template"
        ):
            build(chat_template=wrong)


def test_a_template_with_a_syntax_error_is_refused_by_setting(tmp_path: Path) -> None:
    wrong = "{% for m in messages %}"
    with pytest.raises(SettingsError, match=r"^chat_template: no Jinja template: .*\(line 1\)$"):
        build(chat_template=wrong)
    with pytest.raises(SettingsError, match=r"^models\.m\.chat_template: no Jinja template"):
        build(models={"m": {"chat_template": wrong}})
    folder = small.save(tmp_path, small.chatml(), wrong)
    with pytest.raises(SettingsError, match=r"^tokenizer: the chat template of its folder: no Jinja template"):
        build(tokenizer=folder)


# The embedded tokenizer


def test_the_embedded_tokenizer_is_small_and_its_counts_are_not_exact() -> None:
    assert train_embedded.EMBEDDED.stat().st_size < 500_000
    prompt = build().prepare(HI, CHAT)
    assert not prompt.exact
    assert build().describe("")["vocabulary_size"] == train_embedded.VOCABULARY


def test_the_embedded_tokenizer_gives_every_text_back() -> None:
    tokenizer = embedded_tokenizer().tokenizer
    for sample in (*small.TEXTS, "\x00\x7f\u0600\U0001f600 \t\r\n", "Ünïcödé " * 50):
        assert tokenizer.decode(tokenizer.encode(sample).ids) == sample


def test_the_embedded_tokenizer_counts_english_like_current_models() -> None:
    english = (
        "The gateway sends each request to the replica that will answer first. It knows how long a round trip takes, "
        "how much work is waiting there, and which part of the prompt has been seen before."
    )
    tokens = embedded_tokenizer().tokenizer.encode(english).ids
    assert 4.0 < len(english) / len(tokens) < 5.5


def test_training_is_deterministic_and_what_is_packed_can_be_read() -> None:
    one, again = (train_embedded.packed(train_embedded.train(small.TEXTS, vocabulary=500)) for _ in range(2))
    assert one == again
    assert json.loads(gzip.decompress(one))["model"]["type"] == "BPE"


def test_the_training_text_is_the_public_standard_library(tmp_path: Path) -> None:
    for path in (
        "json/decoder.py",
        "abc.py",
        "test/test_abc.py",
        "unittest/test/x.py",
        "site-packages/a.py",
        "re/_x.py",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path, encoding="utf-8")
    assert list(train_embedded.standard_library(tmp_path)) == ["abc.py", "json/decoder.py", "re/_x.py"]


# Where a tokenizer may be cut


def test_a_cut_that_is_none_is_found_out() -> None:
    vocabulary = Vocabulary(small.chatml(), "test")
    assert vocabulary.cuts_exactly(["<|im_start|>", "<|im_end|>"])
    assert not vocabulary.cuts_exactly(["[INST]"])
    assert not vocabulary.cuts_exactly(["\n"])


def test_a_token_that_is_sought_in_normalized_text_does_not_cut() -> None:
    for normalized, cuts in ((False, ("</s>",)), (True, ())):
        tokenizer = small.prefix_space("normalizer", normalized=normalized)
        assert Vocabulary(tokenizer, "test").choose_cuts(["</s>[INST]"]) == cuts


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (small.chatml, True),
        (small.headers, True),
        (small.older_byte_level, True),
        (lambda: small.prefix_space("first"), False),
        (lambda: small.prefix_space("always"), False),
        (lambda: small.prefix_space("normalizer"), False),
    ],
)
def test_spaces_cut_where_pieces_start_at_them(tokenizer: Any, expected: bool) -> None:
    assert Vocabulary(tokenizer(), "test").cuts_spaces is expected


@pytest.mark.parametrize("token", [("<tail>", {"rstrip": True}), ("a b", {}), ("a ", {})])
def test_spaces_do_not_cut_where_an_added_token_reaches_across(token: Any) -> None:
    from tokenizers import AddedToken

    tokenizer = small.chatml()
    tokenizer.add_tokens([AddedToken(token[0], normalized=False, **token[1])])
    assert not Vocabulary(tokenizer, "test").cuts_spaces
