"""How all tests run: property tests with the same examples everywhere; new ones with `--hypothesis-profile=explore`."""

from __future__ import annotations

import signal

from hypothesis import settings

settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, derandomize=False, print_blob=True)
settings.load_profile("same")

# A shell lets what it starts in the background ignore SIGINT, and so would all processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
