"""What ``make pareto`` measures on one data set: cells of work, each measured once and kept in a journal.

A cell is one policy, at one view of the images, on one block of a data set. A block's cells run one after the other in an order
of their own, so that a machine that grows faster or slower favours no policy. The journal has a line for each cell, keyed by a
digest of what decides it: the model, the rows, the policy and the code. What is timed end to end, to be compared by its
seconds, is one line a block: all ways take their turns there within some minutes, or all do anew.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import pareto_bench
from benchmarks.pareto_bench import Bench, Cell, DataSet
from benchmarks.pareto_contenders import (
    CLOSE,
    CONTENDERS,
    FEWER,
    FEWER_TILES,
    REFERENCE,
    TARGETS,
    WAYS,
    WHOLE,
    Contender,
    View,
    Way,
)
from demo.table import ROOT, code, sha256
from pipeline.images import digest
from trimming import KeepAll, Policy, tower
from trimming.engine import KeptSets
from trimming.tower import TowerPolicy

TOLERANCE, TRIES = 0.004, 12
"""A search ends at a share this near, or after as many passes over a block,"""
FINEST = 1 / 2048
"""or between parameters this near: no image has more than 1,028 features."""
ROUNDS = 3
"""Searches for one share at most, each followed by a pass over all blocks."""
TURNS = 3
"""Passes of each way over a block, of which the fastest counts: what else ran on the machine during the others does not."""
PRIMITIVE_CACHE = 16384
"""Capacity of oneDNN's cache of compiled products, one for each shape. The ways together need more than its default of 1,024:
those whose shapes others share found theirs compiled, others compiled up to a hundred in a pass of 0.7 s."""

# ---- the journal ------------------------------------------------------------------------------------------------------------


class Journal:
    """Finished work by key, a line of JSON each; a last line that was cut off is done again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = file.read_text().rpartition("\n")[0].splitlines() if file.exists() else []
        self.lines: dict[str, Cell] = {line["key"]: line for line in map(json.loads, whole)}
        if whole:
            file.write_text("\n".join(whole) + "\n")
        else:
            file.write_text("")

    def once(self, key: str, work: Callable[[], Cell]) -> Cell:
        """What the journal has under ``key``, or ``work()``, which it then has."""
        if key not in self.lines:
            self.lines[key] = {"key": key, **work()}
            with self.file.open("a") as out:
                out.write(json.dumps(self.lines[key]) + "\n")
        return self.lines[key]


def key_of(*what: Any) -> str:
    return hashlib.sha256(json.dumps(what, default=repr).encode()).hexdigest()[:32]


def code_of(*policies: Policy | TowerPolicy) -> str:
    """A digest of the code that decides what ``policies`` do: all that any policy runs, and of the policies' own files those of
    their classes. So a new policy leaves what was measured of others as it is."""
    lists = {ROOT / "trimming/__init__.py", ROOT / "trimming/tower/__init__.py"}
    theirs = {*(ROOT / "trimming/policies").glob("*.py")}.union(*(files_of(each) for each in tower_policies()))
    theirs -= files_of(TowerPolicy)
    own = set().union(*(files_of(kind) for each in policies for kind in kinds_of(each)))
    files = {*(set(code()) - theirs - lists), *own, Path(pareto_bench.__file__)}
    return key_of(sorted((path.name, sha256(path)) for path in files))


def files_of(kind: type) -> set[Path]:
    """Of a policy's class and those it is made from."""
    return {Path(inspect.getfile(c)) for c in kind.__mro__ if c.__module__.startswith("trimming.")}


def kinds_of(policy: Policy | TowerPolicy) -> list[type]:
    """Its class, and that of a policy within it."""
    return [type(policy), *(type(each) for each in vars(policy).values() if isinstance(each, Policy))]


def tower_policies() -> list[type]:
    return [each for each in vars(tower).values() if isinstance(each, type) and issubclass(each, TowerPolicy)]


# ---- what is measured -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """One point of the plots."""

    contender: str
    """Also ``all features``, ``fewer tiles`` and ``lower resolution``."""
    target: float | None
    """The share that was asked for; None for what comes at a share of its own."""
    share: float
    """The share that its parameter was chosen for."""
    policy: Policy = field(default_factory=KeepAll)
    parameter: float | None = None
    view: View = WHOLE
    kept_sets: KeptSets = "image"


@dataclass(frozen=True, slots=True)
class Work:
    """Something to measure."""

    kind: str
    """All of one kind take about as long."""
    do: Callable[[], object]


