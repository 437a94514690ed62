"""What the router knows of the fleet: round trips, flights, rates, engine gauges, health. None reads a clock."""

from gorgo_plugin.signals.arrivals import Arrivals
from gorgo_plugin.signals.decoding import DecodeTable
from gorgo_plugin.signals.flights import Flight, Flights, Observer
from gorgo_plugin.signals.gauges import EngineGauges, GaugeTable
from gorgo_plugin.signals.health import HealthTable
from gorgo_plugin.signals.latency import LatencyTable
from gorgo_plugin.signals.rates import RateTable, Sample, token_pairs
from gorgo_plugin.signals.silence import Silence

__all__ = [
    "Arrivals",
    "DecodeTable",
    "EngineGauges",
    "Flight",
    "Flights",
    "GaugeTable",
    "HealthTable",
    "LatencyTable",
    "Observer",
    "RateTable",
    "Sample",
    "Silence",
    "token_pairs",
]
