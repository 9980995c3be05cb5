"""Whole jobs that are hit: no row is lost, and none comes twice."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from whole_jobs import ROOT, ROWS, UNIT, check, given, start, write_shard

from benchmarks.soak_run import Moment, Soak, moments
from pipeline.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def shard(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    return write_shard(tmp_path, picture)


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, picture: Callable[..., bytes], checkpoint_folder: str
) -> Callable[..., dict[str, Any]]:
    """The rows by id of a job from ``shard`` with these options that nothing hits."""

    @cache
    def answer(*options: str) -> dict[str, Any]:
        job = start(write_shard(tmp_path_factory.mktemp("undisturbed"), picture), checkpoint_folder, *options)
        assert job.wait() == 0, job.said
        return check(job.output)

    return answer


@pytest.mark.parametrize("kept_sets", ["image", "question"])
def test_an_actor_killed_in_the_middle_of_a_batch(
    shard: Path, checkpoint_folder: str, undisturbed: Callable[..., dict[str, Any]], kept_sets: str
) -> None:
    options = ("--kept-sets", kept_sets)
    job = start(shard, checkpoint_folder, *options)
    job.wait_for_files(2)
    (actor,) = job.actors()
    os.kill(actor, signal.SIGKILL)
    assert job.wait() == 0, job.said
    rows = check(job.output, undisturbed=undisturbed(*options))
    alike = [rows[f"{i:03d}"]["kept"] == rows[f"{i + 2:03d}"]["kept"] for i in range(ROWS) if i % UNIT < 2]
    assert all(alike) if kept_sets == "image" else not all(alike)


def test_a_driver_killed_at_random_moments(
    shard: Path, checkpoint_folder: str, undisturbed: Callable[..., dict[str, Any]]
) -> None:
    """The short form of ``make soak``."""
    job = [*given(shard, checkpoint_folder), "--write-kept"]
    output, ends = Storage(str(shard.parent / "out")), time.monotonic() + 300
    soak = Soak(output, job, shard.parent, last_hit=ends, ends=ends)
    try:
        soak.hit_drivers([Moment("starting", 0, 3.7), *moments(random.Random(0), 2, ROWS // UNIT, start_seconds=8)])
    finally:
        soak.end()
    assert [hit["stage"] for hit in soak.hits] == ["starting", "working", "working"]
    assert [hit["rows"] > 0 for hit in soak.hits] == [False, True, True]
    assert soak.torn == 0
    # The files of killed writers are removed by whoever ends the run.
    check(Path(output.url), undisturbed=undisturbed())


def test_a_driver_killed_while_it_writes_to_s3(shard: Path, checkpoint_folder: str, s3: dict[str, Any]) -> None:
    """Its lock is nobody's after 45 seconds, which the next start waits."""
    root, output = Storage("s3://bucket/kill me", s3), Storage("s3://bucket/killed out", s3)
    root.write("in.parquet", shard.read_bytes(), temporary="")
    given = ["--input", root.url, "--output", output.url, "--storage-options", json.dumps(s3)]
    job = start(shard, checkpoint_folder, *given)
    job.wait_for_files(2, output)
    job.process.kill()
    job.wait()
    job = start(shard, checkpoint_folder, *given)
    assert job.wait() == 0, job.said
    assert f"waiting up to 45 s: a run on {platform.node()}" in job.said
    assert s3["secret"] not in job.said
    fs, path = output.open()
    rows = pq.read_table(path, filesystem=fs).to_pylist()
    assert sorted(row["id"] for row in rows if row["error"] is None) == [f"{i:03d}" for i in range(ROWS)]
    assert ".run/holder.json" not in [f".run/{name}" for name in output.names(".run")]


def test_sigterm_ends_in_a_state_that_continues(shard: Path, checkpoint_folder: str) -> None:
    job = start(shard, checkpoint_folder)
    # Two, so that one has its marker, wherever the signal meets the other.
    job.wait_for_files(2)
    began = time.monotonic()
    job.process.terminate()
    assert job.wait(30) == 143, job.said
    assert time.monotonic() - began < 30
    assert "the same command continues this run" in job.said
    done = len(list(job.output.glob("*.parquet")))
    assert 1 <= done < ROWS // UNIT
    job = start(shard, checkpoint_folder)
    assert job.wait() == 0, job.said
    # SIGTERM may have met a unit between its file and its marker.
    assert re.search(rf"({done}|{done - 1}) of them finished before", job.said), job.said
    check(job.output)


SMALL_DISK = """
mount -t tmpfs -o size=80k tmpfs "$OUT"
"$@"
echo "first: $?"
cp -r "$OUT" "$OUT-full"
mount -o remount,size=10m "$OUT"
"$@"
echo "second: $?"
cp -r "$OUT" "$OUT-done"
"""


