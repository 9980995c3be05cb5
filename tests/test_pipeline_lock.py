"""Who may write to a folder, and who must wait."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import lock
from pipeline.record import RefusalError
from pipeline.storage import Storage

HOLD = """
import json, sys, time
from pipeline import lock
from pipeline.storage import Storage
with lock.locked(Storage(sys.argv[1], json.loads(sys.argv[2]))):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(output: Storage) -> subprocess.Popen[str]:
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLD, output.url, json.dumps(output.options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_local_folder_has_one_writer_and_a_killed_one_has_let_go(tmp_path: Path) -> None:
    output = Storage(str(tmp_path / "out"))
    other = hold(output)
    with (
        pytest.raises(RefusalError, match=rf"is being written by a run on .* \(process {other.pid}, since .*wait for it"),
        lock.locked(output),
    ):
        pass
    end(other)
    for _ in range(2):
        with lock.locked(output):
            pass


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds instead of the better part of a minute, here and not in other processes."""
    for name, seconds in {"LEASE": 3.0, "POLL": 0.2, "SETTLE": 0.2, "RENEWAL": 0.5}.items():
        monkeypatch.setattr(lock, name, seconds)


@pytest.fixture
def bucket(s3: dict[str, Any], request: pytest.FixtureRequest) -> Storage:
    return Storage(f"s3://bucket/{request.node.name}", s3)


def test_a_store_has_one_writer(bucket: Storage, brisk: None) -> None:
    holding, ends = threading.Event(), threading.Event()

    def other() -> None:
        with lock.locked(bucket):
            holding.set()
            ends.wait(30)

    thread = threading.Thread(target=other)
    thread.start()
    assert holding.wait(10)
    said: list[str] = []
    with pytest.raises(RefusalError, match="is being written by a run on"), lock.locked(bucket, said.append):
        pass
    assert "waiting up to 3 s" in said[0]
    ends.set()
    thread.join()
    # A writer that ends well leaves nothing to wait for.
    began = time.monotonic()
    with lock.locked(bucket):
        pass
    assert time.monotonic() - began < 2
    assert not bucket.exists(".run/holder.json")


def test_a_killed_writers_lease_is_waited_out(bucket: Storage, brisk: None) -> None:
    end(hold(bucket))
    assert bucket.exists(".run/holder.json")
    began = time.monotonic()
    with lock.locked(bucket):
        assert time.monotonic() - began > 3
    # What cannot be read is somebody's too.
    bucket.write(".run/holder.json", b"{", temporary="")
    with lock.locked(bucket):
        pass


def test_a_writer_that_was_taken_for_dead_ends(bucket: Storage, brisk: None) -> None:
    def be_robbed() -> None:
        bucket.write(".run/holder.json", json.dumps({"token": "another's"}).encode(), temporary="")
        time.sleep(10)

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(lock.LostError, match="another run has taken over"), lock.locked(bucket):
            be_robbed()
    finally:
        signal.signal(signal.SIGINT, before)
    # The other's lock is left alone.
    assert json.loads(bucket.read(".run/holder.json")) == {"token": "another's"}


def test_of_two_that_take_it_at_once_one_has_it(bucket: Storage, brisk: None) -> None:
    had: list[int] = []
    refused: list[int] = []
    start = threading.Barrier(4)

    def take(number: int) -> None:
        start.wait()
        try:
            with lock.locked(bucket):
                had.append(number)
                time.sleep(2)
        except RefusalError:
            refused.append(number)

    threads = [threading.Thread(target=take, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(had), len(refused)) == (1, 3)
