"""Chats like those of ART-Chat, the data set of GORGO's second paper.

What the paper tells of its evaluation windows of 30 minutes: about 7,200 requests of 580 users, 12.8 a user, prompts of
5,638 tokens in the median, 6,877 in the mean and 19,886 at p95, cut off at 24,000, 74% with earlier turns, 78.8% of the
blocks seen before. The form behind the figures is ours: users who each bring a profile (persona, memory) of their own
behind the system prompt of one of a few applications, and who begin a new chat every few turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from gorgo_plugin.fleet.turns import Prefix, TokenTree, Turn, answer_s
from gorgo_plugin.fleet.workload import WorkloadError

_GOLDEN = (5**0.5 - 1) / 2  # multiples of it, less their whole part, fill an interval evenly
_BINS = 60  # of the window, in which arrivals are counted to spread them evenly
_PLACES = 16  # tried for a user's stretch, of which the emptiest is taken
_RAMP = 0.1  # share of the window until its full rate: at once, all the first users' prompts would be cold together
_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """Sizes and rates; lengths in tokens. The defaults meet the paper's figures."""

    users: int = 572
    """Users in the window."""
    requests_per_user: float = 12.7
    """Mean requests of a user in the window (log-normal, as few users send most requests)."""
    requests_spread: float = 0.8
    """Sigma of it."""
    most_requests: int = 60
    """Most requests of a user; as many fit a window a fifth as long."""
    window_s: float = 1800.0
    """Seconds in which all requests arrive at a rate scale of 1."""
    think_s: float = 40.0
    """Mean seconds (exponential) between an answer and the next turn at a rate scale of 1."""
    fresh_share: float = 0.25
    """Share of the turns that begin a new chat, beside those that must because the prompt would be too long."""
    apps: int = 4
    """Applications, each with a system prompt."""
    system_tokens: int = 400
    """Tokens of a system prompt."""
    profile_tokens: float = 2820.0
    """Median tokens of a user's profile (log-normal)."""
    profile_spread: float = 0.47
    """Sigma of it."""
    document_share: float = 0.09
    """Share of the new chats that begin with a document."""
    document_tokens: tuple[int, int] = (15_500, 21_000)
    """Shortest and longest document."""
    question_tokens: float = 350.0
    """Median tokens of what a user adds in a turn (log-normal): text, and what was looked up for it."""
    question_spread: float = 1.1
    """Sigma of it."""
    past_turns: float = 3.0
    """Mean turns (geometric) that a chat under way at a user's first request has had before."""
    output_tokens: tuple[int, int] = (40, 128)
    """Fewest and most tokens of an answer."""
    longest_prompt_tokens: int = 24_000
    """Longest prompt."""


def chat_turns(seed: int, rate_scale: float = 1.0, settings: ChatSettings | None = None) -> list[Turn]:
    """A window of chats in order of arrival, all within `window_s / rate_scale` seconds.

    The same seed gives the same turns. Each user is active for one stretch of the window. The users' sizes are drawn
    one from each of as many equal parts of their distribution, so that every seed has the same mix of users.

    Raises:
        WorkloadError: at this rate some user would have to ask before the last answer is there.
    """
    settings = settings or ChatSettings()
    rng = np.random.default_rng(seed)
    window = _Window(rng, settings, rate_scale)
    counts = _request_counts(rng, settings)
    profiles = _log_normal(_parts(rng, settings.users), settings.profile_tokens, settings.profile_spread)
    turns: list[Turn] = []
    for user, (count, tokens) in enumerate(zip(counts, profiles.tolist(), strict=True)):
        turns += window.user_turns(f"user-{user}", count, round(tokens))
    return sorted(turns, key=lambda turn: turn.at_s)


def _parts(rng: np.random.Generator, count: int) -> _Floats:
    """One uniform draw from each of `count` equal parts of (0, 1), in random order; shape (count,)."""
    return (rng.permutation(count) + rng.uniform(0.001, 0.999, count)) / count


def _log_normal(quantiles: _Floats, median: float, sigma: float) -> _Floats:
    inverse = NormalDist().inv_cdf
    return median * np.exp(sigma * np.array([inverse(quantile) for quantile in quantiles.tolist()]))


