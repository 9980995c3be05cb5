"""Right and wrong answers by kind of question: shares and paired differences, with their intervals over images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from demo.shards import Row
from jobs.comparison.bootstrap import Clusters, difference, score

ALL = "all"
"""The name of all kinds together."""

Result = dict[str, Any]


class Scores:
    """Of one data set's rows, in their order."""

    def __init__(self, rows: Sequence[Row]) -> None:
        kinds = np.array([row.kind for row in rows])
        self._images = np.unique([row.path for row in rows], return_inverse=True)[1]
        self.masks = {ALL: np.ones(len(rows), bool), **{str(kind): kinds == kind for kind in sorted(set(kinds))}}

    @staticmethod
    def right(digits: str) -> np.ndarray:
        """(rows,) 1 for a right answer and 0 for a wrong one, from a string of these."""
        return np.frombuffer(digits.encode(), np.uint8) - 48.0

    def share(self, right: np.ndarray) -> dict[str, Result]:
        """Of right answers, by kind."""
        return {kind: short(score(self._of(right, kind)).as_dict()) for kind in self.masks}

    def less(self, one: np.ndarray, other: np.ndarray) -> dict[str, Result]:
        """``one``'s right answers less ``other``'s, row for row, by kind."""
        return {kind: self.less_in(kind, one, other) for kind in self.masks}

    def less_in(self, kind: str, one: np.ndarray, other: np.ndarray) -> Result:
        return short(difference(self._of(one - other, kind), "quality"))

    def _of(self, values: np.ndarray, kind: str) -> Clusters:
        return Clusters.of(self._images[self.masks[kind]], values[self.masks[kind]])


def short(found: Result) -> Result:
    """Without how many rows and images there are, which the data set says."""
    return {name: value for name, value in found.items() if name not in ("rows", "clusters")}
