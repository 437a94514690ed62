"""Byte-level BPE by tiktoken, where it gives the ids of `tokenizers`: several times as fast, and without the GIL.

Both merge the pair of least rank first. `tokenizers` merges listed pairs, tiktoken whatever pair joins to an entry, and
takes the entry's id for its rank. The results are the same where the merges are listed in the order of the ids they
make, and where the merges alone lead from the bytes of each entry to that entry: what stands between two boundaries
that no merge has crossed was merged independently of the rest, so an entry's bytes are one token before a pair of less
order than its own comes up. That is checked for each entry; where the text is split, which two regular expression
engines do, is tried on texts made of the vocabulary and of characters of all kinds.
"""

from __future__ import annotations

import random
import re
import secrets
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import cache
from hashlib import sha256
from itertools import groupby, pairwise
from typing import Any, Literal, cast

import msgspec
import numpy as np
import tiktoken
from cachetools import LRUCache
from numpy.typing import NDArray
from tokenizers import Tokenizer

Ids = NDArray[np.uint32]
NormalForm = Literal["NFC", "NFD", "NFKC", "NFKD"]

GPT2_SPLITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # of `ByteLevel` itself
# A regular expression's pieces: escapes, classes of characters, what opens, closes or parts alternatives, all else.
_PIECES = re.compile(r"\\.|\[\^?\]?(?:\\.|[^]\\])*\]|\(\?<?[=!]|\(\?[a-z-]+\)|\(\?[a-z-]*x[a-z-]*:|.", re.DOTALL)
KINDS_BELOW = 0x32000  # code points above are private, or variants of those below
TEXTS_OF_ENTRIES = 200
ENTRIES_A_TEXT = 40
RANDOM_TEXTS = 50
RANDOM_BYTES = 200
# tiktoken is told with each text which special tokens to look for, 0.1 us for each. Of so many, those that a text holds
# are found sooner, if no more places in it look like the beginning of one.
MANY_SPECIALS = 64
BEGINNINGS = 8
SEPARATOR_ID = 0x7FFF_FFFF  # no vocabulary reaches so far
KEPT = 8  # encoders; a gateway that reads its settings anew finds its own again


class NotTheSame(Exception):
    """tiktoken cannot stand in for a tokenizer; the message says why."""


