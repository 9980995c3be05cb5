"""From a question and a number of images to a prompt's tokens, in the checkpoint's own layout, and from tokens to text."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import MllamaProcessor

DATE = "26 Jul 2024"
"""What Llama's template takes for today where it has no clock. With one, a run that goes on over midnight would ask two
different questions of rows without an image."""

_BRACKETED = re.compile(r"[<\[{].+[>\]}]", re.DOTALL)


class Prompter:
    """Builds prompts for one processor: by its chat template, or ``<|image|>``, begin of text, question without one.

    Nothing that a question says becomes a special token, so that no row can add an image, end its turn or speak as the system.
    """

    def __init__(self, processor: MllamaProcessor) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self._lock = threading.Lock()
        # Of Meta's 257 added tokens only three have a name that the tokenizer counts among its special ones, and a fine-tune
        # may have lost even their mark. Words that somebody has added are words.
        added = self.tokenizer.added_tokens_decoder
        self._special = {id: t.content for id, t in added.items() if t.special or _BRACKETED.fullmatch(t.content)}
        self._silent = {id for id, t in added.items() if t.special or t.content.startswith("<|")}
        self._layouts: dict[int, list[int]] = {}

    def text(self, question: str, images: int) -> str:
        """The whole prompt as a string, begin of text included; special tokens that the question spells out are broken up."""
        for token in self._special.values():
            if token in question:
                question = question.replace(token, f"{token[0]} {token[1:]}")
        return self._laid_out(question, images)

    def tokens(self, question: str, images: int) -> list[int]:
        """Token ids of ``text``; exactly one begin of text. Raises ``ValueError`` for a question that adds special ones."""
        ids = self._encoded(self.text(question, images))
        if images not in self._layouts:
            self._layouts[images] = self._specials(self._encoded(self._laid_out("a", images)))
        # Whatever a tokenizer makes of a question: one that folds other letters into a token's, a token of one letter.
        if self._specials(ids) != self._layouts[images]:
            raise ValueError("the question spells a special token of the model's in a way that can't be broken up; rephrase it")
        return ids

    def words(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens, special ones left out."""
        with self._lock:
            text: str = self.tokenizer.decode([t for t in tokens if t not in self._silent], skip_special_tokens=True)
        return text

    def _laid_out(self, question: str, images: int) -> str:
        if not self.processor.chat_template:
            return f"{self.processor.image_token * images}{self.tokenizer.bos_token or ''}{question}"
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": question}]
        dated = {"date_string": DATE} if "date_string" in str(self.processor.chat_template) else {}
        rendered: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, **dated
        )
        return rendered

    def _encoded(self, text: str) -> list[int]:
        # An actor's calls come from several threads, and a fast tokenizer may be changed by one while another uses it.
        with self._lock:
            ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        return ids if bos is None or bos in ids else [bos, *ids]

    def _specials(self, ids: Sequence[int]) -> list[int]:
        # What a tokenizer has no word for comes out as a special token of its own.
        return [id for id in ids if id in self._special and id != self.tokenizer.unk_token_id]
