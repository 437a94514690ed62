"""Tokenizers by hub name, with no hub in reach."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from gorgo_plugin.errors import SettingsError
from gorgo_plugin.runtime.hub import with_local_tokenizers
from gorgo_plugin.settings import Settings


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def _cache(folder: Path, files: dict[str, str]) -> Path:
    """What a download of org/name leaves behind."""
    repo = folder / "models--org--name"
    snapshot = repo / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abc")
    for name, text in files.items():
        (snapshot / name).write_text(text)
    return snapshot


def test_files_and_folders_stay_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    settings = Settings.model_validate({"tokenizer": str(file), "models": {"m": {"tokenizer": str(tmp_path)}}})
    assert with_local_tokenizers(settings) == settings


def test_no_tokenizer_needs_no_hub() -> None:
    assert with_local_tokenizers(Settings()) == Settings()


def test_a_hub_name_in_the_cache_is_taken_from_there_without_asking(hub_cache: Path) -> None:
    snapshot = _cache(hub_cache, {"tokenizer.json": "{}"})
    settings = Settings.model_validate({"models": {"m": {"tokenizer": "org/name", "block_tokens": 32}}})
    local = with_local_tokenizers(settings)
    assert Path(local.models["m"].tokenizer or "") == snapshot
    assert local.models["m"].block_tokens == 32


def test_a_path_that_is_not_there_names_the_field() -> None:
    settings = Settings.model_validate({"models": {"m": {"tokenizer": "/nowhere/tokenizer.json"}}})
    with pytest.raises(SettingsError, match=r"^models\.m\.tokenizer: '/nowhere/tokenizer\.json' is no file"):
        with_local_tokenizers(settings)


def test_a_hub_name_offline_names_the_field_and_the_switch(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SettingsError, match=r"^tokenizer: 'org/name' .*HF_HUB_OFFLINE"):
        with_local_tokenizers(Settings.model_validate({"tokenizer": "org/name"}))


def test_a_hub_that_cannot_be_reached_is_one_sentence(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(SettingsError, match=r"^tokenizer: 'org/name' .*the hub cannot be reached$") as caught:
            with_local_tokenizers(Settings.model_validate({"tokenizer": "org/name"}))
    assert "\n" not in str(caught.value)


def test_a_hub_that_never_answers_is_given_up_in_time(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(SettingsError, match=r"the hub did not answer in 0\.5 s$"):
            with_local_tokenizers(Settings.model_validate({"tokenizer": "org/name"}), timeout_s=0.5)
        assert time.monotonic() - started < 30.0
