"""`gorgo mock-upstream` as a command, and children that end with their parent."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from gorgo_plugin.fleet.processes import ProcessError, first_line, running

GORGO = (sys.executable, "-c", "from gorgo_plugin.cli import main; main(prog_name='gorgo')")
BODY = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


async def test_the_command_prints_its_url_serves_and_ends_on_sigterm(tmp_path: Path) -> None:
    command = [*GORGO, "mock-upstream", "--name", "us-1", "--rtt-ms", "100", "--ms-per-token", "0.5"]
    async with running("mock", command, tmp_path / "log", read_output=True) as child:
        ready = await first_line(child)
        assert ready["name"] == "us-1"
        assert ready["pid"] == child.pid
        began = time.monotonic()
        async with (
            aiohttp.ClientSession(ready["url"]) as client,
            client.post("/v1/chat/completions", json=BODY) as response,
        ):
            assert (await response.json())["system_fingerprint"] == "us-1"
        assert time.monotonic() - began > 0.1
        child.process.terminate()
        assert await asyncio.wait_for(child.process.wait(), 5) == 0


async def test_a_replica_told_to_die_after_some_requests_is_gone_without_an_answer(tmp_path: Path) -> None:
    command = [*GORGO, "mock-upstream", "--fault", "die", "--fault-after", "2"]
    async with running("mock", command, tmp_path / "log", read_output=True) as child:
        url = (await first_line(child))["url"]
        async with aiohttp.ClientSession(url) as client:
            for _ in range(2):
                async with client.post("/v1/chat/completions", json=BODY) as response:
                    assert response.status == 200
            with pytest.raises(aiohttp.ClientError):
                await client.post("/v1/chat/completions", json=BODY)
        assert await asyncio.wait_for(child.process.wait(), 5) == 70


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kv-tokens", "8"], "kv_tokens: expected at least two blocks"),
        (["--tokenizer", "/nowhere/tokenizer.json"], "tokenizer"),
        (["--port", "70000"], "70000"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1"),
    ],
)
def test_a_setting_that_cannot_work_ends_the_command_with_a_sentence_that_names_it(
    options: list[str], said: str
) -> None:
    result = subprocess.run(
        [*GORGO, "mock-upstream", *options], capture_output=True, text=True, timeout=30, check=False
    )
    assert result.returncode != 0
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_importing_the_command_line_needs_no_extra() -> None:
    program = (
        "import sys\n"
        "for name in ('aiohttp', 'litellm', 'prometheus_client', 'rich', 'matplotlib', 'grpc'):\n"
        "    sys.modules[name] = None\n"
        "from gorgo_plugin.cli import main\n"
        "main(['--help'])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 0, result.stderr
    assert "mock-upstream" in result.stdout


@pytest.mark.parametrize("command", ["demo", "mock-upstream"])
def test_a_command_whose_extra_is_missing_says_which_to_install(command: str) -> None:
    program = f"import sys\nsys.modules['aiohttp'] = None\nfrom gorgo_plugin.cli import main\nmain(['{command}'])\n"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 1
    assert "pip install 'gorgo-plugin[demo]'" in result.stderr
    assert "Traceback" not in result.stderr


async def test_a_process_that_does_not_start_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no luck today')"]
    with pytest.raises(ProcessError, match="no luck today"):
        async with running("mock", command, tmp_path / "log", read_output=True) as child:
            await first_line(child)
    with pytest.raises(ProcessError, match="cannot be started"):
        async with running("mock", ["/nowhere/program"], tmp_path / "log"):
            pass


PARENT = """
import asyncio, json, sys
from pathlib import Path
from gorgo_plugin.fleet.processes import running
async def main():
    async with running("child", [sys.executable, "-c", "import time; time.sleep(60)"], Path(sys.argv[1])) as child:
        print(json.dumps({"pid": child.pid}), flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """A process that runs a child of its own."""
    command = [sys.executable, "-c", PARENT, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        line: dict[str, Any] = json.loads(process.stdout.readline())
        yield process, psutil.Process(line["pid"])
        if process.poll() is None:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent was killed")
def test_a_child_ends_with_its_parent_however_that_ends(
    parent: tuple[subprocess.Popen[str], psutil.Process], number: signal.Signals
) -> None:
    process, child = parent
    os.kill(process.pid, number)
    process.wait(10)
    gone, _ = psutil.wait_procs([child], timeout=5)
    assert gone
