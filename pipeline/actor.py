"""What Ray runs: an actor takes a unit's rows, feeds them to its engine as they are decoded, and emits as many."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa

from pipeline import images, schema
from pipeline.attempts import LETHAL, MOST, Attempts, Log, Trial
from pipeline.config import RunConfig
from pipeline.decoder import Decoder
from pipeline.gauges import Gauges
from pipeline.model import Checkpoint
from pipeline.pictures import ImageError
from pipeline.rows import Row, pack, tally
from pipeline.schema import Columns
from pipeline.source import READ_SECONDS, block_rows

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from pipeline.engine import Engine
    from trimming.engine import Completion

logger = logging.getLogger(__name__)

Seconds = defaultdict[str, float]
"""Seconds by stage."""

DECODERS = 4
"""Threads that decode images, at most; never more than the machine's cores."""
AHEAD = 64
"""Rows that are decoded or wait for the engine, beyond those it runs: enough to fill it and for any group
(``trimming.engine.request.GROUP_ROWS``), few enough for their tiles' memory."""
DECODED_AHEAD = 16
"""Groups of rows whose images are decoded before the engine takes them."""
REPORT_ROWS = 32
COUNTERS = (
    "images_encoded",
    "image_hits",
    "decode_steps",
    "decode_tokens",
    "cross_kv_byte_seconds",
    "cross_kv_byte_seconds_full",
    "cross_kv_bytes_read",
)
PEAKS = ("peak_sequences", "peak_kv_bytes", "peak_cross_kv_bytes")
"""What a unit's statistics have of ``trimming.engine.Statistics``."""


