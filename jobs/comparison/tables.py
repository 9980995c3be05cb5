"""The report's tables as headings and cells of text, which the page and the Markdown both show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.comparison import words
from jobs.comparison.words import UNKNOWN, byte_seconds, bytes_of, dollars, known, number, points, share, times
from jobs.report import STAGES

Report = dict[str, Any]
SCORES = ("vqa_accuracy", "accuracy", "anls")
"""The first that there is speaks for a run: VQA accuracy is there where rows have several references."""
AGREEMENT = ("exact", "edit_similarity", "chrf")
HELD = (
    "Cross KV is counted as the machine held it: keys and values of images, once however many rows share them. Peak: the most "
    "that one actor held at once; it grows with the number of rows that run together. Held per row: bytes times the seconds of "
    "tower, prefill and decode that they were held for, by answered row; it grows only as far as rows that run together slow "
    "each other down, and with the slowness of the machine. Read per token: bytes that decode steps attended to, by output "
    "token; it falls where rows about one image run together."
)
"""What the three figures of held bytes are, and what each hangs on."""


@dataclass(frozen=True, slots=True)
class Cell:
    text: str
    note: str = ""
    """Said below, smaller: an interval, a ratio."""
    tone: str = ""
    """``good`` or ``bad``."""


@dataclass(frozen=True, slots=True)
class Table:
    """The first column names the row; the others are numbers unless their heading is in ``prose``."""

    name: str
    """Unique on the page."""
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    prose: Sequence[str] = ()
    notes: Sequence[str] = field(default=())

    def numeric(self, column: int) -> bool:
        return column > 0 and self.columns[column] not in self.prose


def make(
    name: str, caption: str, columns: Mapping[str, Callable[[Any], Cell | str]], items: Iterable[Any], **rest: Any
) -> Table:
    """A row for each of ``items``, a column for each heading."""
    made = [[_cell(column(item)) for column in columns.values()] for item in items]
    return Table(name, caption, list(columns), made, **rest)


def _cell(value: Cell | str) -> Cell:
    return Cell(value) if isinstance(value, str) else value


def quality(report: Report) -> str:
    """The score that the page speaks of first: by references where the baseline has any, else agreement with the baseline."""
    base = report["runs"][0]
    # Two captions are hardly ever equal to the letter.
    agreement = "chrf" if base["job"] == "caption" else "exact"
    return next((name for name in SCORES if words.score(base["scores"].get(name))), agreement)


def priced(report: Report) -> bool:
    """Whether every run has a cost in dollars."""
    return all(run["cost"]["dollars_per_million_images"] is not None for run in report["runs"])


def hours(report: Report) -> str:
    """What a run's hours are hours of: a GPU's, or on CPUs an actor's."""
    on_cpu = [str(run["hardware"] or "").startswith("CPU") for run in report["runs"]]
    return "actor-hours" if all(on_cpu) else "GPU- or actor-hours" if any(on_cpu) else "GPU-hours"


def device(report: Report) -> str:
    return {"actor-hours": "actor", "GPU-hours": "GPU"}.get(hours(report), "GPU or actor")


def compared(report: Report, run: Report) -> Report | None:
    """The run's comparison with the baseline; None for the baseline itself."""
    return next((c for c in report["comparisons"] if c["run"] == run["name"]), None)


def summary(report: Report) -> Table:
    """What the page begins with: what each run held, took, got right and cost."""
    columns: dict[str, Callable[[Report], Cell | str]] = {
        "run": name_of(report),
        "peak cross KV": peak(report),
        "held per row": held(report, "byte_seconds_per_row", byte_seconds, "held_ratio"),
        "read per token": held(report, "bytes_read_per_token", bytes_of, "read_ratio"),
        "tower, prefill, decode: s per 1,000 images": lambda run: stage_seconds(report, run),
    }
    first = quality(report)
    if first in SCORES:
        columns[words.METRICS[first]] = lambda run: scored(run["scores"].get(first))
        columns["against the baseline"] = lambda run: _against(report, run, first)
    elif first == "chrf":
        columns[words.METRICS[first]] = lambda run: _agrees(report, run, first)
    columns |= {
        "exact agreement": lambda run: _agrees(report, run, "exact"),
        "features kept": lambda run: known(run["kept"]["mean"] if run["kept"] else None, share),
        f"images/s per {device(report)}": lambda run: Cell(
            known(run["speed"]["images_per_second"], number), ratio_of(report, run, "speed_ratio")
        ),
    }
    costs = [run["cost"] for run in report["runs"]]
    if any(cost["dollars_per_million_images"] is not None for cost in costs):
        columns["$ per million images"] = lambda run: cost_of(report, run, "dollars_per_million_images", dollars)
    if not priced(report):
        heading = f"{hours(report)} per million images"
        columns[heading] = lambda run: cost_of(report, run, "gpu_hours_per_million_images", number)
    prose = ("against the baseline",)
    return make("summary", "Memory, time, quality and cost of each run", columns, report["runs"], prose=prose, notes=[HELD])


