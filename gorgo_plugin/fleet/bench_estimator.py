"""The estimator (request -> tokens -> blocks -> cached tokens -> decision) against that of the paper's authors.

In each round both sides sweep over the same prompts in one process, each without the other in between: a loop over
20,000 integers leaves little in the processor's caches, so the first decisions of a sweep are not counted either. Which
side goes first alternates. Both route every prompt and keep it in their indexes. Each decision is on another
conversation than the one before it, a turn further than it was. The garbage collector is on, as in a gateway.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import add

from gorgo_plugin.decision import Prompt
from gorgo_plugin.fleet.bench_estimator_index import SIDES, Memory, SizedLookups, memory
from gorgo_plugin.fleet.bench_estimator_prompts import (
    TURN_TOKENS,
    Chat,
    Ids,
    Writer,
    chat_body,
    chatml,
    conversation_ids,
)
from gorgo_plugin.fleet.bench_estimator_sides import (
    CHAT,
    UNCOUNTED,
    Disagreement,
    Indexes,
    OurRouter,
    TheirRouter,
    fastest_encode,
    look_up,
)
from gorgo_plugin.prompt.sources import embedded_tokenizer

LOOKUP = "lookup alone"
HASHED_LOOKUP = "lookup, hashing included"
FROM_LIST = "decide + insert, list of ids"
FROM_NUMPY = "decide + insert, numpy ids"
END = "end of a request"
NEW_TURN = "raw JSON, one new turn"
ALL_SEEN = "raw JSON, all seen"
COLD = "raw JSON, cold"
ENCODES_TRIED = 8
EARLIER_WORDS = 150


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: in each of which all cases are measured.
        prompt_tokens: about the length of every prompt.
        conversations: of token ids; each decided on once a case and round.
        chats: of text, likewise; as many cold ones a round.
        earlier_chats: short ones that both sides tokenize before: a gateway that has run for a while knows most words.
        fleets: numbers of replicas.
        sizes: cached tokens of the indexes that are only looked up.
        rival_tokens: the largest of these that the rival's index is filled to as well.
        lookups: in each of these, a round.
        memory_tokens: cached tokens of the indexes whose memory is measured.
        seed: of the prompts.
    """

    rounds: int = 9
    prompt_tokens: int = 20_000
    conversations: int = 80
    chats: int = 40
    earlier_chats: int = 5_000
    fleets: tuple[int, ...] = (3, 64)
    sizes: tuple[int, ...] = (1_000_000, 10_000_000, 100_000_000)
    rival_tokens: int = 10_000_000
    lookups: int = 80
    memory_tokens: int = 10_000_000
    seed: int = 0


QUICK = Plan(rounds=3, conversations=30, chats=10, earlier_chats=1_000, rival_tokens=1_000_000, lookups=40)

Key = tuple[str, int]  # what is measured, and with how many replicas


