"""Use the simulator as a library: two policies and weights of one's own, on a fleet whose nearest engine slows down.

Run it with `python examples/simulate_by_hand.py` (needs the extra `demo`); `gorgo simulate` does the same for traces,
with plots. Where the round trip is all but free of charge ("no network") more goes to the farther regions: the median
pays for it, while the tail, which is queue, gains a little.
"""

from pathlib import Path

import numpy as np

from gorgo_plugin.fleet.generated import generate
from gorgo_plugin.fleet.rows import ROWS, Row
from gorgo_plugin.fleet.simulator import simulate
from gorgo_plugin.fleet.topology import Fleet, read_fleet

fleet = read_fleet(Path(__file__).parent / "fleets" / "near.yaml")
slowing = {"kind": "slow", "at_s": 40, "replica": "us-east-1", "factor": 3}
fleet = Fleet.model_validate({**fleet.model_dump(), "events": [slowing]})
requests = generate("conversations", 0, rate_scale=1.0, block_tokens=fleet.block_tokens)[:600]

for row in (ROWS["gorgo"], ROWS["session-affinity"], Row("no network", {"weights": {"rtt": 0.05, "queue": 1.0}})):
    outcome = simulate(row, fleet, requests, seed=1)
    after = outcome.at_s > 40
    p50, p95 = np.percentile(outcome.ttft_ms[after], (50, 95))
    shares = ", ".join(f"{region} {share:.0%}" for region, share in outcome.region_shares().items())
    print(f"{row.name:<17} TTFT after the engine slowed: p50 {p50:5.0f} ms, p95 {p95:5.0f} ms   {shares}")
