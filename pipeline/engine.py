"""The batch engine behind one checkpoint: prompts and tiles in, answers with their key/value statistics out. Knows no Ray."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers import MllamaForConditionalGeneration, MllamaProcessor

from pipeline.images import Normaliser, Tiles
from pipeline.prompts import Prompter
from trimming import Policy
from trimming.engine import Completion, Image, KeptSets, Request, Sampling, groups
from trimming.engine import Engine as BatchEngine
from trimming.engine.memory import spare_bytes
from trimming.engine.scheduler import activation_bytes
from trimming.engine.stages import stages
from trimming.tower import TowerPolicy, TowerTiles

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row, ready for the model. ``tokens`` hold one image token for each image, ``keys`` one digest for each."""

    id: str
    tokens: Sequence[int]
    images: Sequence[Tiles]
    keys: Sequence[str]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to one prompt; the fields are the output columns of the same names."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    output_tokens: int
    visual_tokens: int
    kept_visual_tokens: int
    keep_fraction: float | None
    tower_keep_fraction: float | None
    cross_kv_bytes_full: int
    cross_kv_bytes: int
    self_kv_bytes: int
    kept: Sequence[int]
    merged_into: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """How tokens are chosen, and when an answer ends."""

    max_new_tokens: int
    sampling: Sampling = Sampling()  # noqa: RUF009 - frozen
    stop: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much the engine may hold at once."""

    max_sequences: int = 256
    kv_bytes: int | None = None
    """Memory for keys and values, of all devices; None: what each can spare once the model is loaded."""
    image_cache_bytes: int = 1 << 30


class Engine:
    """Prompts may be submitted from any thread; ``batch`` does the work, from one thread alone (``serve``, ``generate``)."""

    def __init__(
        self,
        model: MllamaForConditionalGeneration,
        processor: MllamaProcessor,
        policy: Policy,
        rows: Literal["meta", "transformers"],
        decoding: Decoding,
        limits: Limits = Limits(),
        tower_tiles: TowerTiles | None = None,
        kept_sets: KeptSets = "image",
        tower_policy: TowerPolicy | None = None,
    ) -> None:
        self.model, self.processor, self.decoding, self.kept_sets = model, processor, decoding, kept_sets
        self.device: torch.device = model.device
        self.prompter = Prompter(processor)
        eos = model.generation_config.eos_token_id
        eos = processor.tokenizer.eos_token_id if eos is None else eos
        # The first device encodes images, and holds what is kept of them.
        others = activation_bytes(model, policy, limits.max_sequences)
        spare = [spare_bytes(s.device, others + (0 if n else limits.image_cache_bytes)) for n, s in enumerate(stages(model))]
        self.batch = BatchEngine(
            model,
            policy,
            rows=rows,
            normalise=Normaliser(processor, self.device, model.dtype),
            eos=eos if isinstance(eos, list) else [eos],
            kv_bytes=limits.kv_bytes or spare,
            max_sequences=limits.max_sequences,
            image_cache_bytes=limits.image_cache_bytes,
            tower_tiles=tower_tiles,
            tower_policy=tower_policy,
            detokenize=self.prompter.words,
            kept_sets=kept_sets,
        )
        self.max_prompt_tokens: int = model.config.text_config.max_position_embeddings - decoding.max_new_tokens

    def groups(self, keys: Sequence[Sequence[str]], lengths: Sequence[int]) -> list[list[int]]:
        """Which prompts decide together what is kept, by their places: each list is for one ``submit_together``.

        Args:
            keys: the images' digests of each prompt.
            lengths: the tokens of each prompt.
        """
        return groups(keys, lengths) if self.kept_sets == "image" else [[place] for place in range(len(keys))]

    def submit_together(self, prompts: Sequence[Prompt]) -> list[Future[Completion]]:
        """The completions to come of prompts of one group, for ``answer``.

        One that can't be run has its ``ValueError`` for a result; the others still decide together.
        """
        futures: list[Future[Completion]] = [Future() for _ in prompts]
        able: list[tuple[int, Request]] = []
        for place, prompt in enumerate(prompts):
            try:
                request = self._request(prompt)
                self.batch.check(request)
                able.append((place, request))
            except ValueError as error:
                futures[place].set_exception(error)
        if able:
            submitted = self.batch.submit_together([request for _, request in able])
            for (place, _), future in zip(able, submitted, strict=True):
                futures[place] = future
        return futures

    def answer(self, prompt_tokens: int, completion: Completion) -> Answer:
        """``completion`` of a prompt of this length as an output row has it."""
        trim = completion.trim
        assert completion.text is not None
        reason: Any = completion.finish_reason
        return Answer(
            text=completion.text.strip(),
            finish_reason=reason,
            prompt_tokens=prompt_tokens,
            output_tokens=completion.output_tokens,
            visual_tokens=trim.visual_tokens,
            kept_visual_tokens=trim.kept_visual_tokens,
            keep_fraction=trim.keep_fraction,
            tower_keep_fraction=trim.tower_keep_fraction,
            cross_kv_bytes_full=trim.cross_kv_bytes_full,
            cross_kv_bytes=trim.cross_kv_bytes,
            self_kv_bytes=trim.self_kv_bytes + completion.output_tokens * self._token_bytes,
            kept=trim.kept.tolist(),
            merged_into=None if trim.merged_into is None else trim.merged_into.numpy(),
        )

    @property
    def _token_bytes(self) -> int:
        return self.batch.geometry.self_kv_bytes(self.model.dtype.itemsize)

    def generate(self, prompts: Iterable[Prompt]) -> list[Answer]:
        """One answer a prompt, in order, worked out on this thread.

        Raises ``ValueError`` for a prompt that can't be run, before any is.
        """
        asked = list(prompts)
        done = self.batch.generate(map(self._request, asked))
        return [self.answer(len(prompt.tokens), completion) for prompt, completion in zip(asked, done, strict=True)]

    def _request(self, prompt: Prompt) -> Request:
        decoding = self.decoding
        return Request(
            id=prompt.id,
            tokens=prompt.tokens,
            images=[Image(key, tiles.pixels, tiles.ratio_id) for key, tiles in zip(prompt.keys, prompt.images, strict=True)],
            max_new_tokens=decoding.max_new_tokens,
            sampling=decoding.sampling,
            stop=decoding.stop,
        )
