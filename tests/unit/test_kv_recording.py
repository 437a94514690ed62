"""The KV events of a real engine, as `tests.real_engine.record` took them down."""

from __future__ import annotations

import base64
import json

import numpy as np

from gorgo_plugin.prefix import BlockHasher, EngineBlocks
from gorgo_plugin.runtime.kv_wire import WireReader
from tests.real_engine.record import FILE, RESET_BEFORE


def test_the_events_of_a_real_engine_tell_the_cached_tokens_that_it_reports() -> None:
    recording = json.loads(FILE.read_text())
    block_tokens = recording["block_tokens"]
    reader, hasher = WireReader(), BlockHasher(block_tokens, b"secret")
    blocks = EngineBlocks(block_tokens, b"secret")
    blocks.clear(0)
    believed, reported = [], []
    for step in recording["steps"]:
        tokens = np.array(step["prompt"], dtype=np.uint32)
        believed.append(blocks.match(hasher.hashes(tokens), len(tokens)).get(0, 0) * block_tokens)
        reported.append(step["cached_tokens"])
        for _, payload in step["frames"]:
            for event in reader.read(base64.b64decode(payload))[1]:
                for piece in blocks.pieces(event):
                    blocks.apply(0, piece)
    # That its cache was cleared an engine tells only with the events of its next step.
    assert (believed.pop(RESET_BEFORE), reported.pop(RESET_BEFORE)) == (192, 0)
    assert believed == reported
    assert reader.skipped == 0
