"""The peer: the recipe users have today, the Hugging Face processor and ``model.generate`` on static batches."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import MllamaForConditionalGeneration, MllamaProcessor

from benchmarks.timing import Pass, synchronise
from benchmarks.workloads import Workload


@dataclass(frozen=True, slots=True)
class Batch:
    """Answers of one static batch."""

    tokens: list[list[int]]
    texts: list[str]
    preparing: float
    """Seconds in the processor and the image decoder."""
    generating: float
    """Seconds in ``generate``."""


class Peer:
    """Static batches in the rows' order, padded on the left, greedy, with transformers' default cache."""

    def __init__(self, model: MllamaForConditionalGeneration, processor: MllamaProcessor) -> None:
        self.model, self.processor = model, processor

    def __call__(self, workload: Workload, batch_size: int) -> Pass:
        """One pass."""
        tokens: list[list[int]] = []
        preparing = generating = 0.0
        began = time.perf_counter()
        with self.timed_tower() as tower:
            for start in range(0, len(workload.rows), batch_size):
                rows = workload.rows[start : start + batch_size]
                files = [workload.images[row.image] for row in rows]
                batch = self.batch(files, [row.prompt for row in rows], [row.length for row in rows])
                tokens += batch.tokens
                preparing += batch.preparing
                generating += batch.generating
        seconds = time.perf_counter() - began
        return Pass(seconds=seconds, preparing=preparing, tower=sum(tower), generation=generating - sum(tower), tokens=tokens)

    @torch.inference_mode()
    def batch(self, files: Sequence[bytes], prompts: Sequence[str], lengths: Sequence[int]) -> Batch:
        """One batch. It goes on until its longest row is done, as it does where an end token ends the others: what comes after
        a row's own length is dropped.
        """
        began = time.perf_counter()
        inputs = self.inputs(files, prompts)
        prepared = time.perf_counter()
        tokens = self.answer(inputs, lengths)
        done = time.perf_counter()
        texts: list[str] = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return Batch(tokens, texts, prepared - began, done - prepared)

    def inputs(self, files: Sequence[bytes], prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """What ``generate`` takes, on the CPU."""
        processor: Any = self.processor
        start = processor.image_token + processor.tokenizer.bos_token
        made: Mapping[str, Tensor] = processor(
            # One list a row: a flat list would give the first row all the images.
            images=[[Image.open(io.BytesIO(file)).convert("RGB")] for file in files],
            text=[start + prompt for prompt in prompts],
            padding=True,
            return_tensors="pt",
            add_special_tokens=False,
        )
        return made

    @torch.inference_mode()
    def answer(self, inputs: Mapping[str, Tensor], lengths: Sequence[int]) -> list[list[int]]:
        """Tokens of one batch, each row's up to its length."""
        device, dtype = self.model.device, self.model.dtype
        moved = {name: part.to(device, dtype if part.is_floating_point() else None) for name, part in inputs.items()}
        out = self.model.generate(**moved, do_sample=False, max_new_tokens=max(lengths))
        said = out[:, inputs["input_ids"].shape[1] :].tolist()
        return [row[:length] for row, length in zip(said, lengths, strict=True)]

    @contextmanager
    def timed_tower(self) -> Iterator[list[float]]:
        """Seconds of each call of the tower and of the projector."""
        with _timed([self.model.model.vision_model, self.model.model.multi_modal_projector], self.model.device) as seconds:
            yield seconds


@contextmanager
def _timed(modules: Sequence[nn.Module], device: torch.device) -> Iterator[list[float]]:
    """Seconds of each forward of ``modules``, none of which runs inside another."""
    seconds: list[float] = []
    began = [0.0]

    def before(*_: Any) -> None:
        synchronise(device)
        began[0] = time.perf_counter()

    def after(*_: Any) -> None:
        synchronise(device)
        seconds.append(time.perf_counter() - began[0])

    hooks = [m.register_forward_pre_hook(before) for m in modules] + [m.register_forward_hook(after) for m in modules]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()
