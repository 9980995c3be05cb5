"""From a question and a number of images to a prompt's tokens, in the checkpoint's own layout, and from tokens to text."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import MllamaProcessor


class Prompter:
    """Builds prompts for one processor: by its chat template, or ``<|image|>``, begin of text, question without one."""

    def __init__(self, processor: MllamaProcessor) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
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

    def words(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens, special ones left out."""
        with self._lock:
            text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text
