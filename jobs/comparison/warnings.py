"""Why a comparison of two runs may say less than its numbers, in one sentence each."""

from __future__ import annotations

from typing import Any

from jobs.comparison import costs, words
from jobs.comparison.runs import Run
from jobs.report import HOLDS_MORE, MORE

FEW = 0.95
"""Share of a run's rows below which the joined ones are few."""
# What decides an answer, besides what is compared: name in run.json's config, and what to call it.
_SETTINGS = (
    ("job", "jobs"),
    ("prompt", "prompts"),
    ("question_column", "question columns"),
    ("image_column", "image columns"),
    ("id_column", "id columns"),
    ("max_new_tokens", "most new tokens (max_new_tokens)"),
    ("temperature", "temperatures"),
    ("top_p", "top_p"),
    ("top_k", "top_k"),
    ("stop", "stop texts"),
    ("rows", "row semantics (rows)"),
    ("tower_tiles", "tower_tiles"),
    ("limit", "limits"),
)
_VERSIONS = ("torch", "transformers")


def warnings(run: Run, baseline: Run, joined: int) -> list[str]:
    """One sentence for each reason why ``run`` and ``baseline``, ``joined`` of whose rows share an id, don't quite compare."""
    said = []
    if run.input_digest != baseline.input_digest:
        here, there = run.config["input"], baseline.config["input"]
        changed = f"shards of {here} have changed between {baseline.name} and {run.name}"
        why = changed if here == there else _two(run, baseline, here, there)
        said.append(f"The inputs differ: {why}; rows are compared that have the same id, and may have other images.")
    said += _joins(run, baseline, joined)
    for name, called in _SETTINGS:
        here, there = (r.config[name] for r in (run, baseline))
        if here != there:
            said.append(f"The {called} differ: {_two(run, baseline, here, there)}.")
    sampled = run.config["temperature"] or baseline.config["temperature"]
    if sampled and run.config["seed"] != baseline.config["seed"]:
        said.append(f"The seeds of sampling differ: {_two(run, baseline, run.config['seed'], baseline.config['seed'])}.")
    if run.record["checkpoint"]["identity"] != baseline.record["checkpoint"]["identity"]:
        models = (f"{r.record['checkpoint']['source']} ({r.record['checkpoint']['identity']})" for r in (run, baseline))
        said.append(f"The models differ: {_two(run, baseline, *models)}.")
    if run.stats["dtype"] != baseline.stats["dtype"]:
        said.append(f"The weights' types differ: {_two(run, baseline, run.stats['dtype'], baseline.stats['dtype'])}.")
    if run.hardware != baseline.hardware:
        where = _two(run, baseline, run.hardware, baseline.hardware)
        said.append(f"The hardware differs: {where}; speed, cost and byte-seconds compare machines as well as runs.")
    said += _holds_more(run, baseline)
    said += _versions(run, baseline)
    for one in (run, baseline):
        said += _own(one)
    return said


def _joins(run: Run, baseline: Run, joined: int) -> list[str]:
    if not joined:
        return ["No row of one run has the id of a row of the other, so no answers are compared."]
    rows = {one.name: int(one.stats["rows"]) for one in (run, baseline)}
    few = [f"{joined:,} of {count:,} rows of {name}" for name, count in rows.items() if joined < FEW * count]
    return [f"Few rows have an id that is in both runs: {' and '.join(few)}."] if few else []


def _holds_more(run: Run, baseline: Run) -> list[str]:
    """Where a trimmed run held more than the baseline, which keeps everything of the same tiles."""
    whole = baseline.policy == "none" and baseline.tower is None
    if run.policy == "none" or not whole or run.max_tiles != baseline.max_tiles:
        return []
    peak, other = (costs.peaks(one)["cross_kv_bytes"] for one in (run, baseline))
    # More rows at once fill more memory, which is no fault. What is held over time is told by a run itself: see ``_own``.
    if not (peak and other and peak > MORE * other and run.stats["peak_sequences"] <= baseline.stats["peak_sequences"]):
        return []
    beside = f"{words.bytes_of(peak)} at its peak beside {words.bytes_of(other)} ({words.times(peak / other)})"
    return [f"{run.name} trims and holds more cross KV than {baseline.name}: {beside}."]


def _versions(run: Run, baseline: Run) -> list[str]:
    said = []
    for name in _VERSIONS:
        here, there = (r.record.get("versions", {}).get(name) for r in (run, baseline))
        if here != there:
            said.append(f"The versions of {name} differ: {_two(run, baseline, here, there)}.")
    return said


def _own(run: Run) -> list[str]:
    """What is to be said of one run, whatever it is compared with."""
    said = []
    if len(run.records) < run.partitions:
        said.append(f"{run.name} is incomplete: {len(run.records)} of its {run.partitions} partitions have begun.")
    if len(run.finished) < run.units:
        done = f"{len(run.finished):,} of {run.units:,} units ({run.stats['rows']:,} rows) are finished"
        said.append(f"{run.name} is incomplete: {done}, and only those are compared.")
    if shared := run.record.get("shared"):
        said.append(f"{run.name} is part of a calibration: {shared}.")
    ratio = costs.held(run)["of_full"]
    if run.policy != "none" and ratio is not None and ratio > MORE:
        said.append(f"{run.name} {HOLDS_MORE.format(times=words.times(ratio))}.")
    if run.stats["cross_kv_byte_seconds"] is None:
        said.append(
            f"{run.name} was made by an older version that did not count what was held and read: its byte-seconds and bytes "
            "read are unknown, and rows' own caches don't tell, since rows about one image may have shared them."
        )
    if run.untimed:
        said.append(
            f"{run.name} was made by an older version that did not time its actors ({run.untimed:,} of {len(run.finished):,} "
            "units): tower, prefill and decode seconds stand in, which makes it look faster and cheaper than it was."
        )
    return said


def _two(run: Run, baseline: Run, here: Any, there: Any) -> str:
    return f"{_said(here)} in {run.name}, {_said(there)} in {baseline.name}"


def _said(value: Any) -> str:
    return "none" if value is None else repr(value) if isinstance(value, list) else str(value)