@dataclass(slots=True)
class Samples:
    """Nanoseconds of each case, ours and theirs on the same prompts; theirs is empty where only ours was measured."""

    ours: list[int] = field(default_factory=list)
    theirs: list[int] = field(default_factory=list)

    def sweep(
        self, ours: Callable[[], list[int]], theirs: Callable[[], list[int]], ours_first: bool, uncounted: int
    ) -> None:
        """Add a sweep of each side over the same prompts, without the first `uncounted` of them."""
        if ours_first:
            self.ours += ours()[uncounted:]
            self.theirs += theirs()[uncounted:]
        else:
            self.theirs += theirs()[uncounted:]
            self.ours += ours()[uncounted:]


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run found.

    Attributes:
        plan: what was asked for.
        samples: by case and replicas; lookups in an index of a size by `sized_lookup`.
        memory: of each side and fleet.
        encoder: how the rival's prompts were tokenized.
        chat_tokens: (fewest, most) of the chats' prompts.
    """

    plan: Plan
    samples: dict[Key, Samples]
    memory: list[Memory]
    encoder: str
    chat_tokens: tuple[int, int]


def sized_lookup(cached_tokens: int) -> str:
    """The name of the lookups in an index of a size."""
    return f"lookup, {cached_tokens / 1e6:g}M cached tokens"


def measure(plan: Plan, done: Callable[[str], None]) -> Measured:
    """Run the benchmark; `done` is told of progress.

    Raises:
        RivalMissing: the rival's package is not installed.
        Disagreement: the two sides would not do the same work.
    """
    samples: dict[Key, Samples] = defaultdict(Samples)
    done("conversations of token ids")
    decisions = IdDecisions(plan, samples)
    done("conversations of text")
    chats = ChatDecisions(plan, samples)
    lookups = SizedLookups(plan.sizes, plan.fleets, plan.rival_tokens, plan.prompt_tokens, plan.seed, done)
    for number in range(plan.rounds):
        done(f"round {number + 1} of {plan.rounds}: token ids")
        decisions.round(number)
        done(f"round {number + 1} of {plan.rounds}: raw JSON")
        chats.round(number)
        done(f"round {number + 1} of {plan.rounds}: lookups by size")
        for size, replicas, times in lookups.round(plan.lookups, ours_first=number % 2 == 0):
            samples[sized_lookup(size), replicas].ours += times.ours
            samples[sized_lookup(size), replicas].theirs += times.theirs
    done("memory")
    taken = [
        memory(side, replicas, plan.memory_tokens, plan.prompt_tokens, plan.seed)
        for replicas in plan.fleets
        for side in SIDES
    ]
    return Measured(plan, dict(samples), taken, chats.encoder, (min(chats.tokens), max(chats.tokens)))


class _Sides:
    """Both routers before fleets of one size."""

    def __init__(self, replicas: int, encode: Callable[[str], list[int]] | None = None) -> None:
        self.replicas = replicas
        self.ours, self.theirs = OurRouter(replicas), TheirRouter(replicas, encode)

    def from_list(self, ids: Ids) -> tuple[int, int]:
        """Our nanoseconds to decide on a list of ids, and to end a request."""
        tokens = ids.tolist()
        began = time.perf_counter_ns()
        decision = self.ours.router.route(Prompt(tokens=tokens))
        ended = time.perf_counter_ns()
        return ended - began, self.ours.between(decision.flight_id)

    def from_numpy(self, ids: Ids) -> tuple[int, int]:
        """The same for an array, fresh from a tokenizer as it were."""
        tokens = ids.copy()
        began = time.perf_counter_ns()
        decision = self.ours.router.route(Prompt(tokens=tokens))
        ended = time.perf_counter_ns()
        return ended - began, self.ours.between(decision.flight_id)

    def their_list(self, ids: Ids) -> int:
        """Their nanoseconds to decide on a list of ids and to insert it."""
        tokens = ids.tolist()
        began = time.perf_counter_ns()
        target = self.theirs.route(tokens)
        ended = time.perf_counter_ns()
        self.theirs.between(target, len(tokens))
        return ended - began

    def their_numpy(self, ids: Ids) -> int:
        """The same for an array, which they need as a list: their policy asks for its truth, which an array has not."""
        tokens = ids.copy()
        began = time.perf_counter_ns()
        target = self.theirs.route(tokens.tolist())
        ended = time.perf_counter_ns()
        self.theirs.between(target, len(tokens))
        return ended - began

    def body(self, body: bytes) -> int:
        """Our nanoseconds from the bytes of a request to the decision."""
        router = self.ours.router
        began = time.perf_counter_ns()
        decision = router.route(router.prepare(body, CHAT))
        ended = time.perf_counter_ns()
        self.ours.between(decision.flight_id)
        return ended - began

    def their_body(self, body: bytes) -> int:
        """Theirs."""
        began = time.perf_counter_ns()
        target, tokens = self.theirs.route_body(body)
        ended = time.perf_counter_ns()
        self.theirs.between(target, tokens)
        return ended - began


class IdDecisions:
    """Lookups alone, and decisions from lists and from arrays of token ids."""

    def __init__(self, plan: Plan, samples: dict[Key, Samples]) -> None:
        """Bring each conversation to its first turn on both sides."""
        self._samples = samples
        turns = 2 * plan.rounds  # two of the cases of a round go on with the same conversations
        self._first_tokens = max(plan.prompt_tokens - TURN_TOKENS * turns // 2, 1)
        longest = self._first_tokens + TURN_TOKENS * turns
        self._conversations = [conversation_ids(n, longest, plan.seed) for n in range(plan.conversations)]
        self._indexes = {replicas: Indexes(replicas) for replicas in plan.fleets}
        self._fleets = [_Sides(replicas) for replicas in plan.fleets]
        for number in range(plan.conversations):
            ids = self._prompt(number, 0)
            for sides in self._fleets:
                sides.from_numpy(ids)
                sides.their_list(ids)
                self._indexes[sides.replicas].add(ids, number % sides.replicas)

    def _prompt(self, conversation: int, turn: int) -> Ids:
        return self._conversations[conversation][: self._first_tokens + turn * TURN_TOKENS]

    def round(self, number: int) -> None:
        """Each conversation goes on by a turn for each case."""
        ours_first = number % 2 == 0
        conversations = range(len(self._conversations))
        ones, twos = ([self._prompt(one, 2 * number + step) for one in conversations] for step in (1, 2))
        for sides in self._fleets:
            self._look_up(sides.replicas, twos, ours_first)
            self._decide(FROM_LIST, sides.replicas, sides.from_list, sides.their_list, ones, ours_first)
            self._decide(FROM_NUMPY, sides.replicas, sides.from_numpy, sides.their_numpy, twos, ours_first)

    def _look_up(self, replicas: int, prompts: Sequence[Ids], ours_first: bool) -> None:
        times = look_up(self._indexes[replicas], prompts, rival=True, ours_first=ours_first)
        alone, hashed = self._samples[LOOKUP, replicas], self._samples[HASHED_LOOKUP, replicas]
        alone.ours += times.ours
        hashed.ours += map(add, times.hashing, times.ours)
        alone.theirs += times.theirs
        hashed.theirs += times.theirs
        for conversation, ids in enumerate(prompts):
            self._indexes[replicas].add(ids, conversation % replicas)

    def _decide(
        self,
        case: str,
        replicas: int,
        ours: Callable[[Ids], tuple[int, int]],
        theirs: Callable[[Ids], int],
        prompts: Sequence[Ids],
        ours_first: bool,
    ) -> None:
        ends: list[int] = self._samples[END, replicas].ours

        def ours_all() -> list[int]:
            times = [*map(ours, prompts)]
            ends.extend(end for _, end in times[UNCOUNTED:])
            return [decided for decided, _ in times]

        self._samples[case, replicas].sweep(ours_all, lambda: [*map(theirs, prompts)], ours_first, UNCOUNTED)


class ChatDecisions:
    """Decisions from the bytes of chat requests: with a new turn, sent again, and never seen."""

    def __init__(self, plan: Plan, samples: dict[Key, Samples]) -> None:
        """Bring each chat to its first request on both sides.

        Raises:
            Disagreement: the prompts of the two sides are not the same token ids.
        """
        self._samples, self._seed = samples, plan.seed
        tokenizer = embedded_tokenizer().tokenizer
        self._writer = Writer(tokenizer)
        text = self._writer.text(2_000, plan.seed, 3)
        per_word = len(tokenizer.encode(text).ids) / 2_000
        self._words = int(plan.prompt_tokens / per_word)
        self._chats = [Chat(self._writer, number, self._words, plan.seed) for number in range(plan.chats)]
        self._cold = plan.chats  # the number of the next chat
        texts = [chatml(chat.messages) for chat in self._chats[:ENCODES_TRIED]]
        self.encoder, self._encode = fastest_encode(tokenizer, texts)
        self._fleets = [_Sides(replicas, self._encode) for replicas in plan.fleets]
        self._meet_words(plan.earlier_chats)
        self.tokens: list[int] = []
        for chat in self._chats:
            ids = self._encode(chatml(chat.messages))
            self.tokens.append(len(ids))
            for sides in self._fleets:
                prompt = sides.ours.router.prepare(chat.body, CHAT)
                if prompt.tokens.tolist() != ids:
                    raise Disagreement("the prompts of the two sides are not the same token ids")
                sides.ours.between(sides.ours.router.route(prompt).flight_id)
                sides.theirs.between(sides.theirs.route(ids), len(ids))

    def _meet_words(self, chats: int) -> None:
        for number in range(chats):
            messages = [{"role": "user", "content": self._writer.text(EARLIER_WORDS, self._seed, 4, number)}]
            self._encode(chatml(messages))
            for sides in self._fleets:
                sides.ours.router.prepare(chat_body(messages), CHAT)

    def round(self, number: int) -> None:
        """Each chat goes on by a turn and is sent again when all others have been; then as many new ones."""
        for chat in self._chats:
            chat.grow()
        bodies = [chat.body for chat in self._chats]
        numbers = range(self._cold, self._cold + len(bodies))
        self._cold += len(bodies)
        cold = [Chat(self._writer, one, self._words, self._seed, shared_system=False).body for one in numbers]
        for sides in self._fleets:
            self._decide(NEW_TURN, sides, bodies, number, UNCOUNTED)
            self._decide(ALL_SEEN, sides, bodies, number, UNCOUNTED)
        # One by one: these take about as long on both sides, and a slow second of the machine shall fall on both.
        for at, body in enumerate(cold):
            for sides in self._fleets:
                self._decide(COLD, sides, [body], number + at)

    def _decide(self, case: str, sides: _Sides, bodies: Sequence[bytes], number: int, uncounted: int = 0) -> None:
        self._samples[case, sides.replicas].sweep(
            lambda: [*map(sides.body, bodies)], lambda: [*map(sides.their_body, bodies)], number % 2 == 0, uncounted
        )
