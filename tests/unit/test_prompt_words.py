"""Text tokenized word by word has the ids that the tokenizer gives it as a whole."""

from unittest.mock import patch

import pytest

from gorgo_plugin.prompt import words
from gorgo_plugin.prompt.sources import embedded_tokenizer
from gorgo_plugin.prompt.words import Words

TEXTS = [
    "",
    " ",
    "one",
    " one two  three\n four, five. Six 7 eight",
    "<|im_start|>user\nHow are you?<|im_end|>\n",
    "caf\u00e9 au lait \u6f22\u5b57 kanji \U0001f642 smile",
    "def f(x):\n    return x + 1  # a comment",
    " ".join(f"word{k}" for k in range(500)),
]


TOKENIZER = embedded_tokenizer().tokenizer


def whole(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", TEXTS)
def test_known_and_unknown_words_give_the_ids_of_the_whole(text: str) -> None:
    for tokenized in (Words(whole), Words(whole, lines=True, specials=("<|im_start|>", "<|im_end|>"))):
        for _ in range(9):  # 500 words become known by and by
            assert tokenized.ids(text).tolist() == whole(text)
        assert not tokenized.ids(text).flags.writeable


def test_a_known_word_is_not_tokenized_again() -> None:
    asked: list[str] = []
    tokenized = Words(lambda text: asked.append(text) or whole(text))
    tokenized.ids("the cat and the dog and the bird")
    assert asked == ["the", " cat", " and", " the", " dog", " bird"]


def test_lines_and_special_tokens_part_words() -> None:
    asked: list[str] = []
    tokenized = Words(lambda text: asked.append(text) or whole(text), lines=True, specials=("<|im_end|>",))
    tokenized.ids("user\none two\nthree and two<|im_end|>\n")
    assert asked == ["user\n", "one", " two\n", "three", " and", " two", "<|im_end|>\n"]


def test_lines_of_unknown_words_are_mostly_tokenized_at_once() -> None:
    asked: list[str] = []
    tokenized = Words(lambda text: asked.append(text) or whole(text), lines=True)
    tokenized.ids("\n".join(f"word{k}" for k in range(500)))
    assert len(asked) == 1


def test_a_text_of_unknown_words_is_mostly_tokenized_at_once() -> None:
    asked: list[str] = []
    tokenized = Words(lambda text: asked.append(text) or whole(text))
    tokenized.ids(" ".join(f"word{k}" for k in range(500)))
    assert len(asked) == words.NEW_WORDS + 1


def test_words_in_use_stay_and_the_table_is_bounded() -> None:
    asked: list[str] = []
    tokenized = Words(lambda text: asked.append(text) or [1])
    with patch.object(words, "WORDS", 10):
        for number in range(100):
            tokenized.ids(f"often w{number}")
    assert asked.count("often") == 1
    assert len(tokenized._young) + len(tokenized._old) <= 20
