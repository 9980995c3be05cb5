"""Who takes part in ``make pareto``: a new policy is one line in ``POLICIES``, a new way through the tower one in ``WAYS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from trimming import (
    Clusters,
    DivPrune,
    ElasticCache,
    FastV,
    Grid,
    KeepAll,
    Policy,
    Random,
    SnapKV,
    Spread,
    ThinK,
    TrimmedLlama,
    VisionZip,
    WeightedFarthest,
    ZipVL,
)
from trimming.engine import KeptSets
from trimming.tower import Alike, EViT, GridRows, RandomRows, ToMe, TowerPolicy, TowerTiles, Windows

TARGETS = (0.5, 0.3, 0.15, 0.05)
"""Shares that are asked for of what is held with all features: the most bytes of images' keys and values at once."""
CLOSE = 0.01
"""Such shares, no further apart, that count as equal."""
REFERENCE = "trimmed-llama"
"""What all others are matched to and compared with."""


def same(share: float) -> float | None:
    """The parameter is the share that is kept."""
    return share


def of_channels(share: float) -> float | None:
    """The share of key channels at which keys and values together take ``share`` of their bytes. Values stay whole: below half
    of the bytes there is none, and within two hundredths of it the least that is possible."""
    return None if share < 0.48 else max(1e-6, 2 * share - 1)


@dataclass(frozen=True, slots=True)
class Contender:
    """A family of policies with one parameter."""

    name: str
    make: Callable[[float], Policy]
    """From the parameter, in (0, 1]."""
    parameter: Callable[[float], float | None] | None = same
    """From a share of what all features hold to the parameter, or to None where it can't be had. None in its place: what is
    held depends on the data, and the parameter is searched for."""
    control: bool = False
    kept_sets: KeptSets = "image"


def both(one: Contender) -> tuple[Contender, ...]:
    """A contender and, if its policy looks at the text, the same with a kept set a question."""
    if one.make(0.5).where == "features":
        return (one,)
    return one, replace(one, name=one.name + BY_QUESTION, parameter=None, kept_sets="question")


BY_QUESTION = " by question"
POLICIES = (
    Contender(REFERENCE, lambda k: TrimmedLlama(k_ratio=k), parameter=None),
    Contender("fastv", lambda keep: FastV(keep=keep)),
    Contender("zipvl", lambda mass: ZipVL(mass=mass), parameter=None),
    Contender("snapkv", lambda keep: SnapKV(keep=keep)),
    Contender("elastic", lambda keep: ElasticCache(keep=keep)),
    Contender("elastic-weighted", lambda keep: ElasticCache(keep=keep, weighted=True)),
    Contender("divprune", lambda keep: DivPrune(keep=keep)),
    Contender("visionzip", lambda keep: VisionZip(keep=keep)),
    Contender("visionzip-weighted", lambda keep: VisionZip(keep=keep, weighted=True)),
    Contender("weighted-farthest", lambda keep: WeightedFarthest(keep=keep)),
    Contender("spread", lambda keep: Spread(keep=keep)),
    Contender("clusters", lambda likeness: Clusters(likeness=likeness), parameter=None),
    Contender("clusters, a share", lambda keep: Clusters(keep=keep)),
    Contender("think", lambda channels: ThinK(keep=channels), parameter=of_channels),
    Contender("random", lambda keep: Random(keep=keep), control=True),
    Contender("grid", lambda keep: Grid(keep=keep), control=True),
)
CONTENDERS = tuple(each for one in POLICIES for each in both(one))


@dataclass(frozen=True, slots=True)
class View:
    """How images come to the model and go through its tower; all features of a view are kept, or a policy's."""

    max_tiles: int | None = None
    """Most tiles an image is cut into; None: the model's own."""
    scale: float = 1.0
    """Of both sides, before the image is cut."""
    tower_tiles: TowerTiles = "pooled"
    tower_policy: TowerPolicy | None = None

    @property
    def name(self) -> str:
        if self.max_tiles:
            return f"{self.max_tiles} tile{'s' * (self.max_tiles > 1)} at most"
        return f"sides × {self.scale:.2f}" if self.scale != 1 else "as they are"


WHOLE = View()
FEWER_TILES = (View(max_tiles=3), View(max_tiles=2), View(max_tiles=1))


@dataclass(frozen=True, slots=True)
class Way:
    """From images' files to texts: what is timed with its tower, since the tower is what it saves."""

    name: str
    """Of the line that it is a point of."""
    parameter: float | None = None
    view: View = WHOLE
    policy: Policy = KeepAll()  # noqa: RUF009 - frozen

    @classmethod
    def through(cls, name: str, policy: TowerPolicy, behind: Policy = KeepAll()) -> Way:  # noqa: B008 - frozen
        return cls(name, policy.keep, View(tower_policy=policy), behind)


ALL_ROWS, POOLED, OURS, REAL, FEWER = "all rows", "pooled", "alike", "real tiles", "fewer tiles"
CHALLENGERS = (POOLED, OURS)
BEHIND = f"{OURS}, then clusters"
CONTROLS = ("random rows", "grid rows")
RIVALS = (REAL, FEWER, "tome", "windows", "evit", *CONTROLS)
"""What the challengers are compared with at equal images/s."""
KEEPS = (0.7, 0.6, 0.53, 0.5, 0.45, 0.4, 0.35, 0.3)
"""Shares of the tower's rows × layers of the challenger, which is to be had at each rival's speed,"""
SOME = (0.7, 0.53, 0.45)
"""and of the others."""
WAYS = (
    Way(ALL_ROWS, view=View(tower_tiles="all")),
    Way(POOLED),
    *(Way.through(OURS, Alike(keep)) for keep in KEEPS),
    *(Way.through(BEHIND, Alike(keep), Clusters(keep=0.5)) for keep in SOME),
    Way.through("alike, not weighted", Alike(0.53, weighted=False)),
    *(Way.through("tome", ToMe(keep)) for keep in SOME),
    *(Way.through("windows", Windows(keep)) for keep in SOME),
    *(Way.through("evit", EViT(keep)) for keep in SOME),
    *(Way.through("random rows", RandomRows(keep)) for keep in SOME),
    *(Way.through("grid rows", GridRows(keep)) for keep in SOME),
    Way(REAL, view=View(tower_tiles="real")),
    *(Way(FEWER, view.max_tiles, view) for view in FEWER_TILES),
    Way(REFERENCE, 0.25, policy=TrimmedLlama(k_ratio=0.25)),
    Way("clusters, a share", 0.1, policy=Clusters(keep=0.1)),
)
