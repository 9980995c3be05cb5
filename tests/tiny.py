"""Tiny random-weight Mllamas and hand-made batches for them, shared by the numeric tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

TILE, PATCH, TILES = 42, 14, 4
TOKENS = (TILE // PATCH) ** 2 + 1
IMAGE, BOS, EOS, PAD = 64, 1, 2, 0
# Aspect ratio ids of 1 to 4 tiles, landscape: see the image processor's table of ratios.
RATIO_OF_TILES = {1: 1, 2: 5, 3: 7, 4: 6}


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> MllamaForConditionalGeneration:
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
            "num_hidden_layers": 7,
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
