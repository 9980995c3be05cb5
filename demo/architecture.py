"""The demo model's configuration, tokenizer and processor: a real Mllama, some 2,000 times smaller than the 11B.

Everything is saved with ``save_pretrained`` and loaded by the path that loads ``meta-llama/Llama-3.2-11B-Vision-Instruct``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    GenerationConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from demo import scenes
from demo.scenes import FLAT, Style

SPECIAL = (
    "<|pad|>",
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|python_tag|>",
    "<|unknown|>",
)
# As in Llama's vocabulary, the image token comes after the last token that the model can utter.
IMAGE_TOKEN = "<|image|>"
# Llama 3.2's layout, without its date and tool branches.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_WORD = re.compile(r"\w+|[^\w\s]")


def scene_words(style: Style) -> set[str]:
    """Every word that the questions, answers and captions of scenes can hold; of a number, its first digit."""
    words = {
        *scenes.SHAPES,
        *scenes.COLORS,
        *(mark.lower()[0] for marks in style.marks for mark in marks),
        *map(str, range(10)),
    }
    words |= {f"{s}es" if s == "cross" else f"{s}s" for s in scenes.SHAPES}
    texts = (
        scenes.CAPTION_PROMPT,
        "what color is the object marked? what shape is the object? how many objects are there?",
        "what is farthest left right at the top bottom? is the above the left of the? yes no",
        "what is written on the nothing, user assistant system",
    )
    return words | {w for text in texts for w in _WORD.findall(text)}


def build_processor(texts: Iterable[str], style: Style = FLAT) -> MllamaProcessor:
    """Word-level tokenizer over the words of ``texts`` and of the scenes, Llama's chat template, 112-pixel tiles. A number's
    second digit is a token of its own: two times ten are learnt sooner than ninety."""
    numbers = any(len(mark) > 1 for marks in style.marks for mark in marks)
    words = scene_words(style) | {w for text in texts for w in _WORD.findall(text.lower())}
    spaced = sorted(w for w in words if w[0].isalnum())
    marks = sorted(w for w in words if not w[0].isalnum())
    tokens = [*SPECIAL, *(f"▁{w}" for w in spaced), *(map(str, range(10)) if numbers else ()), *marks, IMAGE_TOKEN]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<|unknown|>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    # The mark of a word's beginning lets the decoder put spaces back before words and none before a comma.
    pieces = [pre_tokenizers.Metaspace(prepend_scheme="always", split=True), pre_tokenizers.Punctuation("isolated")]
    if numbers:
        pieces.append(pre_tokenizers.Split(Regex(r"(?<=\d)\d"), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|pad|>",
        unk_token="<|unknown|>",
        additional_special_tokens=["<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", IMAGE_TOKEN],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    images = MllamaImageProcessorPil(size={"height": scenes.TILE, "width": scenes.TILE}, max_image_tiles=4)
    return MllamaProcessor(images, fast, chat_template=CHAT_TEMPLATE)


def build_model(processor: MllamaProcessor, seed: int = 0, patch: int = FLAT.patch) -> MllamaForConditionalGeneration:
    """A fresh model with weights from ``seed``, with patches of ``patch`` pixels (14: 65 visual tokens a tile, 7: 257);
    cross-attention at layers 1, 3, 5 and 7 of 8."""
    tokenizer = processor.tokenizer
    vocabulary = len(tokenizer) - 1  # all but the image token
    config = MllamaConfig(
        vision_config={
            "hidden_size": 160,
            "intermediate_size": 480,
            "attention_heads": 5,
            "num_hidden_layers": 5,
            "num_global_layers": 1,
            "intermediate_layers_indices": [1, 3],
            "vision_output_dim": 480,
            "image_size": scenes.TILE,
            "patch_size": patch,
            "max_num_tiles": 4,
        },
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": 192,
            "intermediate_size": 384,
            "num_hidden_layers": 8,
            "cross_attention_layers": [1, 3, 5, 7],
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    torch.manual_seed(seed)
    model = MllamaForConditionalGeneration(config)
    with torch.no_grad():
        # The published initialisation closes every gate, to be opened slowly over a frozen language model;
        # from scratch there is nothing to protect.
        vision = model.model.vision_model
        vision.gated_positional_embedding.gate.fill_(0.5)
        vision.gated_positional_embedding.embedding.normal_(std=0.3)
        vision.pre_tile_positional_embedding.gate.fill_(0.5)
        vision.pre_tile_positional_embedding.embedding.weight.normal_(std=0.3)
        vision.post_tile_positional_embedding.gate.fill_(0.5)
        for layer in vision.global_transformer.layers:
            layer.gate_attn.fill_(math.pi / 4)
            layer.gate_ffn.fill_(math.pi / 4)
        for index in config.text_config.cross_attention_layers:
            layer = model.model.language_model.layers[index]
            layer.cross_attn_attn_gate.fill_(1.0)
            layer.cross_attn_mlp_gate.fill_(1.0)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    return model


@torch.no_grad()
def start_from(
    model: MllamaForConditionalGeneration,
    processor: MllamaProcessor,
    other: MllamaForConditionalGeneration,
    words: MllamaProcessor,
) -> None:
    """Give ``model`` the weights of ``other``, whose processor is ``words``: smaller patches and a finer grid of positions are
    interpolated, so that it sees its tiles about as ``other`` sees them enlarged; a word that ``other`` lacks starts anew."""
    mine, theirs = model.state_dict(), other.float().state_dict()
    grid, old_grid = (m.config.vision_config.image_size // m.config.vision_config.patch_size for m in (model, other))
    vocabulary, known = processor.tokenizer.get_vocab(), words.tokenizer.get_vocab()
    for name, weight in mine.items():
        found = theirs[name]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            for token, place in vocabulary.items():
                if token in known and place < len(weight) and known[token] < len(found):
                    weight[place] = found[known[token]]
        elif name.endswith("patch_embedding.weight"):
            # The adjoint of enlarging: what the old kernel says of an enlarged patch.
            side, old_side = weight.shape[-1], found.shape[-1]
            pixels = torch.eye(side * side).view(-1, 1, side, side)
            enlarged = F.interpolate(pixels, size=(old_side, old_side), mode="bilinear").flatten(1)
            weight.copy_((found.flatten(2) @ enlarged.T).view_as(weight))
        elif weight.shape != found.shape and "gated_positional_embedding" in name:
            old = found.view(-1, old_grid**2 + 1, model.config.vision_config.hidden_size)
            table = old[:, 1:].mT.unflatten(-1, (old_grid, old_grid))
            finer = F.interpolate(table, size=(grid, grid), mode="bilinear").flatten(2).mT
            weight.copy_(torch.cat([old[:, :1], finer], dim=1).view_as(weight))
        else:
            weight.copy_(found)
