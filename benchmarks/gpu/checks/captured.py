"""The check that a captured decode step computes what the same step computes uncaptured."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers.models.mllama.image_processing_pil_mllama import get_all_supported_aspect_ratios

from benchmarks.gpu.bench import Result
from benchmarks.gpu.checks.subject import DType, Subject, demand, make_engine, record
from benchmarks.model import TINY, build_model, build_processor
from trimming import Clusters, KeepAll, Policy, SnapKV, ThinK, TrimmedLlama
from trimming.engine import Completion, Engine, Image, Request, scheduler
from trimming.engine.decode import Decode

SMALL = replace(
    TINY,
    text={
        **TINY.text,
        "num_hidden_layers": 4,
        "cross_attention_layers": [1, 3],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
)
"""The model for Triton's interpreter, which takes ten milliseconds for each program of a kernel."""
BF16_TOLERANCE = 1e-2
"""The same kernels should give the same bits, which ``equal_steps`` counts; bf16 numbers are up to 0.8 % apart."""
LEAST_TOKENS = 0.99
"""Share of the rows whose best token must be the same. It is another one where two logits tie."""

Arrival = tuple[int, Request]
"""The engine step at which a request arrives, and the request."""


@dataclass(frozen=True)
class Decoder:
    """A way to decode."""

    make: Callable[..., Decode] | None
    """From what ``scheduler._decode_for`` is given: model, memory, rotary tables, most rows. None for the engine's choice."""
    tolerance: float
    """Greatest difference of a step's logits from the first decoder's, over the greatest logit."""

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """Engines that are made inside decode this way."""
        before = scheduler._decode_for
        if self.make is not None:
            scheduler._decode_for = self.make
        try:
            yield
        finally:
            scheduler._decode_for = before


def uncaptured(model: Any, memory: Any, rotary: Any, rows: int, *_: Any) -> Decode:
    """The step that CUDA graphs capture, kernel by kernel."""
    # It imports triton.
    from trimming.engine.cuda import GraphDecode

    return GraphDecode(model, memory, rotary, rows, capture=False)


def plain(model: Any, memory: Any, rotary: Any, *_: Any) -> Decode:
    """The step with torch's own attention."""
    return Decode(model, memory, rotary)


def decoders(device: torch.device, dtype: DType) -> dict[str, Decoder]:
    """The decoder under test comes first."""
    if device.type == "cpu":
        return {"uncaptured": Decoder(uncaptured, 0.0), "plain": Decoder(plain, 1e-5)}
    ways = {"captured": Decoder(None, 0.0), "uncaptured": Decoder(uncaptured, 1e-5), "plain": Decoder(plain, 3e-5)}
    if dtype == "bfloat16":
        # Other kernels round otherwise.
        ways = {"captured": Decoder(None, 0.0), "uncaptured": Decoder(uncaptured, BF16_TOLERANCE)}
    return ways


