"""Both sides through Ray Data: the peer's loop as a ``map_batches`` class, the engine as ``python -m jobs.caption`` runs it.

A job has one limit of output tokens for all rows, so all answers have the same length here.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import MllamaForConditionalGeneration, MllamaProcessor

from benchmarks.peer import Peer
from benchmarks.study import Study
from benchmarks.workloads import Workload

MAX_NEW_TOKENS = 32
SHARDS = 2
START_SECONDS = 30.0
"""Of either side, to start its actors and load its model."""


def estimate(study: Study) -> float:
    """Seconds that ``compare`` will take, from the sweep: the engine is taken for twice as fast as the peer."""
    swept = study.sweeps["captioning"][study.batch_sizes("captioning")[0]]
    return 2 * START_SECONDS + 1.5 * swept.seconds / len(swept.tokens) * len(study.captioning.rows)


def compare(study: Study, say: Callable[[str], object]) -> dict[str, Any]:
    """One pass of each over the captioning workload, from parquet shards to parquet files; the workload has one prompt."""
    from pipeline import cluster

    load, batch_size = study.captioning, study.batch_sizes("captioning")[0]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder, cluster.connected(None):
        root = Path(folder)
        study.model.save_pretrained(root / "model")
        study.processor.save_pretrained(root / "model")
        _write(load, root / "shards")
        # Ray's first data set pays for Ray's own start.
        _write(load.first(1), root / "first")
        _peer(root, "first", load, batch_size)
        _ours(root, "first", load)
        peer = _timed(lambda: _peer(root, "shards", load, batch_size))
        say(f"Ray Data: peer: {peer:.1f} s")
        ours = _timed(lambda: _ours(root, "shards", load))
        say(f"Ray Data: engine: {ours:.1f} s")
        texts = [_texts(root / f"{name}-shards", len(load.rows)) for name in ("peer", "engine")]
    return {
        "images": len(load.images),
        "max_new_tokens": MAX_NEW_TOKENS,
        "batch_size": batch_size,
        "peer": {"seconds": peer, "images_per_second": len(load.images) / peer},
        "engine": {"seconds": ours, "images_per_second": len(load.images) / ours},
        "same_texts": sum(a == b for a, b in zip(*texts, strict=True)) / len(load.rows),
    }


class PeerActor:
    """What users write: the model loaded once, then a batch in, its texts out."""

    def __init__(self, folder: str, prompt: str) -> None:
        import torch

        # Ray's own default would be one thread.
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        model = MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        processor = MllamaProcessor.from_pretrained(folder)
        processor.tokenizer.padding_side = "left"
        self.peer, self.prompt = Peer(model, processor), prompt

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        files = list(batch["image"])
        answered = self.peer.batch(files, [self.prompt] * len(files), [MAX_NEW_TOKENS] * len(files))
        return {"id": batch["id"], "text": answered.texts}


def _peer(root: Path, shards: str, load: Workload, batch_size: int) -> None:
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.read_parquet(str(root / shards)).map_batches(
        PeerActor,
        fn_constructor_args=(str(root / "model"), load.rows[0].prompt),
        batch_size=batch_size,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=1),
    ).write_parquet(str(root / f"peer-{shards}"))


def _ours(root: Path, shards: str, load: Workload) -> None:
    from pipeline import graph
    from pipeline.config import RunConfig
    from pipeline.plan import make_plan

    config = RunConfig(
        job="caption",
        input=str(root / shards),
        output=str(root / f"engine-{shards}"),
        model=str(root / "model"),
        policy="none",
        # Exactly what the peer does: both are to say the same.
        tower_tiles="all",
        prompt=load.rows[0].prompt,
        question_column=None,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    graph.run(make_plan(config))


def _write(load: Workload, folder: Path) -> None:
    folder.mkdir()
    files = [load.images[row.image] for row in load.rows]
    table = pa.table({"id": [f"{i:06d}" for i in range(len(files))], "image": pa.array(files, pa.binary())})
    size = -(-len(table) // SHARDS)
    for i, start in enumerate(range(0, len(table), size)):
        pq.write_table(table.slice(start, size), folder / f"{i:03d}.parquet")


def _texts(folder: Path, rows: int) -> list[str]:
    """In the rows' order. Raises ``RuntimeError`` where a row is missing."""
    table = pq.read_table(folder, columns=["id", "text"]).sort_by("id")
    texts = table["text"].drop_null()
    if len(texts) != rows:
        raise RuntimeError(f"{folder} lacks answers: {len(texts)} of {rows} are there")
    return list(texts.to_pylist())


def _timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
