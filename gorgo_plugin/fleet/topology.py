"""The fleet of the demo: three regions, as far from the gateway as in the paper."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Region:
    """One region with one replica; round trip and its standard deviation as seen from the gateway."""

    name: str
    rtt_ms: float
    jitter_ms: float


# The paper's means from a gateway beside the first region.
REGIONS = (
    Region("us-east", 37.0, 2.0),
    Region("eu-central", 279.0, 8.0),
    Region("ap-northeast", 456.0, 12.0),
)


def mock_command(region: Region, seed: int, kv_tokens: int, model: str, stream_interval: int) -> Sequence[str]:
    """The command line of a region's mock replica; each gets a seed of its own."""
    return (
        sys.executable,
        "-c",
        "from gorgo_plugin.cli import main; main()",
        "mock-upstream",
        f"--name={region.name}",
        f"--model={model}",
        f"--rtt-ms={region.rtt_ms}",
        f"--jitter-ms={region.jitter_ms}",
        f"--kv-tokens={kv_tokens}",
        f"--stream-interval={stream_interval}",
        f"--seed={seed * len(REGIONS) + REGIONS.index(region)}",
    )
