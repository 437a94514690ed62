"""Which replica holds how much of a prompt: block hashes, the bounded index over them, and the engines' own word."""

from gorgo_plugin.prefix.answers import Answer, AnswerIndex
from gorgo_plugin.prefix.blocks import HASH_BYTES, BlockHasher, Blocks, block_hasher
from gorgo_plugin.prefix.engine_blocks import AllBlocksCleared, BlockRemoved, BlockStored, EngineBlocks, KvEvent
from gorgo_plugin.prefix.index import Credit, PrefixIndex

__all__ = [
    "HASH_BYTES",
    "AllBlocksCleared",
    "Answer",
    "AnswerIndex",
    "BlockHasher",
    "BlockRemoved",
    "BlockStored",
    "Blocks",
    "Credit",
    "EngineBlocks",
    "KvEvent",
    "PrefixIndex",
    "block_hasher",
]
