"""The model that is measured: Llama-3.2-Vision's proportions with random weights, scaled to a CPU, and its own processor."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

SPECIAL = ("<|pad|>", "<|begin_of_text|>", "<|eot_id|>", "<|python_tag|>", "<|unknown|>")
IMAGE_TOKEN = "<|image|>"
PATCH = 14
MAX_TILES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """Sizes of one model."""

    syllables: int
    """The vocabulary is every word of three of these."""
    tile: int
    """Pixels."""
    vision: dict[str, Any]
    """Fields of ``MllamaVisionConfig``."""
    text: dict[str, Any]
    """Fields of ``MllamaTextConfig``."""


BENCH = ModelSize(
    syllables=25,
    tile=224,
    vision={
        "hidden_size": 256,
        "intermediate_size": 1024,
        "attention_heads": 4,
        "num_hidden_layers": 8,
        "num_global_layers": 2,
        # Five of the local layers, as at 11B; the features are these and the last global layer's.
        "intermediate_layers_indices": [0, 2, 4, 6, 7],
        "vision_output_dim": 256 * 6,
    },
    text={
        "hidden_size": 512,
        "intermediate_size": 1792,
        "num_hidden_layers": 20,
        "cross_attention_layers": [1, 3, 6, 8, 11, 13, 16, 18],
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
)
TINY = ModelSize(
    syllables=4,
    tile=42,
    vision={
        "hidden_size": 32,
        "intermediate_size": 48,
        "attention_heads": 2,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 32 * 2,
    },
    text={
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 7,
        "cross_attention_layers": [1, 3, 5],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
)


def words(size: ModelSize) -> list[str]:
    """The vocabulary without its special tokens."""
    syllables = [c + v for c, v in itertools.product("bdgmr", "aeiou")][: size.syllables]
    return ["".join(three) for three in itertools.product(syllables, repeat=3)]


def build_processor(size: ModelSize) -> MllamaProcessor:
    """One token a word, padding on the left; no chat template, so that prompts begin with the image, as the base models' do."""
    vocabulary = [*SPECIAL, *words(size), IMAGE_TOKEN]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|pad|>",
        unk_token="<|unknown|>",
        additional_special_tokens=["<|python_tag|>", IMAGE_TOKEN],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    images = MllamaImageProcessorPil(size={"height": size.tile, "width": size.tile}, max_image_tiles=MAX_TILES)
    return MllamaProcessor(images, fast)


def build_model(size: ModelSize, processor: MllamaProcessor, seed: int) -> MllamaForConditionalGeneration:
    """fp32 weights from ``seed``, ready to generate with sdpa attention; it never utters a special token."""
    torch.manual_seed(seed)
    model = MllamaForConditionalGeneration(build_config(size, processor)).eval()
    make_ready(model, processor)
    return model


def build_config(size: ModelSize, processor: MllamaProcessor) -> MllamaConfig:
    """The tokenizer's vocabulary and short texts, where ``size`` does not say otherwise."""
    tokenizer = processor.tokenizer
    return MllamaConfig(
        vision_config={**size.vision, "image_size": size.tile, "patch_size": PATCH, "max_num_tiles": MAX_TILES},
        text_config={
            "vocab_size": len(tokenizer) - 1,  # all but the image token
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            **size.text,
            **_ends(processor),
            "eos_token_id": tokenizer.eos_token_id,
        },
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )


def make_ready(model: MllamaForConditionalGeneration, processor: MllamaProcessor) -> None:
    """Opens the gates of fresh weights, and has the model generate greedily, to any length and with sdpa attention."""
    with torch.no_grad():
        # Fresh gates are shut: open them, so that answers depend on the images.
        vision, layers = model.model.vision_model, model.model.language_model.layers
        vision.gated_positional_embedding.gate.fill_(0.5)
        vision.pre_tile_positional_embedding.gate.fill_(0.5)
        vision.post_tile_positional_embedding.gate.fill_(0.5)
        for layer in vision.global_transformer.layers:
            layer.gate_attn.fill_(math.pi / 4)
            layer.gate_ffn.fill_(math.pi / 4)
        for index in model.config.text_config.cross_attention_layers:
            layers[index].cross_attn_attn_gate.fill_(1.0)
            layers[index].cross_attn_mlp_gate.fill_(1.0)
        # A logit of exactly 0 is never the best of thousands: lengths are decided by the workload alone.
        model.lm_head.weight[: len(SPECIAL)] = 0
    model.set_attn_implementation("sdpa")
    model.generation_config = GenerationConfig(**_ends(processor), do_sample=False)


def _ends(processor: MllamaProcessor) -> dict[str, int]:
    tokenizer = processor.tokenizer
    return {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
