"""The report as one dict, of which ``report.json`` is the text and the page a view."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from jobs.comparison import bootstrap, costs, pairs, prices
from jobs.comparison.bootstrap import Clusters
from jobs.comparison.pairs import Pairs
from jobs.comparison.references import SCORES
from jobs.comparison.runs import Run
from jobs.comparison.warnings import warnings
from pipeline import schema

DISTRIBUTION = "trimmed-mllama"


def build(
    runs: Sequence[Run],
    priced: Mapping[str, float],
    *,
    references: str | None = None,
    examples: int = 10,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Reads the runs' rows and compares them.

    Args:
        runs: the baseline first.
        priced: dollars an hour by the hardware's name.
        references: column of references; default: each run's own answer column.
        examples: ids of rows whose texts differ, for each comparison.
        say: takes a line on what is being read.

    Returns:
        Numbers, strings, lists and dicts alone, None where something is unknown; agreement, scores and kept fractions are
        fractions of 1, sizes bytes, times seconds.

    Raises ``ValueError`` where no run has the column of references, and for runs that can't be read or joined.
    """
    columns = reference_columns(runs, references)
    baseline, *others = runs
    described, compared = [], []
    for run in runs:
        say(f"reading {run.name}: {run.stats['rows']:,} rows")
        described.append(describe(run, prices.blend(run.device_seconds, priced), columns[run.name]))
    for run, its in zip(others, described[1:], strict=True):
        say(f"comparing {run.name} with {baseline.name}")
        pair = Pairs(run, baseline, (columns[run.name], columns[baseline.name]), examples=examples)
        ratios = {
            "speed_ratio": _ratio(its["speed"]["images_per_second"], described[0]["speed"]["images_per_second"]),
            "cost_ratio": _ratio(its["cost"]["dollars_per_million_images"], described[0]["cost"]["dollars_per_million_images"]),
            "held_ratio": _ratio(its["held"]["byte_seconds_per_row"], described[0]["held"]["byte_seconds_per_row"]),
            "peak_ratio": _ratio(its["peaks"]["cross_kv_bytes"], described[0]["peaks"]["cross_kv_bytes"]),
            "read_ratio": _ratio(its["held"]["bytes_read_per_token"], described[0]["held"]["bytes_read_per_token"]),
        }
        compared.append({"run": run.name, "warnings": warnings(run, baseline, pair.joined), **pair.as_dict(), **ratios})
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": _version(),
        "baseline": baseline.name,
        "prices": dict(priced),
        "runs": described,
        "comparisons": compared,
        "equal_kv": equal_kv(runs, described, columns),
    }


def describe(run: Run, price: prices.Price | None, reference: str | None) -> dict[str, Any]:
    """One run on its own."""
    spread = costs.Distributions()
    keys: list[np.ndarray] = []
    values: dict[str, list[np.ndarray]] = {name: [] for name in SCORES}
    judged = [schema.ID, schema.TEXT, reference] if reference else []
    for table in run.rows([*costs.COLUMNS, *judged]):
        spread.add(table)
        if not reference:
            continue
        keys.append(pairs.cluster_keys(table[schema.ID], table[schema.IMAGE_DIGEST]))
        texts, cells = table[schema.TEXT].to_pylist(), table[reference].to_pylist()
        for name, measure in SCORES.items():
            # A row with an error has no text, which is a wrong answer, as in the pipeline's own accuracy.
            values[name].append(pairs.as_array([measure(text, cell) for text, cell in zip(texts, cells, strict=True)]))
    stats = run.stats
    return {
        "name": run.name,
        "folder": run.folder.url,
        "job": run.config["job"],
        "policy": run.policy,
        "options": run.options,
        "max_tiles": run.max_tiles,
        "tower_tiles": run.tower_tiles,
        "tower": run.tower,
        "kept_sets": run.kept_sets,
        "model": run.record["checkpoint"]["source"],
        "identity": run.record["checkpoint"]["identity"],
        "dtype": stats["dtype"],
        "hardware": run.hardware,
        "partitions": run.partitions,
        "units": run.units,
        "units_finished": len(run.finished),
        "complete": run.complete,
        **{name: stats[name] for name in ("rows", "errors", "error_kinds", "images", "tiles")},
        "speed": costs.speed(run),
        "cost": costs.cost(run, price),
        "output_tokens": spread.output_tokens(),
        "tiles_per_row": spread.tiles_per_row(),
        "questions_per_image": spread.questions_per_image(),
        "peaks": costs.peaks(run),
        "kept": spread.kept(),
        "tower_kept": stats.get("mean_tower_keep_fraction"),
        "held": costs.held(run),
        "row_kv": costs.row_kv(run),
        "stages": costs.stages(run),
        "scores": {name: _score(keys, found) for name, found in values.items()},
    }


