"""Reads tokenizers and chat templates from files and folders; the hub is never touched here."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gorgo_plugin.errors import SettingsError

EMBEDDED = "embedded"
# What transformers passes to a template of the tokenizer's special tokens.
_TOKEN_VARIABLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """A tokenizer with what its folder says of chat.

    Attributes:
        tokenizer: read from `tokenizer.json`.
        name: the file it was read from, or `embedded`.
        templates: chat templates by name; `default` is the one for every use.
        variables: the special tokens as template variables.
    """

    tokenizer: Tokenizer
    name: str
    templates: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)


def embedded_tokenizer() -> TokenizerSource:
    """The tokenizer inside the package; `train_embedded` says where it comes from."""
    packed = resources.files("gorgo_plugin.prompt").joinpath("embedded.json.gz").read_bytes()
    return TokenizerSource(Tokenizer.from_buffer(gzip.decompress(packed)), EMBEDDED)


def read_tokenizer(name: str, where: str) -> TokenizerSource:
    """Read a tokenizer from a folder that holds `tokenizer.json`, or from such a file.

    A file called `tokenizer.json` brings the chat template of its folder; one by another name comes alone.

    Raises:
        SettingsError: nothing of that name, or what is there cannot be read; names the setting `where`.
    """
    path = _path(name)
    if path is None:
        raise SettingsError(
            f"{where}: '{name:.200}' is neither a file nor a folder (models of the Hugging Face hub have to be fetched)"
        )
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise SettingsError(f"{where}: folder '{name}' holds no tokenizer.json")
    try:
        tokenizer = Tokenizer.from_buffer(file.read_bytes())
    except Exception as error:  # noqa: BLE001 (tokenizers raises nothing narrower)
        raise SettingsError(f"{where}: '{name}' is no tokenizer.json that can be read ({error!s:.200})") from None
    if file.name != "tokenizer.json":
        return TokenizerSource(tokenizer, str(file))
    folder = file.parent
    config = _json_object(folder / "tokenizer_config.json", where)
    special = _json_object(folder / "special_tokens_map.json", where)
    return TokenizerSource(tokenizer, str(file), _templates(folder, config, where), _variables(special | config))


def _path(name: str) -> Path | None:
    """The file or folder of that name, None when there is none."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, an unknown home
        return None


def _json_object(file: Path, where: str) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(_text(file, where))
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{where}: '{file}' is not valid JSON ({error!s:.200})") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{where}: '{file}' holds no JSON object")
    return content


def _text(file: Path, where: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{where}: '{file}' cannot be read ({type(error).__name__})") from None


def _templates(folder: Path, config: dict[str, Any], where: str) -> dict[str, str]:
    template = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(template, str):
        templates["default"] = template
    elif isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        pairs = [(entry.get("name"), entry.get("template")) for entry in named]
        templates |= {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        templates["default"] = _text(alone, where)
    return templates


def _variables(config: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name in _TOKEN_VARIABLES:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            found[name] = content
    return found


def read_template(setting: str, where: str) -> tuple[str, str]:
    """(template text, where it is from): the setting is the template itself, or the path of a file that holds it.

    Raises:
        SettingsError: neither; names the setting `where`.
    """
    if "{" in setting or "\n" in setting:
        return setting, "settings"
    file = _path(setting)
    if file is None or not file.is_file():
        raise SettingsError(f"{where}: '{setting:.200}' is neither a file nor the text of a Jinja template")
    return _text(file, where), str(file)