def equal_kv(report: Report) -> Table:
    """Each policy beside the fewer-tiles run that held about as much."""
    return make(
        "equal-kv",
        "Trimming beside the run of fewer tiles that held nearest to it per row",
        {
            "run": lambda pair: pair["run"],
            "beside": lambda pair: pair["tiles_run"],
            "cross KV, run / beside": lambda pair: Cell(
                known(pair["ratio"], times),
                "" if pair["by"] == "held" else "of rows' own caches: held bytes are not comparable",
            ),
            "score": lambda pair: words.METRICS.get(pair["score"], pair["score"]),
            "difference, points": lambda pair: difference_cell(pair["difference"], points),
            "verdict": lambda pair: verdict_cell(pair["difference"]),
        },
        report["equal_kv"],
        prose=("beside", "score", "verdict"),
    )


def scored(found: Report | None) -> Cell:
    """A score with its interval below."""
    found = words.score(found)
    return Cell(UNKNOWN) if found is None else Cell(share(found["value"]), words.interval(found, share))


def name_of(report: Report) -> Callable[[Report], Cell]:
    return lambda run: Cell(run["name"], "baseline" if run["name"] == report["baseline"] else "")


def ratio_of(report: Report, run: Report, ratio: str) -> str:
    found = compared(report, run)
    return "" if found is None or found[ratio] is None else f"{times(found[ratio])} the baseline"


def peak(report: Report) -> Callable[[Report], Cell]:
    """A column of the most cross KV that one actor held."""
    return lambda run: _counted(run["peaks"]["cross_kv_bytes"], bytes_of, ratio_of(report, run, "peak_ratio"))


def held(report: Report, name: str, shape: Callable[[float], str], ratio: str = "") -> Callable[[Report], Cell]:
    """A column of what a run held or read, with its ratio to the baseline's where there is one."""
    return lambda run: _counted(run["held"][name], shape, ratio_of(report, run, ratio) if ratio else "")


def _counted(value: float | None, shape: Callable[[float], str], note: str) -> Cell:
    return Cell("unknown") if value is None else Cell(shape(value), note)


def per_thousand(run: Report, *stages: str) -> float:
    """Seconds in ``stages`` per 1,000 images, summed over actors."""
    return 1000 * sum(run["stages"].get(stage) or 0.0 for stage in stages) / float(run["images"])


def stage_seconds(report: Report, run: Report) -> Cell:
    """What the device did, with the ratio of prefill and decode, which trimming is about, to the baseline's."""
    base = report["runs"][0]
    if not run["images"] or not any(run["stages"].get(stage) for stage in STAGES):
        return Cell(UNKNOWN)
    here, there = (per_thousand(each, *STAGES[1:]) if each["images"] else 0.0 for each in (run, base))
    said = ", ".join(number(per_thousand(run, stage)) for stage in STAGES)
    related = there and compared(report, run) is not None
    return Cell(said, f"last two {times(here / there)} the baseline" if related else "")


def cost_of(report: Report, run: Report, name: str, shape: Callable[[float], str]) -> Cell:
    base, value = report["runs"][0]["cost"][name], run["cost"][name]
    related = base and value is not None and compared(report, run) is not None
    return Cell(known(value, shape), f"{times(value / base)} the baseline" if related else "")


def _agrees(report: Report, run: Report, name: str) -> Cell:
    found = compared(report, run)
    return Cell("", "") if found is None else scored(found["agreement"][name])


def _against(report: Report, run: Report, name: str) -> Cell:
    found = compared(report, run)
    if found is None:
        return Cell("")
    difference = words.score(found["differences"].get(name))
    if difference is None:
        return Cell(UNKNOWN, "no row to compare")
    said = f"{points(difference['value'])} points ({words.interval(difference, points)})"
    return Cell(words.verdict(difference), said, words.tone(difference))


def difference_cell(found: Report | None, shape: Callable[[float], str]) -> Cell:
    found = words.score(found)
    return Cell(UNKNOWN) if found is None else Cell(shape(found["value"]), words.interval(found, shape))


def verdict_cell(found: Report | None) -> Cell:
    found = words.score(found)
    return Cell(UNKNOWN) if found is None else Cell(words.verdict(found), tone=words.tone(found))
