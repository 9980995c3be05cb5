"""Captioning end to end on the device: the engine beside the peer, at the peer's best static batch, in turns.

Decoding and cutting images is the host's work, which threads do beside the device in a pipeline. Here it is done before the
clock starts on both sides: seconds are from the host's tiles or pixels to texts. Each round has images of its own, as a job
has: whatever a library or a cache prepares for one image's shapes helps the next round as little as it would help a job.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

from torch import Tensor

from benchmarks import workloads
from benchmarks.gpu.attention import AttentionShapes
from benchmarks.gpu.bench import Bench, Result
from benchmarks.gpu.passes import Passes, engine_pass, make_engine, prepare
from benchmarks.half import Half, find_half
from benchmarks.ours import Ours
from benchmarks.peer import Peer
from benchmarks.timing import Pass
from benchmarks.workloads import CAPTION_LENGTHS, CAPTION_PROMPT, Workload
from trimming import KeepAll, Policy
from trimming.engine import Engine, Request
from trimming.engine.scheduler import out_of_memory
from trimming.tower import Tower, TowerTiles

FULL, TRIMMED, REAL, PEER = "engine", "engine, trimmed", "engine, real tiles", "peer"
HALF_ROWS = 16
SWEEP_SECONDS = 15.0
"""That a trial of one batch size is taken to need."""
ROUND_SECONDS = 50.0
"""That the first round is taken to need, engines and graphs included."""
Way = tuple[str, Callable[[], Policy] | None, TowerTiles]
"""Of the engine: its name, the policy if it is not to keep all features, and the tiles that go through the tower."""
Inputs = list[Mapping[str, Tensor]]
"""The peer's, of each static batch."""


def measure_captioning(bench: Bench, out: Result) -> None:
    """Fills ``out``: the ``sweep`` of the peer's batch sizes, ``contenders``, ``attention`` calls, and the ``same`` tokens."""
    Captioning(bench, out).measure()


