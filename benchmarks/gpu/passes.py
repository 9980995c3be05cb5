"""Passes of the engine over a workload, and what becomes of several: for captioning and for questions."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from benchmarks.gpu.bench import Bench, Result
from benchmarks.ours import Ours, measured
from benchmarks.timing import Pass, spread, synchronise
from benchmarks.workloads import Workload
from trimming import Policy
from trimming.engine import Engine, Image, Request
from trimming.engine.layers import computing_on

THREADS = 8


def prepare(ours: Ours, load: Workload) -> list[Request]:
    """The workload's requests, their images decoded and cut by several threads; each image once."""
    with ThreadPoolExecutor(THREADS) as pool:
        images = list(pool.map(ours.image, load.images))
    known: dict[int, Image] = dict(enumerate(images))
    return ours.requests(load, range(len(load.rows)), known)


def make_engine(bench: Bench, ours: Ours, policy: Policy) -> Engine:
    """An engine whose every batch size is captured: in a job that lasts for hours this is done once."""
    engine = ours.engine(policy)
    with computing_on(bench.device):
        engine.decode.warm_up()
    return engine


def engine_pass(bench: Bench, engine: Engine, requests: Sequence[Request]) -> Pass:
    """From tiles on the host to texts. What the engine encoded before is forgotten."""
    engine.images.clear()
    engine.reset_statistics()
    synchronise(bench.device)
    began = time.perf_counter()
    answered = engine.generate(requests)
    tokens = [one.tokens for one in answered]
    bench.processor.batch_decode(tokens, skip_special_tokens=True)
    seconds, tower = time.perf_counter() - began, engine.seconds["tower"]
    more = measured(engine, answered)
    more["cross_kv_bytes_of_rows"] = sum(one.trim.cross_kv_bytes for one in answered)
    return Pass(seconds=seconds, preparing=0.0, tower=tower, generation=seconds - tower, tokens=tokens, measured=more)


class Passes:
    """Every contender's passes so far, as ``out["contenders"]`` has them."""

    def __init__(self, bench: Bench, out: Result) -> None:
        self.bench, self.out = bench, out
        self.passes: defaultdict[str, list[Pass]] = defaultdict(list)

    def add(self, name: str, done: Pass, images: int) -> None:
        """``images`` is how many one pass was about."""
        passes = self.passes[name]
        passes.append(done)
        seconds = [one.seconds for one in passes]
        self.out["contenders"][name] = {
            "passes": len(passes),
            "seconds": spread(seconds),
            "images_per_second": images / statistics.median(seconds),
            "tower_seconds": statistics.median(one.tower for one in passes),
            "generation_seconds": statistics.median(one.generation for one in passes),
            **{key: statistics.median(one.measured[key] for one in passes) for key in done.measured},
            "peak_bytes": self.bench.peak_bytes(),
        }
        self.bench.say(f"{name}: {done.seconds:.2f} s, {images / done.seconds:.2f} images/s")
        self.bench.save()
