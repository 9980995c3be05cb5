"""The calls that the engine would make for some rows, and what each costs: its scheduler by its rules, without a model.

As ``trimming.engine.scheduler`` has it: rows wait in order and are prefilled as memory and slots allow, images go through the
tower by tile count, each running sequence gets a token a step and leaves at once. Left out: holes between segments,
images that the cache drops, preemption, and rows that fail.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from trimming.costs import Cost, Costs, Look

Stage = Literal["tower", "prefill", "decode"]
STAGES: tuple[Stage, ...] = ("tower", "prefill", "decode")
"""As the engine times them: the tower with the projector, prefill with the cross-attention layers' keys and values."""
TowerTiles = Literal["all", "real"]

# The scheduler's own limits, which are constants of a module that imports torch (tests/test_estimation_schedule.py).
TOWER_IMAGES = 8
PREFILL_SEQUENCES = 16
PREFILL_TOKENS = 8192
PREFILL_VISUAL_TOKENS = 1 << 16
SLOT_GRAIN = 32
LEARNING, MARGIN = 0.2, 1.05
"""How fast the scheduler learns what rows keep, and how much more it expects."""


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt about one image."""

    image: int
    """Rows with the same one share its encoding, and with all features kept its cache."""
    tiles: int
    prompt: int
    """Tokens, the image's own among them; all of them see the image."""
    output: int
    kept: int
    """Visual tokens that stay."""
    capacity: int
    """Tokens that its slot is reserved for: the prompt and the longest answer that is allowed."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a stage."""

    stage: Stage
    cost: Cost
    parts: tuple[Cost, ...]
    """What runs in it one after the other, each bound by operations or by bytes; ``cost`` is their sum."""
    rows: int
    """Images of a tower's call, prompts of a prefill, sequences of a decode step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """What decides how rows are put together.

    Args:
        costs: the model's.
        kv_bytes: memory for keys and values.
        max_sequences: that decode at once, at most.
        shared: with all features kept, rows about one image share its cache.
        encode_once: images stay for the next rows that ask about them; False encodes each row's anew.
    """

    costs: Costs
    kv_bytes: float
    max_sequences: int
    shared: bool
    tower_tiles: TowerTiles = "all"
    encode_once: bool = True

    def largest(self, row: Row) -> int:
        """Sequences like ``row``, each with an image of its own, that run at once."""
        slot = -(-row.capacity // SLOT_GRAIN) * SLOT_GRAIN
        return min(self.max_sequences, int(self.kv_bytes // self.costs.kv_bytes(slot, row.kept)))

    def calls(self, rows: Sequence[Row]) -> Iterator[Call]:
        """All calls until the last row is done. Raises ``ValueError`` for a row that never fits."""
        return _Simulation(self, rows).run()


class _Simulation:
    def __init__(self, engine: Engine, rows: Sequence[Row]) -> None:
        self.engine, self.costs = engine, engine.costs
        self.waiting = deque(rows)
        self.encoded: set[int] = set()
        self.projected: set[int] = set()
        """Images whose keys and values of the first cross-attention layer are there."""
        self.step = 0
        self.ends: list[tuple[int, int, Row]] = []
        """(step after which a running row leaves, its number, it)."""
        self.capacities: Counter[int] = Counter()
        self.segments: Counter[tuple[int, int]] = Counter()
        """Users of each kept set, by (image, number of its own or -1 where shared)."""
        self.kept: dict[tuple[int, int], int] = {}
        self.started = 0
        self.text = 0
        """Tokens that the next step's self-attention reads, over all running rows."""
        self.looks: list[Look] | None = None
        self.share = {False: 1.0, True: 1.0}
        """What a row's kept set is expected to take of all its features': Engine._share."""

    def run(self) -> Iterator[Call]:
        while self.waiting or self.ends:
            yield from self._admit()
            if self.ends:
                yield self._decode()

    # ---- admission: Engine._admit and _fitting -----------------------------------------------------------------------------

    def _admit(self) -> Iterator[Call]:
        while self.waiting:
            batch, whole = self._fitting()
            enough = whole or len(batch) >= min(len(self.waiting), max(1, len(self.ends) // 8))
            if self.ends and not enough:
                return
            if not batch:
                # What it is expected to keep may be too much: the first is tried all the same.
                row = self.waiting[0]
                need = self.costs.kv_bytes(_slot(row.capacity), row.kept)
                if need > self.engine.kv_bytes:
                    have = self.engine.kv_bytes / 1e9
                    raise ValueError(f"one row needs {need / 1e9:.3g} GB for keys and values, and there are {have:.3g}")
                batch = [row]
            yield from self._start(batch)

    def _fitting(self) -> tuple[list[Row], bool]:
        costs, engine, running = self.costs, self.engine, len(self.ends)
        capacity = max(self.capacities, default=0)
        used: float = sum(self.kept.values())
        here = {image for image, _ in self.segments}
        batch: list[Row] = []
        tokens = visual = 0
        seen: set[int] = set()
        for row in self.waiting:
            tokens += row.prompt
            visual += row.tiles * costs.tokens * (row.image not in seen)
            seen.add(row.image)
            capacity = max(capacity, row.capacity)
            used += row.tiles * costs.tokens * self.share[row.image in here]
            large = tokens > PREFILL_TOKENS or visual > PREFILL_VISUAL_TOKENS
            if len(batch) == PREFILL_SEQUENCES or (batch and large):
                return batch, True
            together = running + len(batch)
            room = (together + 1) * costs.kv_bytes(_slot(capacity), 0) + costs.kv_bytes(0, int(used))
            if together == engine.max_sequences or room > engine.kv_bytes:
                break
            batch.append(row)
            here.add(row.image)
        return batch, False

    def _start(self, batch: list[Row]) -> Iterator[Call]:
        costs, engine = self.costs, self.engine
        for row in batch:
            if not engine.encode_once or row.image not in self.encoded:
                yield self._encode(row)
        tokens = costs.tokens
        first = sum(r.tiles * tokens for r in _unique(batch) if r.image not in self.projected)
        later = 0
        here = {image for image, _ in self.segments}
        for row in batch:
            self.waiting.popleft()
            key = (row.image, -1 if engine.shared else self.started)
            new = not self.segments[key]
            if new:
                self.kept[key] = row.kept
                later += row.kept
            self.segments[key] += 1
            known = row.image in here
            took = row.kept / (row.tiles * tokens) if new else 0.0
            self.share[known] += LEARNING * (MARGIN * took - self.share[known])
            here.add(row.image)
            self.capacities[row.capacity] += 1
            if row.output > 1:
                heapq.heappush(self.ends, (self.step + row.output - 1, self.started, row))
                self.text += row.prompt + 1
            else:
                self._release(row, self.started)
            self.started += 1
        if engine.encode_once:
            self.projected.update(row.image for row in batch)
        self.looks = None
        looks = [Look(row.prompt, row.tiles * tokens, row.kept) for row in batch]
        yield _call("prefill", len(batch), costs.cross_kv(first, later), costs.prefill([row.prompt for row in batch], looks))

    def _encode(self, row: Row) -> Call:
        """``row``'s image, with those of its tile count that wait: Engine._alike."""
        engine, together, seen = self.engine, 1, {row.image}
        if engine.encode_once:
            for number, other in enumerate(self.waiting):
                if together == TOWER_IMAGES or number == 2 * TOWER_IMAGES + PREFILL_SEQUENCES:
                    break
                if other.tiles == row.tiles and other.image not in seen and other.image not in self.encoded:
                    together += 1
                    seen.add(other.image)
            self.encoded |= seen
        tower = self.costs.tower(row.tiles, together, engine.tower_tiles)
        return _call("tower", together, tower, self.costs.projector(row.tiles, together))

    # ---- decoding ----------------------------------------------------------------------------------------------------------

    def _decode(self) -> Call:
        running = len(self.ends)
        if self.looks is None:
            self.looks = [Look(users, self.kept[key], self.kept[key]) for key, users in self.segments.items()]
        # Costs follow from the sum of the lengths alone.
        each, more = divmod(self.text, running)
        cost = self.costs.decode([each + 1] * more + [each] * (running - more), self.looks)
        self.text += running
        self.step += 1
        while self.ends and self.ends[0][0] <= self.step:
            _, number, row = heapq.heappop(self.ends)
            self.text -= row.prompt + row.output
            self._release(row, number)
            self.looks = None
        return _call("decode", running, cost)

    def _release(self, row: Row, number: int) -> None:
        key = (row.image, -1 if self.engine.shared else number)
        self.segments[key] -= 1
        if not self.segments[key]:
            del self.segments[key], self.kept[key]
        self.capacities[row.capacity] -= 1
        if not self.capacities[row.capacity]:
            del self.capacities[row.capacity]


def _call(stage: Stage, rows: int, *parts: Cost) -> Call:
    return Call(stage, sum(parts, Cost()), parts, rows)


def _unique(rows: Sequence[Row]) -> list[Row]:
    """One row of each image."""
    return list({row.image: row for row in rows}.values())


def _slot(tokens: int) -> int:
    return -(-tokens // SLOT_GRAIN) * SLOT_GRAIN
