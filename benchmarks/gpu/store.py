"""``gpu.json`` and ``gpu.md``: what was measured so far. The file is also how the kit follows the program that it runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.gpu.amounts import SECTIONS
from benchmarks.gpu.page import markdown
from benchmarks.gpu.results import GOALS, Result, ratios


class Store:
    """The results in a folder, read if they are there, written whole at every ``save``.

    Attributes:
        sections: by name, each with its ``status`` (``loading`` the model, ``running``, ``done``, ``failed``, ``timed out``,
            ``killed``, ``cut off``), its ``conditions`` (where it ran, on which commit) and figures.
        conditions: of the latest start.
        rehearsal: whether a tiny model ran, which measures nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sections: Result = {}
        self.conditions: Result = {}
        self.rehearsal = True
        self.read()

    @property
    def file(self) -> Path:
        return self.folder / "gpu.json"

    @property
    def exists(self) -> bool:
        return bool(self.sections or self.conditions)

    def read(self) -> None:
        """Raises ``ValueError`` for a file that is no such result."""
        try:
            found = json.loads(self.file.read_text())
            self.sections, self.conditions = found["sections"], found["conditions"]
            self.rehearsal = found["rehearsal"]
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.file} holds no results of the GPU kit ({error!r}): move it away") from None

    def cut_off(self) -> None:
        """Marks what an earlier program was in the midst of when it was ended."""
        for section in self.sections.values():
            if section["status"] in ("loading", "running"):
                section["status"] = "cut off"

    def missing(self) -> list[str]:
        """Sections that are not done, in order."""
        return [name for name in SECTIONS if self.sections.get(name, {}).get("status") != "done"]

    def save(self) -> None:
        ordered = {name: self.sections[name] for name in SECTIONS if name in self.sections}
        whole = {
            "rehearsal": self.rehearsal,
            "ratios": ratios(ordered),
            "goals": GOALS,
            "sections": ordered,
            "conditions": self.conditions,
        }
        rounded = _rounded(whole)
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.file, json.dumps(rounded, indent=1) + "\n")
        _write(self.folder / "gpu.md", markdown(rounded))


def _write(path: Path, text: str) -> None:
    """Whole or not at all: the program may be cut off at any time."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def _rounded(value: Any) -> Any:
    """Five significant digits; of a point in time all."""
    if isinstance(value, dict):
        return {name: part if name == "began" else _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
