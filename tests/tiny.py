"""Tiny random-weight Mllamas and hand-made batches for them, shared by the numeric tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from trimming import KeepAll, Policy, Rows, SampleTrim, trim
from trimming.engine import Completion, Engine, Image, Request
from trimming.engine.memory import Memory
from trimming.engine.sequence import Sequence_
from trimming.engine.sharded import ShardedMemory

TILE, PATCH, TILES = 42, 14, 4
TOKENS = (TILE // PATCH) ** 2 + 1
IMAGE, BOS, EOS, PAD = 64, 1, 2, 0
# Aspect ratio ids of 1 to 4 tiles, landscape: see the image processor's table of ratios.
RATIO_OF_TILES = {1: 1, 2: 5, 3: 7, 4: 6}


def tiny_model(
    seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "sdpa", layers: int = 7
) -> MllamaForConditionalGeneration:
    config = MllamaConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "attention_heads": 2,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
            "image_size": TILE,
            "patch_size": PATCH,
            "max_num_tiles": TILES,
        },
        text_config={
            "vocab_size": 64,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": layers,
            "cross_attention_layers": [1, 3, 5],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        },
        image_token_index=IMAGE,
    )
    torch.manual_seed(seed)
    model = MllamaForConditionalGeneration(config).eval()
    with torch.no_grad():
        # Fresh weights are small and their gates shut: open them, so that images matter, and sharpen the attention, so that
        # features differ.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
        for layer in (model.model.language_model.layers[i] for i in config.text_config.cross_attention_layers):
            layer.cross_attn_attn_gate.fill_(0.8)
            layer.cross_attn_mlp_gate.fill_(0.6)
            layer.cross_attn.q_norm.weight.fill_(2.0)
        model.model.vision_model.gated_positional_embedding.gate.fill_(0.4)
    model.set_attn_implementation(attention)
    return model.to(dtype)


@dataclass(frozen=True)
class Row:
    """A prompt: ``before`` text tokens, then each image (its tile count) followed by ``after`` text tokens."""

    tiles: tuple[int, ...]
    before: int = 2
    after: int = 4


BATCHES: dict[str, list[Row]] = {
    "one tile": [Row((1,))],
    "four tiles": [Row((4,))],
    "mixed tiles": [Row((1,)), Row((4,), after=7), Row((2,), before=0), Row((3,), before=3, after=2)],
    "several images": [Row((2, 1)), Row((4,)), Row((1, 3), before=0, after=3)],
    "adjacent images": [Row((1, 2), after=0), Row((2,))],
    "text-only among images": [Row((2,)), Row((), before=6), Row((4,), before=1)],
}


def make_inputs(rows: list[Row], seed: int = 0, padding: str = "left") -> dict[str, Tensor]:
    """What ``MllamaProcessor`` returns for such prompts, with random pixels and tokens."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(3, 64, (count,), generator=generator).tolist()

    prompts = []
    for row in rows:
        tokens = [BOS, *words(row.before)]
        for _ in row.tiles:
            tokens += [IMAGE, *words(row.after)]
        prompts.append([*tokens, *words(2)])
    length = max(map(len, prompts))
    pads = [[PAD] * (length - len(p)) for p in prompts]
    left = padding == "left"
    ids = [[*pad, *p] if left else [*p, *pad] for p, pad in zip(prompts, pads, strict=True)]
    attended = [
        [0] * len(pad) + [1] * len(p) if left else [1] * len(p) + [0] * len(pad) for p, pad in zip(prompts, pads, strict=True)
    ]
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(attended)}
    images = max(len(row.tiles) for row in rows)
    if not images:
        return inputs
    pixels = torch.zeros(len(rows), images, TILES, 3, TILE, TILE)
    ratio_ids = torch.zeros(len(rows), images, dtype=torch.long)
    ratio_mask = torch.zeros(len(rows), images, TILES, dtype=torch.long)
    ratio_mask[:, :, 0] = 1  # as the processor has it, for missing images too
    for i, row in enumerate(rows):
        for j, tiles in enumerate(row.tiles):
            pixels[i, j, :tiles] = torch.randn(tiles, 3, TILE, TILE, generator=generator)
            ratio_ids[i, j] = RATIO_OF_TILES[tiles]
            ratio_mask[i, j, :tiles] = 1
    dense = convert_sparse_cross_attention_mask_to_dense(
        [get_cross_attention_token_mask(tokens, IMAGE) for tokens in ids], [list(row.tiles) for row in rows], TILES, length
    )
    return inputs | {
        "pixel_values": pixels,
        "aspect_ratio_ids": ratio_ids,
        "aspect_ratio_mask": ratio_mask,
        "cross_attention_mask": torch.from_numpy(dense),
    }


# ---- for the engine -----------------------------------------------------------------------------------------------------


@cache
def lively_model(dtype: torch.dtype = torch.float32, layers: int = 7) -> MllamaForConditionalGeneration:
    """``tiny_model`` with every gate open, and with an answer that goes on from its last token: the plain one soon says one
    token for ever, which a wrong slot or position would not change. Shared by tests: leave it as it is."""
    model = tiny_model(layers=layers)
    vision = model.model.vision_model
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight.mul_(10)
        for module in (vision.pre_tile_positional_embedding, vision.post_tile_positional_embedding):
            module.embedding.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
            module.gate.fill_(0.5)
    # A prompt goes on for as long as a test wants.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.to(dtype)


