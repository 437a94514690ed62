"""The background thread: what is wanted runs, what is not wanted ends."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator

import pytest

from gorgo_plugin.runtime.background import Background, Job

WAIT_S = 10.0


class Recorder:
    """Makes jobs that say when they start and end."""

    def __init__(self) -> None:
        self.started: dict[str, threading.Event] = {}
        self.ended: dict[str, threading.Event] = {}
        self.threads: list[str] = []

    def job(self, name: str) -> Job:
        self.started[name], self.ended[name] = threading.Event(), threading.Event()

        async def run() -> None:
            self.threads.append(threading.current_thread().name)
            self.started[name].set()
            try:
                await asyncio.Event().wait()
            finally:
                self.ended[name].set()

        return run


@pytest.fixture
def background() -> Iterator[Background]:
    made = Background("test-background")
    yield made
    made.request_stop()
    assert made.join(WAIT_S)


def test_jobs_run_in_a_thread_of_their_own(background: Background) -> None:
    recorder = Recorder()
    background.want({"a": recorder.job("a")})
    background.ensure_started()
    assert recorder.started["a"].wait(WAIT_S)
    assert recorder.threads == ["test-background"]


def test_a_change_of_jobs_ends_the_old_starts_the_new_and_leaves_the_rest(background: Background) -> None:
    recorder = Recorder()
    jobs = {name: recorder.job(name) for name in "abc"}
    background.want({"a": jobs["a"], "b": jobs["b"]})
    background.ensure_started()
    assert recorder.started["b"].wait(WAIT_S)
    background.want({"b": jobs["b"], "c": jobs["c"]})
    assert recorder.started["c"].wait(WAIT_S)
    assert recorder.ended["a"].wait(WAIT_S)
    assert not recorder.ended["b"].is_set()
    assert len(recorder.threads) == 3


def test_starting_twice_from_many_threads_makes_one_thread(background: Background) -> None:
    starters = [threading.Thread(target=background.ensure_started) for _ in range(16)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join()
    assert [thread.name for thread in threading.enumerate()].count("test-background") == 1


def test_stopping_cancels_every_job_and_ends_the_thread() -> None:
    recorder, background = Recorder(), Background("test-stop")
    background.want({"a": recorder.job("a")})
    background.ensure_started()
    assert recorder.started["a"].wait(WAIT_S)
    background.request_stop()
    assert background.join(WAIT_S)
    assert recorder.ended["a"].is_set()
    background.ensure_started()
    assert not background.running


def test_stopping_right_after_starting_ends_too() -> None:
    for _ in range(50):
        background = Background("test-race")
        background.want({"a": Recorder().job("a")})
        background.ensure_started()
        background.request_stop()
        assert background.join(WAIT_S)


def test_jobs_go_on_when_the_loop_they_were_started_from_is_gone(background: Background) -> None:
    recorder = Recorder()
    background.want({"a": recorder.job("a")})

    async def start() -> None:
        background.ensure_started()

    asyncio.run(start())
    asyncio.run(start())
    assert recorder.started["a"].wait(WAIT_S)
    assert not recorder.ended["a"].is_set()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_starts_a_thread_of_its_own(background: Background) -> None:
    recorder = Recorder()
    background.want({"a": recorder.job("a")})
    background.ensure_started()
    assert recorder.started["a"].wait(WAIT_S)
    pid = os.fork()
    if pid == 0:
        recorder.started["a"].clear()
        background.ensure_started()
        os._exit(0 if recorder.started["a"].wait(WAIT_S) else 1)
    assert os.waitpid(pid, 0)[1] == 0
