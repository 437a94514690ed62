"""Which replica holds how much of a prompt: block hashes and the bounded index over them."""

from gorgo_plugin.prefix.blocks import HASH_BYTES, BlockHasher, Blocks, block_hasher
from gorgo_plugin.prefix.index import Credit, PrefixIndex

__all__ = ["HASH_BYTES", "BlockHasher", "Blocks", "Credit", "PrefixIndex", "block_hasher"]
