"""Any replica."""

import numpy as np

from gorgo_plugin.policies.base import Policy, View
from gorgo_plugin.signals.columns import FloatArray


class Random(Policy):
    """Uniformly at random."""

    name = "random"
    reason = "random"

    def scores(self, view: View) -> FloatArray:
        """Draws from [0, 1)."""
        return np.array([view.rng.random() for _ in view.names])
