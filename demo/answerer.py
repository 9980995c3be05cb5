"""Answer rows with the demo model in this process, without Ray: what ``demo.table`` and ``demo.picture`` measure and draw.

The texts are those that ``python -m jobs.answer`` would give: same prompts, same trimming, greedy decoding in fp32. Only the
vision tower's work is shared: its features depend on the image alone, so each image is encoded once for all questions and
policies.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, MllamaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from demo.shards import Row
from pipeline.images import Tiler
from pipeline.prompts import Prompter
from trimming import Policy, SampleTrim, trim

MAX_NEW_TOKENS = 40
"""A caption of six marked objects has 23 tokens."""


@dataclass(frozen=True, slots=True)
class Answered:
    row: Row
    text: str
    trim: SampleTrim

    @property
    def right(self) -> bool:
        return self.text == self.row.answer


class Answerer:
    """A loaded model, its processor, and the tower's features of the images seen so far (0.5 MB each)."""

    def __init__(self, folder: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.processor.tokenizer.padding_side = "left"
        self.model = MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.prompter, self.tiler = Prompter(self.processor), Tiler(self.processor)
        self.tower = _RememberingTower(self.model.model.vision_model)

    def prompt(self, question: str) -> str:
        return self.prompter.text(question, images=1)

    @torch.inference_mode()
    def answer(self, rows: list[Row], policy: Policy) -> list[Answered]:
        """One batch."""
        inputs = self.processor(
            # One list a sample: a flat list would give the first sample all the images.
            images=[[Image.open(io.BytesIO(row.image)).convert("RGB")] for row in rows],
            text=[self.prompt(row.question) for row in rows],
            add_special_tokens=False,  # the template has begun the text
            padding=True,
            return_tensors="pt",
        )
        self.tower.names = [row.path for row in rows]
        with trim(self.model, policy) as trimmed:
            trimmed.sample_ids = [row.id for row in rows]
            output = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        told = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [Answered(row, text.strip(), sample) for row, text, sample in zip(rows, told, trimmed.samples, strict=True)]


class _RememberingTower:
    """Stands before the vision tower's ``forward`` and computes only images it has not seen."""

    def __init__(self, vision: Any) -> None:
        self.compute, self.seen = vision.forward, {}  # type: Any, dict[str, Tensor]
        self.names: list[str] = []
        vision.forward = self

    def __call__(self, pixel_values: Tensor, aspect_ratio_ids: Tensor, aspect_ratio_mask: Tensor, **_: Any) -> BaseModelOutput:
        first = {name: row for row, name in reversed(list(enumerate(self.names))) if name not in self.seen}
        if first:
            pick = torch.tensor(list(first.values()))
            output = self.compute(pixel_values[pick], aspect_ratio_ids[pick], aspect_ratio_mask[pick])
            self.seen.update(zip(first, output.last_hidden_state, strict=True))
        return BaseModelOutput(last_hidden_state=torch.stack([self.seen[name] for name in self.names]))
