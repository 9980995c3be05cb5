"""The 11B geometry with random weights, made where it will run: no weight is ever on the host, and none is ever fp32."""

from __future__ import annotations

import torch
from transformers import MllamaForConditionalGeneration, MllamaProcessor

from benchmarks.model import BENCH, ModelSize, build_config, make_ready

DTYPE = torch.bfloat16
ELEVEN_B = ModelSize(
    # Of the model's vocabulary the tokenizer knows the first words only: prompts need no more.
    syllables=BENCH.syllables,
    tile=560,
    # transformers' defaults are Llama-3.2-11B-Vision's but for these; its tile is the 448 pixels of the paper's first stage.
    vision={},
    text={
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
)


def build_on(device: torch.device, size: ModelSize, processor: MllamaProcessor, seed: int) -> MllamaForConditionalGeneration:
    """bf16 weights from ``seed`` on ``device``, ready to generate; it never utters a special token.

    transformers' own constructor, with every tensor on ``device`` from the start: buffers are as they always are.
    """
    config = build_config(size, processor)
    torch.manual_seed(seed)
    with torch.device(device):
        model = MllamaForConditionalGeneration._from_config(config, dtype=DTYPE).eval()
    make_ready(model, processor)
    with torch.no_grad():
        if config.image_token_index < config.text_config.vocab_size:
            # The tokenizer has its image token within the vocabulary.
            model.lm_head.weight[config.image_token_index] = 0
    return model
