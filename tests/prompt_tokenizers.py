"""Small real tokenizers and chat templates in the styles models use, trained here in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from gorgo_plugin.prompt.train_embedded import PIECES

TEXTS = [
    "user assistant system tool: what is the weather in Paris today? It is 21 degrees, and sunny.",
    "def add(a, b):\n    return a + b\n\n\nclass Point:\n    def __init__(self, x=0, y=0):\n        self.x = x",
    "The quick brown fox jumps over the lazy dog. Don't you think it's 12345 times quicker?",
    "こんにちは世界。漢字とかな。 Ça va très bien, merci! Grüße aus München. Привет, мир.",
    '{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}',
    "user\nassistant\nuser\n\nassistant\n\n [INST] and [/INST] with <s> and </s> in plain text \n\n",
] * 3

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %} {{ message.content }} {{ eos_token }}"
    "{% else %}[INST] {{ message.content }} [/INST]{% endif %}{% endfor %}"
)
# Drops what past answers thought, as soon as a later question stands: an earlier turn changes.
FORGETS_THOUGHTS = (
    "{% set last = namespace(question=0) %}"
    "{% for message in messages %}{% if message.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.index0 < last.question and '</think>' in message.content %}"
    "{{ message.content.split('</think>')[-1].lstrip('\\n') }}"
    "{% else %}{{ message.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _special(content: str, **flags: bool) -> AddedToken:
    return AddedToken(content, special=True, **{"normalized": False, **flags})


def byte_level(*special: str, **flags: bool) -> Tokenizer:
    """A byte-level BPE in the style of GPT-4, Qwen and Llama-3."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, [_special(token, **flags) for token in special], pre_tokenizers.ByteLevel.alphabet())
    return tokenizer


def older_byte_level() -> Tokenizer:
    """A byte-level BPE in the style of GPT-2, with a normalizer, and ChatML's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [_special(token) for token in ("<|im_start|>", "<|im_end|>")]
    _train(tokenizer, special, pre_tokenizers.ByteLevel.alphabet())
    return tokenizer


def chatml() -> Tokenizer:
    """ChatML's special tokens, and an ordinary added token."""
    tokenizer = byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return tokenizer


def composed() -> Tokenizer:
    """ChatML's special tokens over text in composed form (NFC), in the style of Qwen."""
    tokenizer = chatml()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def converted() -> Tokenizer:
    """Llama-3's special tokens; merges as they are made of tiktoken's ranks: every pair that joins to an entry."""
    state = json.loads(headers().to_str())
    special = {token["content"] for token in state["added_tokens"]}
    vocabulary = {token: id for token, id in state["model"]["vocab"].items() if token not in special}
    state["model"]["merges"] = [
        [token[:at], token[at:]]
        for token in sorted(vocabulary, key=vocabulary.__getitem__)
        for at in range(1, len(token))
        if token[:at] in vocabulary and token[at:] in vocabulary
    ]
    state["model"]["ignore_merges"] = True
    return Tokenizer.from_str(json.dumps(state))


def headers() -> Tokenizer:
    """Llama-3's special tokens; the tokenizer itself puts a BOS before raw text."""
    tokens = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = byte_level(*tokens)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        special_tokens=[("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))],
    )
    return tokenizer


def prefix_space(scheme: str, **flags: bool) -> Tokenizer:
    """A BPE over words with a prefix space in the style of SentencePiece; [INST] is ordinary text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    if scheme == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    _train(tokenizer, [_special(token, **flags) for token in ("<unk>", "<s>", "</s>")], [])
    return tokenizer


def _train(tokenizer: Tokenizer, special: list[AddedToken], alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)


def save(folder: Path, tokenizer: Tokenizer, template: str | None = None, **config: Any) -> str:
    """Write a tokenizer folder as the hub holds it; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)
