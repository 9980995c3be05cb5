"""How many go at once, while memory decides: fewer after it ran out, more again once it has sufficed for a while."""

from __future__ import annotations

PATIENCE = 64
"""Calls at a lowered limit that must succeed before it is raised again, at first."""
MOST_PATIENCE = 4096


class Limit:
    """A number of images, prompts or sequences.

    Running out of memory lowers it. Once ``patience`` calls at the lowered limit have succeeded it doubles, up to ``most``;
    each time that proves too much, twice as many have to succeed before the next try.

    Args:
        most: the limit where memory suffices.
        patience: see above.
    """

    def __init__(self, most: int, patience: int = PATIENCE) -> None:
        self.most = self.now = most
        self.patience = patience
        self._calm = 0

    def lower(self, to: int) -> None:
        """After a call ran out of memory."""
        if self.now < self.most:
            self.patience = min(2 * self.patience, MOST_PATIENCE)
        self.now, self._calm = max(1, to), 0

    def passed(self, count: int) -> None:
        """After a call of ``count`` succeeded; what is under the limit proves nothing."""
        if self.now == self.most or count < self.now:
            return
        self._calm += 1
        if self._calm == self.patience:
            self.now, self._calm = min(2 * self.now, self.most), 0