class Answerer:
    """The class that ``map_batches`` makes an actor of. A batch is a one-row table: a unit.

    Ray calls it from several threads, each with a unit of its own. All of them feed one engine, so that the end of one unit and
    the beginning of the next decode side by side.

    Args:
        config: the run's.
        columns: the input's.
        checkpoint: which model to load.
        report: called with (rows, errors) every now and then, for progress.
        attempts: where units are noted that are begun and ended; default: nowhere.
    """

    def __init__(
        self,
        config: RunConfig,
        columns: Columns,
        checkpoint: Checkpoint,
        report: Callable[[int, int], object] = lambda rows, errors: None,
        attempts: Log | None = None,
    ) -> None:
        self.config, self.columns, self.checkpoint, self.report = config, columns, checkpoint, report
        self.attempts: Log = attempts or Attempts()
        self.turns, self.gauges = _Turns(), Gauges()
        self.refused: str | None = None
        self.load_seconds: float | None = None
        self.accounts = threading.Lock()
        self._start()
        self.unit_ended = time.perf_counter()

    def _start(self) -> None:
        """Loads the model, and begins what feeds it."""
        began = time.perf_counter()
        cores = _cores()
        self.decoders = _Decoders(min(DECODERS, cores))
        self.room = _Room(self.config.batch_size + AHEAD)
        self.accounted: dict[str, float] = {}
        self.device = _Device()
        try:
            self.engine: Engine = self.device.start(partial(_load, self.config, self.checkpoint), cores)
            weakref.finalize(self, self.device.stop)
            model_tiles = self.engine.model.config.vision_config.max_num_tiles
            self.tiler = images.Tiler(self.engine.processor, self.config.max_tiles, model_tiles)
        except Exception as error:  # noqa: BLE001 - told by the first unit instead
            # Ray starts an actor over whose constructor raises, and prints every traceback; a unit that raises ends the run.
            self.refused = f"{type(error).__name__}: {error}"
            return
        self.load_seconds = time.perf_counter() - began

    def __call__(self, unit: pa.Table) -> pa.Table:
        """One row (``unit``, ``rows``, ``read_seconds``) in; one row (``unit``, ``rows``, ``stats``) out.

        The rows come out in their order and of the output's type.
        """
        if self.refused is not None:
            raise RuntimeError(f"model={self.config.model!r} can't be loaded: {' '.join(self.refused.split())}")
        ((name, packed, table),) = block_rows([unit])
        seconds: Seconds = defaultdict(float, read=table[READ_SECONDS][0].as_py())
        trial = self.attempts.begin(name)
        if trial.deaths > MOST:
            raise RuntimeError(f"unit {name} has ended its actor {trial.deaths} times")
        try:
            with self.turns.alone() if trial.careful else self.turns.together():
                rows = self._unpack(packed)
                if trial.careful:
                    self._answer_carefully(rows, name, trial, seconds)
                else:
                    self._answer_all(rows, seconds)
        except Exception as error:
            if self.engine.batch.failed is not None:
                _end_actor(error)
            raise
        loading, self.load_seconds = self.load_seconds, None
        if loading is not None:
            seconds["load"] = loading
        counts = self._account(seconds)
        output = pack(rows, packed, self.columns, self.config.write_kept)
        stats = {
            **tally(rows, packed, self.columns),
            **counts,
            "seconds": dict(seconds),
            "actor_seconds": self._actor_seconds(),
            "gpus": _gpus(self.config, self.engine),
            "device": _device_name(self.engine),
            "dtype": str(self.engine.model.dtype).removeprefix("torch."),
            "peak_memory_bytes": _peak_memory(self.engine),
        }
        self.gauges.unit(stats)
        for row in rows:
            if row.error is not None:
                logger.warning("unit %s, id %s: %s", name, row.id, row.error)
        listed = pa.LargeListArray.from_arrays(pa.array([0, len(output)], pa.int64()), output)
        self.attempts.end(name)
        return pa.table({schema.UNIT: pa.array([name]), schema.ROWS: listed, schema.STATS: pa.array([json.dumps(stats)])})

    # ---- rows in ----------------------------------------------------------------------------------------------------------

    def _unpack(self, packed: pa.StructArray) -> list[Row]:
        ids = packed.field(schema.ID).to_pylist()
        questions = packed.field(schema.TEXT).to_pylist()
        rows = []
        for id, question, cell in zip(ids, questions, packed.field(schema.IMAGES), strict=True):
            members = cell.as_py()
            row = Row(id, len(members), [m["bytes"] for m in members if m["bytes"] is not None], question)
            row.keys = [images.digest(data) for data in row.files]
            row.digest = images.row_digest(row.keys)
            broken = next((m["error"] for m in members if m["error"] is not None), None)
            if broken is not None:
                row.fail(broken)
            rows.append(row)
        return rows

    def _examine(self, rows: Sequence[Row], seconds: Seconds, before: Callable[[int], object] = lambda place: None) -> None:
        """Sets the prompt, or the error, of each row that has no error yet; ``before`` is told each one's place first."""
        began = time.perf_counter()
        for place, row in enumerate(rows):
            if row.error is not None:
                continue
            before(place)
            try:
                self._set_prompt(row)
            except Exception as error:  # noqa: BLE001 - the row's boundary
                row.fail(error)
        seconds["examine"] += time.perf_counter() - began

    def _set_prompt(self, row: Row) -> None:
        asked = self.config.prompt if self.config.prompt is not None else row.question
        if asked is None or not asked.strip():
            row.fail(f"no question: column {self.columns.question!r} is null, empty or not UTF-8")
            return
        if self.config.job == "caption" and not row.files:
            row.fail(f"no image to caption: column {self.columns.image!r} is null or empty")
            return
        row.tokens = self.engine.prompter.tokens(asked, len(row.files))
        room = self.engine.max_prompt_tokens
        if len(row.tokens) > room:
            row.fail(f"the prompt's {len(row.tokens)} tokens are over the {room} that the model has room for")

    # ---- through the engine -----------------------------------------------------------------------------------------------

    def _answer_all(self, rows: Sequence[Row], seconds: Seconds) -> None:
        """Answers the rows that have no error yet."""
        self._examine(rows, seconds)
        self._answer_groups(rows, self._groups(rows), seconds)

    def _answer_carefully(self, rows: Sequence[Row], unit: str, trial: Trial, seconds: Seconds) -> None:
        """The same with one row examined, and one group answered, at a time: each is announced before it is begun."""
        for place in trial.lethal:
            died = f"the actor died each time when this row, or the rows of its image together, were answered ({LETHAL} times)"
            rows[place].fail(f"left out, as {died}")
        self._examine(rows, seconds, before=lambda place: self.attempts.at(unit, [place]))
        for group in self._groups(rows):
            self.attempts.at(unit, group)
            self._answer_groups(rows, [group], seconds)
        self.attempts.at(unit, [])

    def _groups(self, rows: Sequence[Row]) -> list[list[int]]:
        """Places of examined rows that decide together what is kept. Those that have failed are reported, and in no group."""
        fine = [place for place, row in enumerate(rows) if row.error is None]
        failed = len(rows) - len(fine)
        self.report(failed, failed)
        together = self.engine.groups([rows[place].keys for place in fine], [len(rows[place].tokens) for place in fine])
        return [[fine[number] for number in numbers] for numbers in together]

    def _answer_groups(self, rows: Sequence[Row], places: Sequence[Sequence[int]], seconds: Seconds) -> None:
        """Answers groups of ``rows``, each given by its places: it goes to the engine whole once its images are decoded."""
        groups = [[rows[place] for place in group] for group in places]
        decoding = _Decoding(self.decoders, self.tiler, groups)
        asked: list[tuple[Row, Future[Completion]]] = []
        seen = done = 0
        for group in groups:
            self.room.take(len(group))
            submitted: list[tuple[Row, Future[Completion]]] = []
            try:
                submitted = self._submit(group, decoding)
            finally:
                self.room.give(len(group) - len(submitted))
            for _, future in submitted:
                future.add_done_callback(partial(_give, self.room))
            asked += submitted
            if len(asked) - seen >= REPORT_ROWS:
                seen = len(asked)
                self.gauges.running(len(self.engine.batch.decode.running))
                finished = sum(future.done() for _, future in asked)
                self.report(finished - done, 0)
                done = finished
        seconds["decode_images"] += decoding.seconds
        for number, (row, future) in enumerate(asked):
            self._take(row, future)
            if number >= done and number % REPORT_ROWS == REPORT_ROWS - 1:
                self.report(number + 1 - done, 0)
                done = number + 1
        answered = [row for group in groups for row in group]
        self.report(len(answered) - done, sum(row.error is not None for row in answered))

    def _submit(self, group: Sequence[Row], decoding: _Decoding) -> list[tuple[Row, Future[Completion]]]:
        """The group's rows with their completions to come; none where its images can't be decoded and all rows have failed."""
        from pipeline.engine import Prompt

        failure: Exception | str
        try:
            tiles = decoding.take()
            for row in group:
                row.tiles = sum(len(t.pixels) for t in tiles)
                row.grids = [t.grid for t in tiles]
            prompts = [Prompt(row.id, row.tokens, tiles, row.keys) for row in group]
            return list(zip(group, self.engine.submit_together(prompts), strict=True))
        except ImageError as error:
            failure = str(error)
        except Exception as error:
            if self.engine.batch.failed is not None:
                raise
            failure = error
        for row in group:
            row.fail(failure)
        return []

    def _take(self, row: Row, future: Future[Completion]) -> None:
        """The row's answer or error. Raises where the device itself has failed: the unit is done again by whoever continues."""
        try:
            row.answer = self.engine.answer(len(row.tokens), future.result())
        except Exception as error:
            if self.engine.batch.failed is not None:
                raise
            row.fail(error)

    def _account(self, seconds: Seconds) -> dict[str, float]:
        """Adds what the engine has spent since this was last asked to ``seconds``, and returns its counts since then.

        Units run side by side in one engine, so one unit's share is partly another's; over a run they add up once.
        """
        statistics = self.engine.batch.statistics
        with self.accounts:
            now = {name: getattr(statistics, name) for name in COUNTERS} | dict(self.engine.batch.seconds)
            since = {name: value - self.accounted.get(name, 0) for name, value in now.items()}
            self.accounted = now
        for stage in now.keys() - set(COUNTERS):
            seconds[stage] += since[stage]
        return {name: since[name] for name in COUNTERS} | {name: getattr(statistics, name) for name in PEAKS}

    def _actor_seconds(self) -> float:
        """Seconds that a unit which ends now stands for: since the unit before it ended, or since the actor was ready.

        Units run side by side and wait for rows in between; so cut, an actor's units add up to its time, once.
        """
        with self.accounts:
            now = time.perf_counter()
            since, self.unit_ended = now - self.unit_ended, now
        return since


