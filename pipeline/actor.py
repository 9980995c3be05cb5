"""What Ray runs: an actor takes a unit's rows, answers them in batches while the next are decoded, and emits as many."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import pyarrow as pa

from pipeline import images, schema
from pipeline.config import RunConfig
from pipeline.model import Checkpoint
from pipeline.rows import Row, pack, tally
from pipeline.schema import Columns
from pipeline.source import READ_SECONDS, block_rows

if TYPE_CHECKING:
    from pipeline.engine import Engine

Seconds = defaultdict[str, float]
"""Seconds by stage."""

DECODERS = 4
"""Threads that decode images, at most; never more than the machine's cores."""


class Answerer:
    """The class that ``map_batches`` makes an actor of. A batch is a one-row table: a unit.

    Args:
        config: the run's.
        columns: the input's.
        checkpoint: which model to load.
        report: called with (rows, errors) after every batch, for progress.
    """

    def __init__(
        self,
        config: RunConfig,
        columns: Columns,
        checkpoint: Checkpoint,
        report: Callable[[int, int], object] = lambda rows, errors: None,
    ) -> None:
        self.config, self.columns, self.checkpoint, self.report = config, columns, checkpoint, report
        began = time.perf_counter()
        cores = _cores()
        self.decoders = ThreadPoolExecutor(min(DECODERS, cores), thread_name_prefix="decode")
        # All of the model's work happens on this thread: Ray calls an actor from several, and PyTorch keeps its number of CPU
        # threads and CUDA's workspaces for each. Ray's own default would be one CPU thread (OMP_NUM_THREADS).
        self.device = ThreadPoolExecutor(1, thread_name_prefix="device", initializer=_use_cores, initargs=(cores,))
        self.refused: str | None = None
        try:
            self.engine: Engine = self.device.submit(self._load).result()
        except Exception as error:  # noqa: BLE001 - told by the first unit instead
            # Ray starts an actor over whose constructor raises, and prints every traceback; a unit that raises ends the run.
            self.refused = f"{type(error).__name__}: {error}"
            return
        self.tiler = images.Tiler(self.engine.processor)
        self.load_seconds: float | None = time.perf_counter() - began

    def _load(self) -> Engine:
        import torch

        from pipeline.engine import Decoding, Engine
        from pipeline.model import build_policy, load_model, load_processor

        config = self.config
        decoding = Decoding(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            seed=config.seed,
        )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_model(self.checkpoint, config.dtype, device)
        return Engine(model, load_processor(self.checkpoint), build_policy(config), config.rows, decoding)

    def __call__(self, unit: pa.Table) -> pa.Table:
        """One row (``unit``, ``rows``, ``read_seconds``) in; one row (``unit``, ``rows``, ``stats``) out.

        The rows come out in their order and of the output's type.
        """
        if self.refused is not None:
            raise RuntimeError(f"model={self.config.model!r} can't be loaded: {' '.join(self.refused.split())}")
        ((name, packed, table),) = block_rows([unit])
        seconds: Seconds = defaultdict(float, read=table[READ_SECONDS][0].as_py())
        rows = self._unpack(packed, seconds)
        self._answer_all(rows, seconds)
        # Two units take turns on the device, so each sees some of the other's seconds; over a run they add up once.
        for stage, spent in self.device.submit(self._take_seconds).result().items():
            seconds[stage] += spent
        loading, self.load_seconds = self.load_seconds, None
        if loading is not None:
            seconds["load"] = loading
        output = pack(rows, packed, self.columns, self.config.write_kept)
        stats = json.dumps(
            {
                **tally(rows, packed, self.columns),
                "seconds": dict(seconds),
                "device": _device_name(self.engine),
                "dtype": str(self.engine.model.dtype).removeprefix("torch."),
                "peak_memory_bytes": _peak_memory(self.engine),
            }
        )
        listed = pa.LargeListArray.from_arrays(pa.array([0, len(output)], pa.int64()), output)
        return pa.table({schema.UNIT: pa.array([name]), schema.ROWS: listed, schema.STATS: pa.array([stats])})

    # ---- rows in ----------------------------------------------------------------------------------------------------------

    def _unpack(self, packed: pa.StructArray, seconds: Seconds) -> list[Row]:
        began = time.perf_counter()
        ids = packed.field(schema.ID).to_pylist()
        questions = packed.field(schema.TEXT).to_pylist()
        rows = []
        for id, question, cell in zip(ids, questions, packed.field(schema.IMAGES), strict=True):
            members = cell.as_py()
            row = Row(id, len(members), [m["bytes"] for m in members if m["bytes"] is not None])
            row.digest = images.digest(row.files)
            broken = next((m["error"] for m in members if m["error"] is not None), None)
            try:
                if broken is not None:
                    row.fail(broken)
                else:
                    self._examine(row, question)
            except Exception as error:  # noqa: BLE001 - the row's boundary
                row.fail(str(error) if isinstance(error, images.ImageError) else error)
            rows.append(row)
        seconds["examine"] += time.perf_counter() - began
        return rows

    def _examine(self, row: Row, question: str | None) -> None:
        asked = self.config.prompt if self.config.prompt is not None else question
        if asked is None or not asked.strip():
            row.fail(f"no question: column {self.columns.question!r} is null, empty or not UTF-8")
            return
        if self.config.job == "caption" and not row.files:
            row.fail(f"no image to caption: column {self.columns.image!r} is null or empty")
            return
        row.tiles = sum(self.tiler.tile_count(*images.header(data)) for data in row.files)
        row.tokens = self.engine.prompter.tokens(asked, len(row.files))
        room = self.engine.max_prompt_tokens
        if len(row.tokens) > room:
            row.fail(f"the prompt's {len(row.tokens)} tokens are over the {room} that the model has room for")

    # ---- batches ----------------------------------------------------------------------------------------------------------

    def _answer_all(self, rows: Sequence[Row], seconds: Seconds) -> None:
        """Answers the rows that have no error yet: a batch is on the device while the next ones are decoded."""
        broken = sum(row.error is not None for row in rows)
        if broken:
            self.report(broken, broken)
        batches = self._batches(rows)
        decoding: deque[list[Future[float]]] = deque()
        answering: deque[tuple[list[Row], Future[None]]] = deque()
        for i, batch in enumerate(batches):
            while len(decoding) < 2 and i + len(decoding) < len(batches):
                decoding.append([self.decoders.submit(self._decode, row) for row in batches[i + len(decoding)]])
            seconds["decode"] += sum(done.result() for done in decoding.popleft())
            answering.append((batch, self.device.submit(self._answer, [row for row in batch if row.error is None])))
            while len(answering) > (i < len(batches) - 1):
                finished, future = answering.popleft()
                future.result()
                self.report(len(finished), sum(row.error is not None for row in finished))

    def _batches(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows of one number of images together, like tile counts and lengths side by side: that is what padding costs."""
        waiting = [row for row in rows if row.error is None]
        waiting.sort(key=lambda row: (len(row.files), row.tiles, len(row.tokens)), reverse=True)
        batches: list[list[Row]] = []
        for row in waiting:
            if not batches or len(batches[-1]) == self.config.batch_size or len(batches[-1][0].files) != len(row.files):
                batches.append([])
            batches[-1].append(row)
        return batches

    def _decode(self, row: Row) -> float:
        began = time.perf_counter()
        try:
            row.images = [self.tiler(images.decode(data)) for data in row.files]
            row.tiles = sum(len(tiles.pixels) for tiles in row.images)
        except images.ImageError as error:
            row.fail(str(error))
        except Exception as error:  # noqa: BLE001 - the row's boundary
            row.fail(error)
        return time.perf_counter() - began

    def _answer(self, rows: Sequence[Row]) -> None:
        """Runs on the device's thread. A batch that fails is taken apart, so that only its culprit fails."""
        from torch import OutOfMemoryError

        if not rows:
            return
        failure = self._try(rows)
        if failure is not None and len(rows) == 1:
            rows[0].fail(failure)
        elif failure is not None:
            size = -(-len(rows) // 2) if isinstance(failure, OutOfMemoryError) else 1
            for i in range(0, len(rows), size):
                self._answer(rows[i : i + size])
        for row in rows:
            row.grids = [tiles.grid for tiles in row.images] or row.grids
            row.images = []

    def _try(self, rows: Sequence[Row]) -> Exception | None:
        """Answers ``rows`` at once, or says why not. Raises where the device itself has failed."""
        from pipeline.engine import Prompt

        try:
            answers = self.engine.generate([Prompt(row.id, row.tokens, row.images) for row in rows])
        except Exception as error:
            if not self.engine.healthy():
                # Every later row would fail as well: the unit fails, and is done again by whoever continues the run.
                raise
            # The traceback's frames hold the batch's tensors.
            return error.with_traceback(None)
        for row, answer in zip(rows, answers, strict=True):
            row.answer = answer
        return None

    def _take_seconds(self) -> dict[str, float]:
        taken = dict(self.engine.seconds)
        self.engine.seconds.clear()
        return taken


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _use_cores(cores: int) -> None:
    import torch

    torch.set_num_threads(cores)


def _device_name(engine: Engine) -> str:
    import torch

    if engine.device.type == "cuda":
        return torch.cuda.get_device_name(engine.device)
    return f"CPU, {_cores()} threads"


def _peak_memory(engine: Engine) -> int:
    import resource

    import torch

    if engine.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(engine.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
