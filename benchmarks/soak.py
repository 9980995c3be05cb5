"""Kill a real job again and again, and count what was lost: ``python -m benchmarks.soak --output benchmarks/results``.

A driver at random moments of its life, on local disk and on S3, and a job's actor. Writes ``soak.json`` and ``soak.md``, and
exits with 1 where anything was lost, came twice or was torn. Linux only.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.soak_job import files
from benchmarks.soak_run import Soak, audit, moments, texts
from demo import MODEL

if TYPE_CHECKING:
    from pipeline.storage import Storage

QUESTIONS, SCENES = 1500, 350
UNIT_ROWS = 64
SEED = 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of soak.json and soak.md")
    parser.add_argument(
        "--minutes", type=float, default=20, help="all is over by then, with fewer hits if need be; default: 20"
    )
    parser.add_argument("--kills", type=int, default=10, help="hits on a driver, on local disk and on S3 each; default: 10")
    parser.add_argument("--actor-kills", type=int, default=5, help="hits on a job's actor; default: 5")
    options = parser.parse_args(arguments)

    from benchmarks.soak_page import ZEROS, markdown

    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{(time.monotonic() - began) / 60:5.1f} min] {line}", file=sys.stderr, flush=True)

    measured = study(options.kills, options.actor_kills, began + 60 * options.minutes, say)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "soak.json").write_text(json.dumps(measured, indent=1) + "\n")
    (options.output / "soak.md").write_text(markdown(measured))
    print(markdown(measured))
    return int(any(run[name] for run in measured["runs"] for name in ZEROS))


@dataclass(frozen=True, slots=True)
class Quiet:
    """The job when nobody hits it."""

    asked: list[str]
    """Ids of the input."""
    texts: dict[str, str | None]
    seconds: float
    first: float
    """Seconds to the first file."""
    units: int


def study(kills: int, actor_kills: int, ends: float, say: Callable[[str], object]) -> dict[str, Any]:
    """A quiet run, then one whose drivers are killed, one whose actors are, and one on S3 as far as time goes."""
    from benchmarks.conditions import commit, processor
    from demo import shards
    from pipeline.lock import LEASE
    from pipeline.model import versions
    from pipeline.storage import Storage

    conditions = {
        "hardware": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "commit": commit(),
        "versions": versions(),
    }
    draw = random.Random(SEED)
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        say("writing shards")
        shards.main(["--output", str(folder / "in"), "--easy-vqa", str(QUESTIONS), "--scenes", str(SCENES)])
        job = ["--model", str(MODEL), "--unit-rows", str(UNIT_ROWS), "--ray-address", "local"]
        local = ["--input", str(folder / "in"), *job]
        say("a quiet run")
        quiet = _quiet(Soak(Storage(str(folder / "quiet")), local, folder, ends, ends), folder / "in")
        say(f"{len(quiet.asked):,} rows in {quiet.units} units, {quiet.seconds:.0f} s, the first after {quiet.first:.0f} s")
        # Time for a last start that waits a lease out, on a machine that is as slow again.
        last_hit = ends - LEASE - 2 * quiet.seconds

        def drivers(name: str, output: Storage, options: list[str]) -> dict[str, Any]:
            soak = Soak(output, options, folder, last_hit, ends)
            at = moments(draw, kills, quiet.units, quiet.first)
            return _report(name, soak, lambda: soak.hit_drivers(at), kills, quiet, say)

        runs = [drivers("local disk", Storage(str(folder / "drivers")), local)]
        acted = Soak(Storage(str(folder / "actors")), local, folder, last_hit, ends)
        at = sorted(draw.sample(range(1, quiet.units - 3), actor_kills))
        runs.append(_report("local disk, actors", acted, lambda: acted.hit_actors(at), actor_kills, quiet, say))
        left_out = []
        if time.monotonic() > last_hit:
            left_out.append("S3, for want of time")
        else:
            with _s3(folder / "in") as (input, output):
                there = ["--input", input.url, "--storage-options", json.dumps(output.options), *job]
                runs.append(drivers("S3", output, there))
    short = [run for run in runs if len(run["hits"]) < run["wanted"]]
    left_out += [f"{run['wanted'] - len(run['hits'])} of {run['wanted']} hits on {run['name']}" for run in short]
    of = {"rows": len(quiet.asked), "units": quiet.units, "unit_rows": UNIT_ROWS}
    return {"runs": runs, "left_out": left_out, "job": of, "seed": SEED, "conditions": conditions}


def _quiet(soak: Soak, shards: Path) -> Quiet:
    import pyarrow.parquet as pq

    asked = pq.read_table(shards, columns=["id"])["id"].to_pylist()
    began = time.time()
    try:
        soak.hit_drivers([])
    finally:
        soak.end()
    seconds, there = time.time() - began, files(soak.output)
    first = min(os.stat(soak.output.path(name)).st_mtime for name in there) - began
    return Quiet(asked, {id: text for id, text, _ in texts(soak.output)}, seconds, first, len(there))


def _report(
    name: str, soak: Soak, work: Callable[[], None], wanted: int, quiet: Quiet, say: Callable[[str], object]
) -> dict[str, Any]:
    """Does ``work``, and says what came of it."""
    began = time.monotonic()
    try:
        work()
    finally:
        soak.end()
    seconds, found = time.monotonic() - began, texts(soak.output)
    unlike = sum(id in quiet.texts and text != quiet.texts[id] for id, text, _ in found)
    counts = audit(quiet.asked, found) | {"torn": soak.torn, "unlike": unlike}
    say(f"{name}: {len(soak.hits)} hits, {counts['lost']} rows lost, {counts['doubled']} twice, {counts['torn']} files torn")
    times = {"seconds": seconds, "quiet_seconds": quiet.seconds}
    return {"name": name, "wanted": wanted, "hits": soak.hits, **counts, **times}


@contextmanager
def _s3(shards: Path) -> Iterator[tuple[Storage, Storage]]:
    """The shards on an S3 server of this process's, and a place for an output."""
    import boto3
    from moto.server import ThreadedMotoServer

    from pipeline.storage import Storage

    # It tells every request.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        keys = {"aws_access_key_id": "soak", "aws_secret_access_key": "soak"}
        boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys).create_bucket(Bucket="soak")
        options = {"endpoint_url": endpoint, "key": "soak", "secret": "soak"}
        input = Storage("s3://soak/in", options)
        for file in shards.rglob("*.parquet"):
            input.write(str(file.relative_to(shards)), file.read_bytes(), temporary="")
        yield input, Storage("s3://soak/out", options)
    finally:
        server.stop()


if __name__ == "__main__":
    sys.exit(main())