class Study:
    """One data set's cells: entries' at equal held bytes, and ways' end to end."""

    def __init__(self, bench: Bench, journal: Journal, data: DataSet, say: Callable[[str], None]) -> None:
        self.bench, self.journal, self.data, self.say = bench, journal, data, say
        self._codes: dict[tuple[type, ...], str] = {}
        # Shares by parameter, of each contender that is searched for.
        self._found: defaultdict[str, dict[float, float]] = defaultdict(dict)
        self._rows = key_of([(row.id, row.question, row.answer, digest(row.image)) for row in data.rows])
        self._model = sha256(bench.weights)
        # Before anything is measured: files may change meanwhile, what was imported does not.
        for policy in (KeepAll(), *(contender.make(0.5) for contender in CONTENDERS)):
            self._code(policy)
        self._ways_key(WAYS, 0)

    def plan(self, contenders: Sequence[Contender] = CONTENDERS, targets: Sequence[float] = TARGETS) -> list[Entry]:
        """All entries, with their parameters found.

        The reference comes as near to each target as its data let it (one tile has 65 features, and each head takes a whole
        number of them); the others are matched to what it came to, and so does it to what fewer tiles came to.
        """
        by_name = {contender.name: contender for contender in contenders}
        reference = by_name[REFERENCE]
        reached = {target: self.find(reference, target) for target in targets}
        entries = [Entry("all features", None, 1.0)]
        for contender in contenders:
            for target, (_, share) in reached.items():
                parameter = reached[target][0] if contender is reference else self.parameter(contender, share)
                if parameter is not None:
                    policy, kept_sets = contender.make(parameter), contender.kept_sets
                    entries.append(Entry(contender.name, target, share, policy, parameter, kept_sets=kept_sets))
        had = [share for _, share in reached.values()]
        for rival in list(self.rivals(reached)):
            entries.append(rival)
            if all(abs(share - rival.share) > CLOSE for share in had):
                k, share = self.find(reference, rival.share)
                had.append(share)
                entries.append(Entry(REFERENCE, None, share, reference.make(k), k))
        return entries

    def ways(self, ways: Sequence[Way] = WAYS) -> list[Way]:
        """Those that are ways of their own here: images of one tile have no fewer."""
        rows = self.data.rows
        most = self.bench.tiles(rows, WHOLE)
        return [way for way in ways if way.view.max_tiles is None or self.bench.tiles(rows, way.view) < most]

    def rivals(self, reached: dict[float, tuple[float, float]]) -> Iterator[Entry]:
        """Fewer tiles, and images shrunk to each of the reference's shares that can be had and to the least there is."""
        rows = self.data.rows
        most = self.bench.tiles(rows, WHOLE)
        floor = self.bench.tiles(rows, View(max_tiles=1)) / most
        if floor == 1:
            return
        for view in FEWER_TILES:
            yield Entry(FEWER, None, self.bench.tiles(rows, view) / most, view=view)
        wanted = {target: share for target, (_, share) in reached.items() if share > floor + CLOSE}
        for target, share in [*wanted.items(), (None, floor)]:
            scale, found = find(lambda s: self.bench.tiles(rows, View(scale=s)) / most, share, {}, 0.001, 20)
            yield Entry("lower resolution", target, found, view=View(scale=scale))

    def parameter(self, contender: Contender, share: float) -> float | None:
        return self.find(contender, share)[0] if contender.parameter is None else contender.parameter(share)

    def find(self, contender: Contender, share: float) -> tuple[float, float]:
        """The parameter whose measured share of held bytes is nearest to ``share``, and that share.

        Searched for on the first block; where all blocks together came to something else, again for as much more or less.
        """
        tried: dict[float, float] = {}
        sought = share
        while len(tried) < ROUNDS:
            parameter, _ = find(lambda p: self.share(contender, p, 1), sought, self._found[contender.name])
            if parameter in tried:
                break
            tried[parameter] = came = self.share(contender, parameter, self.data.blocks)
            if abs(came - share) <= TOLERANCE:
                break
            sought = min(1.0, sought * share / came)
        found = min(tried, key=lambda p: abs(tried[p] - share))
        self.say(f"{self.data.name}: {contender.name} holds {tried[found]:.1%} at {found:.4f} for {share:.1%}")
        return found, tried[found]

    def share(self, contender: Contender, parameter: float, blocks: int) -> float:
        """What the first ``blocks`` hold, of what they do with all features."""
        policy, of = contender.make(parameter), range(blocks)
        own = sum(self._held(policy, contender.kept_sets, block) for block in of)
        return own / sum(self._held(KeepAll(), "image", block) for block in of)

    def _held(self, policy: Policy, kept_sets: KeptSets, block: int) -> int:
        """Bytes of a block, whose seconds do not count: it is not its turn."""
        rows = self.data.block(block)
        self.journal.once(self._key("tower", WHOLE, block), lambda: self.bench.see(rows, WHOLE))
        key = self._key("search", policy, kept_sets, block)
        return int(self.journal.once(key, lambda: self.bench.answers(policy, rows, WHOLE, kept_sets))["held_bytes"])

    def todo(self, entries: Sequence[Entry], ways: Sequence[Way], block: int) -> list[Work]:
        """What the journal lacks of a block: entries in an order of its own, then all ways."""
        unknown = {self.key(entry, block): entry for entry in entries}
        order = [entry for key, entry in unknown.items() if key not in self.journal.lines]
        random.Random(f"{self.data.name}/{block}").shuffle(order)
        name = self.data.name
        todo = [Work(f"{name} at equal bytes", partial(self.measure, entry, block)) for entry in order]
        if self._ways_key(ways, block) not in self.journal.lines:
            todo.append(Work(f"{name} end to end", partial(self.measure_ways, ways, block)))
        return todo

    def measure(self, entry: Entry, block: int) -> Cell:
        rows = self.data.block(block)
        self.journal.once(self._key("tower", entry.view, block), lambda: self.bench.see(rows, entry.view))
        return self.journal.once(
            self.key(entry, block), lambda: self.bench.answers(entry.policy, rows, entry.view, entry.kept_sets)
        )

    def measure_ways(self, ways: Sequence[Way], block: int) -> list[Cell]:
        """The fastest pass of each, all in turns, so that their seconds can be compared."""

        def taken() -> Cell:
            order = list(range(len(ways)))
            drawn = random.Random(f"{self.data.name}/{block}")
            passes: list[list[Cell]] = [[] for _ in ways]
            for _ in range(TURNS):
                drawn.shuffle(order)
                for place in order:
                    passes[place].append(self.bench.end_to_end(ways[place], self.data.block(block)))
            return {"ways": [min(each, key=lambda cell: cell["preparing"] + cell["wall"]) for each in passes]}

        return list(self.journal.once(self._ways_key(ways, block), taken)["ways"])

    def cells_of_ways(self, ways: Sequence[Way]) -> list[list[Cell]]:
        """Each way's finished cells, block by block."""
        blocks = [self.journal.lines[self._ways_key(ways, block)]["ways"] for block in range(self.data.blocks)]
        return [[block[place] for block in blocks] for place in range(len(ways))]

    def cells(self, entry: Entry) -> list[Cell]:
        """The entry's finished cells, block by block."""
        return [self.journal.lines[self.key(entry, block)] for block in range(self.data.blocks)]

    def tower_seconds(self, view: View) -> float:
        """What the tower takes for an image, mean over those that it was timed on: each is encoded once."""
        lines = [self.journal.lines[self._key("tower", view, block)] for block in range(self.data.blocks)]
        return sum(line["tower"] for line in lines) / max(1, sum(line["images_encoded"] for line in lines))

    def key(self, entry: Entry, block: int) -> str:
        return self._key(PRIMITIVE_CACHE, block, entry.policy, entry.view, entry.kept_sets)

    def _key(self, *what: Any) -> str:
        policies = [each for each in what if isinstance(each, Policy)] or [KeepAll()]
        return key_of(self._model, self._rows, self.data.blocks, self._code(policies[0]), *what)

    def _ways_key(self, ways: Sequence[Way], block: int) -> str:
        policies = [each for way in ways for each in (way.policy, way.view.tower_policy) if each is not None]
        code = self._code(*policies)
        timed = ("end to end", TURNS, PRIMITIVE_CACHE, torch.get_num_threads())
        return key_of(self._model, self._rows, self.data.blocks, code, *timed, ways, block)

    def _code(self, *policies: Policy | TowerPolicy) -> str:
        kinds = tuple(kind for each in policies for kind in kinds_of(each))
        if kinds not in self._codes:
            self._codes[kinds] = code_of(*policies)
        return self._codes[kinds]


