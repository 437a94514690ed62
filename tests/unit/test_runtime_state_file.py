"""The state file: what is kept, and what becomes of files that cannot be used."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gorgo_plugin import Prompt, Router, Settings, SettingsError
from gorgo_plugin.runtime import Runtime
from gorgo_plugin.runtime.state_file import StateFile, learned, replace, with_frozen_weights

URLS = {"a": "http://key:pw@127.0.0.1:1/v1", "b": "http://127.0.0.1:2/v1"}


def settings(folder: Path | None = None, urls: dict[str, str] = URLS, **more: Any) -> Settings:
    replicas = [{"name": name, "url": url} for name, url in urls.items()]
    state = {} if folder is None else {"state": {"path": str(folder / "state.json")}}
    return Settings.model_validate({"replicas": replicas, "metrics": {"path": None}, **state, **more})


def teach(router: Router) -> None:
    """Round trips, rates and a token scale."""
    for name, rtt_s in (("a", 0.02), ("b", 0.2)):
        router.observe_rtt(name, rtt_s)
    for number in range(8):
        tokens = np.arange(number * 9000, number * 9000 + 4000)
        flight = router.route(Prompt(tokens, exact=False), candidates=["a"]).flight_id
        router.first_token(flight, at_s=router._clock() + 2.0)
        router.usage(flight, prompt_tokens=6000)
        router.finish(flight)


def known(router: Router, name: str = "a") -> tuple[Any, ...]:
    snapshot = router.snapshot()
    replica = snapshot["replicas"][name]
    return (
        replica["latency"]["rtt_ms"],
        replica["models"].get("", {}).get("ms_per_token"),
        snapshot["models"].get("", {}).get("token_scale"),
    )


def kept(folder: Path, **more: Any) -> Path:
    """A file that a runtime has left behind."""
    runtime = Runtime(settings(folder, **more))
    teach(runtime.router)
    runtime.close()
    return folder / "state-0.json"


def test_a_restart_is_no_cold_start(tmp_path: Path) -> None:
    first = Runtime(settings(tmp_path))
    teach(first.router)
    before = known(first.router)
    first.close()
    second = Runtime(settings(tmp_path))
    assert known(second.router) == pytest.approx(before)
    assert before[2] == 1.5
    assert second.status()["state"]["path"].endswith("state-0.json")
    second.close()


def test_no_secret_and_no_prompt_is_kept(tmp_path: Path) -> None:
    text = kept(tmp_path).read_text()
    assert "pw" not in text
    assert "key" not in text
    state = json.loads(text)
    assert (state["format"], state["version"], state["worker"]) == ("gorgo-state", 1, os.getpid())


def test_workers_at_the_same_time_have_files_of_their_own_and_find_them_again(tmp_path: Path) -> None:
    workers = [Runtime(settings(tmp_path)) for _ in range(3)]
    for number, worker in enumerate(workers):
        worker.router.observe_rtt("a", 0.1 * (number + 1))
        worker.close()
    assert sorted(path.name for path in tmp_path.glob("*.json")) == [f"state-{number}.json" for number in range(3)]
    again = [Runtime(settings(tmp_path)) for _ in range(3)]
    assert [known(worker.router)[0] for worker in again] == pytest.approx([100.0, 200.0, 300.0])
    for worker in again:
        worker.close()


def test_a_replica_that_is_elsewhere_now_is_measured_anew(tmp_path: Path) -> None:
    kept(tmp_path)
    runtime = Runtime(settings(tmp_path, {**URLS, "a": "http://127.0.0.1:3/v1"}))
    assert known(runtime.router, "a")[0] is None
    assert known(runtime.router, "b")[0] == pytest.approx(200.0)
    runtime.close()


def test_round_trips_are_older_by_the_time_since_they_were_kept(tmp_path: Path) -> None:
    path = kept(tmp_path)
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "saved_at_s": state["saved_at_s"] - 3600.0}))
    runtime = Runtime(settings(tmp_path))
    latency = runtime.router.snapshot()["replicas"]["a"]["latency"]
    assert latency["age_s"] > 3600.0
    assert latency["stale"]
    runtime.close()


def changed(path: Path, **fields: Any) -> bytes:
    return json.dumps({**json.loads(path.read_text()), **fields}).encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "it is not JSON"),
        (b"\xff\xfe", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"[1, 2]", "it is no state file of gorgo"),
        (b'{"version": 1}', "it is no state file of gorgo"),
        ({"version": 2}, "it has version 2, this release reads 1"),
        ({"replicas": 7}, "its content is not as expected"),
        ({"replicas": {"a": {"url": "http://127.0.0.1:1/v1"}}}, "its content is not as expected"),
        ({"models": {"": {"token_scale": "x"}}}, "its content is not as expected"),
        ({"tuning": {"start": {"rtt": 1.0, "queue": 1.0}}}, "its content is not as expected"),
    ],
)
def test_a_file_that_cannot_be_used_is_ignored_with_one_warning_and_kept_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: Any, says: str
) -> None:
    path = kept(tmp_path)
    path.write_bytes(content if isinstance(content, bytes) else changed(path, **content))
    put = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        runtime = Runtime(settings(tmp_path, tuning={"mode": "online"}))
    assert known(runtime.router)[0] is None
    (record,) = [record for record in caplog.records if "state.path" in record.getMessage()]
    assert says in record.getMessage()
    assert (tmp_path / "state-0.json.unusable").read_bytes() == put
    runtime.close()
    assert json.loads(path.read_text())["version"] == 1


def test_a_file_is_replaced_as_a_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state-0.json"
    replace(path, b"old")
    replace(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["state-0.json"]


def test_a_folder_that_cannot_be_written_costs_one_warning_and_no_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    runtime = Runtime(settings(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        runtime._keeper.save(runtime.router)
        runtime._keeper.save(runtime.router)
    assert len([record for record in caplog.records if "cannot be written" in record.getMessage()]) == 1
    assert runtime.status()["state"]["error"] is not None
    runtime.router.route(Prompt([1, 2, 3]))
    runtime.close()


def test_the_file_of_a_worker_that_died_is_free_again(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from gorgo_plugin.runtime.state_file import StateFile;"
        "file = StateFile(Path(sys.argv[1])); print(file.path.name, flush=True); os._exit(0)"
    )
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "state.json")], capture_output=True, check=True, text=True
        )
        assert done.stdout.strip() == "state-0.json"
    own, other = StateFile(tmp_path / "state.json"), StateFile(tmp_path / "state.json")
    assert [own.path.name, other.path.name] == ["state-0.json", "state-1.json"]
    own.close()
    other.close()


# Frozen weights


def state_of(tmp_path: Path, **more: Any) -> Path:
    path = tmp_path / "learned.json"
    router = Router(settings(**{"weights": {"rtt": 0.3, "queue": 0.7}, **more}))
    replace(path, json.dumps(learned(router)).encode())
    return path


def frozen(path: Path, **more: Any) -> Settings:
    return settings(tuning={"mode": "frozen", "path": str(path)}, **more)


def test_frozen_weights_are_those_of_the_file_which_is_only_read(tmp_path: Path) -> None:
    path = state_of(tmp_path)
    before = path.read_bytes()
    runtime = Runtime(frozen(path))
    assert runtime.status()["weights"] == {"rtt": 0.3, "queue": 0.7}
    assert runtime.status()["tuning"] is None
    runtime.close()
    assert path.read_bytes() == before


def test_frozen_takes_what_was_learned_not_what_was_in_force(tmp_path: Path) -> None:
    path = state_of(tmp_path, tuning={"mode": "propose"})
    state = json.loads(path.read_text())
    state["tuning"]["weights"] = {"rtt": 0.5, "queue": 0.6}
    path.write_text(json.dumps(state))
    assert with_frozen_weights(frozen(path)).weight_pair() == (0.5, 0.6)


def test_frozen_without_usable_weights_does_not_start(tmp_path: Path) -> None:
    path = state_of(tmp_path)
    missing = tmp_path / "none.json"
    with pytest.raises(SettingsError, match=r"tuning.path: cannot read .*none.json \(No such file or directory\)"):
        Runtime(frozen(missing))
    with pytest.raises(SettingsError, match="are of policy 'gorgo', not 'gorgo-paper'"):
        Runtime(frozen(path, policy="gorgo-paper"))
    path.write_bytes(changed(path, weights={"rtt": -1.0, "queue": 1.0}))
    with pytest.raises(SettingsError, match="holds no weights"):
        Runtime(frozen(path))
    path.write_text("{}")
    with pytest.raises(SettingsError, match="cannot be used: it is no state file of gorgo"):
        Runtime(frozen(path))


def test_a_reload_that_names_no_usable_weights_is_refused(tmp_path: Path) -> None:
    runtime = Runtime(settings())
    with pytest.raises(SettingsError):
        runtime.reload(frozen(tmp_path / "none.json"))
    assert runtime.settings_error is not None
    runtime.reload(frozen(state_of(tmp_path)))
    assert runtime.router.snapshot()["weights"] == {"rtt": 0.3, "queue": 0.7}
    runtime.close()


def test_a_reload_moves_the_file(tmp_path: Path) -> None:
    runtime = Runtime(settings(tmp_path))
    runtime.router.observe_rtt("a", 0.1)
    runtime.reload(settings(tmp_path / "other"))
    assert (tmp_path / "state-0.json").exists()
    runtime.close()
    assert json.loads((tmp_path / "other" / "state-0.json").read_text())["replicas"]["a"]["latency"]["rtt_ms"] == 100.0


@pytest.mark.parametrize(
    ("name", "value"),
    [("token_scale", 0), ("token_scale", 1e999), ("ms_per_token", 0), ("ms_per_token", "nan"), ("overhead_ms", -1)],
)
def test_a_number_that_would_spoil_every_price_sets_the_file_aside(tmp_path: Path, name: str, value: Any) -> None:
    path = kept(tmp_path)

    def spoil(known: Any) -> None:
        if isinstance(known, dict):
            for key in known:
                if key == name:
                    known[key] = value
                spoil(known[key])

    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    runtime = Runtime(settings(tmp_path))
    assert runtime.router.route(Prompt(range(100))).costs["a"].total_ms > 0
    assert known(runtime.router)[1:] == (None, None) or known(runtime.router)[2] != value
    runtime.close()
    assert [found.name for found in tmp_path.iterdir() if "state-0.json" in found.name and found != path]
