"""``ray job submit`` against a real head node of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parent.parent
RAY = Path(sys.executable).parent / "ray"

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def head(free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a job server; its cluster is ended by the process that began it, and no other Ray is touched."""
    dashboard = free_port()
    ports = {
        "port": free_port(),
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": free_port(),
        "ray-client-server-port": free_port(),
        "num-cpus": 3,
    }
    log = (tmp_path_factory.mktemp("head") / "log").open("wb")
    command = [RAY, "start", "--head", "--block", "--disable-usage-stats", *(f"--{k}={v}" for k, v in ports.items())]
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api/version", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, Path(log.name).read_text()
                time.sleep(0.5)
        else:
            pytest.fail(f"no job server within a minute: {Path(log.name).read_text()}")
        yield address
    finally:
        # All that it started is in its process group; asked politely, it takes half a minute.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
        log.close()


def submit(head: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    job = [RAY, "job", "submit", "--address", head, "--working-dir", ".", "--", sys.executable, "-m", "jobs.answer", *arguments]
    return subprocess.run(job, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_a_jobs_exit_code_tells_the_truth(
    head: str, checkpoint_folder: str, picture: Callable[..., bytes], tmp_path: Path
) -> None:
    table = pa.table({"image": [picture(seed=i) for i in range(4)] + [b"broken"], "question": ["how many"] * 5})
    pq.write_table(table, tmp_path / "shard.parquet")
    given = [
        "--input",
        str(tmp_path / "shard.parquet"),
        "--output",
        str(tmp_path / "out"),
        "--max-new-tokens",
        "2",
        "--max-error-rate",
        "0.5",
    ]

    done = submit(head, *given, "--model", checkpoint_folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    assert "errors              1" in done.stdout
    assert pq.read_table(tmp_path / "out").num_rows == 5

    refused = submit(head, *given, "--model", "/no/such/model")
    assert refused.returncode == 1
    assert "model='/no/such/model' does not exist" in refused.stdout
