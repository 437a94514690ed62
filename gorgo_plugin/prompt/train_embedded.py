"""Trains the embedded tokenizer: a byte-level BPE with ChatML's special tokens.

It serves where no tokenizer is configured. Its text is what every CPython 3.11 carries: the sources of the standard
library and the topics of `pydoc`, both under the PSF licence, so that nothing is downloaded and anyone can repeat it:

    python3.11 -m gorgo_plugin.prompt.train_embedded

The file it writes, `embedded.json.gz`, is the same to the byte for the same Python release (the one in the package:
CPython 3.11.7) and `tokenizers` release. Pieces are cut as GPT-4 and Llama-3 do, digits in threes, so that its counts
follow those of current models; what remains is scaled by the counts the engines report.
"""

from __future__ import annotations

import gzip
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 16_384  # entries: about 4 characters a token on English, and a file under 300 KB
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Tables, code kept for its age, and what distributions leave out or change.
LEFT_OUT = {"distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "test", "this", "turtledemo"}
EMBEDDED = Path(__file__).with_name("embedded.json.gz")


def standard_library(root: Path) -> Iterator[str]:
    """The sources of the public standard library under `root`, in the order of their paths."""
    kept = {name for name in sys.stdlib_module_names if name not in LEFT_OUT}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        top = path.relative_to(root).parts[0].removesuffix(".py")
        if top in kept and not {"test", "tests"} & set(path.parts):
            yield path.read_text(encoding="utf-8", errors="replace")


def train(texts: Iterable[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """Train a byte-level BPE on `texts`; equal texts in equal order give an equal tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def packed(tokenizer: Tokenizer) -> bytes:
    """The tokenizer's JSON, compressed without a time stamp."""
    return gzip.compress(tokenizer.to_str().encode(), compresslevel=9, mtime=0)


def main() -> None:
    """Train on this Python's own library and write `embedded.json.gz` into the package."""
    root = Path(sysconfig.get_path("stdlib"))
    data = packed(train(standard_library(root)))
    EMBEDDED.write_bytes(data)
    print(f"{EMBEDDED.name}: {len(data):,} bytes, from CPython {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