def test_a_disk_that_is_full(shard: Path, checkpoint_folder: str) -> None:
    """A file system of 80 KiB, in a mount namespace of its own; then of 10 MiB."""
    output = shard.parent / "out"
    output.mkdir()
    command = [
        sys.executable,
        "-m",
        "jobs.answer",
        "--input",
        str(shard),
        "--output",
        str(output),
        "--model",
        checkpoint_folder,
    ]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", SMALL_DISK, "sh", *command, "--unit-rows", str(UNIT)],
        cwd=ROOT,
        env={**os.environ, "OUT": str(output)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    said = done.stdout + done.stderr
    assert "first: 1" in done.stdout, said
    assert "No space left on device" in done.stderr, said
    # Every file that has its name is whole.
    written = [pq.read_table(file).num_rows for file in Path(f"{output}-full").glob("*.parquet")]
    assert 1 <= len(written) < ROWS // UNIT
    assert set(written) == {UNIT}
    assert "second: 0" in done.stdout, said
    check(Path(f"{output}-done"))


NODES = """
import sys, time
from pathlib import Path
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, connect=False, head_node_args={"num_cpus": 0, "include_dashboard": False})
print(cluster.address, flush=True)
sys.stdin.readline()
node = cluster.add_node(num_cpus=3)
sys.stdin.readline()
cluster.remove_node(node, allow_graceful=False)
cluster.add_node(num_cpus=3)
print("replaced", flush=True)
sys.stdin.readline()
cluster.shutdown()
"""


def test_nodes_that_come_late_and_are_taken_away(
    shard: Path, checkpoint_folder: str, undisturbed: Callable[..., dict[str, Any]]
) -> None:
    """The job waits for its node, which holds the actor and all blocks and goes; another comes in its place."""
    nodes = subprocess.Popen(
        [sys.executable, "-c", NODES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert nodes.stdin is not None
    assert nodes.stdout is not None
    try:
        address = nodes.stdout.readline().strip()
        job = start(shard, checkpoint_folder, "--ray-address", address, "--wait-minutes", "2", "--gpus-per-actor", "0")
        while "waiting up to 2 minutes for the cluster to grow: num_actors=1" not in job.said:
            assert job.process.poll() is None, job.said
            time.sleep(0.1)
        print("come", file=nodes.stdin, flush=True)
        job.wait_for_files(2)
        print("go", file=nodes.stdin, flush=True)
        assert nodes.stdout.readline() == "replaced\n"
        assert job.wait(240) == 0, job.said
        check(job.output, undisturbed=undisturbed())
    finally:
        with suppress(ProcessLookupError):
            os.killpg(nodes.pid, signal.SIGKILL)
        nodes.communicate()


def test_a_second_run_into_one_folder_is_refused(shard: Path, checkpoint_folder: str) -> None:
    first = start(shard, checkpoint_folder)
    first.wait_for_files(1)
    # It holds the folder until the second has looked, however late that comes.
    first.process.send_signal(signal.SIGSTOP)
    try:
        second = start(shard, checkpoint_folder)
        assert second.wait() == 2, second.said
    finally:
        first.process.send_signal(signal.SIGCONT)
    assert f"is being written by a run on {platform.node()} (process {first.process.pid}, since" in second.said
    assert first.wait() == 0, first.said
    check(first.output)


POISON = """
import hashlib, os, signal
from pathlib import Path
from pipeline.process import Process
from pipeline.prompts import Prompter

ask, tokens = Process.ask, Prompter.tokens

def poisoned_ask(self, data):
    left = Path(__file__).parent / hashlib.sha256(data).hexdigest()
    if left.exists() and int(left.read_text()) > 0:
        left.write_text(str(int(left.read_text()) - 1))
        os.kill(os.getpid(), signal.SIGKILL)
    return ask(self, data)

def poisoned_tokens(self, question, images):
    if "poison" in question:
        os.kill(os.getpid(), signal.SIGKILL)
    return tokens(self, question, images)

Process.ask, Prompter.tokens = poisoned_ask, poisoned_tokens
"""


@pytest.fixture
def poison(tmp_path: Path) -> Path:
    """A folder that gives every Python process a tokenizer which a certain word kills, and a decoder which images kill: those
    that a file is named for, by their digest, as many times as it says."""
    folder = tmp_path / "poison"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(POISON)
    return folder


def test_a_row_that_always_kills_its_actor_is_left_out(
    shard: Path, checkpoint_folder: str, poison: Path, undisturbed: Callable[..., dict[str, Any]]
) -> None:
    table = pq.read_table(shard)
    questions = ["poison" if i == 21 else question for i, question in enumerate(table["question"].to_pylist())]
    table = table.set_column(1, "question", pa.array(questions))
    pq.write_table(table, shard, row_group_size=UNIT)
    job = start(shard, checkpoint_folder, "--max-error-rate", "0.5", PYTHONPATH=f"{poison}{os.pathsep}{ROOT}")
    assert job.wait(240) == 0, job.said
    # The other question about its image is answered, and decides alone.
    others = {id: row for id, row in undisturbed().items() if id not in ("021", "023")}
    check(job.output, {"021": "left out, as the actor died each time"}, others)
    kinds = json.loads((job.output / ".run/summary.json").read_text())["error_kinds"]
    assert [found["ids"] for found in kinds.values()] == [["021"]]


@pytest.mark.parametrize("times", [2, 99])
def test_an_image_that_kills_its_actor(
    shard: Path, checkpoint_folder: str, poison: Path, undisturbed: Callable[..., dict[str, Any]], times: int
) -> None:
    """Its unit is begun a third time, one group at a time: answered as if nothing had been, or left out with all its rows."""
    image = pq.read_table(shard)["image"][21].as_py()
    (poison / hashlib.sha256(image).hexdigest()).write_text(str(times))
    job = start(shard, checkpoint_folder, "--max-error-rate", "0.5", PYTHONPATH=f"{poison}{os.pathsep}{ROOT}")
    assert job.wait(240) == 0, job.said
    left_out = ["021", "023"] if times > 2 else []
    check(job.output, dict.fromkeys(left_out, "left out, as the actor died each time"), undisturbed())
    assert int((poison / hashlib.sha256(image).hexdigest()).read_text()) == (95 if times > 2 else 0)
