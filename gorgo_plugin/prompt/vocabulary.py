"""A Hugging Face tokenizer and where text may be cut for it.

A special token cuts tokenization exactly: nothing before it merges with anything after. So a prompt cut in front of
special tokens can be tokenized piece by piece, each piece once, and joined. Headers and newlines do not cut, nor do
tokens that take the whitespace before them along or that another added token overlaps. Each piece begins with its
special token, so that what depends on what stands before the text (a prefix space, whitespace a token takes from its
right) comes out as in the whole. Byte-level tokenizers also start anew at the space before a word; long pieces are cut
there. Both are tried on texts chosen against them before they are used.
"""

from __future__ import annotations

import logging
import re
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from gorgo_plugin.prompt.byte_level import ByteLevelEncoder, NotTheSame, encoder_for, give_up
from gorgo_plugin.prompt.cuts import cut_text

_log = logging.getLogger("gorgo_plugin")

Ids = NDArray[np.uint32]
Spread = Callable[[Callable[[list[str]], list["Ids"]], Iterable[list[str]]], Iterable[list["Ids"]]]
"""Like `map`, of batches of texts; that of an executor tokenizes them at the same time."""

ORDINARY_PROBED = 256  # ordinary added tokens tried next to a cut; some vocabularies hold thousands of unused ones
BATCH_CHARS = 64 * 1024  # tokenized at a time: handing over the ids of so many holds the GIL for about 0.5 ms
CHARS_PER_TOKEN = 4.0  # of English in the usual vocabularies, until text was tokenized
COUNTED_TOKENS = 1000.0  # what that counts as
COUNTED_TOKENS_MOST = 1_000_000.0  # beyond, what came before counts half
SMALL_CHARS = 8 * 1024  # fewer are tokenized in this thread: waking the tokenizer's pool takes 0.4 ms of CPU
_SPACE_IN_TOKEN = re.compile(r"[!-~] ([A-Za-z]|$)")
_VISIBLE = string.ascii_letters + string.digits + string.punctuation

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

_WORD_BEGINNINGS = ("a", "I", "Hello", "s", "re the", "x1", "Zß", "a\u0301", "b'c", "e\n\nf", "to_s", "A.")


