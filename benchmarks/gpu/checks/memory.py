"""The check that the engine survives running out of memory, and says what it says with enough of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.bench import Result
from benchmarks.gpu.checks.subject import Subject, demand
from demo import scenes
from trimming import TrimmedLlama
from trimming.engine import Engine, Request
from trimming.engine.scheduler import out_of_memory

POLICY = TrimmedLlama(0.25)
MOST_STEPS = 500
"""Engine steps after which the requests of a case count as never answered."""


@dataclass(frozen=True)
class Case:
    """When memory runs out, for one call of one stage."""

    stage: str
    cached: int = 0
    """Images that were asked about before and are held for later questions."""
    running: int = 0
    """Sequences that decode when the others arrive."""
    asked: int = 1
    """Requests that arrive together. The first call of the stage after their arrival runs out of memory."""
    image_cache_bytes: int = 1 << 30


CASES = {
    "tower, several images": Case("tower", asked=6),
    "tower, a lone image beside cached ones": Case("tower", cached=2),
    "tower, a lone image while others decode": Case("tower", running=3, image_cache_bytes=0),
    "prefill, several prompts": Case("prefill", asked=6),
    "prefill, a lone prompt": Case("prefill"),
    "prefill, a lone prompt while others decode": Case("prefill", running=3, image_cache_bytes=0),
    "decode, several rows": Case("decode", asked=6),
    "decode, a lone row": Case("decode"),
}


class Scarce:
    """A stage's call that really runs out of memory half-way the first time, and has enough of it from then on.

    Args:
        inner: the stage's call.
        module: in the middle of the stage. From its forward on there is nothing left to allocate until the call has failed.
        device: whose memory it is.
        before: called before the first call.
    """

    def __init__(
        self,
        inner: Callable[..., Any],
        module: nn.Module,
        device: torch.device,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        self.inner, self.module, self.device, self.before = inner, module, device, before
        self.refused = 0

    def __call__(self, *arguments: Any) -> Any:
        if self.refused:
            return self.inner(*arguments)
        self.before()
        with ExitStack() as stack:
            hook = self.module.register_forward_pre_hook(lambda *_: stack.enter_context(without_memory(self.device)))
            stack.callback(hook.remove)
            try:
                return self.inner(*arguments)
            except Exception as error:
                self.refused += out_of_memory(error)
                raise


@contextmanager
def without_memory(device: torch.device) -> Iterator[None]:
    """Leaves the device nothing to allocate. A CPU's allocator is asked for what no machine has, which fails at once.

    On CUDA this process may not take more of the device than it has, and a ballast fills what its allocator holds in reserve.
    """
    if device.type == "cpu":
        torch.empty(1 << 60, dtype=torch.uint8)
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved(device) / total, device)
    ballast: list[Tensor] = []
    try:
        for size in (1 << power for power in range(27, 8, -1)):
            _fill(ballast, size, device)
        yield
    finally:
        ballast.clear()
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _fill(ballast: list[Tensor], size: int, device: torch.device) -> None:
    """Takes blocks of ``size`` bytes until there are none."""
    try:
        while True:
            ballast.append(torch.empty(size, dtype=torch.uint8, device=device))
    except torch.OutOfMemoryError:
        return


def check_out_of_memory(subject: Subject) -> Result:
    """Every request is answered, with the tokens of an undisturbed run, when tower, prefill or decode run out of memory."""
    most = max(case.cached + case.running + case.asked for case in CASES.values())
    requests = _alike(subject, most)
    wanted = {r.id: c.tokens for r, c in zip(requests, subject.engine(POLICY).generate(requests), strict=True)}
    found = {name: _fault_of(subject, case, requests, wanted) for name, case in CASES.items()}
    faults = [f"{name}: {fault}" for name, fault in found.items() if fault]
    return demand(faults, {"cases": len(found), "survived": len(found) - len(faults)})


def _alike(subject: Subject, count: int) -> list[Request]:
    """Requests about different images of one tile each, which go through the tower together."""
    sizes = ((index, scenes.scene("test", index)) for index in itertools.count())
    fitting = (index for index, scene in sizes if subject.tiler.tile_count(scene.width, scene.height) == 1)
    return [question.request(12) for question in subject.questions(list(itertools.islice(fitting, count)), ["caption"])]


def _fault_of(subject: Subject, case: Case, requests: Sequence[Request], wanted: Mapping[str, list[int]]) -> str | None:
    """What is wrong with a case; None where it is survived."""
    engine = subject.engine(POLICY, image_cache_bytes=case.image_cache_bytes)
    engine.generate(requests[: case.cached])
    answered = requests[case.cached :][: case.running + case.asked]
    futures = [engine.submit(request) for request in answered[: case.running]]
    for _ in range(2):
        engine.step()
    call = _make_scarce(engine, case.stage, subject.device)
    futures += [engine.submit(request) for request in answered[case.running :]]
    try:
        for _ in range(MOST_STEPS):
            if all(future.done() for future in futures):
                break
            engine.step()
    except Exception as error:
        if not out_of_memory(error):
            raise
        return "it ended the engine"
    if not call.refused:
        return "memory never ran out, so that this checks nothing"
    failed = [future.exception() for future in futures if future.done() and future.exception()]
    if failed:
        return f"{len(failed)} of {len(futures)} requests failed with {type(failed[0]).__name__}"
    if not all(future.done() for future in futures):
        return f"not all requests are answered after {MOST_STEPS} steps"
    if [future.result().tokens for future in futures] != [wanted[request.id] for request in answered]:
        return "other tokens than in an undisturbed run"
    if engine.waiting or engine.decode.running or engine.memory.slots or engine.memory.segment_elements:
        return "keys and values are left allocated"
    if [c.tokens for c in engine.generate(answered)] != [wanted[request.id] for request in answered]:
        return "the same requests have other tokens afterwards"
    return None


def _make_scarce(engine: Engine, stage: str, device: torch.device) -> Scarce:
    model: Any = engine.model.model
    layers = model.vision_model.transformer.layers if stage == "tower" else model.language_model.layers
    middle = layers[len(layers) // 2].mlp
    if stage == "tower":
        engine.tower.encode = call = Scarce(engine.tower.encode, middle, device)  # type: ignore[method-assign, assignment]
    elif stage == "prefill":
        engine.prefill = call = Scarce(engine.prefill, middle, device)  # type: ignore[assignment]
    else:
        # A graph allocates when it is captured, not when it is replayed.
        call = Scarce(engine.decode.step, middle, device, before=engine.decode.release)
        engine.decode.step = call  # type: ignore[method-assign]
    return call