class _Decoders:
    """Threads, and a decoding process for each."""

    def __init__(self, count: int) -> None:
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="decode")
        self.submit = self._pool.submit

    def __call__(self, data: bytes) -> Image:
        """The image, on the thread's own process."""
        if not hasattr(self._own, "decode"):
            self._own.decode = Decoder()
        image: Image = self._own.decode(data)
        return image


class _Turns:
    """Units that run together, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._together = 0
        self._alone = False

    @contextmanager
    def together(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._together += 1
        try:
            yield
        finally:
            with self._changed:
                self._together -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._alone = True
            self._changed.wait_for(lambda: not self._together)
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


class _Room:
    """Room for so many rows. A group takes its room whole, however little of it is free at once."""

    def __init__(self, rows: int) -> None:
        self._free = threading.BoundedSemaphore(rows)
        self._turn = threading.Lock()

    def take(self, rows: int) -> None:
        # Two groups that had a part of their room each could wait for each other.
        with self._turn:
            for _ in range(rows):
                self._free.acquire()

    def give(self, rows: int) -> None:
        if rows:
            self._free.release(rows)


class _Decoding:
    """Images on their way from files to tiles, some groups of rows ahead of the engine; equal files are decoded once."""

    def __init__(self, decoders: _Decoders, tiler: images.Tiler, groups: Sequence[Sequence[Row]]) -> None:
        self.decoders, self.tiler, self.groups = decoders, tiler, groups
        self.uses = Counter(key for group in groups for key in group[0].keys)
        self.tiles: dict[str, Future[images.Tiles]] = {}
        self.begun = self.taken = 0
        self.seconds = 0.0
        self._lock = threading.Lock()

    def take(self) -> list[images.Tiles]:
        """The tiles of the next group, whose rows have the same images. Raises what these can't be decoded for."""
        keys = self.groups[self.taken][0].keys
        self.taken += 1
        while self.begun < min(len(self.groups), self.taken + DECODED_AHEAD):
            group = self.groups[self.begun]
            for key, data in zip(group[0].keys, group[0].files, strict=True):
                if key not in self.tiles:
                    self.tiles[key] = self.decoders.submit(self._decode, data)
            for row in group:
                row.files = []
            self.begun += 1
        futures = [self.tiles[key] for key in keys]
        for key in keys:
            # Tiles that no later group wants must not stay for the rest of the unit.
            self.uses[key] -= 1
            if not self.uses[key]:
                self.tiles.pop(key, None)
        return [future.result() for future in futures]

    def _decode(self, data: bytes) -> images.Tiles:
        began = time.perf_counter()
        try:
            return self.tiler(self.decoders(data))
        finally:
            with self._lock:
                self.seconds += time.perf_counter() - began


