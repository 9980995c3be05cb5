"""Answering the demo's questions under one policy after another: cells of work, each measured once and kept in a journal.

A cell is one policy, at one view of the images, on one block of a data set: at equal held bytes with images that the tower has
seen before, or end to end, from files to texts. A block's cells run one after the other in an order
of their own, so that a machine that grows faster or slower favours no policy. The journal has a line for each cell, keyed by a
digest of what decides it: the model, the rows, the policy and the code.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.pareto_contenders import CLOSE, CONTENDERS, FEWER_TILES, REFERENCE, TARGETS, WAYS, WHOLE, Contender, View, Way
from demo.answerer import LIMITS, Answerer
from demo.shards import Row
from demo.table import ROOT, code, sha256
from pipeline.engine import Engine, Prompt
from pipeline.images import Tiler, Tiles, digest
from pipeline.pictures import decode
from trimming import KeepAll, Policy, ThinK, VisionZip
from trimming.engine import KeptSets
from trimming.engine.images import ImageCache

TOLERANCE, TRIES = 0.004, 12
"""A search ends at a share this near, or after as many passes over a block,"""
FINEST = 1 / 2048
"""or between parameters this near: no image has more than 1,028 features."""
ROUNDS = 3
"""Searches for one share at most, each followed by a pass over all blocks."""

Cell = dict[str, Any]


# ---- data -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSet:
    """Rows by image, cut into blocks of every ``blocks``-th image."""

    name: str
    images: Sequence[Sequence[Row]]
    blocks: int

    def block(self, number: int) -> list[Row]:
        return [row for image in self.images[number :: self.blocks] for row in image]

    @property
    def rows(self) -> list[Row]:
        """In the order of the blocks."""
        return [row for number in range(self.blocks) for row in self.block(number)]


# ---- answering --------------------------------------------------------------------------------------------------------------


class Bench:
    """A demo model with an engine for each kind of policy, all of which share what any of them encoded.

    Kinds, since an engine is made for one way of keeping sets, refuses to change between policies that slice keys and those
    that don't, and drops encoded images when a policy looks at the tower's attention and the one before did not.
    """

    def __init__(self, model: Path) -> None:
        self.answerer, self.weights = Answerer(model), model / "model.safetensors"
        self._engines: dict[tuple[KeptSets, bool, bool], Engine] = {}
        self._tilers: dict[int | None, Tiler] = {}
        self._tiles: dict[tuple[str, View], Tiles] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        self._seen: set[tuple[str, View]] = set()

    def engine(self, policy: Policy, kept_sets: KeptSets) -> Engine:
        kind = (kept_sets, policy.slices, "class_attention" in policy.looks_at)
        if kind in self._engines:
            self._engines[kind].batch.use(policy)
        else:
            self._engines[kind] = self.answerer.engine(policy, kept_sets=kept_sets)
        return self._engines[kind]

    def see(self, rows: Sequence[Row], view: View) -> Cell:
        """Encodes each image that is new, so that no policy pays for it, with the tower's attention, which one policy looks at.
        How many, and the tower's seconds."""
        new = {key: row for row in rows if (key := (digest(row.image), view)) not in self._seen}
        cell = self._answers(self.engine(VisionZip(0.5), "image"), list(new.values()), view, self._tiles)
        self._seen.update(new)
        return {name: cell[name] for name in ("images_encoded", "tower")}

    def answers(self, policy: Policy, rows: Sequence[Row], view: View, kept_sets: KeptSets = "image") -> Cell:
        self.see(rows, view)
        return self._answers(self.engine(policy, kept_sets), rows, view, self._tiles)

    def end_to_end(self, policy: Policy, rows: Sequence[Row], view: View) -> Cell:
        """The rows with nothing known of their images: each is decoded, cut and sent through the tower once, for all questions
        about it, by an engine of its own, whose making is not timed."""
        engine = self.answerer.engine(policy, view.tower_tiles, tower_policy=view.tower_policy)
        engine.batch.images = ImageCache(LIMITS.image_cache_bytes)
        # No cell pays for the last one's garbage.
        gc.collect()
        return self._answers(engine, rows, view, {})

    def _answers(self, engine: Engine, rows: Sequence[Row], view: View, known: dict[tuple[str, View], Tiles]) -> Cell:
        """What the rows came to: right or wrong as a string of 1 and 0, the images' keys and values that were held (the most
        bytes at once, and bytes times seconds), the shares that were kept, tokens and seconds of all of them. ``known`` has
        images that were cut before, and gets those that were not."""
        engine.batch.reset_statistics()
        began = time.perf_counter()
        prompts = [self._prompt(row, view, known) for row in rows]
        prepared = time.perf_counter()
        said = engine.generate(prompts)
        wall = time.perf_counter() - prepared
        return {
            "policy": repr(engine.batch.policy),
            "rows": len(rows),
            "right": "".join("01"[answer.text == row.answer] for answer, row in zip(said, rows, strict=True)),
            "held_bytes": engine.batch.statistics.peak_cross_kv_bytes,
            "held_byte_seconds": engine.batch.statistics.cross_kv_byte_seconds,
            "output_tokens": sum(answer.output_tokens for answer in said),
            "images_encoded": engine.batch.statistics.images_encoded,
            "keep_fraction": statistics.fmean(answer.keep_fraction or 0.0 for answer in said) if said else 0.0,
            "tower_keep_fraction": statistics.fmean(answer.tower_keep_fraction or 0.0 for answer in said) if said else 0.0,
            "preparing": round(prepared - began, 4),
            **{name: round(engine.batch.seconds[name], 4) for name in ("tower", "prefill", "decode")},
            "wall": round(wall, 4),
        }

    def tiles(self, rows: Sequence[Row], view: View) -> int:
        """Of all rows' images, by their sizes alone."""
        tiler = self._tiler(view)
        return sum(tiler.tile_count(*scaled(self._size(row), view.scale)) for row in rows)

    def _size(self, row: Row) -> tuple[int, int]:
        key = digest(row.image)
        if key not in self._sizes:
            self._sizes[key] = decode(row.image).size
        return self._sizes[key]

    def _tiler(self, view: View) -> Tiler:
        if view.max_tiles not in self._tilers:
            model_tiles = self.answerer.model.config.vision_config.max_num_tiles
            self._tilers[view.max_tiles] = Tiler(self.answerer.processor, view.max_tiles, model_tiles)
        return self._tilers[view.max_tiles]

    def _prompt(self, row: Row, view: View, known: dict[tuple[str, View], Tiles]) -> Prompt:
        key = (digest(row.image), view)
        if key not in known:
            image = decode(row.image)
            if view.scale != 1:
                image = image.resize(scaled(image.size, view.scale), Image.Resampling.LANCZOS)
            known[key] = self._tiler(view)(image)
        return Prompt(row.id, self.answerer.tokens(row.question, 1), [known[key]], [f"{key[0]} {view}"])


def scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


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


def code_of(policy: Policy) -> str:
    """A digest of the code that decides what ``policy`` does: all that any policy runs, and of the policies' own files those of
    its classes. So a new policy leaves what was measured of others as it is."""
    policies = ROOT / "trimming/policies"
    shared = [path for path in code() if path.parent != policies and path != ROOT / "trimming/__init__.py"]
    classes = [c for each in (policy, *vars(policy).values()) if isinstance(each, Policy) for c in type(each).__mro__]
    own = {Path(inspect.getfile(c)) for c in classes if c.__module__.startswith("trimming.")}
    return key_of(sorted((path.name, sha256(path)) for path in {*shared, *own, Path(__file__)}))


# ---- what is measured -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """One point of the plots."""

    contender: str
    """Also ``all features``, ``fewer tiles`` and ``lower resolution``; end to end the name of a way."""
    target: float | None
    """The share that was asked for; None for what comes at a share of its own."""
    share: float
    """The share that its parameter was chosen for."""
    policy: Policy = field(default_factory=KeepAll)
    parameter: float | None = None
    view: View = WHOLE
    kept_sets: KeptSets = "image"
    end_to_end: bool = False
    """Timed from images' files on."""


class Study:
    """One data set's entries and cells."""

    def __init__(self, bench: Bench, journal: Journal, data: DataSet, say: Callable[[str], None]) -> None:
        self.bench, self.journal, self.data, self.say = bench, journal, data, say
        self._codes: dict[str, str] = {}
        # Shares by parameter, of each contender that is searched for.
        self._found: defaultdict[str, dict[float, float]] = defaultdict(dict)
        self._rows = key_of([(row.id, row.question, row.answer, digest(row.image)) for row in data.rows])
        self._model = sha256(bench.weights)
        # Before anything is measured: files may change meanwhile, what was imported does not.
        for policy in (KeepAll(), *(contender.make(0.5) for contender in CONTENDERS)):
            self._code(policy)

    def plan(
        self,
        contenders: Sequence[Contender] = CONTENDERS,
        targets: Sequence[float] = TARGETS,
        ways: Sequence[Way] = WAYS,
    ) -> list[Entry]:
        """All entries, with their parameters found: at equal held bytes, then end to end.

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
        return entries + [Entry(w.name, None, 1.0, w.policy, w.parameter, w.view, end_to_end=True) for w in ways]

    def rivals(self, reached: dict[float, tuple[float, float]]) -> Iterator[Entry]:
        """Fewer tiles, and images shrunk to each of the reference's shares that can be had and to the least there is."""
        rows = self.data.rows
        most = self.bench.tiles(rows, WHOLE)
        floor = self.bench.tiles(rows, View(max_tiles=1)) / most
        if floor == 1:
            return
        for view in FEWER_TILES:
            yield Entry("fewer tiles", None, self.bench.tiles(rows, view) / most, view=view)
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

    def todo(self, entries: Sequence[Entry], block: int) -> list[Entry]:
        """Entries whose cell the journal lacks, in the block's own order."""
        unknown = {self.key(entry, block): entry for entry in entries}
        order = [entry for key, entry in unknown.items() if key not in self.journal.lines]
        random.Random(f"{self.data.name}/{block}").shuffle(order)
        return order

    def measure(self, entry: Entry, block: int) -> Cell:
        rows = self.data.block(block)
        if entry.end_to_end:
            return self.journal.once(self.key(entry, block), lambda: self.bench.end_to_end(entry.policy, rows, entry.view))
        self.journal.once(self._key("tower", entry.view, block), lambda: self.bench.see(rows, entry.view))
        return self.journal.once(
            self.key(entry, block), lambda: self.bench.answers(entry.policy, rows, entry.view, entry.kept_sets)
        )

    def cells(self, entry: Entry) -> list[Cell]:
        """The entry's finished cells, block by block."""
        return [self.journal.lines[self.key(entry, block)] for block in range(self.data.blocks)]

    def tower_seconds(self, view: View) -> float:
        """What the tower takes for an image, mean over those that it was timed on: each is encoded once."""
        lines = [self.journal.lines[self._key("tower", view, block)] for block in range(self.data.blocks)]
        return sum(line["tower"] for line in lines) / max(1, sum(line["images_encoded"] for line in lines))

    def key(self, entry: Entry, block: int) -> str:
        return self._key(block, entry.policy, entry.view, entry.kept_sets, *["end to end"] * entry.end_to_end)

    def _key(self, *what: Any) -> str:
        policies = [each for each in what if isinstance(each, Policy)] or [KeepAll()]
        return key_of(self._model, self._rows, self.data.blocks, self._code(policies[0]), *what)

    def _code(self, policy: Policy) -> str:
        name = type(policy).__name__ + (type(policy.policy).__name__ if isinstance(policy, ThinK) else "")
        if name not in self._codes:
            self._codes[name] = code_of(policy)
        return self._codes[name]


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