def _request_counts(rng: np.random.Generator, settings: ChatSettings) -> list[int]:
    """Requests of each user; they add up to what the settings say."""
    shares = _log_normal(_parts(rng, settings.users), 1.0, settings.requests_spread)
    low, high = 0.0, 10.0 * settings.requests_per_user
    counts = shares
    for _ in range(40):  # bisection, as rounding and clipping move the mean
        scale = (low + high) / 2
        counts = np.clip(np.round(shares * scale), 1, settings.most_requests)
        low, high = (scale, high) if counts.mean() < settings.requests_per_user else (low, scale)
    return [int(count) for count in counts.tolist()]


class _Window:
    """Makes the turns of one user after the other."""

    def __init__(self, rng: np.random.Generator, settings: ChatSettings, rate_scale: float) -> None:
        self._rng = rng
        self._settings = settings
        self._rate_scale = rate_scale
        self._arrivals = np.zeros(_BINS)
        self._wanted = np.minimum(1.0, (np.arange(_BINS) + 1.0) / (_RAMP * _BINS))
        self._chats = 0
        self._offset = rng.uniform(0.0, 1.0)
        self._tree = TokenTree()
        self._systems = [self._tree.grow(None, settings.system_tokens) for _ in range(settings.apps)]

    def user_turns(self, session: str, count: int, profile_tokens: int) -> list[Turn]:
        """The turns of one user; those before the window are made for what they leave in the prompts, and dropped."""
        system = self._systems[int(self._rng.integers(len(self._systems)))]
        longest = (self._settings.longest_prompt_tokens - system.tokens) * 3 // 4  # leaves room for a chat
        profile = self._tree.grow(system, min(max(1, profile_tokens), longest))
        chat, history = profile, 0
        asked: list[tuple[int, Prefix, Prefix]] = []
        for _ in range(int(self._rng.geometric(1.0 / self._settings.past_turns)) + count):
            prompt, history = self._ask(profile, chat, history)
            chat = self._answer(prompt)
            asked.append((history, prompt, chat))
            history += 1
        asked = asked[-count:]
        times_s = self._times_s([answer_s(prompt.tokens, whole.tokens - prompt.tokens) for _, prompt, whole in asked])
        return [Turn(at_s, session, *one) for at_s, one in zip(times_s, asked, strict=True)]

    def _ask(self, profile: Prefix, chat: Prefix, history: int) -> tuple[Prefix, int]:
        """The next prompt, in this chat or a new one, and the answers in it."""
        settings = self._settings
        question = round(self._rng.lognormal(np.log(settings.question_tokens), settings.question_spread)) + 1
        longest = settings.longest_prompt_tokens
        if self._rng.random() < settings.fresh_share or chat.tokens + question > longest:
            chat, history = profile, 0
            question += self._document_tokens()
        return self._tree.grow(chat, min(question, longest - chat.tokens)), history

    def _document_tokens(self) -> int:
        """Tokens of the document that a new chat begins with, mostly none; evenly spread, as they make the tail."""
        self._chats += 1
        documents = self._chats * self._settings.document_share
        if documents % 1.0 >= self._settings.document_share:
            return 0
        shortest, longest = self._settings.document_tokens
        return round(shortest + (self._offset + documents // 1.0 * _GOLDEN) % 1.0 * (longest - shortest))

    def _answer(self, prompt: Prefix) -> Prefix:
        fewest, most = self._settings.output_tokens
        return self._tree.grow(prompt, int(self._rng.integers(fewest, most + 1)))

    def _times_s(self, answers_s: list[float]) -> list[float]:
        """Arrivals of a user's turns: each after the answer before it, all in the window, where it is emptiest."""
        window_s = self._settings.window_s / self._rate_scale
        waits_s = np.array(answers_s)
        thinks_s = self._rng.exponential(self._settings.think_s / self._rate_scale, len(answers_s))
        spare_s = window_s - waits_s.sum()
        if spare_s <= 0:
            raise WorkloadError(f"rate_scale: expected less than {self._rate_scale}, at which turns overtake answers")
        thinks_s *= min(1.0, spare_s / thinks_s.sum())
        ends_s = np.cumsum(waits_s + thinks_s)
        starts_s = self._rng.uniform(0.0, max(0.0, window_s - ends_s[-1]), _PLACES)
        placed_s = starts_s[:, None] + np.concatenate([[0.0], ends_s[:-1]])
        bins = np.minimum(placed_s * (_BINS / window_s), _BINS - 1).astype(np.int64)
        fullest = (self._arrivals[bins] / self._wanted[bins]).max(axis=1)
        best = int(fullest.argmin())
        np.add.at(self._arrivals, bins[best], 1.0)
        times_s: list[float] = placed_s[best].tolist()
        return times_s
