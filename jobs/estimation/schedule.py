"""The calls that the engine would make for some rows, and what each costs: its scheduler by its rules, without a model.

As ``trimming.engine.scheduler`` has it: rows wait in order and are prefilled as memory and slots allow, those at once that
decide together what is kept; images go through the tower by tile count; each running sequence gets a token a step and leaves at
once. Left out: holes between segments, images that the cache drops, preemption, rows that fail, and the prefill that only
decides, for rows that can't all run at once.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

from jobs.report import Stage
from trimming.costs import Cost, Costs, Look
from trimming.engine.request import GROUP_ROWS, KeptSets, groups
from trimming.engine.scheduler import PREFILL_SEQUENCES, PREFILL_TOKENS, PREFILL_VISUAL_TOKENS, SLOT_GRAIN, TOWER_IMAGES
from trimming.engine.sequence import ceil_to
from trimming.tower import TowerPolicy, TowerTiles

LEARNING, MARGIN = 0.2, 1.05
"""How fast the scheduler learns what rows keep, and how much more it expects."""


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt about one image."""

    image: int
    """Rows with the same one share its encoding, and its cache where they keep all of it or decide together."""
    tiles: int
    prompt: int
    """Tokens, the image's own among them; all of them see the image."""
    output: int
    kept: int
    """Visual tokens that stay; the same for rows that decide together."""
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
    held: int
    """Bytes of images' keys and values that are held meanwhile, what rows share once; a decode step reads them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """What decides how rows are put together.

    Args:
        costs: the model's.
        kv_bytes: memory for keys and values.
        max_sequences: that decode at once, at most.
        kept_sets: who decides what is kept; see ``trimming.engine.Engine``. Rows about one image stand one behind the other.
        encode_once: images stay for the next rows that ask about them; False encodes them anew for each group.
        merged: what rows keep is what is left of their images once features that are alike are merged, before any text is read.
    """

    costs: Costs
    kv_bytes: float
    max_sequences: int
    kept_sets: KeptSets
    tower_tiles: TowerTiles = "pooled"
    tower_policy: TowerPolicy | None = None
    encode_once: bool = True
    merged: bool = False

    def left(self, tiles: int) -> int:
        """Visual tokens that the tower leaves of an image of so many tiles."""
        return self.costs.tower_rows(tiles, self.tower_policy)[-1]

    def there(self, row: Row) -> int:
        """Visual tokens of the row's image that there are for a layer to see."""
        return row.kept if self.merged else self.left(row.tiles)

    def decided(self, row: Row) -> bool:
        """Whether what stays follows from the image alone."""
        return self.merged or row.kept == self.left(row.tiles)

    def largest(self, row: Row, sharing: float) -> int:
        """Sequences like ``row`` that run at once; so many about one image share its kept set."""
        held = self.costs.kv_bytes(slot_tokens(row.capacity), round(row.kept / sharing))
        return min(self.max_sequences, int(self.kv_bytes // held))

    def calls(self, rows: Sequence[Row]) -> Iterator[Call]:
        """All calls until the last row is done. Raises ``ValueError`` for a row that never fits."""
        return _Simulation(self, rows).run()


@dataclass(slots=True, eq=False)
class _Group:
    """Rows that decide together, or one alone."""

    rows: list[Row]
    decided: bool = False


_Waiting = tuple[Row, _Group]
_Set = tuple[int, _Group | None]
"""A kept set: of an image, by a group; None where it is everything."""


class _Simulation:
    def __init__(self, engine: Engine, rows: Sequence[Row]) -> None:
        self.engine, self.costs = engine, engine.costs
        self.waiting: deque[_Waiting] = deque((row, group) for group in self._groups(rows) for row in group.rows)
        self.encoded: set[int | _Group] = set()
        """Images, or groups where each encodes its own."""
        self.step = 0
        self.ends: list[tuple[int, int, Row, _Set]] = []
        """(step after which a running row leaves, its number, it, what it keeps)."""
        self.capacities: Counter[int] = Counter()
        self.sets: Counter[_Set] = Counter()
        """Users of each kept set."""
        self.kept: dict[_Set, int] = {}
        self.started = 0
        self.text = 0
        """Tokens that the next step's self-attention reads, over all running rows."""
        self.looks: list[Look] | None = None
        self.share = {False: 1.0, True: 1.0}
        """What a kept set is expected to take of all its features': Engine._share."""

    def run(self) -> Iterator[Call]:
        while self.waiting or self.ends:
            yield from self._admit()
            if self.ends:
                yield self._decode()

    def _groups(self, rows: Sequence[Row]) -> Iterator[_Group]:
        for _, alike in groupby(rows, key=lambda row: row.image):
            together = list(alike)
            parts = [[place] for place in range(len(together))]
            if self.engine.kept_sets == "image":
                parts = groups([[row.image] for row in together], [row.prompt for row in together])
            decided = self.engine.decided(together[0])
            yield from (_Group([together[place] for place in part], decided) for part in parts)

    # ---- admission: Engine._admit and _fitting -----------------------------------------------------------------------------

    def _admit(self) -> Iterator[Call]:
        while self.waiting:
            first = next(self._parties())
            if len(first) > self.engine.max_sequences:
                yield from self._decide_ahead(first)
                continue
            batch, whole = self._fitting()
            enough = whole or len(batch) >= min(len(self.waiting), max(1, len(self.ends) // 8))
            if self.ends and not enough:
                return
            if not batch:
                # What they are expected to keep may be too much: the first are tried all the same.
                need = self._need(first)
                if need <= self.engine.kv_bytes:
                    batch = first
                elif len(first) > 1:
                    yield from self._decide_ahead(first)
                    continue
                else:
                    have = self.engine.kv_bytes / 1e9
                    raise ValueError(f"one row needs {need / 1e9:.3g} GB for keys and values, and there are {have:.3g}")
            yield from self._start(batch)

    def _parties(self) -> Iterator[list[_Waiting]]:
        return _parties(islice(self.waiting, PREFILL_SEQUENCES + 1 + GROUP_ROWS))

    def _need(self, party: Sequence[_Waiting]) -> int:
        """Bytes that the rows of ``party`` hold, where nothing else runs."""
        longest = max(row.capacity for row, _ in party)
        return len(party) * self.costs.kv_bytes(slot_tokens(longest), 0) + self.costs.kv_bytes(0, party[0][0].kept)

    def _fitting(self) -> tuple[list[_Waiting], bool]:
        costs, engine, running = self.costs, self.engine, len(self.ends)
        capacity = max(self.capacities, default=0)
        used: float = sum(self.kept.values())
        here = {image for image, _ in self.sets}
        batch: list[_Waiting] = []
        tokens = visual = 0
        seen: set[int] = set()
        sharing = {key[1] or key[0] for key in self.sets}
        for party in self._parties():
            row, group = party[0]
            features = self.engine.left(row.tiles)
            tokens += sum(one.prompt for one, _ in party)
            visual += engine.there(row) * (not engine.decided(row) or row.image not in seen)
            seen.add(row.image)
            capacity = max(capacity, *(one.capacity for one, _ in party))
            whose = row.image if engine.decided(row) else group
            used += features * self.share[row.image in here] * (whose not in sharing)
            large = tokens > PREFILL_TOKENS or visual > PREFILL_VISUAL_TOKENS
            if batch and (len(batch) + len(party) > PREFILL_SEQUENCES or large):
                return batch, True
            together = running + len(batch) + len(party)
            room = together * costs.kv_bytes(slot_tokens(capacity), 0) + costs.kv_bytes(0, int(used))
            if together > engine.max_sequences or room > engine.kv_bytes:
                break
            batch += party
            here.add(row.image)
            sharing.add(whose)
        return batch, False

    def _decide_ahead(self, party: Sequence[_Waiting]) -> Iterator[Call]:
        yield from self._encode(party)
        party[0][1].decided = True

    def _start(self, batch: Sequence[_Waiting]) -> Iterator[Call]:
        costs = self.costs
        yield from self._encode(batch)
        new = {self._owner(row, group): self.engine.there(row) for row, group in batch}
        later: Counter[int] = Counter()
        looks = []
        here = {image for image, _ in self.sets}
        for party in _parties(batch, started=True):
            row, group = party[0]
            visual = self.engine.left(row.tiles)
            key: _Set = (row.image, None if self.engine.decided(row) else group)
            fresh = not self.sets[key]
            if fresh:
                self.kept[key] = row.kept
                # At most: of sets that differ, what is in several is projected once.
                later[row.image] = min(later[row.image] + row.kept, visual)
            known = row.image in here
            self.share[known] += LEARNING * (MARGIN * fresh * row.kept / visual - self.share[known])
            here.add(row.image)
            looks.append(Look(sum(one.prompt for one, _ in party), self.engine.there(row), row.kept))
            for one, _ in party:
                self._run(one, key)
        cross_kv = costs.cross_kv(sum(new.values()), later.total())
        yield self._call("prefill", len(batch), cross_kv, costs.prefill([row.prompt for row, _ in batch], looks))
        # Answers of one token are done.
        self._leave()

    def _run(self, row: Row, key: _Set) -> None:
        self.waiting.popleft()
        self.sets[key] += 1
        self.capacities[row.capacity] += 1
        heapq.heappush(self.ends, (self.step + row.output - 1, self.started, row, key))
        self.started += 1
        self.text += row.prompt + 1
        self.looks = None

    def _owner(self, row: Row, group: _Group) -> int | _Group:
        """Whose an encoded image is."""
        return row.image if self.engine.encode_once else group

    def _encode(self, batch: Iterable[_Waiting]) -> Iterator[Call]:
        """The images of ``batch``, each with those of its tile count that wait: Engine._alike."""
        for row, group in batch:
            if self._owner(row, group) in self.encoded:
                continue
            found = {self._owner(row, group)}
            ahead = islice(_unique(self.waiting), 2 * TOWER_IMAGES + PREFILL_SEQUENCES)
            for other, its_group in ahead:
                if len(found) == TOWER_IMAGES:
                    break
                if other.tiles == row.tiles and self._owner(other, its_group) not in self.encoded:
                    found.add(self._owner(other, its_group))
            self.encoded |= found
            policy = self.engine.tower_policy
            tower = self.costs.tower(row.tiles, len(found), self.engine.tower_tiles, policy)
            after = [self.costs.projector(row.tiles, len(found), policy)]
            if self.engine.merged:
                after.append(self.costs.clustering(row.tiles, len(found), policy))
            yield self._call("tower", len(found), tower, *after)

    # ---- decoding ----------------------------------------------------------------------------------------------------------

    def _decode(self) -> Call:
        running = len(self.ends)
        if self.looks is None:
            self.looks = [Look(users, self.kept[key], self.kept[key]) for key, users in self.sets.items()]
        # Costs follow from the sum of the lengths alone.
        each, more = divmod(self.text, running)
        call = self._call("decode", running, self.costs.decode([each + 1] * more + [each] * (running - more), self.looks))
        self.text += running
        self.step += 1
        self._leave()
        return call

    def _leave(self) -> None:
        """Rows leave whose answer is done."""
        while self.ends and self.ends[0][0] <= self.step:
            _, _, row, key = heapq.heappop(self.ends)
            self.text -= row.prompt + row.output
            self.sets[key] -= 1
            if not self.sets[key]:
                del self.sets[key], self.kept[key]
            self.capacities[row.capacity] -= 1
            if not self.capacities[row.capacity]:
                del self.capacities[row.capacity]
            self.looks = None

    def _call(self, stage: Stage, rows: int, *parts: Cost) -> Call:
        return Call(stage, sum(parts, Cost()), parts, rows, self.costs.kv_bytes(0, sum(self.kept.values())))


def slot_tokens(capacity: int) -> int:
    """Tokens that the slot of such a row has room for."""
    return ceil_to(capacity, SLOT_GRAIN)


def _parties(rows: Iterable[_Waiting], started: bool = False) -> Iterator[list[_Waiting]]:
    """``rows`` parted into those that must be prefilled at once, or that have ``started`` together."""
    for group, several in groupby(rows, key=lambda one: one[1]):
        party = list(several)
        if started or not group.decided:
            yield party
        else:
            yield from ([one] for one in party)


def _unique(rows: Iterable[_Waiting]) -> Iterator[_Waiting]:
    """The first of each group."""
    for _, several in groupby(rows, key=lambda one: one[1]):
        yield next(several)