def why_no_kernels(device: torch.device) -> str | None:
    """Why the decode kernels do not run here; None where they do."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        return None
    from triton.runtime.interpreter import InterpretedFunction

    from trimming.engine import triton_attention

    if not isinstance(triton_attention._attend_to_share, InterpretedFunction):
        return "triton was imported without TRITON_INTERPRET=1"
    if _release("triton") < (3, 7) and _release("numpy") >= (2, 4):
        return f"the interpreter of triton {version('triton')} fails with NumPy {version('numpy')}"
    return None


def _release(package: str) -> tuple[int, ...]:
    return tuple(map(int, version(package).split(".")[:2]))


def check_captured(subject: Subject) -> Result:
    """A captured decode step computes what it computes uncaptured, over batches that grow, shrink and are refilled."""
    if why := why_no_kernels(subject.device):
        return {"skipped": why}
    figures: Result = {"policies": {}}
    faults = []
    shared: tuple[Policy, ...] = (KeepAll(), TrimmedLlama(0.25), Clusters(0.3))
    policies = (*shared, SnapKV(0.4), ThinK(0.5, SnapKV(0.4)), ThinK(0.5))
    for policy in policies[:5] if subject.device.type == "cpu" else policies:
        part, wrong = _replayed(subject, policy, "float32")
        figures["policies"][repr(policy)] = part
        faults += [f"{policy!r}: {fault}" for fault in wrong]
    if subject.device.type == "cuda":
        # The interpreter multiplies bf16 as bit patterns.
        for policy in shared[1:]:
            part, wrong = _replayed(subject, policy, "bfloat16")
            figures["policies"][f"{policy!r}, bf16"] = part
            faults += [f"{policy!r}, bf16: {fault}" for fault in wrong]
    return demand(faults, figures)


def _replayed(subject: Subject, policy: Policy, dtype: DType) -> tuple[Result, list[str]]:
    """Figures and faults of one policy."""
    found: dict[str, list[Tensor]] = {}
    figures: Result = {}
    faults = []
    ways = decoders(subject.device, dtype)
    for name, way in ways.items():
        with way.chosen():
            engine = _engine(subject, policy, dtype)
        found[name] = _play(engine, _arrivals(engine, subject.device))
        if name == "captured":
            figures["captured"] = sorted(engine.decode.replays)  # type: ignore[attr-defined]
            if engine.decode.uncaptured or not engine.decode.replays:  # type: ignore[attr-defined]
                faults.append(f"batches of {sorted(engine.decode.uncaptured)} rows were not captured")  # type: ignore[attr-defined]
    tested, *others = found
    figures |= {"steps": len(found[tested]), "rows": "".join(str(len(step)) for step in found[tested])}
    for name in others:
        figures[name], wrong = _apart(found[tested], found[name], ways[name].tolerance)
        faults += [f"{tested} against {name}: {fault}" for fault in wrong]
    return figures, faults


def _apart(steps: list[Tensor], wanted: list[Tensor], tolerance: float) -> tuple[Result, list[str]]:
    """Figures and faults of one decoder's steps against another's."""
    if [step.shape for step in steps] != [step.shape for step in wanted]:
        return {}, ["other batches decode"]
    scale = max(step.abs().max().item() for step in wanted)
    # NaN is over any tolerance.
    apart = [(a - b).abs().max().nan_to_num(torch.inf).item() / scale for a, b in zip(steps, wanted, strict=True)]
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(steps, wanted, strict=True)]).float().mean().item()
    figures = {"difference": max(apart), "equal_steps": sum(each == 0 for each in apart), "tokens_equal": same}
    faults = []
    wrong = [number for number, each in enumerate(apart) if not each <= tolerance]
    if wrong:
        first = f"step {wrong[0]}, of {len(steps[wrong[0]])} rows, is {apart[wrong[0]]:.1e} away, over {tolerance:g}"
        faults.append(f"{first}; {len(wrong)} of {len(steps)} steps are")
    if same < LEAST_TOKENS:
        faults.append(f"{1 - same:.1%} of the rows have another best token")
    return figures, faults


def _engine(subject: Subject, policy: Policy, dtype: DType) -> Engine:
    """An engine with few slots. For the interpreter it has a small model, whose weights are random."""
    if subject.device.type == "cuda":
        return subject.engine(policy, dtype, max_sequences=5)
    processor = build_processor(SMALL)
    model = build_model(SMALL, processor, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # Fresh weights are so small that nothing has much effect.
                parameter.mul_(4)
    return make_engine(model, policy, processor, max_sequences=3)


def _arrivals(engine: Engine, device: torch.device) -> list[Arrival]:
    """Requests of random lengths and images. They come in waves, more of them than there are slots, while others run."""
    draw, generator = random.Random(11), torch.Generator().manual_seed(0)
    requests, longest = (6, 6) if device.type == "cpu" else (20, 12)
    side, words = engine.model.config.vision_config.image_size, range(5, engine.image_token)
    grids = get_all_supported_aspect_ratios(engine.tower.max_tiles)
    ratio_ids = {rows * columns: number for number, (rows, columns) in enumerate(grids, 1)}
    pictures = []
    for number, tiles in enumerate((1, 2, 3, 4, 4)):
        pixels = torch.randint(0, 256, (tiles, 3, side, side), dtype=torch.uint8, generator=generator)
        pictures.append(Image(f"noise {number}", pixels, ratio_ids[tiles]))
    arrivals, step = [], 0
    for number in range(requests):
        # One of four prompts has no image, one of six has two; some share an image.
        images = [] if number % 4 == 2 else draw.sample(pictures, 2 if number % 6 == 3 else 1)
        tokens = draw.choices(words, k=2)
        for _ in images:
            tokens += [engine.image_token, *draw.choices(words, k=draw.randint(1, 2 * longest))]
        # One answer of seven needs longer slots, which moves everybody's keys and values.
        new_tokens = longest + 16 if number % 7 == 6 and device.type == "cuda" else draw.randint(2, longest)
        arrivals.append((step, Request(id=str(number), tokens=tokens, images=images, max_new_tokens=new_tokens)))
        step += (0, 0, 2, 0, 9)[number % 5]
    return arrivals


def _play(engine: Engine, arrivals: Sequence[Arrival]) -> list[Tensor]:
    """The logits (B, V) of every decode step. Answers are random tokens, so that no tie makes them others."""
    draw, words = random.Random(1), range(5, engine.image_token)
    record(engine, {request.id: draw.choices(words, k=request.max_new_tokens) for _, request in arrivals})
    logits: list[Tensor] = []
    inner = engine.decode.step

    def step() -> Tensor:
        # The next step overwrites them.
        logits.append(inner().float().clone())
        return logits[-1]

    engine.decode.step = step  # type: ignore[method-assign]
    futures: list[Future[Completion]] = []
    coming, now = list(arrivals), 0
    while coming or not all(future.done() for future in futures):
        while coming and coming[0][0] <= now:
            futures.append(engine.submit(coming.pop(0)[1]))
        engine.step()
        now += 1
    for future in futures:
        future.result()
    return logits
