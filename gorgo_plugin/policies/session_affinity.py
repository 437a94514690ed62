"""Every request of a session to the same replica."""

import hashlib

import numpy as np

from gorgo_plugin.policies.base import Policy, View
from gorgo_plugin.signals.columns import FloatArray


class SessionAffinity(Policy):
    """Rendezvous hashing: when a replica leaves, only its own sessions move."""

    name = "session-affinity"
    reason = "affinity"

    def scores(self, view: View) -> FloatArray:
        """A hash of session and replica, in [0, 1)."""
        session = view.affinity()
        digests = [hashlib.blake2b(session, key=_key(name), digest_size=8).digest() for name in view.names]
        return np.array([int.from_bytes(digest, "big") / 2**64 for digest in digests])


def _key(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=32).digest()