@dataclass(frozen=True, eq=False)
class Prompt:
    """One row, for the engine and for the model alone."""

    tokens: list[int]
    images: list[Image]
    inputs: dict[str, Tensor]
    """What the processor returns for this row without neighbours."""

    def request(self, id: str, max_new_tokens: int = 10, **options: Any) -> Request:
        return Request(id=id, tokens=self.tokens, images=self.images, max_new_tokens=max_new_tokens, **options)


def make_prompts(rows: Sequence[Row], seed: int = 0) -> list[Prompt]:
    """The rows of ``make_inputs``, each by itself. Every image has a key of its own."""
    together = make_inputs(list(rows), seed)
    prompts = []
    for i, row in enumerate(rows):
        tokens = together["input_ids"][i][together["attention_mask"][i].bool()].tolist()
        images = [
            Image(f"{seed}/{i}/{j}", together["pixel_values"][i, j, :tiles], RATIO_OF_TILES[tiles])
            for j, tiles in enumerate(row.tiles)
        ]
        prompts.append(Prompt(tokens, images, inputs_of(tokens, images)))
    return prompts


def inputs_of(tokens: list[int], images: Sequence[Image]) -> dict[str, Tensor]:
    inputs = {"input_ids": torch.tensor([tokens]), "attention_mask": torch.ones(1, len(tokens), dtype=torch.long)}
    if not images:
        return inputs
    pixels = torch.zeros(1, len(images), TILES, 3, TILE, TILE)
    mask = torch.zeros(1, len(images), TILES, dtype=torch.long)
    for j, image in enumerate(images):
        pixels[0, j, : len(image.pixels)] = image.pixels
        mask[0, j, : len(image.pixels)] = 1
    dense = convert_sparse_cross_attention_mask_to_dense(
        [get_cross_attention_token_mask(tokens, IMAGE)], [[len(image.pixels) for image in images]], TILES, len(tokens)
    )
    return inputs | {
        "pixel_values": pixels,
        "aspect_ratio_ids": torch.tensor([[image.ratio_id for image in images]]),
        "aspect_ratio_mask": mask,
        "cross_attention_mask": torch.from_numpy(dense),
    }


@dataclass(frozen=True)
class Alone:
    """What the model itself says to one row, under ``trim``."""

    tokens: list[int]
    logits: Tensor
    """(tokens, V)."""
    trim: SampleTrim


def run_alone(
    model: MllamaForConditionalGeneration,
    prompt: Prompt,
    id: str,
    policy: Policy,
    rows: Rows = "meta",
    new_tokens: int = 10,
    **tower: Any,
) -> Alone:
    with torch.inference_mode(), trim(model, policy, rows, **tower) as trimmed:
        trimmed.sample_ids = [id]
        out = model.generate(
            **prompt.inputs, max_new_tokens=new_tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    tokens = out.sequences[0, len(prompt.tokens) :].tolist()
    return Alone(tokens, torch.cat(out.logits), trimmed.samples[0])


def make_engine(policy: Policy | None = None, model: MllamaForConditionalGeneration | None = None, **options: Any) -> Engine:
    """An engine with room for everything; tests' pixels are normalised already."""
    model = model or lively_model()
    defaults: dict[str, Any] = {"normalise": lambda pixels: pixels.to(model.dtype), "eos": (), "kv_bytes": 1 << 22}
    engine = Engine(model, policy or KeepAll(), **{**defaults, **options})
    # Fresh memory may hold anything: what has not been written must not be read.
    for memory in memories(engine):
        memory.flat.fill_(torch.nan)
    return engine


def finish(engine: Engine, requests: Iterable[Request]) -> list[Future[Completion]]:
    """Steps until all are done, failed ones too."""
    futures = [engine.submit(request) for request in requests]
    drain(engine)
    assert all(future.done() for future in futures)
    return futures


def drain(engine: Engine, after_step: Callable[[], object] = lambda: None) -> None:
    """Steps until nobody waits or runs: the engine must be left empty then."""
    for _ in range(2000):
        if not engine.waiting and not engine.decode.running:
            break
        engine.step()
        after_step()
    assert_empty(engine)


def complete(engine: Engine, requests: Iterable[Request]) -> list[Completion]:
    return [future.result(timeout=0) for future in finish(engine, requests)]


def assert_empty(engine: Engine) -> None:
    assert not engine.waiting
    assert not engine.decode.running
    assert engine.memory.shared == {}
    # Nobody's images count as held.
    assert (engine._shown, engine._full_elements) == ({}, 0)
    for memory in memories(engine):
        assert (memory.slots, memory.segment_elements, memory.shared) == (0, 0, {})
        assert memory.free == memory.size


def memories(engine: Engine) -> list[Memory]:
    """One for each device of the model."""
    return engine.memory.parts if isinstance(engine.memory, ShardedMemory) else [engine.memory]


def record_logits(engine: Engine) -> dict[str, list[Tensor]]:
    """Fills with the logits (V,) that each request's tokens are chosen from."""
    seen: dict[str, list[Tensor]] = {}
    # A step with static shapes overwrites the last one's.
    watch_choice(engine, lambda logits, sequence: seen.setdefault(sequence.request.id, []).append(logits.float().clone()))
    return seen


def watch_choice(engine: Engine, see: Callable[[Tensor, Sequence_], object]) -> None:
    inner = engine._choose

    def choose(logits: Tensor, sequences: Sequence[Sequence_]) -> Tensor:
        for row, sequence in zip(logits, sequences, strict=True):
            see(row, sequence)
        return inner(logits, sequences)

    engine._choose = choose  # type: ignore[method-assign]
