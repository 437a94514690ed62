"""tiktoken stands in for a tokenizer exactly where it gives the same ids."""

import inspect
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from gorgo_plugin import Settings
from gorgo_plugin.fleet.passages import Passage
from gorgo_plugin.prompt import PromptBuilder, byte_level
from gorgo_plugin.prompt.byte_level import ByteLevelEncoder, NotTheSame
from gorgo_plugin.prompt.sources import embedded_tokenizer
from gorgo_plugin.prompt.train_embedded import PIECES
from gorgo_plugin.prompt.vocabulary import Vocabulary
from tests import prompt_tokenizers as small

MADE: dict[str, Callable[[], Tokenizer]] = {
    "embedded": lambda: embedded_tokenizer().tokenizer,
    "chatml": small.chatml,
    "headers": small.headers,
    "older byte level": small.older_byte_level,
    "composed": small.composed,
    "converted": small.converted,
}


def corpus() -> list[str]:
    """Prose, code, Unicode, digits, runs of whitespace, and bytes taken for text."""
    rng = random.Random(7)
    texts = [Passage(f"corpus/{k}", 200).text for k in range(20)] + small.TEXTS
    texts += [inspect.getsource(module) for module in (byte_level, random, json)]
    blocks = [(0x20, 0x2FF), (0x300, 0x36F), (0x370, 0x5FF), (0x900, 0xE7F), (0x1E00, 0x2FFF), (0x3000, 0x30FF)]
    blocks += [(0x4E00, 0x9FFF), (0xA000, 0xD7FF), (0xE000, 0xFFFD), (0x1F300, 0x1FAFF), (0x10000, 0x10FFFF)]
    texts += ["".join(chr(rng.randint(*block)) for _ in range(300)) for block in blocks for _ in range(5)]
    texts += [
        "".join(rng.choices("0123456789., ", k=300)),
        "\r\n" * 50,
        " " * 700 + "x",
        "\n \n\t" * 60,
        "'S'll'RE" * 30,
    ]
    texts += [rng.randbytes(400).decode("latin-1"), rng.randbytes(400).decode(errors="replace"), ""]
    return texts + ["<|im_start|>user\n" + text + "<|im_end|>\n<tool_call><|im_" for text in texts]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"'s| ?\p{L}+|\s+(?!\S)|\s+", r"(?:'s| ?\p{L}+)|\s+(?!\S)|\s+"),
        (r"(?i:'s|'t)|[|)]|\||(a|b)|(?<=x)y|z", r"(?:(?i:'s|'t)|[|)]|\||(a|b))|(?<=x)y|z"),
        (r"[]|]|[^]|]|\)(?=a)|b", r"(?:[]|]|[^]|])|\)(?=a)|b"),
        (r"a|(b(?!c))|d", r"a|(b(?!c))|d"),  # there is but one plain alternative in front
        (r"(?=a)|b|c", r"(?=a)|b|c"),
        (r"a|b|c", r"a|b|c"),
        (r"(?i)a|b|c(?!d)", r"(?i)a|b|c(?!d)"),  # in a group the flag would end with it
        ("(?x: a # )\n|b)|c(?!d)", "(?x: a # )\n|b)|c(?!d)"),  # what looks like a bracket is a comment
        ("", ""),
    ],
)
def test_alternatives_in_front_of_one_that_looks_around_become_one(pattern: str, expected: str) -> None:
    assert byte_level.grouped(pattern) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        r"[a-z]+|[A-Z]+|[[:punct:]|](?!c)|\s+|[\s\S]",  # the class goes on behind its first bracket
        r"a\p{L}{1,100}|b\p{L}{1,100}|c\p{L}{1,100}|.|\s+(?!\S)|\s+",  # too large as one
    ],
)
def test_alternatives_that_cannot_be_one_stay_apart(pattern: str) -> None:
    assert ByteLevelEncoder(splitting_by(pattern)).ids("some words") is not None


@pytest.mark.parametrize("name", list(MADE))
def test_a_corpus_gets_the_ids_of_the_tokenizer(name: str) -> None:
    tokenizer = MADE[name]()
    encoder, texts = ByteLevelEncoder(tokenizer), corpus()
    taken = 0
    for text, expected in zip(texts, tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True):
        ids = encoder.ids(text)
        taken += ids is not None
        assert ids is None or ids.tolist() == expected.ids
    assert taken > 0.6 * len(texts)


