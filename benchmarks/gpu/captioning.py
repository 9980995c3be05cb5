"""Captioning end to end on the device: the engine beside the peer, at the peer's best static batch.

Decoding and cutting images is the host's work, which threads do beside the device in a pipeline. Here one thread does it on
both sides before the clock starts, and is measured by itself: seconds are from the host's tiles or pixels to texts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from benchmarks import workloads
from benchmarks.gpu.bench import Bench, Result
from benchmarks.half import find_half
from benchmarks.ours import IMAGE_CACHE_BYTES, Ours, measured
from benchmarks.peer import Peer
from benchmarks.timing import Pass, spread
from benchmarks.workloads import CAPTION_LENGTHS, CAPTION_PROMPT, Workload
from trimming import KeepAll, Policy
from trimming.engine import Engine, Request
from trimming.engine.scheduler import out_of_memory
from trimming.engine.vision import TowerTiles

FULL, TRIMMED, REAL = "engine", "engine, trimmed", "engine, real tiles"
HALF_ROWS = 32
FIRST_SECONDS = 30.0
"""That a pass of unknown length is taken to need."""
Inputs = list[Mapping[str, Tensor]]
"""The peer's, of each static batch."""


def measure_captioning(bench: Bench, out: Result) -> None:
    """Fills ``out``: the sweep of the peer's batch sizes, then every contender."""
    Captioning(bench, out).measure()


