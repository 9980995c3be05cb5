"""The report for people: one HTML page that needs nothing else, and the same as Markdown with its pictures beside it."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.comparison import curves, drawing, full_tables, plots, sentences, tables, words
from jobs.comparison import examples as rows
from jobs.comparison.words import dollars

if TYPE_CHECKING:
    from jobs.comparison.runs import Run

Report = dict[str, Any]
# What Markdown would take for a sign of its own, GitHub's formulas among it.
_SIGNS = re.compile(r"([\\`*_\[\]|~$#])")


def write(
    report: Report,
    runs: Sequence[Run],
    out: Path,
    *,
    examples: int,
    input: str | None,
    storage_options: Mapping[str, Any],
    references: str | None = None,
) -> None:
    """Writes index.html, report.md, plots/*.svg and examples/*.jpg under ``out``.

    Args:
        report: the contents of report.json.
        runs: the runs that it tells of; their example rows and images are read again.
        out: folder, made where it is missing.
        examples: rows shown for each comparison, at most.
        input: where the shards are now, if not where the runs read them.
        storage_options: of the store that holds runs and input.
        references: column of the references, if not the runs' own answer column.
    """
    by_name = {run.name: run for run in runs}
    wanted = {c["run"]: c["examples"][:examples] for c in report["comparisons"]}
    loaded: dict[str, list[rows.Example]] = {}
    if report["baseline"] in by_name:
        base = by_name[report["baseline"]]
        loaded = rows.load(wanted, base, runs, input=input, storage_options=storage_options, references=references)
    context = _context(report, runs) | {"examples": loaded}
    drawn = [plot for group in context["plots"].values() for plot in group]
    for folder in ("plots", "examples"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for plot in drawn:
        (out / "plots" / f"{plot.name}.svg").write_text(drawing.as_file(plot), encoding="utf-8")
    files = dict(_pictures(loaded))
    for name, data in files.items():
        (out / "examples" / name).write_bytes(data)
    (out / "report.md").write_text(_markdown(context), encoding="utf-8")
    (out / "index.html").write_text(_html(context), encoding="utf-8")


def picture_name(comparison: int, example: int, side: int, picture: int) -> str:
    """File of an example's picture; all count from 1."""
    return f"{comparison:02d}-{example:02d}-{'baseline' if side == 1 else 'run'}-{picture}.jpg"


def _pictures(loaded: Mapping[str, Sequence[rows.Example]]) -> Iterator[tuple[str, bytes]]:
    for c, listed in enumerate(loaded.values(), 1):
        for e, example in enumerate(listed, 1):
            for s, side in enumerate(example.sides, 1):
                for p, data in enumerate(side.pictures, 1):
                    yield picture_name(c, e, s, p), data


def _context(report: Report, runs: Sequence[Run]) -> dict[str, Any]:
    """What both templates are filled from."""
    return {
        "report": report,
        "title": "Comparison of runs: what each held, took and got right",
        "lead": sentences.lead(report),
        "bottom_line": " ".join(sentences.bottom_line(report)),
        "findings": [sentences.finding(report, comparison) for comparison in report["comparisons"]],
        "summary": tables.summary(report),
        "equal_kv": tables.equal_kv(report) if report["equal_kv"] else None,
        "tables": list(full_tables.full(report)),
        "conditions": _conditions(report, runs),
        "whole": [run["name"] for run in report["runs"] if run["kept"] and run["kept"]["mean"] == 1],
        "prices": ", ".join(f"{name}: {dollars(price)} an hour" for name, price in report["prices"].items()),
        "plots": {
            "curves": list(curves.curves(report)),
            "kept": list(plots.kept(report)),
            "counts": list(plots.counts(report)),
            "tokens": list(plots.tokens(report)),
            "stages": list(plots.stages(report)),
        },
    }


def _conditions(report: Report, runs: Sequence[Run]) -> tables.Table:
    """What each run was, one column a run: there is more to say than fits a line."""
    by_name = {run.name: run for run in runs}

    def recorded(run: Report, *path: str) -> Any:
        value: Any = by_name[run["name"]].record if run["name"] in by_name else {}
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def shown(value: Any) -> str:
        return words.UNKNOWN if value is None or value == "" else str(value)

    lines = {
        "folder": lambda run: shown(run["folder"]),
        "job": lambda run: shown(run["job"]),
        "policy": lambda run: " ".join([run["policy"], *(f"{k}={v}" for k, v in run["options"].items())]),
        "kept sets": lambda run: shown(run["kept_sets"]),
        "most tiles": lambda run: shown(run["max_tiles"] or "the model's"),
        "padding tiles": lambda run: shown(run["tower_tiles"]),
        "tower": lambda run: shown(run["tower"] or "all rows"),
        "model": lambda run: f"{run['model']} ({run['identity']})",
        "type": lambda run: shown(run["dtype"]),
        "hardware": lambda run: shown(run["hardware"]),
        "input": lambda run: shown(recorded(run, "config", "input")),
        "prompt": lambda run: shown(recorded(run, "config", "prompt")),
        "longest answer": lambda run: shown(recorded(run, "config", "max_new_tokens")),
        "started": lambda run: shown(recorded(run, "started")),
        "versions": lambda run: ", ".join(f"{k} {v}" for k, v in (recorded(run, "versions") or {}).items()) or words.UNKNOWN,
    }
    columns = ["", *(run["name"] for run in report["runs"])]
    made = [[tables.Cell(name), *(tables.Cell(line(run)) for run in report["runs"])] for name, line in lines.items()]
    return tables.Table("conditions", "What was run", columns, made, prose=columns[1:])


def _html(context: Mapping[str, Any]) -> str:
    from markupsafe import Markup

    environment = _environment(autoescape=True, finalize=_shown)
    environment.filters["picture"] = lambda data: "data:image/jpeg;base64," + base64.b64encode(data).decode()
    # The plots are ours, their texts escaped; on a page they take its colours, light or dark.
    environment.filters["inline"] = lambda plot: Markup(
        plot.svg.replace(drawing.INK, "currentColor").replace(drawing.FAINT, "var(--rule)")
    )
    return str(environment.get_template("index.html.j2").render(context))


def _markdown(context: Mapping[str, Any]) -> str:
    environment = _environment(autoescape=False, finalize=markdown)
    environment.globals["picture_name"] = picture_name
    text = str(environment.get_template("report.md.j2").render(context))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _environment(**options: Any) -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("jobs.comparison"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options
    )


def _shown(value: Any) -> Any:
    return words.printable(value) if type(value) is str else value


def markdown(value: Any) -> str:
    """A value as Markdown that says just this, in a line: for a table's cell, a heading or a list."""
    from markupsafe import Markup

    if isinstance(value, Markup):
        return str(value)
    text = words.printable(str(value)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    lines = (" ".join(line.split()) for line in _SIGNS.sub(r"\\\1", text).splitlines())
    return "<br>".join(line for line in lines if line)
