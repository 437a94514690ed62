"""What was learned, in a file: a restart is no cold start, and learned weights can be taken elsewhere.

Each worker has a file of its own, the first whose lock is free: state-0.json for the first, state-1.json for the next.
So as many workers as before find as many files, whatever their process ids are now. Files are replaced as a whole, and
one that cannot be used is moved aside before its place is written to.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from gorgo_plugin.errors import SettingsError
from gorgo_plugin.router import Router
from gorgo_plugin.runtime.status import without_userinfo
from gorgo_plugin.settings import Settings, WeightSettings
from gorgo_plugin.tuning import pair

try:
    import fcntl
except ImportError:  # no POSIX
    fcntl = None  # type: ignore[assignment]

FORMAT = "gorgo-state"
VERSION = 1
MAX_WORKERS = 256  # whose files are looked through; no gateway runs so many on one machine
MAX_BYTES = 64 * 2**20  # of a file that is read; a thousand replicas of a hundred models take less
_LEARNED = ("latency", "models")  # of a replica; load, health and caches do not outlive the process

_log = logging.getLogger(__name__)


class Unusable(Exception):
    """A state file cannot be used; says why."""


class StateFile:
    """One worker's file.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._wanted = path
        self._claim()

    def _claim(self) -> None:
        self._process = os.getpid()
        self.path, self._lock = _claimed(self._wanted)

    def read(self, settings: Settings) -> dict[str, Any] | None:
        """The state in it, None where there is none that can be used; why not, the log says."""
        try:
            return _for_these_replicas(load(self.path), settings)
        except FileNotFoundError:
            return None
        except Unusable as error:
            self.set_aside(str(error))
        except OSError as error:
            _log.warning("gorgo: state.path: %s cannot be read (%s)", self.path, error.strerror)
        return None

    def set_aside(self, reason: str) -> None:
        """Keep a file that cannot be used from being written over, and say so."""
        aside = self.path.with_suffix(f"{self.path.suffix}.unusable")
        with contextlib.suppress(OSError):
            self.path.replace(aside)
        _log.warning("gorgo: state.path: %s is ignored and now called %s: %s", self.path, aside.name, reason)

    def write(self, router: Router) -> None:
        """Put in it what the router has learned. Slow, as it waits for the disk.

        Raises:
            OSError: it cannot be written.
        """
        if self._process != os.getpid():  # forked: the parent's file is the parent's
            self._claim()
        replace(self.path, json.dumps(learned(router), allow_nan=False, indent=1).encode())

    def close(self) -> None:
        """Let another worker have it."""
        if self._lock is not None:
            self._lock.close()


def learned(router: Router) -> dict[str, Any]:
    """What a router has learned that is worth keeping, as JSON-able data."""
    snapshot = router.snapshot()
    urls = {replica.name: without_userinfo(replica.url) for replica in router.settings.replicas}
    return {
        "format": FORMAT,
        "version": VERSION,
        "saved_at_s": time.time(),
        "worker": os.getpid(),
        "policy": snapshot["policy"],
        "weights": snapshot["weights"],
        "replicas": {
            name: {"url": urls.get(name), **{key: replica[key] for key in _LEARNED}}
            for name, replica in snapshot["replicas"].items()
        },
        "models": snapshot["models"],
        "tuning": snapshot["tuning"],
    }


def load(path: Path) -> dict[str, Any]:
    """The content of a state file.

    Raises:
        Unusable: it is broken, something else, or of a later version.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    try:
        state = json.loads(content[:MAX_BYTES], parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise Unusable("it is not JSON") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise Unusable("it is no state file of gorgo")
    if state.get("version") != VERSION:
        raise Unusable(f"it has version {state.get('version')!r:.20}, this release reads {VERSION}")
    return state


def _no_number(constant: str) -> NoReturn:
    raise ValueError(constant)


def _for_these_replicas(state: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The state of the replicas that are still where they were, their round trips older by the time since.

    Raises:
        Unusable: something in it is missing or of another kind.
    """
    urls = {replica.name: without_userinfo(replica.url) for replica in settings.replicas}
    try:
        age_s = max(time.time() - float(state["saved_at_s"]), 0.0)
        kept = {name: known for name, known in state["replicas"].items() if known["url"] == urls.get(name)}
        for known in kept.values():
            if known["latency"]["age_s"] is not None:
                known["latency"]["age_s"] += age_s
        return {**state, "replicas": kept}
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise Unusable(f"its content is not as expected ({type(error).__name__}: {error!s:.80})") from None


def replace(path: Path, content: bytes) -> None:
    """Make `content` all that is in a file, at once: a reader, or a crash, finds the old content or the new.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # some file systems cannot: then the name may be lost in a power failure
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _claimed(path: Path) -> tuple[Path, BinaryIO | None]:
    """The first file of this name that no other worker has, and what holds it."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        for worker in range(MAX_WORKERS if fcntl is not None else 0):
            own = path.with_stem(f"{path.stem}-{worker}")
            lock = own.with_suffix(".lock").open("ab")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                continue
            return own, lock
    return path.with_stem(f"{path.stem}-{os.getpid()}"), None


def with_frozen_weights(settings: Settings) -> Settings:
    """The settings with the weights of the state file that `tuning.mode: frozen` names; others stay as they are.

    Raises:
        SettingsError: it has none for this policy.
    """
    tuning = settings.tuning
    if tuning.mode != "frozen" or tuning.path is None:
        return settings
    try:
        state = load(Path(tuning.path))
        known = (state.get("tuning") or state)["weights"]
        rtt, queue = pair(known)
    except OSError as error:
        raise SettingsError(f"tuning.path: cannot read {tuning.path} ({error.strerror})") from None
    except (AttributeError, KeyError, TypeError, ValueError):
        raise SettingsError(f"tuning.path: {tuning.path} holds no weights") from None
    except Unusable as error:
        raise SettingsError(f"tuning.path: {tuning.path} cannot be used: {error}") from None
    if state.get("policy") != settings.policy:
        raise SettingsError(
            f"tuning.path: the weights in {tuning.path} are of policy '{state.get('policy')}', not '{settings.policy}'"
        )
    return settings.model_copy(update={"weights": WeightSettings(rtt=rtt, queue=queue)})