class Vocabulary:
    """A tokenizer without truncation and padding. Thread-safe.

    Attributes:
        source: where it was read.
        number: tells the vocabularies of one builder apart.
        encoder: what tokenizes, and why it is not tiktoken where it is not.
    """

    def __init__(self, tokenizer: Tokenizer, source: str, number: int = 0, fastest: bool = True) -> None:
        """With `fastest` tiktoken tokenizes where it gives the same ids."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.source = source
        self.number = number
        self._counted = (CHARS_PER_TOKEN * COUNTED_TOKENS, COUNTED_TOKENS)
        self.encoder, self._fast = _chosen(tokenizer) if fastest else ("tokenizers", None)

    @property
    def size(self) -> int:
        """Entries, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def chars_per_token(self) -> float:
        """Of the text tokenized lately."""
        chars, tokens = self._counted
        return chars / tokens

    def count(self, chars: int, tokens: int) -> None:
        """So many characters of text were so many tokens; of two threads at a time one may go uncounted."""
        share = 0.5 if self._counted[1] > COUNTED_TOKENS_MOST else 1.0
        self._counted = self._counted[0] * share + chars, self._counted[1] * share + tokens

    def encode(self, texts: Sequence[str], spread: Spread = map) -> list[Ids]:
        """Token ids of each text, read-only; no special token is added.

        With tiktoken the GIL is released for each text, and much text goes through `spread` in batches. `tokenizers`
        uses threads of its own for much text, and releases the GIL for that alone.
        """
        if self._fast is not None:
            if sum(map(len, texts)) <= BATCH_CHARS:
                return self._encode_fast(texts)
            return [*chain.from_iterable(spread(self._encode_fast, _batches(texts)))]
        if sum(map(len, texts)) > SMALL_CHARS:
            return self._encode_batches(texts)
        return [*map(self._encode_one, texts)]

    def _encode_fast(self, texts: Sequence[str]) -> list[Ids]:
        fast = self._fast
        if fast is None:  # given up meanwhile, in another thread
            return self._encode_batches(texts)
        try:
            if len(texts) > 1 and (batch := fast.batch(texts)) is not None:
                return batch
            found = [*map(fast.ids, texts)]
        except NotTheSame as error:
            self._give_up(error)
            return self._encode_batches(texts)
        return [self._encode_batches([text])[0] if ids is None else ids for text, ids in zip(texts, found, strict=True)]

    def _give_up(self, reason: NotTheSame) -> None:
        give_up(self._tokenizer, reason)
        if self._fast is not None:  # not yet, in another thread
            self.encoder, self._fast = f"tokenizers ({reason})", None
            _log.warning("gorgo: %s is tokenized by tokenizers from now on: %s", self.source, reason)

    def _encode_one(self, text: str) -> Ids:
        return read_only(np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32))

    def _encode_batches(self, texts: Sequence[str]) -> list[Ids]:
        # `encode` would hold the GIL all along; a batch holds it only while it hands over the ids.
        ids: list[Ids] = []
        for batch in _batches(texts):
            encodings = self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            ids += [read_only(np.array(encoding.ids, dtype=np.uint32)) for encoding in encodings]
        return ids

    @cached_property
    def affixes(self) -> tuple[Ids, Ids]:
        """The ids the tokenizer's post-processor puts before and after a text of its own (BOS, [CLS], EOS)."""
        bare = self._encode_one("a").tolist()
        full = self._tokenizer.encode_batch_fast(["a"], add_special_tokens=True)[0].ids
        starts = range(len(full) - len(bare) + 1)
        at = next((start for start in starts if full[start : start + len(bare)] == bare), 0)
        before, after = full[:at], full[at + len(bare) :]
        return read_only(np.array(before, dtype=np.uint32)), read_only(np.array(after, dtype=np.uint32))

    @cached_property
    def _added(self) -> list[AddedToken]:
        added: dict[int, AddedToken] = self._tokenizer.get_added_tokens_decoder()
        return [token for _, token in sorted(added.items())]

    def choose_cuts(self, gaps: Sequence[str]) -> tuple[str, ...]:
        """Special tokens to cut at: the fewest (greedily) that occur in every gap in which any may be cut at.

        A gap is what a chat template puts between two messages.
        """
        others = [token.content for token in self._added]
        found = [token for token in self._added if any(token.content in gap for gap in gaps)]
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
        ordinary = [token.content for token in self._added if not token.special][:ORDINARY_PROBED]
        probes = [*texts]
        for cut in cuts:
            probes += [left + cut + right for left in _NEIGHBOURS for right in _NEIGHBOURS]
            probes += [f"a {token}{cut}{token} b" for token in ordinary]
            probes += [f"{cut}a{other}b{cut}{other}{cut} c\n" for other in cuts]
        return self._pieces_match([cut_text(probe, cuts, piece_chars=1) for probe in probes])

    @cached_property
    def cuts_spaces(self) -> bool:
        """Whether text may also be cut in front of a space between a visible ASCII character and a letter.

        The pre-tokenizers of the GPT and Llama families start a piece there, so nothing merges across; tokenizers that
        put a space before every text do not allow it. Added tokens must not reach across either.
        """
        across = any(token.rstrip or _SPACE_IN_TOKEN.search(token.content) for token in self._added)
        lefts = [
            *(f"x{mark}" for mark in _VISIBLE),
            *(f"{left}." for left in _NEIGHBOURS),
            "\n}",
            "9)",
            " <|x|>",
            "A's",
        ]
        probes = [[left, f" {right}"] for left in lefts for right in _WORD_BEGINNINGS]
        return not across and self._pieces_match(probes)

    def _pieces_match(self, probes: Sequence[Sequence[str]]) -> bool:
        wholes = self._encode_batches(["".join(pieces) for pieces in probes])
        parts = iter(self._encode_batches([piece for pieces in probes for piece in pieces]))
        return all(
            np.array_equal(whole, np.concatenate([next(parts) for _ in pieces]) if pieces else whole)
            for whole, pieces in zip(wholes, probes, strict=True)
        )


def _chosen(tokenizer: Tokenizer) -> tuple[str, ByteLevelEncoder | None]:
    """(what tokenizes, tiktoken's encoder where it is that)."""
    try:
        fast = encoder_for(tokenizer)
    except NotTheSame as reason:
        return f"tokenizers ({reason})", None
    return fast.name, fast


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def read_only(ids: Ids) -> Ids:
    """The same array, protected: cached ids are shared by every prompt that holds them."""
    ids.flags.writeable = False
    return ids


def _apart(token: str, added: Iterable[str]) -> bool:
    """Whether no added token can share characters of a text with this one: hold it, or begin as it ends."""
    return not any(
        (other != token and (other in token or token in other))
        or any(token[:k] == other[-k:] or other[:k] == token[-k:] for k in range(1, min(len(token), len(other))))
        for other in added
        if other
    )
