"""The policies, by the name that `policy:` selects. To add one: a file here with a `Policy`, and a line below."""

from gorgo_plugin.policies.base import Policy, View
from gorgo_plugin.policies.gorgo import Gorgo
from gorgo_plugin.policies.gorgo_paper import GorgoPaper
from gorgo_plugin.policies.gorgo_v1_distributed import GorgoV1Distributed
from gorgo_plugin.policies.gorgo_v1_proxy import GorgoV1Proxy
from gorgo_plugin.policies.least_load import LeastLoad
from gorgo_plugin.policies.least_request import LeastRequest
from gorgo_plugin.policies.nearest import Nearest
from gorgo_plugin.policies.prefix_cache import PrefixCache
from gorgo_plugin.policies.prefix_similarity import PrefixSimilarity
from gorgo_plugin.policies.random_choice import Random
from gorgo_plugin.policies.session_affinity import SessionAffinity

_ALL: tuple[Policy, ...] = (
    Gorgo(),
    GorgoPaper(),
    GorgoV1Proxy(),
    GorgoV1Distributed(),
    LeastLoad(),
    LeastRequest(),
    PrefixCache(),
    PrefixSimilarity(),
    SessionAffinity(),
    Nearest(),
    Random(),
)
POLICIES: dict[str, Policy] = {policy.name: policy for policy in _ALL}
POLICIES["gorgo-proxy"] = POLICIES["gorgo-v1-proxy"]  # the name the first paper's evaluation uses

__all__ = ["POLICIES", "Policy", "View"]
