"""A model made here: random weights, a tokenizer trained on the standard library, two chat templates.

Nothing is downloaded. vLLM draws the weights itself (`--load-format dummy`), so a folder with a configuration, a
tokenizer and a template is a whole model. Its answers are noise; what it counts, caches and how long it takes is real.
"""

from __future__ import annotations

import json
import re
import sysconfig
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from gorgo_plugin.prompt.train_embedded import standard_library, train

CONTEXT_TOKENS = 8192
VOCABULARY = 8192  # entries trained; half of the embedded tokenizer's, so that it is another one
LAYERS, KV_HEADS, HEAD_DIM = 4, 2, 64
# Keys and values of all layers in bfloat16: 2 KiB a token, so that a cache of 64 MiB holds 32,768 tokens.
KV_BYTES_PER_TOKEN = 2 * LAYERS * KV_HEADS * HEAD_DIM * 2

_WORD = re.compile("Ġ[a-z]{3,}")  # Ġ is how byte-level tokenizers write the space
HEADER_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

# ChatML with tools and their calls, as Hermes and Qwen write them.
CHATML = r"""
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- if system or tools %}
    {{- '<|im_start|>system\n' + system }}
    {%- if tools %}
        {{- '\n# Tools\n<tools>' }}
        {%- for tool in tools %}
            {{- '\n' + (tool | tojson) }}
        {%- endfor %}
        {{- '\n</tools>' }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in (messages[1:] if messages[0].role == 'system' else messages) %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {{- '\n<tool_call>\n{"name": ' + (call.function.name | tojson) }}
            {{- ', "arguments": ' + (call.function.arguments | tojson) + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
# Llama-3-style: a BOS, headers between special tokens, trimmed contents.
HEADERS = r"""
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + (message.content | trim) + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""


def write_model(folder: Path) -> None:
    """Write a model that vLLM loads: configuration, tokenizer, ChatML as its template; Llama-3's style beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train(standard_library(Path(sysconfig.get_path("stdlib"))), VOCABULARY)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in HEADER_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config())
    _write_json(folder / "config.json", _config(tokenizer))
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    (folder / "headers.jinja").write_text(HEADERS, encoding="utf-8")


def word_ids(folder: Path) -> list[int]:
    """Ids of the tokens that are a space and a lower-case word.

    A text of such tokens alone is tokenized again to the same ids, as most of what a trained model writes is.
    """
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    return sorted(index for token, index in vocabulary.items() if _WORD.fullmatch(token))


def _write_json(file: Path, content: dict[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


def _tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_TOKENS,
    }


def _config(tokenizer: Tokenizer) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT_TOKENS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": tokenizer.token_to_id("<|begin_of_text|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
    }