class ByteLevelEncoder:
    """A tokenizer's ids by way of tiktoken. Thread-safe.

    Attributes:
        name: package and release.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Build tiktoken's tables and try them against `tokenizer`.

        Raises:
            NotTheSame: tiktoken has no counterpart for a part of the tokenizer, or differs.
        """
        self.name = f"tiktoken {tiktoken.__version__}"
        parts = msgspec.json.decode(tokenizer.to_str())
        self._form = _normal_form(parts["normalizer"])
        specials = _added_tokens(parts["added_tokens"], self._form)
        if tokenizer.encode_special_tokens:
            raise NotTheSame("it takes special tokens for text")
        splits = _splits(parts["pre_tokenizer"])
        ranks = _ranks(tokenizer, parts["model"], specials)
        self._separator = "\0" + secrets.token_hex(16)
        self._specials = frozenset({*specials, self._separator})
        self._beginnings = {special[:1] for special in self._specials}
        self._lengths = sorted({len(special) for special in self._specials})
        self._encoding = _encoding(splits, ranks, specials | {self._separator: SEPARATOR_ID})
        self._try_against(tokenizer, list(_texts([*ranks], [*specials])))

    def ids(self, text: str) -> Ids | None:
        """Token ids of `text`, shape (n,), read-only; None where only the tokenizer itself can tell them.

        Raises:
            NotTheSame: tiktoken broke down over it.
        """
        if self._form is not None and not text.isascii() and not unicodedata.is_normalized(self._form, text):
            return None
        try:
            ids: Ids = self._encoding.encode_to_numpy(text, allowed_special=self._in(text), disallowed_special=())
        except ValueError:  # the regular expression has its limits: a million spaces in a row
            return None
        except BaseException as error:  # a panic of Rust's is no `Exception`
            if type(error).__name__ != "PanicException":
                raise
            raise NotTheSame(f"tiktoken broke down: {error!s:.100}") from None
        ids = ids.copy()  # its own buffer may be twice as long as what it holds
        ids.flags.writeable = False
        return ids

    def batch(self, texts: Sequence[str]) -> list[Ids] | None:
        """Token ids of each of several texts, in one call: each would else wait for the GIL.

        A token of our own between them keeps them apart, as special tokens do.
        """
        joined = self.ids(self._separator.join(texts))
        if joined is None:
            return None
        ends = np.flatnonzero(joined == SEPARATOR_ID).tolist()
        if len(ends) != len(texts) - 1:
            return None  # a text holds the separator
        parts = [joined[start + 1 : end].copy() for start, end in pairwise((-1, *ends, len(joined)))]
        for part in parts:
            part.flags.writeable = False
        return parts

    def _in(self, text: str) -> Set[str]:
        """The special tokens to look for in a text: at least those that it holds."""
        if len(self._specials) < MANY_SPECIALS or sum(map(text.count, self._beginnings)) > BEGINNINGS:
            return self._specials
        found: set[str] = set()
        for char in self._beginnings:
            at = text.find(char)
            while at >= 0:
                found.update(text[at : at + length] for length in self._lengths)
                at = text.find(char, at + 1)
        return found & self._specials

    def _try_against(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        expected = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for text, encoding in zip(texts, expected, strict=True):
            ids = self.ids(text)
            if ids is not None and ids.tolist() != encoding.ids:
                raise NotTheSame("the ids of a text made to try it differ")


_encoders: LRUCache[bytes, ByteLevelEncoder | NotTheSame] = LRUCache(KEPT)
_lock = threading.Lock()


def encoder_for(tokenizer: Tokenizer) -> ByteLevelEncoder:
    """The encoder of a tokenizer, built and tried once however many have an equal one (0.2 to 0.7 s).

    Raises:
        NotTheSame: as `ByteLevelEncoder` does.
    """
    key = _key(tokenizer)
    with _lock:
        found = _encoders.get(key)
        if found is None:
            try:
                found = ByteLevelEncoder(tokenizer)
            except NotTheSame as error:
                found = error
            _encoders[key] = found
    if isinstance(found, NotTheSame):
        raise NotTheSame(str(found))
    return found


def give_up(tokenizer: Tokenizer, reason: NotTheSame) -> None:
    """Have no encoder for a tokenizer any more."""
    with _lock:
        _encoders[_key(tokenizer)] = reason


def _key(tokenizer: Tokenizer) -> bytes:
    return sha256(tokenizer.to_str().encode()).digest()


def _normal_form(normalizer: Mapping[str, Any] | None) -> NormalForm | None:
    """The form that text is brought into first; text that is in it already is left as it is."""
    if normalizer is None:
        return None
    if normalizer["type"] not in ("NFC", "NFD", "NFKC", "NFKD"):
        raise NotTheSame(f"it normalizes text in a way of its own ({normalizer['type']})")
    return cast(NormalForm, normalizer["type"])


def _added_tokens(added: Iterable[Mapping[str, Any]], form: NormalForm | None) -> dict[str, int]:
    """Ids of the tokens found in text before it is split."""
    ids = {str(token["content"]): int(token["id"]) for token in added}
    if any(token[flag] for token in added for flag in ("single_word", "lstrip", "rstrip")):
        raise NotTheSame("an added token depends on what stands beside it")
    if len({token["normalized"] for token in added}) > 1:
        raise NotTheSame("some added tokens are looked for before and some after text is normalized")
    if form is not None and not all(unicodedata.is_normalized(form, token) for token in ids):
        raise NotTheSame("an added token is changed when text is normalized")
    # Of several that begin at one place `tokenizers` takes the longest, tiktoken any.
    if any(after.startswith(token) for token, after in pairwise(sorted(ids))):
        raise NotTheSame("an added token begins like another")
    return ids


def _splits(pre_tokenizer: Mapping[str, Any] | None) -> str:
    """The regular expression of the pieces that text is split into."""
    parts = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    *split, last = parts or [{"type": None}]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise NotTheSame("it is not byte-level, or puts a space before text")
    if not split and last["use_regex"]:
        return GPT2_SPLITS
    if len(split) != 1 or last["use_regex"] or split[0]["type"] != "Split" or "Regex" not in split[0]["pattern"]:
        raise NotTheSame("it splits text in several steps")
    if (split[0]["behavior"], split[0]["invert"]) not in (("Isolated", False), ("Removed", True)):
        raise NotTheSame("it splits text by what stands between the pieces")
    return str(split[0]["pattern"]["Regex"])


def _encoding(splits: str, ranks: dict[bytes, int], specials: dict[str, int]) -> tiktoken.Encoding:
    reason = ""
    for pattern in (grouped(splits), splits):  # as one the alternatives may be more than the engine takes
        try:
            return tiktoken.Encoding("gorgo", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        except ValueError as error:
            reason = str(error)
    raise NotTheSame(f"its regular expression is none of tiktoken's ({reason:.100})")


def grouped(pattern: str) -> str:
    """The same regular expression, with the first alternatives as one, up to those that look around.

    tiktoken's engine interprets an expression that looks around, alternative by alternative, and leaves to a faster
    one what does not: now all of these at once, a quarter less time for a text.
    """
    depth = start = end = 0
    for piece in _PIECES.finditer(pattern):
        text = piece.group()
        if text.startswith("(?") and text.endswith(("=", "!")):
            break  # only what ended before it is plain
        if text.startswith("(?") and text.endswith((")", ":")):
            return pattern  # a flag for all that follows, or comments
        depth += (text == "(") - (text == ")")
        if text == "|" and not depth:
            start, end = end, piece.start()
    else:
        return pattern
    return f"(?:{pattern[:end]}){pattern[end:]}" if start else pattern


def _ranks(tokenizer: Tokenizer, model: Mapping[str, Any], added: Mapping[str, int]) -> dict[bytes, int]:
    """The id of each entry by its bytes."""
    odd = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if model["type"] != "BPE" or odd or model.get("byte_fallback"):
        raise NotTheSame(f"its model is no plain BPE ({', '.join([model['type'], *odd])})")
    vocabulary = {token: id for token, id in model["vocab"].items() if token not in added}
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    made = [model["vocab"][left + right] for left, right in pairs]
    if any(before > after for before, after in pairwise(made)):
        raise NotTheSame("its merges are not in the order of the ids they make")
    byte_of = _byte_of()
    try:
        ranks = {bytes(map(byte_of, token)): id for token, id in vocabulary.items()}
    except KeyError:
        raise NotTheSame("an entry of its vocabulary is no sequence of bytes") from None
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise NotTheSame("its vocabulary lacks a byte")
    _check_reachable(tokenizer, model, vocabulary, pairs)
    return ranks


def _check_reachable(
    tokenizer: Tokenizer, model: Mapping[str, Any], vocabulary: Mapping[str, int], pairs: Iterable[Sequence[str]]
) -> None:
    """Whether the merges alone lead to each entry, or list every pair that joins to it."""
    bare = Tokenizer(tokenizer.model)
    if model.get("ignore_merges"):  # then each entry that is a whole piece is its own token, which proves nothing
        bare = Tokenizer.from_str(
            msgspec.json.encode({"model": {**model, "ignore_merges": False}, "added_tokens": []}).decode()
        )
    tokens = [*vocabulary]
    encodings = bare.encode_batch_fast(tokens, add_special_tokens=False)
    missed = [token for token, encoding in zip(tokens, encodings, strict=True) if encoding.ids != [vocabulary[token]]]
    listed = {tuple(pair) for pair in pairs} if missed else set()
    for token in missed:
        splits = [(token[:at], token[at:]) for at in range(1, len(token))]
        joined = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
        if not model.get("ignore_merges") or not all(pair in listed for pair in joined):
            raise NotTheSame("its merges do not lead to every entry of its vocabulary")


@cache
def _byte_of() -> Callable[[str], int]:
    """The byte that a character of a byte-level vocabulary stands for: itself where it can be seen, else the next free
    one from 256 on (GPT-2)."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unseen = [byte for byte in range(256) if byte not in seen]
    table = {chr(byte): byte for byte in seen} | {chr(256 + at): byte for at, byte in enumerate(unseen)}
    return table.__getitem__


def _texts(entries: Sequence[bytes], specials: Sequence[str]) -> Iterator[str]:
    """Texts on which two tokenizers of one vocabulary would differ if anywhere."""
    yield from _of_every_kind()
    rng = random.Random(0)
    for _ in range(TEXTS_OF_ENTRIES):
        parts = [part.decode(errors="replace") for part in rng.choices(entries, k=ENTRIES_A_TEXT)]
        yield "".join(parts + rng.choices(specials, k=2) + parts[::-1] if specials else parts)
    for _ in range(RANDOM_TEXTS):
        data = rng.randbytes(RANDOM_BYTES)
        yield data.decode(errors="replace")
        yield data.decode("latin-1")
        yield "".join(rng.choices(" \n\t\r\u00a0\u30001a.'", k=RANDOM_BYTES))


@cache
def _of_every_kind() -> tuple[str, ...]:
    """Texts with the first character of each run of code points of one Unicode category, beside letters, digits, ..."""
    kinds = groupby(range(KINDS_BELOW), key=lambda code: unicodedata.category(chr(code)))
    firsts = [chr(next(codes)) for kind, codes in kinds if kind != "Cs"]
    units = [f"a{c}A{c}1{c} {c}'{c}.{c}\n{c}{c}a{c}" for c in firsts]
    return tuple("".join(units[at : at + 100]) for at in range(0, len(units), 100))