class Captioning:
    """One workload and both sides."""

    def __init__(self, bench: Bench, out: Result) -> None:
        self.bench, self.out, amounts = bench, out, bench.amounts
        self.load = workloads.captioning(amounts.captions, amounts.seed, bench.size)
        # Room for rows of four tiles each, of which there are few: it never holds a row back.
        longest = CAPTION_PROMPT + max(CAPTION_LENGTHS) + 32
        self.kv_bytes = amounts.captions * bench.costs.kv_bytes(longest, 4 * bench.costs.tokens)
        self.peer = Peer(bench.model, bench.processor)
        self.ours = Ours(bench.model, bench.processor, amounts.captions, self.kv_bytes)
        self.tokens: dict[str, list[list[int]]] = {}
        """Of contenders that took the whole workload."""

    def measure(self) -> None:
        load, out = self.load, self.out
        out |= {
            "images": len(load.images),
            "tiles": {str(tiles): load.tiles.count(tiles) for tiles in sorted(set(load.tiles))},
            "output_tokens": load.tokens,
            "prompt": CAPTION_PROMPT,
            "sweep": {},
            "contenders": {},
        }
        self._sweep()
        began = time.perf_counter()
        requests = self.ours.requests(load, range(len(load.rows)), None)
        out["engine_preparing_seconds"] = time.perf_counter() - began
        self._engine(FULL, KeepAll(), "all", requests)
        self._peer()
        if self.bench.has(2 * FIRST_SECONDS):
            self.bench.release()
            half = find_half(self.ours, load.first(HALF_ROWS))
            out["k_ratio"] = half.k_ratio
            self._engine(TRIMMED, half.policy, "all", requests)
        self._engine(REAL, KeepAll(), "real", requests)
        self._compare()
        self.bench.save()

    # ---- the peer -----------------------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Seconds a row at each batch size that fits, over a part of the rows."""
        bench, load = self.bench, self.load
        warm = load.first(2).cut(4)
        self._peer_pass(warm, self._inputs(warm, 2))
        a_row = FIRST_SECONDS / bench.amounts.swept_rows
        for size in bench.amounts.peer_batches:
            rows = min(len(load.rows), -(-bench.amounts.swept_rows // size) * size)
            if not bench.has(a_row * rows):
                bench.say(f"captioning: peer, batches of {size}: no time")
                break
            bench.release()
            part = load.first(rows)
            done = self._attempt(partial(self._peer_pass, part, self._inputs(part, size)))
            swept: Result = {"error": "out of memory"}
            if done is not None:
                a_row = done.seconds / rows
                swept = {"rows": rows, "seconds": done.seconds, "peak_bytes": bench.peak_bytes()}
            self.out["sweep"][str(size)] = swept
            bench.say(f"captioning: peer, batches of {size}: {f'{a_row:.3f} s a row' if done else 'out of memory'}")
            bench.save()

    def _peer(self) -> None:
        """The best batch size over all rows."""
        swept = {size: one for size, one in self.out["sweep"].items() if "seconds" in one}
        if not swept:
            self.bench.say("captioning: no batch size of the peer's was measured")
            return
        best = int(min(swept, key=lambda size: swept[size]["seconds"] / swept[size]["rows"]))
        one = swept[str(best)]
        expected = one["seconds"] / one["rows"] * len(self.load.rows)
        self.out["peer"] = name = f"peer {best}"
        self.bench.release()
        began = time.perf_counter()
        inputs = self._inputs(self.load, best)
        self.out["peer_preparing_seconds"] = time.perf_counter() - began
        self._rounds(name, lambda _: self._peer_pass(self.load, inputs), expected)

    def _inputs(self, load: Workload, size: int) -> Inputs:
        batches = [load.rows[start : start + size] for start in range(0, len(load.rows), size)]
        files = [[load.images[row.image] for row in batch] for batch in batches]
        # Not by several threads: the tokenizer is changed by one while another uses it.
        return [self.peer.inputs(f, [row.prompt for row in batch]) for f, batch in zip(files, batches, strict=True)]

    def _peer_pass(self, load: Workload, batches: Inputs) -> Pass:
        tokens: list[list[int]] = []
        began = time.perf_counter()
        with self.peer.timed_tower() as tower:
            for inputs in batches:
                rows = load.rows[len(tokens) : len(tokens) + len(inputs["input_ids"])]
                said = self.peer.answer(inputs, [row.length for row in rows])
                self.bench.processor.batch_decode(said, skip_special_tokens=True)
                tokens += said
        seconds = time.perf_counter() - began
        return Pass(seconds=seconds, preparing=0.0, tower=sum(tower), generation=seconds - sum(tower), tokens=tokens)

    # ---- the engine ---------------------------------------------------------------------------------------------------------

    def _engine(self, name: str, policy: Policy, tower_tiles: TowerTiles, requests: Sequence[Request]) -> None:
        bench = self.bench
        if not bench.has(FIRST_SECONDS):
            bench.say(f"captioning: {name}: no time")
            return
        bench.release()
        engine = self.ours.engine(policy, IMAGE_CACHE_BYTES, tower_tiles)
        # A graph is captured when a batch size first comes, once in an engine's life.
        warm = self._attempt(partial(self._engine_pass, engine, requests, "warm"))
        if warm is None:
            self.out["contenders"][name] = {"error": "out of memory"}
            return
        self._rounds(name, lambda number: self._engine_pass(engine, requests, str(number)), warm.seconds)

    def _engine_pass(self, engine: Engine, requests: Sequence[Request], number: str) -> Pass:
        # Other keys than before: no image has been encoded yet.
        fresh = [
            replace(request, images=[replace(image, key=f"{number}/{image.key}") for image in request.images])
            for request in requests
        ]
        engine.reset_statistics()
        began = time.perf_counter()
        answered = engine.generate(fresh)
        tokens = [one.tokens for one in answered]
        self.bench.processor.batch_decode(tokens, skip_special_tokens=True)
        seconds, tower = time.perf_counter() - began, engine.seconds["tower"]
        more = measured(engine, answered)
        return Pass(seconds=seconds, preparing=0.0, tower=tower, generation=seconds - tower, tokens=tokens, measured=more)

    # ---- all of them --------------------------------------------------------------------------------------------------------

    def _attempt(self, run: Callable[[], Pass]) -> Pass | None:
        """None where memory ran out."""
        try:
            return run()
        except Exception as error:
            if not out_of_memory(error):
                raise
        self.bench.release()
        return None

    def _rounds(self, name: str, run: Callable[[int], Pass], expected: float) -> None:
        """Timed passes, as many as there is time for."""
        bench, passes = self.bench, []
        for number in range(bench.amounts.rounds):
            if not bench.has(expected):
                bench.say(f"captioning: {name}: no time for pass {number + 1}")
                break
            done = self._attempt(partial(run, number))
            if done is None:
                self.out["contenders"][name] = {"error": "out of memory"}
                break
            passes.append(done)
            bench.say(f"captioning: {name}: {done.seconds:.2f} s")
            self.tokens[name] = done.tokens
            self.out["contenders"][name] = self._contender(passes)
            bench.save()

    def _contender(self, passes: Sequence[Pass]) -> Result:
        seconds = [one.seconds for one in passes]
        return {
            "passes": len(passes),
            "seconds": spread(seconds),
            "images_per_second": len(self.load.images) / statistics.median(seconds),
            "tower_seconds": statistics.median(one.tower for one in passes),
            "generation_seconds": statistics.median(one.generation for one in passes),
            **{name: statistics.median(one.measured[name] for one in passes) for name in passes[0].measured},
            "peak_bytes": self.bench.peak_bytes(),
        }

    def _compare(self) -> None:
        """The engine's tokens with all features beside the peer's: in bf16 two logits are often equal, and after the first
        other choice the rest differs too."""
        peer, ours = self.tokens.get(self.out.get("peer", "")), self.tokens.get(FULL)
        if not peer or not ours:
            return
        pairs = list(zip(peer, ours, strict=True))
        common = [next((i for i, (a, b) in enumerate(zip(p, o, strict=True)) if a != b), len(p)) for p, o in pairs]
        self.out["same"] = {
            "rows": sum(p == o for p, o in pairs) / len(pairs),
            "first_tokens": sum(p[0] == o[0] for p, o in pairs) / len(pairs),
            "tokens_before_a_difference": sum(common) / sum(len(p) for p in peer),
        }
