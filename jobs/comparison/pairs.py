"""Two runs row by row, joined on ``id``: how far their texts agree, and what differs between them."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.comparison import agreement, bootstrap
from jobs.comparison.bootstrap import SEED, Clusters
from jobs.comparison.costs import hashes
from jobs.comparison.joins import joined
from jobs.comparison.references import SCORES
from jobs.comparison.runs import Run
from pipeline import schema

AGREEMENT: dict[str, Callable[[str, str], float]] = {
    "exact": agreement.exact,
    "edit_similarity": agreement.edit_similarity,
    "chrf": agreement.chrf,
}
AMOUNTS = ("output_tokens", "cross_kv_bytes")
_COLUMNS = (schema.TEXT, schema.ERROR, schema.IMAGE_DIGEST, *AMOUNTS)


class Pairs:
    """What comes of comparing ``run`` with ``baseline``; holds a few numbers a row.

    Args:
        run, baseline: the runs.
        references: the output column of references in each, or None.
        examples: how many rows to pick whose texts differ.
        agreements: names of ``AGREEMENT`` to measure.
    """

    def __init__(
        self,
        run: Run,
        baseline: Run,
        references: tuple[str | None, str | None],
        *,
        examples: int,
        agreements: Sequence[str] = tuple(AGREEMENT),
    ) -> None:
        self.run, self.baseline, self.wanted, self.agreements = run, baseline, examples, agreements
        # One and the same reference for both sides, whatever the inputs.
        at = 1 if references[1] else 0
        self.reference = f"{at}.{references[at]}" if references[at] else None
        self.joined = self.errors_in_run_only = self.errors_in_baseline_only = self.compared = 0
        self.bytes = {"run": 0, "baseline": 0}
        self.keys: list[np.ndarray] = []
        self.values: defaultdict[str, list[np.ndarray]] = defaultdict(list)
        self.picked: dict[str, list[tuple[bytes, str]]] = {"run": [], "baseline": [], "neither": []}
        columns = [list(_COLUMNS), list(_COLUMNS)]
        if column := references[at]:
            columns[at].append(column)
        for table in joined([run, baseline], columns):
            self._add(table)

    def _add(self, table: pa.Table) -> None:
        self.joined += len(table)
        failed, other_failed = pc.is_valid(table["0.error"]), pc.is_valid(table["1.error"])
        self.errors_in_run_only += pc.sum(pc.and_not(failed, other_failed)).as_py() or 0
        self.errors_in_baseline_only += pc.sum(pc.and_not(other_failed, failed)).as_py() or 0
        table = table.filter(pc.invert(pc.or_(failed, other_failed)))
        self.compared += len(table)
        self.keys.append(cluster_keys(table[schema.ID], pc.coalesce(table["1.image_digest"], table["0.image_digest"])))
        for name in AMOUNTS:
            here, there = (table[f"{side}.{name}"].to_numpy().astype(np.float64) for side in (0, 1))
            self.values[name].append(here - there)
            if name == "cross_kv_bytes":
                self.bytes["run"] += int(here.sum())
                self.bytes["baseline"] += int(there.sum())
        texts, others = table["0.text"].to_pylist(), table["1.text"].to_pylist()
        differing = [i for i, (text, other) in enumerate(zip(texts, others, strict=True)) if text != other]
        for name in self.agreements:
            measure = AGREEMENT[name]
            agreed = np.ones(len(table))
            # Equal texts agree wholly by any measure, and most are.
            agreed[differing] = [measure(texts[i], others[i]) for i in differing]
            self.values[name].append(agreed)
        judged = self._judge(table, texts, others) if self.reference else {}
        if not self.wanted:
            return
        self._pick(table[schema.ID].take(pa.array(differing, pa.int64())).to_pylist(), differing, judged)

    def _judge(self, table: pa.Table, texts: Sequence[str], others: Sequence[str]) -> dict[str, np.ndarray]:
        """Differences of the scores against references, (rows,) each, NaN where a row has none."""
        cells = table[self.reference].to_pylist()
        differences = {}
        for name, measure in SCORES.items():
            there = as_array([measure(other, cell) for other, cell in zip(others, cells, strict=True)])
            here = there.copy()
            for i, (text, other) in enumerate(zip(texts, others, strict=True)):
                if text != other and not np.isnan(there[i]):
                    here[i] = measure(text, cells[i])
            differences[name] = here - there
            self.values[name].append(differences[name])
        return differences

    def _pick(self, ids: Sequence[str], places: Sequence[int], judged: dict[str, np.ndarray]) -> None:
        """Keeps the rows whose ids come first in an order drawn by a fixed seed, whatever parts rows come in."""
        for id, place in zip(ids, places, strict=True):
            better = 0.0
            if judged:
                consensus, right = judged["vqa_accuracy"][place], judged["accuracy"][place]
                better = right if np.isnan(consensus) else consensus
            side = "run" if better > 0 else "baseline" if better < 0 else "neither"
            self.picked[side].append((blake2b(f"{SEED}:{id}".encode(), digest_size=8).digest(), id))
        self.picked = {side: heapq.nsmallest(self.wanted, found) for side, found in self.picked.items()}

    def examples(self) -> list[str]:
        """Ids of at most ``wanted`` rows whose texts differ: half where the run alone is right by its reference and half where
        the baseline is, as far as there are such rows, then others."""
        right, wrong, neither = ([id for _, id in self.picked[side]] for side in ("run", "baseline", "neither"))
        half = max(self.wanted - self.wanted // 2, self.wanted - len(wrong))
        chosen = right[:half]
        chosen += wrong[: self.wanted - len(chosen)]
        return chosen + neither[: self.wanted - len(chosen)]

    def clusters(self, name: str) -> Clusters:
        """The values of this name by image."""
        return Clusters.of(np.concatenate(self.keys), np.concatenate(self.values[name]))

    def difference(self, name: str) -> dict[str, Any] | None:
        """Run less baseline; None for a score without references."""
        if name in SCORES and (name not in self.values or not len(self.clusters(name).counts)):
            return None
        kind: Literal["quality", "amount"] = "quality" if name in SCORES else "amount"
        return bootstrap.difference(self.clusters(name), kind)

    def as_dict(self) -> dict[str, Any]:
        """The comparison as the report has it, speed, cost and warnings apart."""
        return {
            "joined": self.joined,
            "only_in_run": int(self.run.stats["rows"]) - self.joined,
            "only_in_baseline": int(self.baseline.stats["rows"]) - self.joined,
            "errors_in_run_only": self.errors_in_run_only,
            "errors_in_baseline_only": self.errors_in_baseline_only,
            "compared": self.compared,
            "agreement": {name: bootstrap.score(self.clusters(name)).as_dict() for name in self.agreements},
            "differences": {name: self.difference(name) for name in (*SCORES, *AMOUNTS)},
            "row_kv_ratio": self.bytes["run"] / self.bytes["baseline"] if self.bytes["baseline"] else None,
            "examples": self.examples(),
        }


def agreement_difference(run: Run, other: Run, baseline: Run, name: str) -> dict[str, Any]:
    """How much nearer to the baseline's texts ``run`` is than ``other``, by the agreement of this name, over the rows that all
    three have answered."""
    keys, values = [], []
    columns = (schema.TEXT, schema.ERROR, schema.IMAGE_DIGEST)
    for table in joined([run, other, baseline], [columns] * 3):
        failed = pc.or_(pc.or_(pc.is_valid(table["0.error"]), pc.is_valid(table["1.error"])), pc.is_valid(table["2.error"]))
        answered = table.filter(pc.invert(failed))
        keys.append(cluster_keys(answered[schema.ID], pc.coalesce(answered["2.image_digest"], answered["0.image_digest"])))
        texts = zip(*(answered[f"{side}.text"].to_pylist() for side in range(3)), strict=True)
        measure = AGREEMENT[name]
        values.append(np.array([float(measure(a, c)) - float(measure(b, c)) for a, b, c in texts]))
    return bootstrap.difference(Clusters.of(np.concatenate(keys), np.concatenate(values)), "quality")


def cluster_keys(ids: pa.ChunkedArray, digests: pa.ChunkedArray) -> np.ndarray:
    """(rows,) uint64, equal for rows about the same image or images; a row without any is on its own."""
    return hashes(pc.coalesce(digests, pc.binary_join_element_wise("id", ids, " ")))


def as_array(values: Sequence[float | None]) -> np.ndarray:
    """(rows,) float64, NaN for None."""
    return np.array([np.nan if value is None else value for value in values], np.float64)
