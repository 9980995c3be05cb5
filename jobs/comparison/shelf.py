"""Images of rows, read again from the input of a run that has long ended: found by a row's unit, and shrunk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from PIL import Image

from jobs.comparison.runs import Run
from pipeline import schema
from pipeline.listing import list_input
from pipeline.pictures import ImageError
from pipeline.schema import Columns
from pipeline.storage import Storage
from pipeline.units import Unit, plan_units, read_footers

MOST_PIXELS = 480
_TOGETHER = 64
"""Footers read at a time, where not all of them may be needed."""
"""Longest side of a shown image."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a run, and where it is."""

    unit: str
    index: int
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Shown:
    image: Image.Image
    size: tuple[int, int]
    """The image's own, of which ``image`` is a smaller copy."""


class Shelf:
    """Rows' images, small, by the digest that the runs recorded: fetched once, whichever run's input has them."""

    def __init__(self, input: str | None, options: Mapping[str, Any]) -> None:
        from pipeline.decoder import Decoder

        self.input, self.options = input, dict(options)
        self.decoder = Decoder()
        self.shown: dict[str, list[Shown]] = {}
        self.why: dict[str, str] = {}

    def close(self) -> None:
        self.decoder.close()

    def images(self, row: Mapping[str, Any]) -> list[Shown] | str:
        """The row's images, or why there are none."""
        key = row[schema.IMAGE_DIGEST]
        if key is None:
            return "the image was never read"
        return self.shown.get(key) or self.why.get(key, "the image was not found")

    def fetch(self, run: Run, rows: Iterable[Row]) -> None:
        """Reads what is not on the shelf yet from the run's input."""
        units: dict[str, list[Row]] = {}
        for row in rows:
            if row.values[schema.IMAGE_DIGEST] is not None and row.values[schema.IMAGE_DIGEST] not in self.shown:
                units.setdefault(row.unit, []).append(row)
        if not units:
            return
        try:
            shards = _Shards(run, self.input, self.options)
        except Exception as error:  # noqa: BLE001 - a report without pictures is a report: the rows say what is missing
            self._miss(_unreadable(error), (row for missing in units.values() for row in missing))
            return
        for unit, wanted in units.items():
            try:
                cells = shards.read(unit)
            except Exception as error:  # noqa: BLE001 - as above
                self._miss(_unreadable(error), wanted)
                continue
            for row in wanted:
                self._put(row, cells)

    def _miss(self, why: str, rows: Iterable[Row]) -> None:
        for row in rows:
            self.why.setdefault(row.values[schema.IMAGE_DIGEST], why)

    def _put(self, row: Row, cells: pa.StructArray) -> None:
        from pipeline.images import digest, row_digest

        key = row.values[schema.IMAGE_DIGEST]
        # A unit comes out in the order in which it is read.
        images = cells[row.index][schema.IMAGES].as_py() if row.index < len(cells) else []
        gone = next((image["error"] for image in images if image["bytes"] is None), None)
        files = [image["bytes"] for image in images]
        if gone is not None:
            self._miss(f"the image is gone: {gone}", [row])
        elif row_digest([digest(file) for file in files]) != key:
            self._miss("the input has changed: the row's image is another one now", [row])
        else:
            try:
                self.shown[key] = [_shrunk(self.decoder(file)) for file in files]
            except ImageError as error:
                self._miss(str(error), [row])


class _Shards:
    """The input of a run, as far as single units are read again. Raises ``FileNotFoundError`` where there is none."""

    def __init__(self, run: Run, input: str | None, options: dict[str, Any]) -> None:
        self.config, self.passed = run.config, run.record["columns"]
        found = list_input(input or str(run.config["input"]), options)
        self.root, self.names = found.root, found.names
        self.image_roots = tuple(Storage(url, options) for url in run.config.get("image_roots") or ())
        self.units: dict[str, Unit] = {}

    def read(self, name: str) -> pa.StructArray:
        """The rows of the unit of this name: their ids and images."""
        from pipeline.source import UnitReader

        unit = self._unit(name)
        columns = Columns(self.config["image_column"], None, None, None, (), pa.schema([]))
        (block,) = UnitReader(self.root, columns, self.image_roots)(unit)
        rows: pa.StructArray = block[schema.ROWS].combine_chunks().flatten()
        return rows

    def _unit(self, name: str) -> Unit:
        if name not in self.units:
            shards = self._near(name)
            planned = plan_units(shards, int(self.config["unit_rows"]), self.config.get("limit"))
            self.units |= {unit.name: unit for unit in planned}
        if name not in self.units:
            raise ValueError(f"no shard there is cut into {name}")
        return self.units[name]

    def _near(self, name: str) -> list[Any]:
        """The footers that decide how the unit of this name is cut.

        Units are cut shard by shard, and their names hold a digest of the shard's; only a limit counts from the first shard on.
        """
        limit = self.config.get("limit")
        if limit is None:
            digest = name.split("-")[-3]
            own = [shard for shard in self.names if _digest(shard) == digest]
            if not own:
                raise ValueError(f"no shard there is the one of {name}")
            return read_footers(self.root, own)
        shards: list[Any] = []
        for start in range(0, len(self.names), _TOGETHER):
            shards += read_footers(self.root, self.names[start : start + _TOGETHER])
            if sum(each.rows for each in shards) >= limit:
                break
        return shards


def _digest(shard: str) -> str:
    from pipeline.units import Shard

    return Shard(shard, (), 0, pa.schema([])).digest


def _shrunk(image: Image.Image) -> Shown:
    size = image.size
    image.thumbnail((MOST_PIXELS, MOST_PIXELS), Image.Resampling.LANCZOS)
    return Shown(image, size)


def _unreadable(error: Exception) -> str:
    return f"the input can't be read again: {said(error)}"


def said(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]
