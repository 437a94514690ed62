"""Hub names of tokenizers to local folders. Nothing else in the package reaches the Hugging Face hub."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Any

from gorgo_plugin.errors import SettingsError
from gorgo_plugin.settings import Settings

# Tokenizer files are under 40 MB, and the start of a gateway must not hang on a hub that does not answer.
DOWNLOAD_TIMEOUT_S = 60.0
FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
]
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?")


def with_local_tokenizers(settings: Settings, timeout_s: float = DOWNLOAD_TIMEOUT_S) -> Settings:
    """The settings with every tokenizer's hub name replaced by a local folder; files and folders stay as they are.

    What the hub's cache holds already is used without asking the hub; `HF_HUB_OFFLINE` and the other variables of
    huggingface_hub are honoured.

    Raises:
        SettingsError: the hub did not deliver it within `timeout_s`; names the field.
    """
    models = {
        name: model.model_copy(update={"tokenizer": _local(model.tokenizer, f"models.{name}.tokenizer", timeout_s)})
        for name, model in settings.models.items()
    }
    top = _local(settings.tokenizer, "tokenizer", timeout_s)
    return settings.model_copy(update={"tokenizer": top, "models": models})


def _local(tokenizer: str | None, field: str, timeout_s: float) -> str | None:
    if tokenizer is None or Path(tokenizer).expanduser().exists():
        return tokenizer
    if not _HUB_NAME.fullmatch(tokenizer) or tokenizer.endswith(".json"):
        raise SettingsError(f"{field}: '{tokenizer}' is no file, no folder and no hub name (org/name)")
    return _cached(tokenizer) or _downloaded(tokenizer, field, timeout_s)


def _cached(name: str) -> str | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=FILES, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return str(folder) if (folder / "tokenizer.json").is_file() else None


def _downloaded(name: str, field: str, timeout_s: float) -> str:
    """Download in a thread of its own, because huggingface_hub retries for longer than a start-up may take."""
    from huggingface_hub import snapshot_download

    result: dict[str, Any] = {}

    def download() -> None:
        try:
            result["folder"] = Path(snapshot_download(name, allow_patterns=FILES))
        except Exception as error:  # noqa: BLE001 (whatever the hub's client raises becomes one sentence below)
            result["error"] = error

    unknown = f"{field}: '{name}' is no file or folder, and"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise SettingsError(f"{unknown} not in the hub's cache while HF_HUB_OFFLINE is set")
    thread = threading.Thread(target=download, name="gorgo-hub", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise SettingsError(f"{unknown} the hub did not answer in {timeout_s:g} s")
    if "error" in result:
        raise SettingsError(f"{unknown} {_reason(result['error'])}") from result["error"]
    if not (result["folder"] / "tokenizer.json").is_file():
        raise SettingsError(f"{field}: '{name}' has no tokenizer.json on the hub")
    return str(result["folder"])


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "the hub wants a token for it (HF_TOKEN)"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub does not know it"
    return "the hub cannot be reached"
