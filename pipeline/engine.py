"""One model on one device: a batch of prompts and tiles in, answers with their key/value statistics out. Knows no Ray."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, MllamaForConditionalGeneration, MllamaProcessor, StoppingCriteria

from pipeline.images import Normaliser, Tiles
from pipeline.prompts import Prompter
from trimming import Policy, trim


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row, ready for the model. ``tokens`` hold one image token for each image."""

    id: str
    tokens: Sequence[int]
    images: Sequence[Tiles]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to one prompt; the fields are the output columns of the same names."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    output_tokens: int
    visual_tokens: int
    kept_visual_tokens: int
    keep_fraction: float | None
    cross_kv_bytes_full: int
    cross_kv_bytes: int
    self_kv_bytes: int
    kept: Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """How tokens are chosen."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0

    def generation_config(self, eos: Sequence[int], pad: int, bos: int | None) -> GenerationConfig:
        """Complete: nothing is left to the checkpoint's own, which may sample (Llama 3.2's does)."""
        ends: dict[str, Any] = {"eos_token_id": list(eos), "pad_token_id": pad, "bos_token_id": bos}
        if self.temperature == 0:
            return GenerationConfig(max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1, **ends)
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=True,
            num_beams=1,
            temperature=self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            **ends,
        )


class Engine:
    """Trims ``model`` from here on, until ``close``. All calls must come from one thread."""

    def __init__(
        self,
        model: MllamaForConditionalGeneration,
        processor: MllamaProcessor,
        policy: Policy,
        rows: Literal["meta", "transformers"],
        decoding: Decoding,
    ) -> None:
        self.model, self.processor, self.decoding = model, processor, decoding
        self.device: torch.device = model.device
        self.prompter = Prompter(processor)
        self.normalise = Normaliser(processor, self.device, model.dtype)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Seconds by stage since they were last taken."""

        tokenizer = processor.tokenizer
        eos = model.generation_config.eos_token_id
        eos = tokenizer.eos_token_id if eos is None else eos
        self.eos: set[int] = set(eos if isinstance(eos, list) else [eos])
        model.generation_config = decoding.generation_config(sorted(self.eos), tokenizer.pad_token_id, tokenizer.bos_token_id)

        text = model.config.text_config
        self_layers = text.num_hidden_layers - len(text.cross_attention_layers)
        head = text.hidden_size // text.num_attention_heads
        self.self_kv_token_bytes = 2 * self_layers * text.num_key_value_heads * head * model.dtype.itemsize
        self.max_prompt_tokens: int = text.max_position_embeddings - decoding.max_new_tokens
        self._open = ExitStack()
        self._trimmed = self._open.enter_context(trim(model, policy, rows=rows))

    def close(self) -> None:
        """Gives the model back as it was."""
        self._open.close()

    def generate(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """One answer a prompt, in order. Prompts of one batch have one number of images, else the fewer are padded."""
        began = time.perf_counter()
        inputs = self._inputs(prompts)
        self.seconds["inputs"] += time.perf_counter() - began
        if self.decoding.temperature > 0:
            # A unit that is done again draws the same tokens, wherever and after whatever that is.
            key = "\0".join([str(self.decoding.seed), *(p.id for p in prompts)])
            torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1)
        self._trimmed.sample_ids = [p.id for p in prompts]
        clock = _FirstToken(self.device)
        began = time.perf_counter()
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, stopping_criteria=[clock])
        answers = self._answers(prompts, tokens[:, inputs["input_ids"].shape[1] :].tolist())
        self.seconds["prefill"] += clock.at - began
        self.seconds["generation"] += time.perf_counter() - clock.at
        return answers

    def healthy(self) -> bool:
        """Whether the device still works: after a fault of its own, CUDA fails every later call too."""
        try:
            torch.ones(1, device=self.device).add(1).item()
        except RuntimeError:
            return False
        return True

    def _inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        tiles = [[len(image.pixels) for image in prompt.images] for prompt in prompts]
        inputs = {k: v.to(self.device) for k, v in self.prompter.batch([p.tokens for p in prompts], tiles).items()}
        if any(tiles):
            inputs |= self.normalise([p.images for p in prompts])
        return inputs

    def _answers(self, prompts: Sequence[Prompt], generated: Sequence[list[int]]) -> list[Answer]:
        answers = []
        for prompt, tokens, sample in zip(prompts, generated, self._trimmed.samples, strict=True):
            end = next((i for i, token in enumerate(tokens) if token in self.eos), None)
            said = tokens if end is None else tokens[:end]
            count = len(tokens) if end is None else end + 1
            answers.append(
                Answer(
                    text=self.processor.tokenizer.decode(said, skip_special_tokens=True).strip(),
                    finish_reason="length" if end is None else "stop",
                    prompt_tokens=len(prompt.tokens),
                    output_tokens=count,
                    visual_tokens=sample.visual_tokens,
                    kept_visual_tokens=sample.kept_visual_tokens,
                    keep_fraction=sample.keep_fraction,
                    cross_kv_bytes_full=sample.cross_kv_bytes_full,
                    cross_kv_bytes=sample.cross_kv_bytes,
                    self_kv_bytes=sample.self_kv_bytes + count * self.self_kv_token_bytes,
                    kept=sample.kept.tolist(),
                )
            )
        return answers


class _FirstToken(StoppingCriteria):
    """Stops nothing; notes when the first token was there, which is when tower and prefill are done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.at = 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if not self.at:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
