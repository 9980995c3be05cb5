"""Which units have been begun and not ended: how a row that kills its actor is found, and left out.

Ray starts a dead actor anew and hands it the same units, for ever. So an actor says here when it begins a unit and when it ends
one. One that was begun and not ended has cost an actor its life, or was under way when a neighbour did, or a machine was taken
away. After ``CAREFUL`` such deaths nothing runs beside the unit: its rows are examined one at a time, then answered one group
at a time, and the actor says which are next. Rows that ``LETHAL`` deaths meet are left out.

A group is what decides together which visual features are kept: one row, or with ``kept_sets="image"`` all rows of the unit
about one image. It is answered whole and left out whole, although some of its rows may be innocent. Answered one by one they
would keep other features than in a run without deaths, and machines taken away by chance would change answers without a word;
an error says that something happened. Few are lost so: a question that kills is met alone, when it is examined, and what kills
later is most likely the image, which the group's rows have in common.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

CAREFUL = 2
LETHAL = 2
MOST = 20
"""Deaths over one unit after which it is not the rows' fault."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One try at a unit."""

    deaths: int
    """Tries before it that did not end."""
    lethal: frozenset[int]
    """Rows, by their place in the unit, to be left out."""

    @property
    def careful(self) -> bool:
        return self.deaths >= CAREFUL


class Log(Protocol):
    """What an actor says."""

    def begin(self, unit: str) -> Trial: ...

    def at(self, unit: str, rows: Sequence[int]) -> None:
        """``rows`` are next, one that is examined or a group that is answered; empty: none is."""

    def end(self, unit: str) -> None: ...


class Attempts:
    """The log itself; on a cluster it runs as an actor beside the driver."""

    def __init__(self) -> None:
        self.begun: Counter[str] = Counter()
        self.standing: dict[str, tuple[int, ...]] = {}
        self.deaths: dict[str, Counter[tuple[int, ...]]] = {}

    def begin(self, unit: str) -> Trial:
        met = self.deaths.setdefault(unit, Counter())
        if rows := self.standing.pop(unit, ()):
            met[rows] += 1
        before = self.begun[unit]
        self.begun[unit] += 1
        return Trial(before, frozenset(row for rows, times in met.items() if times >= LETHAL for row in rows))

    def at(self, unit: str, rows: Sequence[int]) -> None:
        self.standing[unit] = tuple(rows)

    def end(self, unit: str) -> None:
        for noted in (self.begun, self.standing, self.deaths):
            noted.pop(unit, None)


class RemoteAttempts:
    """``Attempts`` on the cluster. Each call waits: what is said must be known before the actor can die of what comes next."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def begin(self, unit: str) -> Trial:
        trial: Trial | None = self._call("begin", unit)
        return trial or Trial(0, frozenset())

    def at(self, unit: str, rows: Sequence[int]) -> None:
        self._call("at", unit, rows)

    def end(self, unit: str) -> None:
        self._call("end", unit)

    def _call(self, method: str, *given: Any) -> Any:
        import ray

        try:
            return ray.get(getattr(self.actor, method).remote(*given))
        except ray.exceptions.RayActorError:
            # Its machine is gone, and with it what it knew: a lethal row is then found again from the start.
            return None
