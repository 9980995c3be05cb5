"""What trimming changes behind the vision tower: by questions an image, by kept share, and what selecting takes.

Images are encoded before the clock starts, so that a pass is prefill and decoding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks import workloads
from benchmarks.amounts import Amounts
from benchmarks.half import find_half
from benchmarks.merging import TO_A_TENTH
from benchmarks.model import ModelSize
from benchmarks.ours import IMAGE_CACHE_BYTES, Ours, measured
from benchmarks.timing import Pass, Passes, take_turns
from benchmarks.workloads import Workload
from trimming import Grid, KeepAll, Policy, VisualContext
from trimming.engine import Completion, Image, KeptSets
from trimming.engine.images import ImageCache
from trimming.policies.policy import Where

PER_IMAGE = (1, 2, 5, 10, 20)
"""Questions an image."""
TILE_MIX = (2,)
"""Of the images that are asked a growing number of questions: all alike, as there are few."""
SHARES = (1.0, 0.75, 0.5, 0.25, 0.1)
"""Of the features that decoding is timed with."""
FULL, BY_QUESTION, BY_IMAGE, MERGED = "full", "by question", "by image", "merged"
TRIMMED, KNOWN, KNOWN_BEHIND = "trimmed", "known", "known behind"
Say = Callable[[str], object]


class LanguagePasses:
    """Passes over one workload, whose images are encoded here."""

    def __init__(self, ours: Ours, load: Workload) -> None:
        self.images = ImageCache(IMAGE_CACHE_BYTES)
        known: dict[int, Image] = {}
        ours.engine(KeepAll(), self.images).generate(ours.requests(load.cut(1), range(len(load.rows)), known))
        self.requests = ours.requests(load, range(len(load.rows)), known)
        # One for all passes: its memory is not new to the system.
        self.engine = ours.engine(KeepAll(), self.images)

    def __call__(self, policy: Policy, kept_sets: KeptSets = "image") -> Pass:
        completions = self.answer(policy, kept_sets)
        engine = self.engine
        seconds = engine.seconds["prefill"] + engine.seconds["decode"]
        return Pass(
            seconds=seconds,
            preparing=0.0,
            tower=0.0,
            generation=seconds,
            tokens=[one.tokens for one in completions],
            measured=measured(engine, completions),
        )

    def answer(self, policy: Policy, kept_sets: KeptSets = "image") -> list[Completion]:
        engine = self.engine
        engine.use(policy)
        engine.kept_sets = kept_sets
        engine.reset_statistics()
        return engine.generate(self.requests)


def measure_growth(ours: Ours, size: ModelSize, amounts: Amounts, say: Say) -> dict[int, Passes]:
    """By questions an image, then by who decides: the same prompts and answers, about fewer and fewer images. Trimmed keeps
    half of the features, either way; merged a tenth."""
    found: dict[int, Passes] = {}
    for per_image in PER_IMAGE:
        load = workloads.questions(amounts.growth_rows // per_image, amounts.seed, size, per_image, TILE_MIX)
        run = LanguagePasses(ours, load)
        runs = {FULL: partial(run, KeepAll())}
        ways: dict[str, KeptSets] = {BY_QUESTION: "question", BY_IMAGE: "image"}
        for name, kept_sets in ways.items():
            runs[name] = partial(run, find_half(ours, load, kept_sets, run.images).policy, kept_sets)
        runs[MERGED] = partial(run, TO_A_TENTH)
        say(f"{per_image} questions an image: {len(load.images)} images")
        found[per_image] = take_turns(runs, amounts.turns)
    return found


def measure_shares(ours: Ours, load: Workload, amounts: Amounts, say: Say) -> Passes:
    """By kept share: prompts about images of their own, all answered with as many tokens, so that steps are alike."""
    run = LanguagePasses(ours, load.first(amounts.share_rows).cut(amounts.share_length))
    say(f"decoding at {len(SHARES)} kept shares: {amounts.share_rows} rows")
    return take_turns({f"{share:g}": partial(run, Grid(keep=share)) for share in SHARES}, amounts.turns)


def measure_selection(ours: Ours, load: Workload, policy: Policy, amounts: Amounts, say: Say) -> Passes:
    """Prefills by ``policy``, and by policies that know what it keeps: before the language model runs, and behind the first
    cross-attention layer, which then does all that it does for ``policy``."""
    run = LanguagePasses(ours, load.first(amounts.prefills).cut(1))
    kept = {request.id: one.trim.kept for request, one in zip(run.requests, run.answer(policy), strict=True)}
    runs = {TRIMMED: policy, KNOWN: Known(kept), KNOWN_BEHIND: KnownBehind(kept)}
    say(f"selection: {amounts.selection_turns} times {amounts.prefills} prefills, three ways")
    return take_turns({name: partial(run, each) for name, each in runs.items()}, amounts.selection_turns)


@dataclass(frozen=True)
class Known(KeepAll):
    """Keeps what is known of each request beforehand, by its id."""

    kept: Mapping[str, Tensor] = field(repr=False, compare=False)
    """Positions, as ``SampleTrim.kept`` has them."""

    def pick(self, scores: Tensor, budget: Tensor, context: VisualContext) -> Tensor:
        chosen = torch.zeros_like(context.valid)
        for row, sample_id in enumerate(context.sample_ids):
            chosen[row, self.kept[sample_id]] = True
        return chosen


@dataclass(frozen=True)
class KnownBehind(Known):
    """Decides where Trimmed-Llama does."""

    where: ClassVar[Where] = "first_layer"
