"""What the checks share: the demo model with its questions and engines, and how a check says what is wrong."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import MllamaForConditionalGeneration, MllamaProcessor

from benchmarks.gpu.bench import Bench, Result
from demo import MODEL, scenes
from pipeline.images import Normaliser, Tiler
from pipeline.model import find_checkpoint, load_model, load_processor
from pipeline.prompts import Prompter
from trimming import Policy
from trimming.engine import Completion, Engine, Image, Request
from trimming.engine.sequence import Sequence_

CPU = torch.device("cpu")
KV_BYTES = 1 << 26
"""Room for all rows of a check: an image of four tiles takes half a megabyte in fp32."""
LONGEST = 40
"""Tokens of an answer at most; a caption of six objects has 23."""

DType = Literal["float32", "bfloat16"]


class WrongError(AssertionError):
    """What a check found wrong, in one line, with its figures."""

    def __init__(self, said: str, figures: Result | None = None) -> None:
        super().__init__(said)
        self.figures = figures or {}


def demand(faults: Sequence[str], figures: Result) -> Result:
    """``figures`` where there are no faults. Raises ``WrongError`` otherwise."""
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise WrongError(faults[0] + more, figures | {"faults": list(faults)})
    return figures


@dataclass(frozen=True)
class Question:
    """A prompt for the demo model, and the right answer."""

    id: str
    tokens: list[int]
    images: list[Image]
    answer: str = ""

    def request(self, new_tokens: int = LONGEST) -> Request:
        return Request(id=self.id, tokens=self.tokens, images=self.images, max_new_tokens=new_tokens)


@dataclass
class Subject:
    """The demo model, whose weights are trained, with its questions and its engines."""

    bench: Bench
    _models: dict[tuple[str, torch.device], MllamaForConditionalGeneration] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.bench.device

    @property
    def tiny(self) -> bool:
        """Whether this is a rehearsal, which asks fewer questions."""
        return self.bench.amounts.tiny

    @cached_property
    def processor(self) -> MllamaProcessor:
        return load_processor(find_checkpoint(str(MODEL), None))

    @cached_property
    def prompter(self) -> Prompter:
        return Prompter(self.processor)

    @cached_property
    def tiler(self) -> Tiler:
        return Tiler(self.processor)

    @property
    def image_token(self) -> int:
        return int(self.model().config.image_token_index)

    def model(self, dtype: DType = "float32", device: torch.device | None = None) -> MllamaForConditionalGeneration:
        """The model on the bench's device, or on another."""
        where = (dtype, device or self.device)
        if where not in self._models:
            self._models[where] = load_model(find_checkpoint(str(MODEL), None), dtype, [where[1]])
        return self._models[where]

    def engine(self, policy: Policy, dtype: DType = "float32", **options: Any) -> Engine:
        """An engine on the bench's device, which is under test."""
        return make_engine(self.model(dtype), policy, self.processor, **options)

    def reference(self, policy: Policy, **options: Any) -> Engine:
        """An engine on the CPU in fp32."""
        return make_engine(self.model(device=CPU), policy, self.processor, **options)

    def image(self, index: int) -> Image:
        tiles = self.tiler(scenes.draw(scenes.scene("test", index)))
        return Image(f"scene {index}", tiles.pixels, tiles.ratio_id)

    def questions(self, indices: Sequence[int], kinds: Sequence[str] = scenes.KINDS) -> list[Question]:
        """One of each kind about each of these held-out scenes."""
        asked = []
        for index in indices:
            image, scene = self.image(index), scenes.scene("test", index)
            for kind in kinds:
                found = scenes.question(scene, kind, random.Random(f"test/{index}/{kind}"))
                assert found is not None
                asked.append(Question(f"{index}/{kind}", self.prompter.tokens(found[0], 1), [image], found[1]))
        return asked

    def mixed(self) -> list[Question]:
        """Images of one to four tiles, two of them in one prompt, and a prompt without any."""
        several = [self.image(0), self.image(3)]
        text = "how many objects are there?"
        return [
            # Scenes of four, three, one and two tiles.
            *self.questions([0, 2, 3, 4], ["color"] if self.tiny else ["color", "caption"]),
            Question("two images", self.prompter.tokens(text, 2), several),
            Question("no image", self.prompter.tokens(text, 0), []),
        ]


def make_engine(model: MllamaForConditionalGeneration, policy: Policy, processor: MllamaProcessor, **options: Any) -> Engine:
    normalise = Normaliser(processor, model.device, model.dtype)
    defaults: Result = {"normalise": normalise, "eos": (), "kv_bytes": KV_BYTES}
    engine = Engine(model, policy, **{**defaults, **options})
    # What has not been written must not be read.
    engine.memory.flat.fill_(torch.nan)  # type: ignore[union-attr]
    return engine


def answers(engine: Engine, questions: Sequence[Question], new_tokens: int = LONGEST) -> list[Completion]:
    return engine.generate([question.request(new_tokens) for question in questions])


def record(engine: Engine, said: Mapping[str, Sequence[int]] | None = None) -> dict[str, list[Tensor]]:
    """Fills, by request, with the logits (V,) that each token is chosen from. With ``said`` the engine says these tokens."""
    seen: dict[str, list[Tensor]] = defaultdict(list)
    inner = engine._choose

    def choose(logits: Tensor, sequences: Sequence[Sequence_]) -> Tensor:
        for row, sequence in zip(logits, sequences, strict=True):
            # A captured step overwrites the logits of the one before.
            seen[sequence.request.id].append(row.float().clone())
        if said is None:
            return inner(logits, sequences)
        return torch.tensor([said[s.request.id][len(s.said)] for s in sequences], device=logits.device)

    engine._choose = choose  # type: ignore[method-assign]
    return seen


def error_of(found: Tensor, wanted: Tensor) -> float:
    """Relative, by norm; infinite where NaN was computed."""
    error = (torch.linalg.norm(found - wanted) / torch.linalg.norm(wanted)).item()
    return error if error == error else float("inf")
