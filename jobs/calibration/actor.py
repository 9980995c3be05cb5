"""The actor that answers a sample under one policy after the other, so that its images are encoded once for all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline import schema
from pipeline.actor import Answerer
from pipeline.config import RunConfig
from pipeline.model import build_policy, build_tower_policy
from pipeline.sink import UnitWriter
from pipeline.source import UnitReader, block_rows
from pipeline.units import Unit

READERS = 16
"""Units that are read, and written, at once: stores take their time over each."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One of the runs that a calibration consists of."""

    name: str
    config: RunConfig
    writer: UnitWriter
    finished: frozenset[str]
    """Units that it has already."""


class Calibrator(Answerer):
    """``Answerer`` for several runs over the same units."""

    def answer(self, reader: UnitReader, units: Sequence[Unit], runs: Sequence[Asked]) -> dict[str, dict[str, str | None]]:
        """Writes each run's files and markers of ``units``. Each run's new texts by id, None for a row with an error."""
        texts: dict[str, dict[str, str | None]] = {run.name: {} for run in runs}
        # A unit has one image: the engine holds these encoded from the first run to the last.
        room = self._room(len({run.config.tower_policy for run in runs}))
        for start in range(0, len(units), room):
            some = units[start : start + room]
            wanted = {unit.name: unit for unit in some if any(unit.name not in run.finished for run in runs)}
            with ThreadPoolExecutor(READERS) as pool:
                blocks = dict(zip(wanted, pool.map(lambda unit: reader(unit)[0], wanted.values()), strict=True))
            for run in runs:
                texts[run.name] |= self._answer_run([blocks[name] for name in blocks if name not in run.finished], run)
        return texts

    def _answer_run(self, blocks: Sequence[pa.Table], run: Asked) -> dict[str, str | None]:
        if not blocks:
            return {}
        if self.refused is None:
            self.engine.batch.use_tower(build_tower_policy(run.config))
            self.engine.batch.use(build_policy(run.config))
            # A run's peaks are its own.
            self.engine.batch.reset_statistics()
            self.accounted = {}
        # All at once: a unit is one row, or the rows of one image.
        with ThreadPoolExecutor(len(blocks)) as pool:
            done = list(pool.map(self, blocks))
        texts: dict[str, str | None] = {}
        with ThreadPoolExecutor(READERS) as pool:
            for rows in pool.map(lambda table: self._write(table, run.writer), done):
                texts |= dict(zip(rows.field(schema.ID).to_pylist(), rows.field(schema.TEXT).to_pylist(), strict=True))
        return texts

    def _write(self, table: pa.Table, writer: UnitWriter) -> pa.StructArray:
        ((unit, rows, whole),) = block_rows([table])
        stats: dict[str, Any] = json.loads(whole[schema.STATS][0].as_py())
        writer(unit, rows, stats)
        return rows

    def _room(self, towers: int) -> int:
        """Images of all tiles that the cache has room for, each as so many towers leave it, at least 1."""
        if self.refused is not None:
            return 1
        batch = self.engine.batch
        image = batch.tower.max_tiles * batch.tower.tokens * batch.model.config.text_config.hidden_size
        return max(1, batch.images.limit_bytes // (towers * image * batch.memory.itemsize))
