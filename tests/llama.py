"""A processor shaped like that of Meta's Llama-3.2-Vision: byte-level BPE, 257 added tokens of which three have a name that the
tokenizer counts among its special ones, and a template that puts a date over prompts without an image."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import MllamaImageProcessorPil, MllamaProcessor, PreTrainedTokenizerFast

TILE = 112
# As published, but for a few of their names: what is reserved is numbered through.
MARKS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(2)),
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(2, 247)),
    "<|image|>",
]
TEMPLATE = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- set image_ns = namespace(has_images=false) %}
{%- for message in messages %}{% for content in message['content'] %}{% if content['type'] == 'image' %}
{%- set image_ns.has_images = true %}{% endif %}{% endfor %}{% endfor %}
{%- if not image_ns.has_images %}
    {{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- for content in message['content'] %}
        {%- if content['type'] == 'image' %}{{- '<|image|>' }}{% else %}{{- content['text'] }}{% endif %}
    {%- endfor %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def llama_processor(special: bool = True) -> MllamaProcessor:
    """``special``: whether the added tokens are marked as special, as Meta's are; some fine-tunes have lost that."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["ho", "how", "Ġw", "Ġwh", "ma", "man", "many"]
    merges = [("h", "o"), ("ho", "w"), ("Ġ", "w"), ("Ġw", "h"), ("m", "a"), ("ma", "n"), ("man", "y")]
    bpe = models.BPE({token: i for i, token in enumerate([*alphabet, *words])}, merges, ignore_merges=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in MARKS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    images = MllamaImageProcessorPil(size={"height": TILE, "width": TILE}, max_image_tiles=4)
    return MllamaProcessor(images, fast, chat_template=TEMPLATE)
