"""A Hugging Face tokenizer and where text may be cut for it.

A special token cuts tokenization exactly: nothing before it merges with anything after. So a prompt cut in front of
special tokens can be tokenized piece by piece, each piece once, and joined. Headers and newlines do not cut, nor do
tokens that take the whitespace before them along or that another added token overlaps. Each piece begins with its
special token, so that what depends on what stands before the text (a prefix space, whitespace a token takes from its
right) comes out as in the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

Ids = NDArray[np.uint32]

# What stood next to a cut in prompts that tokenizers were seen to treat unlike the middle of a text.
_NEIGHBOURS = (
    "",
    " ",
    "  ",
    "\n",
    "\n\n",
    " \n ",
    "\t",
    "a",
    " a",
    "a ",
    "user\nHello",
    "12345",
    "'s",
    "...",
    "def f(x):\n    return x\n",
    "é",
    "\u0301",
    "ﬁ",
    "漢字",
    "🙂\u200d🙂",
    "\u00a0",
    "▁",
    "[INST] x [/INST]",
    "<s>",
    "<|",
    "|>",
)


class Vocabulary:
    """A tokenizer without truncation and padding. Thread-safe; encoding releases the GIL."""

    def __init__(self, tokenizer: Tokenizer, source: str, number: int = 0) -> None:
        """`number` tells the vocabularies of one builder apart."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.source = source
        self.label = b"text %d" % number

    @property
    def size(self) -> int:
        """Entries, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of each text, read-only; no special token is added.

        `encode` of one text would hold the GIL all along; a batch does so only to hand over the ids (about 2 ms for
        100k tokens).
        """
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [read_only(np.array(encoding.ids, dtype=np.uint32)) for encoding in encodings]

    @cached_property
    def affixes(self) -> tuple[Ids, Ids]:
        """The ids the tokenizer's post-processor puts before and after a text of its own (BOS, [CLS], EOS)."""
        bare = self.encode(["a"])[0].tolist()
        full = self._tokenizer.encode_batch_fast(["a"], add_special_tokens=True)[0].ids
        starts = range(len(full) - len(bare) + 1)
        at = next((start for start in starts if full[start : start + len(bare)] == bare), 0)
        before, after = full[:at], full[at + len(bare) :]
        return read_only(np.array(before, dtype=np.uint32)), read_only(np.array(after, dtype=np.uint32))

    def choose_cuts(self, gaps: Sequence[str]) -> tuple[str, ...]:
        """Special tokens to cut at: the fewest (greedily) that occur in every gap in which any may be cut at.

        A gap is what a chat template puts between two messages.
        """
        added: dict[int, AddedToken] = self._tokenizer.get_added_tokens_decoder()
        others = [token.content for token in added.values()]
        found = [token for _, token in sorted(added.items()) if any(token.content in gap for gap in gaps)]
        usable = [token.content for token in found if self._cuts_by_its_flags(token) and _apart(token.content, others)]
        open_gaps = [{token for token in usable if token in gap} for gap in gaps]
        chosen: list[str] = []
        while open_gaps := [gap for gap in open_gaps if gap and gap.isdisjoint(chosen)]:
            chosen.append(max(usable, key=lambda token: sum(token in gap for gap in open_gaps)))
        return tuple(chosen)

    def _cuts_by_its_flags(self, token: AddedToken) -> bool:
        found_as_written = not token.normalized or self._tokenizer.normalizer is None
        trimmed = token.content == token.content.strip() != ""
        return bool(token.special and found_as_written and trimmed and not token.lstrip and not token.single_word)

    def cuts_exactly(self, cuts: Sequence[str], texts: Iterable[str] = ()) -> bool:
        """Whether pieces give the ids of the whole, on texts chosen to show where they would not."""
        probes = [*texts]
        for cut in cuts:
            probes += [left + cut + right for left in _NEIGHBOURS for right in _NEIGHBOURS]
            probes += [f"{cut}a{other}b{cut}{other}{cut} c\n" for other in cuts]
        pieces = [cut_text(probe.encode(), tuple(cut.encode() for cut in cuts)) for probe in probes]
        wholes = self.encode(probes)
        parts = iter(self.encode([piece.decode() for cut_probe in pieces for piece in cut_probe]))
        return all(
            np.array_equal(whole, np.concatenate([next(parts) for _ in cut_probe] or [whole]))
            for whole, cut_probe in zip(wholes, pieces, strict=True)
        )


def cut_text(text: bytes, cuts: Sequence[bytes], alone: Sequence[bytes] = ()) -> list[bytes]:
    """Cut UTF-8 text in front of every occurrence of `cuts`, and on both sides of those of `alone`."""
    bounds = [at for cut in cuts for at in occurrences(text, cut)]
    for one in alone:
        bounds += (bound for at in occurrences(text, one) for bound in (at, at + len(one)))
    ends = sorted({*bounds, len(text)} - {0})
    return [text[start:end] for start, end in pairwise([0, *ends])]


def occurrences(text: bytes, token: bytes) -> list[int]:
    """Where `token` begins in `text`, without overlaps."""
    found: list[int] = []
    step = len(token)
    at = text.find(token)
    while at >= 0:
        found.append(at)
        at = text.find(token, at + step)
    return found


def read_only(ids: Ids) -> Ids:
    """The same array, protected: cached ids are shared by every prompt that holds them."""
    ids.flags.writeable = False
    return ids


def _apart(token: str, added: Iterable[str]) -> bool:
    """Whether no other added token can share characters of a text with this one: hold it, or begin as it ends."""
    return not any(
        other in token
        or token in other
        or any(token[:k] == other[-k:] or other[:k] == token[-k:] for k in range(1, min(len(token), len(other))))
        for other in added
        if other and other != token
    )
