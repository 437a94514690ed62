"""Tuning of the weights online: a (1+1) evolution strategy, its objectives, and the guard over E2E."""

from gorgo_plugin.tuning.evolution import Pair
from gorgo_plugin.tuning.screening import Screening
from gorgo_plugin.tuning.trial import Arm, Sample, Trial
from gorgo_plugin.tuning.tuner import Step, Tuner, named, pair

__all__ = ["Arm", "Pair", "Sample", "Screening", "Step", "Trial", "Tuner", "named", "pair"]