class _Device:
    """The one thread on which the model is loaded and run: PyTorch keeps its number of CPU threads and CUDA's workspaces for
    each thread. It knows nothing of the actor, which can so be let go."""

    def __init__(self) -> None:
        self._ends = threading.Event()
        self._engine: Future[Engine] = Future()
        self._thread: threading.Thread | None = None

    def start(self, load: Callable[[], Engine], cores: int) -> Engine:
        """Loads, and serves from then on. Raises what ``load`` raises."""
        self._thread = threading.Thread(target=self._run, args=(load, cores), name="device", daemon=True)
        self._thread.start()
        return self._engine.result()

    def stop(self) -> None:
        self._ends.set()
        if self._engine.done() and self._engine.exception() is None:
            self._engine.result().batch.wake()
        # The last reference to an actor may be let go by a future's callback, on the thread itself.
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=10)

    def _run(self, load: Callable[[], Engine], cores: int) -> None:
        import torch

        # Ray's own default would be one CPU thread (OMP_NUM_THREADS).
        torch.set_num_threads(cores)
        try:
            engine = load()
        except BaseException as error:  # noqa: BLE001 - raised by start
            self._engine.set_exception(error)
            return
        self._engine.set_result(engine)
        # What it raises, every unit gets to see.
        with suppress(Exception):
            engine.batch.serve(self._ends)


def _end_actor(error: Exception) -> None:
    """Ends the process where it is an actor's: its device has failed for good, and Ray begins another."""
    import ray

    if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
        print(f"the device has failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def _give(room: _Room, _: object) -> None:
    room.give(1)


def _load(config: RunConfig, checkpoint: Checkpoint) -> Engine:
    from pipeline.engine import Decoding, Engine, Limits
    from pipeline.model import build_policy, build_tower_policy, load_model, load_processor
    from trimming.engine import Sampling

    checkpoint.check()
    sampling = Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=config.seed)
    return Engine(
        load_model(checkpoint, config.dtype, _devices(config)),
        load_processor(checkpoint),
        build_policy(config),
        config.rows,
        Decoding(max_new_tokens=config.max_new_tokens, sampling=sampling, stop=config.stop),
        Limits(
            max_sequences=config.batch_size,
            kv_bytes=None if config.kv_gib is None else int(config.kv_gib * 2**30),
            image_cache_bytes=int(config.image_cache_gib * 2**30),
        ),
        config.tower_tiles,
        config.kept_sets,
        build_tower_policy(config),
    )


def _devices(config: RunConfig) -> list[torch.device]:
    """Those of a copy of the model: of the machine's GPUs an actor sees only those that Ray has given it."""
    import torch

    if not torch.cuda.is_available():
        return [torch.device("cpu")]
    return [torch.device("cuda", i) for i in range(max(1, int(config.gpus_per_actor or 1)))]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device_name(engine: Engine) -> str:
    import torch

    if engine.device.type == "cuda":
        return torch.cuda.get_device_name(engine.device)
    return f"CPU, {_cores()} threads"


def _gpus(config: RunConfig, engine: Engine) -> float:
    """GPUs that the actor holds."""
    if engine.device.type != "cuda":
        return 0.0
    return 1.0 if config.gpus_per_actor is None else float(config.gpus_per_actor)


def _peak_memory(engine: Engine) -> int:
    import resource

    import torch

    if engine.device.type == "cuda":
        return sum(torch.cuda.max_memory_allocated(stage.device) for stage in engine.batch.stages)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
