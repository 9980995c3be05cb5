"""Clusters that do not answer, or come late. Each test has processes of its own: a process has one Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent

JOIN = """
import sys, time
from pipeline import cluster
cluster.JOINING = float(sys.argv[2])
began = time.monotonic()
try:
    with cluster.connected(sys.argv[1], lambda line: print(f"said: {line}", file=sys.stderr, flush=True)):
        print("joined", time.monotonic() - began)
except cluster.UnusableError as error:
    print("refused:", error, file=sys.stderr)
"""
# What Ray does not get to hear in time would make the tests long: seconds instead of half a minute for each of its tries.
BRISK = {"RAY_gcs_rpc_server_connect_timeout_s": "1", "RAY_py_gcs_connect_timeout_s": "1"}
HEAD = """
import sys
from ray.cluster_utils import Cluster
head = {"num_cpus": 2, "include_dashboard": False, "gcs_server_port": int(sys.argv[1])}
cluster = Cluster(initialize_head=True, connect=False, head_node_args=head)
sys.stdin.readline()
cluster.shutdown()
"""


def join(address: str, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", JOIN, address, str(seconds)]
    environment = {**os.environ, **BRISK}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_what_no_cluster_is_at_is_said_and_refused(free_port: Callable[[], int]) -> None:
    address = f"127.0.0.1:{free_port()}"
    joining = join(address, 8)
    said = joining.communicate(timeout=90)[1].splitlines()
    assert said[0].startswith(f"said: waiting up to two minutes for the cluster of ray_address='{address}': "), said
    assert said[-1].startswith(f"refused: ray_address='{address}' can't be joined: Failed to connect to Ray cluster at"), said
    assert said[-1].endswith("or drop --ray-address")


def test_an_address_that_is_none_is_refused_at_once() -> None:
    began = time.monotonic()
    said = join("nonsense", 60).communicate(timeout=60)[1].splitlines()
    assert time.monotonic() - began < 30
    assert said[-1].startswith("refused: ray_address='nonsense' can't be joined: Invalid address format"), said


def test_a_cluster_that_comes_late_is_joined(free_port: Callable[[], int]) -> None:
    port = free_port()
    joining = join(f"127.0.0.1:{port}", 60)
    assert joining.stderr is not None
    assert joining.stderr.readline().startswith("said: waiting")
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD, str(port)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        joined, said = joining.communicate(timeout=90)
        assert joined.startswith("joined"), said
    finally:
        for process in (joining, head):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        head.communicate()


def test_sigterm_ends_the_wait(free_port: Callable[[], int]) -> None:
    joining = join(f"127.0.0.1:{free_port()}", 60)
    assert joining.stderr is not None
    assert joining.stderr.readline().startswith("said: waiting")
    joining.terminate()
    assert joining.communicate(timeout=60)[1].splitlines()[-1] == "pipeline.cluster.Terminated"
