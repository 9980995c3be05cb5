"""One decode step by batch size, with all features, half and a quarter of them, beside the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.gpu.bench import Bench, Result
from benchmarks.gpu.profile import longest_kernels
from benchmarks.gpu.roofline import each_seconds, measured, queued_seconds
from benchmarks.gpu.tower import PROFILE_SECONDS, random_images
from benchmarks.half import HALF
from benchmarks.ours import Ours
from pipeline.images import Normaliser
from trimming import Grid, KeepAll, Policy
from trimming.costs import Look
from trimming.engine import Request
from trimming.engine.images import ImageCache
from trimming.engine.layers import computing_on
from trimming.engine.memory import GRAIN, Memory, spare_bytes
from trimming.engine.scheduler import SLOT_GRAIN, activation_bytes, out_of_memory
from trimming.engine.sequence import Encoded, ceil_to
from trimming.tower import Tower

TILES = 4
ENCODED = 4
"""Images that go through the tower; sequences take theirs from them in turn."""
WARM_STEPS = 3
BATCH_SECONDS = 6.0
"""That a batch size is taken to need, most of it for prefills and for capturing a graph."""
POLICIES: dict[str, Policy] = {"full": KeepAll(), "half": Grid(keep=HALF), "quarter": Grid(keep=0.25)}
"""A step does not see which features stay, only how many: an even grid keeps exactly such a share."""


@torch.inference_mode()
def measure_decode(bench: Bench, out: Result) -> None:
    """Fills ``out["policies"]`` by policy, then by batch size, and ``out["profile"]`` of the last one's largest step. A batch
    that there is no time for is left out."""
    with computing_on(bench.device):
        encoded = _encode(bench)
        out |= {"prompt": bench.amounts.prompt, "said": bench.amounts.said, "tiles": TILES, "policies": {}}
        for name, policy in POLICIES.items():
            bench.release()
            crowd = Crowd(bench, policy, encoded)
            batches: Result = {}
            part: Result = {"kv_room_bytes": crowd.kv_bytes, "largest": crowd.largest, "kept": crowd.kept, "batches": batches}
            part["slot_tokens"] = crowd.capacity
            out["policies"][name] = part
            for batch in sorted({min(size, crowd.largest) for size in bench.amounts.batches}):
                if not bench.has(BATCH_SECONDS):
                    bench.say(f"decode: {name}, batch {batch}: no time")
                    break
                failed = _measure(bench, crowd, batch, batches)
                bench.save()
                if failed:
                    bench.say(f"decode: {name}, batch {batch}: out of memory")
                    break
                bench.say(f"decode: {name}, batch {batch}: {batches[str(batch)]['seconds'] * 1e3:.2f} ms")
            part["peak_bytes"] = bench.peak_bytes()
            bench.save()
            # Behind all that is timed: a profiler that meets graphs captured before it started is the greatest risk here.
            if name == list(POLICIES)[-1] and batches and bench.has(PROFILE_SECONDS):
                crowd.rewind()
                out["profile"] = longest_kernels(bench.device, crowd.engine.decode.step)
            # Its memory is the next one's.
            del crowd


def _measure(bench: Bench, crowd: Crowd, batch: int, out: Result) -> bool:
    """Whether memory ran out."""
    try:
        out[str(batch)] = crowd.measure(batch)
    except Exception as error:
        if not out_of_memory(error):
            raise
        out[str(batch)] = {"error": "out of memory"}
        return True
    return False


def _encode(bench: Bench) -> list[Encoded]:
    tower = Tower(bench.model, Normaliser(bench.processor, bench.device, bench.model.dtype))
    features = tower.encode(random_images(bench, TILES, ENCODED)).features
    return [Encoded(TILES, each.clone()) for each in features]


class Crowd:
    """An engine whose sequences all stand where a captioning job's do half-way: each with a prompt, some tokens said, and an
    image of four tiles of its own.

    Their prompts are as long as prompt and said tokens together, which leaves the same cache. Images have keys of their own, so
    that no two sequences share keys and values, but few features between them.
    """

    def __init__(self, bench: Bench, policy: Policy, encoded: Sequence[Encoded]) -> None:
        self.bench, self.encoded, amounts = bench, encoded, bench.amounts
        self.context = amounts.prompt + amounts.said
        # More than any sequence says before it is rewound: none may end.
        self.more = 2 + WARM_STEPS + amounts.steps
        self.capacity = ceil_to(self.context + self.more, SLOT_GRAIN)
        visual = TILES * bench.costs.tokens
        self.kept: int = round(visual * policy.keep) if isinstance(policy, Grid) else visual
        aside = activation_bytes(bench.model, policy, max(amounts.batches))
        self.kv_bytes = amounts.kv_bytes or spare_bytes(bench.device, aside)
        # A memory without room knows the sizes.
        rule = Memory(bench.costs.geometry, 0, bench.model.dtype, bench.device)
        layers, width = bench.costs.geometry.cross_layers, bench.costs.geometry.head_dim
        one = rule.slot_elements_for(self.capacity)
        one += rule.segment_elements_for([self.kept] * layers, [width] * layers, [width] * layers)
        self.largest = self.kv_bytes // rule.itemsize // GRAIN * GRAIN // one
        # The cache counts an image's features once for each key.
        images = ImageCache(1 << 50)
        self.engine = Ours(bench.model, bench.processor, self.largest, self.kv_bytes).engine(policy, images)
        self.submitted = 0
        self.picture = random_images(bench, TILES, 1)[0]

    def measure(self, batch: int) -> Result:
        """The step of ``batch`` sequences, and the first one, which compiles kernels and captures a graph."""
        bench, engine, steps = self.bench, self.engine, self.bench.amounts.steps
        self._fill(batch)
        free = _free_bytes(bench.device)
        (first,) = each_seconds(bench.device, engine.step, 1)
        captured = _free_bytes(bench.device)
        for _ in range(WARM_STEPS - 1):
            engine.step()
        self.rewind()
        # Has the rows' places uploaded before the clock starts, here and below.
        engine.step()
        seconds = each_seconds(bench.device, engine.step, steps)
        self.rewind()
        engine.decode.step()
        queued = queued_seconds(bench.device, engine.decode.step, steps)
        self.rewind()
        if len(engine.decode.running) != batch:
            # The engine itself sends sequences back when memory runs out.
            raise torch.OutOfMemoryError(f"{batch} sequences do not decode side by side")
        cost = bench.costs.decode([self.context + 1 + steps // 2] * batch, [Look(1, self.kept, self.kept)] * batch)
        found = measured([cost], seconds, bench.rates)
        return found | {
            "first_seconds": first,
            "graph_bytes": free - captured,
            "queued_seconds": queued,
            "queued_roofline_share": found["roofline_seconds"] / queued,
            "tokens_per_second": batch / found["seconds"],
            "kv_bytes": batch * bench.costs.kv_bytes(self.context, self.kept),
            "bound": bench.rates.bound(cost),
        }

    def _fill(self, batch: int) -> None:
        """Prefills until so many run. Not by ``Engine.step``, which decodes between prefills and admits by estimates."""
        engine, running = self.engine, self.engine.decode.running
        for _ in range(batch - len(running)):
            engine.submit(self._request())
        while len(running) < batch:
            if not engine.waiting or not engine._start(list(engine.waiting)[: engine.prefill_sequences.now]):
                raise RuntimeError(f"{len(running)} sequences run, and no more: {batch} were to fit")
        kept = {s.trim.kept_visual_tokens for s in running if s.trim}
        if kept != {self.kept}:
            raise RuntimeError(f"sequences keep {kept} visual tokens instead of {self.kept}")

    def _request(self) -> Request:
        """One with an image of its own, which counts as encoded."""
        key = f"sequence {self.submitted}"
        self.engine.images.put(key, self.encoded[self.submitted % len(self.encoded)])
        self.submitted += 1
        word = len(self.bench.processor.tokenizer) // 2
        tokens = [self.bench.model.config.image_token_index, *[word] * (self.context - 1)]
        # Nothing looks at its pixels but for their shape.
        image = replace(self.picture, key=key)
        return Request(id=key, tokens=tokens, images=[image], max_new_tokens=self.more)

    def rewind(self) -> None:
        """Back to where the prefills ended: what was written behind is written again."""
        decode = self.engine.decode
        decode.positions = [self.context] * len(decode.running)
        decode.changed = True
        for sequence in decode.running:
            del sequence.said[1:]


def _free_bytes(device: torch.device) -> int:
    """Of the device, what torch's allocator holds without using it counted as free; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    # A capture empties it too: what prefills have left there would look like memory that the graph gave back.
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])
