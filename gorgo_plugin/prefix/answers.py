"""Answers in the prefix index: blocks that an engine holds behind a prompt, whose tokens this side never sees.

After an answer an engine has cached it as well, and the next turn of the conversation finds it there. How long it is,
its usage tells; what it holds, the next prompt shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from gorgo_plugin.prefix.blocks import HASH_BYTES
from gorgo_plugin.prefix.index import Credit, Node, PrefixIndex, common_blocks, upwards

_Kind = tuple[int, int, bytes]  # bit, tokens of the tail, their hash


class Answer(Node):
    """The blocks of an answer, which follow a prompt's in the cache but whose tokens this side never sees.

    A child of the prompt's last node under a made-up key, so that it ages, takes room and is evicted like any other,
    until a prompt that goes on from there shows what its blocks are.
    """

    __slots__ = ("bit", "key", "tail", "tail_tokens")

    def __init__(self, edge: bytes, parent: Node, bit: int, tail: bytes, tail_tokens: int) -> None:
        super().__init__(edge, parent)
        self.bit = bit
        self.key = (0, b"")
        self.tail = tail
        self.tail_tokens = tail_tokens

    @property
    def kind(self) -> _Kind:
        """What tells it from other answers to the same blocks."""
        return self.bit, self.tail_tokens, self.tail

    @property
    def blocks(self) -> int:
        """Blocks of it that are left."""
        return len(self.edge) // HASH_BYTES


class AnswerIndex(PrefixIndex):
    """A prefix index that also knows which answers each replica gave."""

    def __init__(self) -> None:
        super().__init__()
        # (blocks, last hash) of a prompt -> the newest of its equal answers. A prompt sampled a thousand times has one.
        self._answers: dict[tuple[int, bytes], dict[_Kind, Answer]] = {}

    @property
    def has_answers(self) -> bool:
        """Whether there is any."""
        return bool(self._answers)

    def credit_after(self, replica: int, hashes: bytes, answers: Iterable[Answer]) -> Credit:
        """`credit`, of a prompt that goes on from these answers (`answers_before`), wherever they were given."""
        for answer in answers:
            self._show(answer, hashes)
        return self.credit(replica, hashes)

    def answered(self, credit: Credit, blocks: int, tail: bytes, tail_tokens: int) -> None:
        """Behind the path of `credit` the replica holds `blocks` more: the prompt's rest and its answer.

        Args:
            credit: of the request that was answered.
            blocks: full blocks beyond those of the path.
            tail: hash of the prompt's tokens behind its last full block, `tail_tokens` of them.
        """
        leaf, bit = credit.leaf, credit.bit
        blocks = min(blocks, self.capacity(credit.replica))
        if blocks < 1 or not self._stands(credit) or not leaf.mask >> bit & 1:
            return
        if credit.blocks == 0 or sum(len(node.edge) for node in upwards(leaf)) != credit.blocks * HASH_BYTES:
            return  # another prompt has gone on from here meanwhile
        self._pushes += 1
        first = (~self._pushes).to_bytes(HASH_BYTES, "big", signed=True)
        answer = Answer(first + bytes((blocks - 1) * HASH_BYTES), leaf, bit, tail, tail_tokens)
        answer.key = credit.blocks, leaf.edge[-HASH_BYTES:]
        leaf.children[first] = answer
        self._hold(answer, bit)
        answer.used[bit] = leaf.used[bit]
        alike = self._answers.setdefault(answer.key, {})
        alike.pop(answer.kind, None)  # the last one is the newest
        alike[answer.kind] = answer
        self._queue_if_leaf(answer, bit)
        self._evict_to_capacity(credit.replica)

    def answers_before(
        self, hashes: bytes, walk: Sequence[tuple[int, int]], tail: Callable[[int, int], bytes]
    ) -> dict[int, Answer]:
        """The answers that a prompt goes on from, by the replica that gave them.

        Args:
            hashes: of the prompt.
            walk: what `walk` found.
            tail: (blocks, tokens) -> hash of that many tokens of the prompt behind that many blocks.
        """
        found: dict[int, Answer] = {}
        further = 0
        for mask, depth in reversed(walk):
            ends_here, further, end = mask ^ further, mask, depth * HASH_BYTES
            if end == len(hashes):
                continue  # it ends there: the same prompt again
            tails: dict[int, bytes] = {}
            for answer in self._answers.get((depth, hashes[end - HASH_BYTES : end]), {}).values():
                replica, tokens = self._owner.get(answer.bit), answer.tail_tokens
                if replica is None or not ends_here >> answer.bit & 1:
                    continue
                if tokens not in tails:
                    tails[tokens] = tail(depth, tokens)
                if tails[tokens] == answer.tail and _leads_to(answer.parent, hashes[:end]):
                    found[replica] = answer
        return found

    def _show(self, answer: Answer, hashes: bytes) -> None:
        """Give an answer's blocks the hashes that the prompt behind it shows them to have."""
        node, bit = answer.parent, answer.bit
        assert node is not None
        start, tick = answer.key[0] * HASH_BYTES, answer.used[bit]
        end = min(start + len(answer.edge), len(hashes))
        self._release(answer, bit)
        if start >= end:
            return
        child = node.children.get(hashes[start : start + HASH_BYTES])
        if child is None and node.mask == 1 << bit and not node.children:
            node.edge += hashes[start:end]
            self._held[bit] += (end - start) // HASH_BYTES
            return
        if child is None:
            child = node.children[hashes[start : start + HASH_BYTES]] = Node(hashes[start:end], node)
        common = common_blocks(child.edge, hashes, start, end)
        if common * HASH_BYTES < len(child.edge):
            child = self._split(child, common)
        if not child.mask >> bit & 1:
            self._hold(child, bit)
            child.used[bit] = tick
            self._queue_if_leaf(child, bit)

    def _gone(self, node: Node) -> None:
        if not isinstance(node, Answer):
            return
        alike = self._answers.get(node.key, {})
        if alike.get(node.kind) is node:
            del alike[node.kind]
            if not alike:
                del self._answers[node.key]


def _leads_to(node: Node | None, hashes: bytes) -> bool:
    """Whether the path from the root to the end of `node` is `hashes`."""
    end = len(hashes)
    for above in upwards(node) if node is not None else ():
        start = end - len(above.edge)
        if start < 0 or hashes[start:end] != above.edge:
            return False
        end = start
    return end == 0