def find(
    share_of: Callable[[float], float],
    share: float,
    seen: dict[float, float],
    tolerance: float = TOLERANCE,
    tries: int = TRIES,
) -> tuple[float, float]:
    """The parameter in (0, 1] at which ``share_of``, which grows with it, is nearest to ``share``, and what it is there.

    Tries where a line between the nearest below and above has it, and every third time the middle, until one is within
    ``tolerance``, after ``tries`` or within ``FINEST``; ``seen`` is what is known beforehand, and is filled.
    """
    seen.setdefault(1.0, 1.0)
    for count in range(1, tries + 1):
        parameter = min(seen, key=lambda p: (abs(seen[p] - share), p))
        if abs(seen[parameter] - share) <= tolerance:
            break
        low = max((p for p, s in seen.items() if s < share), default=0.0)
        high = min((p for p, s in seen.items() if s >= share and p > low), default=1.0)
        if high - low < FINEST:
            break
        below = seen.get(low, 0.0)
        # Not at the ends, which are known.
        part = min(0.98, max(0.02, (share - below) / (seen[high] - below))) if count % 3 and seen[high] > below else 0.5
        found = low + part * (high - low)
        seen[found] = share_of(found)
    parameter = min(seen, key=lambda p: (abs(seen[p] - share), p))
    return parameter, seen[parameter]
