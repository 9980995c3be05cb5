"""Actors for the scale measurement: all that ``Answerer`` does around its engine, with an engine that answers at once.

Rows are unpacked, digested, packed, tallied, announced and reported as ever; no model is loaded, no prompt tokenized, no image
decoded. What is left is what a unit costs whatever the model.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from pipeline import schema
from pipeline.actor import COUNTERS, PEAKS, REPORT_ROWS, Answerer, Seconds
from pipeline.rows import Row

BATCH = 8
"""Rows that ``Paced`` answers together."""
BATCH_SECONDS = 0.05


class StandIn(Answerer):
    """Answers at once. Its units' statistics also have ``block_bytes_in`` and ``block_bytes_out``, the sizes of the block that
    came from the reader and of the one that goes to the writer."""

    def _start(self) -> None:
        import torch

        from pipeline.engine import Answer

        engine: Any = SimpleNamespace(
            device=torch.device("cpu"),
            model=SimpleNamespace(dtype=torch.float32),
            batch=SimpleNamespace(failed=None),
        )
        self.engine = engine
        self.said = Answer(
            text="an answer of a few words",
            finish_reason="stop",
            prompt_tokens=20,
            output_tokens=6,
            visual_tokens=1601,
            kept_visual_tokens=1601,
            keep_fraction=1.0,
            tower_keep_fraction=1.0,
            cross_kv_bytes_full=1601 * 2**15,
            cross_kv_bytes=1601 * 2**15,
            self_kv_bytes=26 * 2**17,
            kept=(),
        )

    def __call__(self, unit: pa.Table) -> pa.Table:
        out = super().__call__(unit)
        sizes = {"block_bytes_in": unit.nbytes, "block_bytes_out": out.nbytes}
        stats = json.dumps(json.loads(out[schema.STATS][0].as_py()) | sizes)
        return out.set_column(out.column_names.index(schema.STATS), schema.STATS, pa.array([stats]))

    def _answer_all(self, rows: Sequence[Row], seconds: Seconds) -> None:
        for start in range(0, len(rows), REPORT_ROWS):
            some = rows[start : start + REPORT_ROWS]
            self._answer_some(some)
            self.report(len(some), sum(row.error is not None for row in some))

    def _answer_some(self, rows: Sequence[Row]) -> None:
        for row in rows:
            row.files = []
            row.tiles = 1
            if row.error is None:
                row.answer = self.said

    def _account(self, seconds: Seconds) -> dict[str, Any]:
        return dict.fromkeys((*COUNTERS, *PEAKS), 0)


class Paced(StandIn):
    """Takes ``BATCH_SECONDS`` for every ``BATCH`` rows, one batch at a time, as a device does. Its units' statistics also have
    ``busy``: (start, end) of every batch since they were last asked for, in seconds of the machine's monotonic clock."""

    def _start(self) -> None:
        super()._start()
        self.device_lock = threading.Lock()
        self.busy: list[tuple[float, float]] = []

    def _answer_some(self, rows: Sequence[Row]) -> None:
        for start in range(0, len(rows), BATCH):
            with self.device_lock:
                began = time.monotonic()
                time.sleep(BATCH_SECONDS)
                self.busy.append((began, time.monotonic()))
            super()._answer_some(rows[start : start + BATCH])

    def _account(self, seconds: Seconds) -> dict[str, Any]:
        with self.device_lock:
            busy, self.busy = self.busy, []
        return super()._account(seconds) | {"busy": busy}
