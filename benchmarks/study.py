"""What is measured, in which order: half of the features, the peer's batch sizes, what trimming changes, what merging takes,
then all in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

from benchmarks import workloads
from benchmarks.amounts import TOWER_KEEP, Amounts
from benchmarks.half import Half, find_half
from benchmarks.language import measure_growth, measure_selection, measure_shares
from benchmarks.merging import TO_A_TENTH, measure_clustering
from benchmarks.model import BENCH, TINY, build_model, build_processor
from benchmarks.ours import Ours
from benchmarks.peer import Peer
from benchmarks.timing import Pass, Passes, take_turns
from benchmarks.workloads import Workload
from trimming import Clusters, Grid
from trimming.costs import Geometry
from trimming.engine.onednn import through_onednn
from trimming.tower import Alike

BATCH_SIZES = (1, 4, 8, 16, 32, 64, 128)
SWEPT_ROWS = 20
"""The sweep takes each batch size over the fewest whole batches that have so many rows: a part like the whole."""
SLOW = 1.25
"""The sweep ends at a batch size that takes so many times as long as the best one."""
LINEAR, STATIC, REUSE, CONTINUOUS, TRIMMED, MERGED = "linear", "static", "reuse", "continuous", "trimmed", "merged"
BY_QUESTION, LEAST, REAL = "by question", "least", "real"
POOLED, TOWER, WHOLE = "pooled", "tower", "whole"
LESS_TOWER, BEHIND = Alike(TOWER_KEEP), Clusters(keep=0.5)
"""In the tower, and behind it."""
ONCE = (LINEAR, STATIC, REUSE, BY_QUESTION, LEAST, REAL)
"""Contenders that no ratio with a goal is made of: one pass is enough to see where the time goes."""
ONE_FEATURE = Grid(keep=1e-6)
"""Of each image: what no trimming can go below."""
FULL, HALF = "full", "half"


class Study:
    """One run of the benchmark; its attributes hold what was measured.

    Args:
        amounts: how much.
        say: takes a line of progress.
    """

    def __init__(self, amounts: Amounts, say: Callable[[str], object]) -> None:
        self.began = time.monotonic()
        self.amounts, self.say = amounts, say
        self.size = size = TINY if amounts.tiny else BENCH
        seed = amounts.seed
        self.captioning = workloads.captioning(amounts.captions, seed, size)
        self.questions = workloads.questions(amounts.questions, seed, size)
        self.four_tiles = workloads.four_tiles(amounts.four_tiles, seed, size)
        self.processor = build_processor(size)
        self.model = build_model(size, self.processor, seed)
        one = self._cache_bytes()
        # Half a row more: the engine keeps a margin, for lack of which all features would run one row fewer.
        self.kv_budget = one * amounts.budget_sequences + one // 2
        self.peer = Peer(self.model, self.processor)
        # Twice what it takes: sequences of many lengths leave gaps, and a static batch may be larger.
        self.ours = Ours(self.model, self.processor, amounts.max_sequences, 2 * one * amounts.max_sequences)
        self.narrow = Ours(self.model, self.processor, amounts.max_sequences, self.kv_budget)

        self.halves: dict[str, Half] = {}
        """By workload, one kept set an image; ``questions, by question`` beside them."""
        self.sweeps: dict[str, dict[int, Pass]] = {}
        """By workload, then by the peer's batch size: a pass over a part of the rows."""
        self.growth: dict[int, Passes] = {}
        """Prefill and decoding, by questions an image, then by who decides."""
        self.shares: Passes = {}
        """Prefill and decoding, by kept share."""
        self.selection: dict[str, Passes] = {}
        """Prefills, by workload, then by policy."""
        self.clustering: list[float] = []
        """Merging's seconds over the tower's, a turn each."""
        self.passes: dict[str, Passes] = {}
        """By workload, then by contender."""

    @property
    def loads(self) -> dict[str, Workload]:
        return {"captioning": self.captioning, "questions": self.questions, "four tiles": self.four_tiles}

    def measure(self, spare: Callable[[], float]) -> None:
        """All of it. ``spare`` tells how many seconds are needed after the last round."""
        self.say("warming up")
        first = self.captioning.first(4)
        self.peer(first, 4)
        self.ours(first)
        for name, load in self.loads.items():
            self.halves[name] = find_half(self.ours, load.first(2 * SWEPT_ROWS))
        part = self.questions.first(2 * SWEPT_ROWS)
        self.halves[f"questions, {BY_QUESTION}"] = find_half(self.ours, part, "question")
        for name, half in self.halves.items():
            self.say(f"{name}: K = {half.k_ratio} keeps {half.keep_fraction:.3f} of the features")
        for name in ("captioning", "questions"):
            self.sweeps[name] = self._sweep(name)
        self.growth = measure_growth(self.ours, self.size, self.amounts, self.say)
        self.shares = measure_shares(self.ours, self.four_tiles, self.amounts, self.say)
        for name in ("captioning", "questions"):
            policy = self.halves[name].policy
            self.selection[name] = measure_selection(self.ours, self.loads[name], policy, self.amounts, self.say)
        part = self.captioning.first(2 * SWEPT_ROWS)
        self.say(f"merging: {self.amounts.clusterings} times {len(part.images)} images")
        self.clustering = measure_clustering(self.ours, part, self.amounts.clusterings)
        self.passes = self._take_turns(spare)

    def batch_sizes(self, name: str) -> list[int]:
        """The fastest from end to end, and the one that was fastest at generating."""
        swept = self.sweeps[name]
        fastest = min(swept, key=lambda size: swept[size].seconds / len(swept[size].tokens))
        generating = min(swept, key=lambda size: swept[size].generation / len(swept[size].tokens))
        return list(dict.fromkeys([fastest, generating]))

    def best_peer(self, name: str, seconds: Callable[[Pass], float]) -> str:
        """The contender's name of the peer's batch size with the least median of ``seconds``."""
        passes = self.passes[name]
        return min(map(peer_name, self.batch_sizes(name)), key=lambda peer: statistics.median(map(seconds, passes[peer])))

    def _sweep(self, name: str) -> dict[int, Pass]:
        """Up to the first batch size that takes all rows at once, or far longer than the best."""
        load, swept = self.loads[name], {}
        best = float("inf")
        for batch_size in BATCH_SIZES:
            rows = min(len(load.rows), -(-SWEPT_ROWS // batch_size) * batch_size)
            swept[batch_size] = done = self.peer(load.first(rows), batch_size)
            seconds = done.seconds / rows
            self.say(f"{name}: peer, batches of {batch_size}: {seconds:.3f} s a row")
            best = min(best, seconds)
            if batch_size >= len(load.rows) or seconds > SLOW * best:
                break
        return swept

    def _take_turns(self, spare: Callable[[], float]) -> dict[str, Passes]:
        runs = {"captioning": self._ladder("captioning"), "questions": self._ladder("questions")}
        decoding = partial(self.narrow, self.four_tiles)
        half = self.halves["four tiles"].policy
        runs["four tiles"] = {FULL: decoding, HALF: partial(decoding, half), MERGED: partial(decoding, TO_A_TENTH)}
        flat = {f"{name}: {each}": _checked(run, self.loads[name]) for name in runs for each, run in runs[name].items()}

        def more(seconds: float) -> bool:
            return time.monotonic() - self.began + seconds + spare() < self.amounts.minutes * 60

        once = [f"{name}: {each}" for name in runs for each in runs[name] if each in ONCE]
        taken = take_turns(flat, self.amounts.rounds, self.say, more, once)
        return {name: {each: taken[f"{name}: {each}"] for each in runs[name]} for name in runs}

    def _ladder(self, name: str) -> dict[str, Callable[[], Pass]]:
        """The peer at its best batch sizes and the engine, one feature after the other; beside them what is no rung."""
        load, half, sizes = self.loads[name], self.halves[name], self.batch_sizes(name)
        runs: dict[str, Callable[[], Pass]] = {peer_name(size): partial(self.peer, load, size) for size in sizes}
        runs[LINEAR] = partial(Peer(through_onednn(self.model), self.processor), load, sizes[0])
        runs[STATIC] = partial(self.ours, load, batch_size=sizes[0], reuse=False)
        several = len(load.images) < len(load.rows)
        if several:
            runs[REUSE] = partial(self.ours, load, batch_size=sizes[0])
        runs[CONTINUOUS] = partial(self.ours, load)
        runs[TRIMMED] = partial(self.ours, load, half.policy)
        runs[MERGED] = partial(self.ours, load, TO_A_TENTH)
        if several:
            policy = self.halves[f"{name}, {BY_QUESTION}"].policy
            runs[BY_QUESTION] = partial(self.ours, load, policy, kept_sets="question")
        runs[LEAST] = partial(self.ours, load, ONE_FEATURE)
        runs[REAL] = partial(self.ours, load, tower_tiles="real")
        runs[POOLED] = partial(self.ours, load, tower_tiles="pooled")
        runs[TOWER] = partial(self.ours, load, tower_tiles="pooled", tower_policy=LESS_TOWER)
        runs[WHOLE] = partial(self.ours, load, BEHIND, tower_tiles="pooled", tower_policy=LESS_TOWER)
        return runs

    def _cache_bytes(self) -> int:
        """Of the longest row of all workloads, with four tiles and nothing trimmed."""
        geometry, itemsize = Geometry.of(self.model.config), self.model.dtype.itemsize
        features = 4 * self.model.model.vision_model.num_patches
        longest = max(len(row.prompt.split()) + 2 + row.length for load in self.loads.values() for row in load.rows)
        return geometry.cross_kv_bytes(itemsize) * features + geometry.self_kv_bytes(itemsize) * longest


def peer_name(batch_size: int) -> str:
    """The contender's."""
    return f"peer {batch_size}"


def _checked(run: Callable[[], Pass], load: Workload) -> Callable[[], Pass]:
    """``run``, refused where it did not answer every row at its full length."""
    lengths = [row.length for row in load.rows]

    def checked() -> Pass:
        done = run()
        if [len(tokens) for tokens in done.tokens] != lengths:
            raise RuntimeError(f"{run} did not answer every row at its length")
        return done

    return checked
