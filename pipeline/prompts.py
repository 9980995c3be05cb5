"""From a question and a number of images to a prompt's tokens, in the checkpoint's own layout."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import MllamaProcessor


class Prompter:
    """Builds prompts for one processor: by its chat template, or ``<|image|>``, begin of text, question without one."""

    def __init__(self, processor: MllamaProcessor) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_tiles: int = processor.image_processor.max_image_tiles
        self._lock = threading.Lock()
        self._special = [t for t in self.tokenizer.all_special_tokens if t]

    def text(self, question: str, images: int) -> str:
        """The whole prompt as a string, begin of text included.

        A special token that a question spells out is broken up, so that no row can add an image, end its turn or speak as the
        system.
        """
        for token in self._special:
            if token in question:
                question = question.replace(token, f"{token[0]} {token[1:]}")
        if not self.processor.chat_template:
            return f"{self.processor.image_token * images}{self.tokenizer.bos_token or ''}{question}"
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": question}]
        rendered: str = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return rendered

    def tokens(self, question: str, images: int) -> list[int]:
        """Token ids of ``text``; exactly one begin of text."""
        text = self.text(question, images)
        # An actor's calls come from several threads, and a fast tokenizer may be changed by one while another uses it.
        with self._lock:
            ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        return ids if bos is None or bos in ids else [bos, *ids]

    def batch(self, prompts: Sequence[Sequence[int]], tiles: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` (B, L), padded on the left, and for images ``cross_attention_mask``
        (B, L, images, max tiles). ``tiles`` are the real tiles of each row's images.
        """
        from transformers.models.mllama.processing_mllama import (
            convert_sparse_cross_attention_mask_to_dense,
            get_cross_attention_token_mask,
        )

        length = max(map(len, prompts))
        ids = np.full((len(prompts), length), self.tokenizer.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, length - len(prompt) :] = prompt
            mask[i, length - len(prompt) :] = 1
        out = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if any(tiles):
            spans = [get_cross_attention_token_mask(row, self.processor.image_token_id) for row in ids.tolist()]
            dense = convert_sparse_cross_attention_mask_to_dense(spans, [list(t) for t in tiles], self.max_tiles, length)
            out["cross_attention_mask"] = torch.from_numpy(dense)
        return out