def test_every_code_point_is_split_alike() -> None:
    # Two regular expression engines, each with its own edition of Unicode; a difference would show in a release.
    tokenizer = small.byte_level("<|im_start|>")
    encoder = ByteLevelEncoder(tokenizer)
    codes = [code for code in range(0x32000) if not (0xD800 <= code < 0xE000 or 0x4E00 <= code < 0x9F00)]
    units = [f"a{chr(code)}1{chr(code)} {chr(code)}a" for code in codes if code < 0x12000 or code % 16 == 0]
    texts = ["".join(units[at : at + 500]) for at in range(0, len(units), 500)]
    for text, expected in zip(texts, tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True):
        ids = encoder.ids(text)
        assert ids is not None
        assert ids.tolist() == expected.ids


def test_whatever_merges_pass_the_check_lead_to_the_same_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_level, "_texts", lambda *_: [])  # no trial: the check of the merges has to do
    passed = 0
    for seed in range(200):
        rng = random.Random(seed)
        tokenizer = made_of(rng)
        try:
            encoder = ByteLevelEncoder(tokenizer)
        except NotTheSame:
            continue
        passed += 1
        texts = ["".join(rng.choices("abc", k=rng.randrange(1, 30))) for _ in range(100)]
        expected = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        assert [ids.tolist() for ids in map(encoder.ids, texts) if ids is not None] == [one.ids for one in expected]
    assert 50 < passed < 190


def made_of(rng: random.Random) -> Tokenizer:
    """A byte-level BPE of random merges, in an order that training may not have given them."""
    vocabulary = {char: id for id, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: dict[tuple[str, str], None] = {}
    tokens = list("abc")
    for _ in range(rng.randrange(1, 14)):
        left, right = rng.choice(tokens), rng.choice(tokens)
        if left + right not in vocabulary:
            vocabulary[left + right] = len(vocabulary)
            tokens.append(left + right)
        elif rng.random() < 0.5:
            continue
        merges[left, right] = None
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[*merges], ignore_merges=rng.random() < 0.5))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def changed(**parts: Any) -> Tokenizer:
    """The ChatML tokenizer with other values in the parts of its JSON."""
    state = json.loads(small.chatml().to_str())
    for name, value in parts.items():
        state[name] = value(state[name]) if callable(value) else value
    return Tokenizer.from_str(json.dumps(state))


def lowercasing() -> Tokenizer:
    tokenizer = small.chatml()
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def splitting_twice() -> Tokenizer:
    tokenizer = small.chatml()
    steps = [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


def splitting_by_gaps() -> Tokenizer:
    tokenizer = small.chatml()
    split = pre_tokenizers.Split(Regex(PIECES), behavior="merged_with_previous")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


def splitting_by(pattern: str) -> Tokenizer:
    tokenizer = small.chatml()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def leaving_text_out() -> Tokenizer:
    # What its expression does not match is a piece too; tiktoken would drop it.
    tokenizer = small.chatml()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def with_added(token: AddedToken) -> Tokenizer:
    tokenizer = small.byte_level("<|im_start|>", "<|im_end|>")
    tokenizer.add_tokens([token])
    return tokenizer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lowercasing, "normalizes text in a way of its own"),
        (lambda: small.prefix_space("normalizer"), "normalizes text in a way of its own"),
        (lambda: small.prefix_space("first"), "not byte-level, or puts a space before text"),
        (lambda: small.byte_level("<|im_end|>", rstrip=True), "depends on what stands beside it"),
        (splitting_twice, "splits text in several steps"),
        (splitting_by_gaps, "by what stands between the pieces"),
        (leaving_text_out, "ids of a text made to try it differ"),
        (lambda: splitting_by(r"\p{L}*|[\s\S]"), "tiktoken broke down: range end index"),  # it matches nothing, too
        (lambda: with_added(AddedToken("<|im_start|>s", normalized=False)), "begins like another"),
        (lambda: with_added(AddedToken("<think>", normalized=True)), "for before and some after text"),
        (lambda: Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "not byte-level"),
        (lambda: changed(model=lambda model: {**model, "dropout": 0.1}), "no plain BPE"),
        (
            lambda: changed(model=lambda model: {**model, "merges": model["merges"][::-1]}),
            "not in the order of the ids",
        ),
        (lambda: changed(model=lambda model: {**model, "merges": model["merges"][:-5]}), "do not lead to every entry"),
    ],
)
def test_a_tokenizer_that_tiktoken_cannot_stand_in_for_is_refused(make: Callable[[], Tokenizer], reason: str) -> None:
    with pytest.raises(NotTheSame, match=reason):
        ByteLevelEncoder(make())