class Captioning:
    """One kind of workload and both sides."""

    def __init__(self, bench: Bench, out: Result) -> None:
        self.bench, self.out, amounts = bench, out, bench.amounts
        # Room for rows of the mean image and a half: it holds hardly a row back.
        longest = CAPTION_PROMPT + max(CAPTION_LENGTHS) + 32
        self.kv_bytes = amounts.captions * bench.costs.kv_bytes(longest, 3 * bench.costs.tokens)
        self.peer = Peer(bench.model, bench.processor)
        self.ours = Ours(bench.model, bench.processor, amounts.captions, self.kv_bytes)
        self.passes = Passes(bench, out)
        self.first = self.load(0)
        """Images of the sweep and of warm-ups, which no timed round has."""
        self.half: Half | None = None
        self.tokens: dict[str, list[list[int]]] = {}
        """Of the last round."""

    def load(self, number: int) -> Workload:
        """Round ``number``'s images and prompts."""
        return workloads.captioning(self.bench.amounts.captions, self.bench.amounts.seed + 1 + number, self.bench.size)

    def measure(self) -> None:
        bench, out, first = self.bench, self.out, self.first
        out |= {
            "images": len(first.images),
            "tiles": {str(tiles): first.tiles.count(tiles) for tiles in sorted(set(first.tiles))},
            "output_tokens": first.tokens,
            "prompt": CAPTION_PROMPT,
            "sweep": {},
            "contenders": {},
        }
        batch = out["peer_batch"] = self._sweep(first)
        longest = ROUND_SECONDS
        for number in range(bench.amounts.rounds):
            if not bench.has(longest if number else longest / 2):
                bench.say(f"captioning: no time for round {number + 1}")
                break
            began = time.monotonic()
            self._round(self.load(1 + number), batch, number)
            longest = time.monotonic() - began
            bench.save()

    def _round(self, load: Workload, batch: int | None, number: int) -> None:
        """A pass of each. The two that the goal is about come first: the section may be cut off."""
        began = time.perf_counter()
        requests = prepare(self.ours, load)
        self.out.setdefault("engine_preparing_seconds", time.perf_counter() - began)
        ways: list[Callable[[], None]] = [
            partial(self._engine, load, requests, [(FULL, None, "all")]),
            partial(self._peer, load, batch),
            partial(self._engine, load, requests, [(TRIMMED, self._half, "all"), (REAL, None, "real")]),
        ]
        # Every other round goes backwards: a drift of the machine's speed hits all alike.
        for way in ways[:: -1 if number % 2 else 1]:
            way()
        self._compare()

    def _half(self) -> Policy:
        """The policy that keeps half of such images' features, found once."""
        if self.half is None:
            self.half = find_half(self.ours, self.first.first(HALF_ROWS))
            self.out["k_ratio"] = self.half.k_ratio
        return self.half.policy

    # ---- the peer -----------------------------------------------------------------------------------------------------------

    def _sweep(self, load: Workload) -> int | None:
        """The batch size of the least seconds a row, over a part of the rows; None where none fits."""
        bench = self.bench
        warm = load.first(2).cut(4)
        self._peer_pass(warm, self._inputs(warm, 2))
        best: dict[int, float] = {}
        for size in bench.amounts.peer_batches:
            rows = min(len(load.rows), -(-bench.amounts.swept_rows // size) * size)
            if not bench.has(SWEEP_SECONDS):
                bench.say(f"captioning: peer, batches of {size}: no time")
                break
            bench.release()
            part = load.first(rows)
            done = self._attempt(part, self._inputs(part, size))
            swept: Result = {"error": "out of memory"}
            if done is not None:
                best[size] = done.seconds / rows
                swept = {"rows": rows, "seconds": done.seconds, "peak_bytes": bench.peak_bytes()}
            self.out["sweep"][str(size)] = swept
            bench.say(f"captioning: peer, batches of {size}: {f'{best[size]:.3f} s a row' if done else 'out of memory'}")
            bench.save()
        return min(best, key=lambda size: best[size]) if best else None

    def _peer(self, load: Workload, size: int | None) -> None:
        """A pass at the best batch size."""
        if size is None:
            return
        began = time.perf_counter()
        inputs = self._inputs(load, size)
        self.out.setdefault("peer_preparing_seconds", time.perf_counter() - began)
        self.bench.release()
        done = self._attempt(load, inputs)
        if done is None:
            self.out["contenders"][PEER] = {"error": "out of memory"}
            return
        self.tokens[PEER] = done.tokens
        self.passes.add(PEER, done, len(load.images))

    def _inputs(self, load: Workload, size: int) -> Inputs:
        batches = [load.rows[start : start + size] for start in range(0, len(load.rows), size)]
        files = [[load.images[row.image] for row in batch] for batch in batches]
        # Not by several threads: the tokenizer is changed by one while another uses it.
        return [self.peer.inputs(f, [row.prompt for row in batch]) for f, batch in zip(files, batches, strict=True)]

    def _attempt(self, load: Workload, inputs: Inputs) -> Pass | None:
        """None where memory ran out."""
        try:
            return self._peer_pass(load, inputs)
        except Exception as error:
            if not out_of_memory(error):
                raise
        self.bench.release()
        return None

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

    def _engine(self, load: Workload, requests: Sequence[Request], ways: Sequence[Way]) -> None:
        """A pass of each of the engine's ways. The engine goes afterwards: the peer gets all of the memory."""
        bench = self.bench
        policies = [KeepAll() if policy is None else policy() for _, policy, _ in ways]
        bench.release()
        engine = make_engine(bench, self.ours, KeepAll())
        self._warm(engine, policies[0])
        for (name, _, tiles), policy in zip(ways, policies, strict=True):
            engine.use(policy)
            engine.tower = Tower(bench.model, self.ours.normalise, tiles)
            done = engine_pass(bench, engine, requests)
            self.tokens[name] = done.tokens
            self.passes.add(name, done, len(load.images))

    def _warm(self, engine: Engine, policy: Policy) -> None:
        """A pass of other images, which warms libraries up. The first with a policy counts its attention calls and their
        shapes."""
        requests = prepare(self.ours, self.first.first(HALF_ROWS))
        counted = self.out.setdefault("attention", {"rows": len(requests)})
        name = "full" if policy == KeepAll() else "trimmed"
        engine.use(policy)
        with nullcontext() if f"{name}_calls" in counted else AttentionShapes() as shapes:
            engine_pass(self.bench, engine, requests)
        if shapes is not None:
            counted |= {f"{name}_calls": shapes.calls, f"{name}_shapes": len(shapes.shapes)}

    # ---- both ---------------------------------------------------------------------------------------------------------------

    def _compare(self) -> None:
        """The engine's tokens with all features beside the peer's: in bf16 two logits are often equal, and after the first
        other choice the rest differs too."""
        peer, ours = self.tokens.get(PEER), self.tokens.get(FULL)
        if not peer or not ours:
            return
        pairs = list(zip(peer, ours, strict=True))
        common = [next((i for i, (a, b) in enumerate(zip(p, o, strict=True)) if a != b), len(p)) for p, o in pairs]
        self.out["same"] = {
            "rows": sum(p == o for p, o in pairs) / len(pairs),
            "first_tokens": sum(p[0] == o[0] for p, o in pairs) / len(pairs),
            "tokens_before_a_difference": sum(common) / sum(len(p) for p in peer),
        }