def equal_kv(
    runs: Sequence[Run], described: Sequence[Mapping[str, Any]], columns: Mapping[str, str | None]
) -> list[dict[str, Any]]:
    """Each run with a policy, in the tower or behind it, beside the cheap alternative: the run that keeps everything of fewer
    tiles and is nearest to it in what it held, byte-seconds of cross-attention KV per answered row, by their ratio. Where a
    run did not count that, or machines of another kind take other seconds, rows' own caches stand in (``by`` is ``row_kv``
    then, else ``held``).

    What is compared is the VQA accuracy where rows have several references, else the accuracy where there are any; without
    references, how far the texts agree with the baseline's, as chrF for captions and exactly for answers. A pair of which one
    is the baseline then has nothing to be measured by, and is left out.
    """
    baseline = runs[0]
    held = {its["name"]: its["held"]["byte_seconds_per_row"] for its in described}
    row_kv = {its["name"]: its["row_kv"]["cross_per_row"] for its in described}
    whole = [run for run in runs if run.policy == "none" and run.tower is None]
    fewer = [run for run in whole if run.max_tiles is not None and row_kv[run.name]]
    found = []
    for run in runs:
        if run in whole or not fewer or not row_kv[run.name]:
            continue
        counted = all(held[one.name] and one.hardware == run.hardware for one in (run, *fewer))
        amounts = held if counted else row_kv
        ratios = {other.name: amounts[run.name] / amounts[other.name] for other in fewer}
        tiles = min(fewer, key=lambda other: abs(math.log(ratios[other.name])))
        # By references where both have them, else by agreement with the baseline.
        pair = Pairs(run, tiles, (columns[run.name], columns[tiles.name]), examples=0, agreements=())
        score = next((name for name in ("vqa_accuracy", "accuracy") if pair.difference(name) is not None), None)
        if score is not None:
            difference = pair.difference(score)
        elif baseline.name in (run.name, tiles.name):
            continue
        else:
            score = "chrf" if run.config["job"] == "caption" else "exact"
            difference = pairs.agreement_difference(run, tiles, baseline, score)
        beside = {"tiles_run": tiles.name, "by": "held" if counted else "row_kv", "ratio": ratios[tiles.name]}
        found.append({"run": run.name, **beside, "score": score, "difference": difference})
    return found


def reference_columns(runs: Sequence[Run], asked: str | None) -> dict[str, str | None]:
    """Each run's output column of references, or None: ``asked``, as the input or the output calls it, else the column that the
    run itself judged by. Raises ``ValueError`` where ``asked`` is in no run."""
    found: dict[str, str | None] = {}
    for run in runs:
        names: Mapping[str, str] = run.record["columns"]
        name = asked if asked is not None else run.config.get("answer_column") or "answer"
        column = names.get(name, name if name in names.values() else None)
        found[run.name] = column if column in run.columns else None
    if asked is not None and not any(found.values()):
        there = ", ".join(dict.fromkeys(name for run in runs for name in run.record["columns"]))
        raise ValueError(f"references={asked!r} is a column of no run's input; there are {there or 'none'}")
    return found


def _score(keys: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> dict[str, Any] | None:
    if not keys:
        return None
    clusters = Clusters.of(np.concatenate(keys), np.concatenate(values))
    return bootstrap.score(clusters).as_dict() if len(clusters.counts) else None


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def _version() -> str:
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        # Run from a checkout, as by Ray's working_dir.
        return "unknown"