def test_several_texts_in_one_call_are_kept_apart() -> None:
    tokenizer = small.chatml()
    encoder = ByteLevelEncoder(tokenizer)
    texts = ["a ", " b", "", "c\n", "\nd", "<|im_start|>", "e", "", " "]
    batch = encoder.batch(texts)
    assert batch is not None
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert encoder.batch([*texts, encoder._separator]) is None  # nobody can know it; then one text at a time


def test_text_that_only_the_tokenizer_can_tell_goes_to_it() -> None:
    vocabulary = Vocabulary(small.older_byte_level(), "test")  # brings text into a normal form
    tokenizer = small.older_byte_level()
    for text in ("e\u0301 ﬁ", "plain", "é" * 3000 + "ﬁ" * 3000):
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert vocabulary.encode([text])[0].tolist() == expected
        assert vocabulary.encode([text, text])[1].tolist() == expected


def test_of_many_special_tokens_those_in_a_text_are_found() -> None:
    overlapping = ["<<<", "<|<", "|<|", "[0][", "][1"]
    tokenizer = small.byte_level(*(f"<|reserved_{number:03}|>" for number in range(300)), *overlapping)
    encoder, rng = ByteLevelEncoder(tokenizer), random.Random(3)
    pieces = ["<|reserved_007|>", "<|reserved_7|>", "<|", "<", "|", "[0][1]", "[", " a ", "word", *overlapping]
    texts = ["".join(rng.choices(pieces, k=rng.randrange(12))) for _ in range(500)] + ["<|reserved_299|>x" * 200]
    for text, expected in zip(texts, tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True):
        ids = encoder.ids(text)
        assert ids is not None
        assert ids.tolist() == expected.ids
        assert {special for special in encoder._specials if special in text} <= encoder._in(text)


def test_text_full_of_what_special_tokens_begin_with_takes_no_longer() -> None:
    encoder = ByteLevelEncoder(small.byte_level(*(f"<|reserved_{number:03}|>" for number in range(300))))
    assert encoder._in("<" * 100_000) is encoder._in("<p>" * 9) is encoder._specials
    assert encoder._in("<p> and <|reserved_007|>") == {"<|reserved_007|>"}


def test_an_encoder_that_breaks_down_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(byte_level, "_encoders", {})
    vocabulary = Vocabulary(small.chatml(), "test")
    fast = vocabulary._fast
    assert fast is not None
    panics = tiktoken.Encoding(
        "panics", pat_str=r"\p{L}*|\s", mergeable_ranks={bytes([byte]): byte for byte in range(256)}, special_tokens={}
    )
    monkeypatch.setattr(fast, "_encoding", panics)
    texts = ["1", "<|im_start|>user\nHello"]
    for wanted in (texts[:1], texts):
        ids = vocabulary.encode(wanted)
        assert [one.tolist() for one in ids] == [
            small.chatml().encode(text, add_special_tokens=False).ids for text in wanted
        ]
    assert vocabulary.encoder.startswith("tokenizers (tiktoken broke down")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert Vocabulary(small.chatml(), "read anew").encoder == vocabulary.encoder


def test_what_exceeds_the_limits_of_a_regular_expression_goes_to_the_tokenizer() -> None:
    encoder = ByteLevelEncoder(small.chatml())
    assert encoder.ids(" " * 1_000_000) is None
    assert encoder.ids("a" * 100_000) is not None


def test_status_says_what_tokenizes_and_why() -> None:
    with_tiktoken = PromptBuilder(Settings(), secret=b"test").describe("")
    assert with_tiktoken["encoder"].startswith("tiktoken ")
    alone = Settings.model_validate({"prepare": {"encoder": "tokenizers"}})
    assert PromptBuilder(alone, secret=b"test").describe("")["encoder"] == "tokenizers"
    refused = Vocabulary(small.prefix_space("first"), "test")
    assert refused.encoder == "tokenizers (it is not byte-level, or puts a space before text)"
