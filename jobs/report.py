"""What a job prints: the plan, the summary, and why a run broke off."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pipeline import errors
from pipeline.listing import describe
from pipeline.units import bytes_fetched

if TYPE_CHECKING:
    from pipeline.plan import Plan

# The line of a traceback that names the exception.
_NAMED = re.compile(r"[A-Za-z_][\w.]*(Error|Exception): ")
UNKNOWN = "unknown: units of an older version did not count it"
HOLDS_MORE = (
    "held {times} what all features would have (by formula): rows about one image kept different sets, each for itself "
    "(--kept-sets question) or in several groups"
)
"""The warning on a trimmed run that keeps less of each row's features and more in memory."""
Stage = Literal["tower", "prefill", "decode"]
STAGES: tuple[Stage, ...] = ("tower", "prefill", "decode")
"""What the device does, one after another, as the engine times it: the tower with the projector, prefill with the
cross-attention layers' keys and values."""
KINDS = 3
"""Kinds of errors that a summary names."""
MUCH = 1 << 30
"""Bytes read in vain from which on it is worth a word."""
MORE = 1.02
"""Ratio from which on a run is said to hold more than another; what is below is the rounding of what is allocated."""
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: float) -> str:
    """E.g. ``1.5 GiB``."""
    for unit in _UNITS[:-1]:
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"


def count(number: int, thing: str) -> str:
    """E.g. ``1 row``, ``2,000 rows``."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def heading(plan: Plan) -> str:
    config = plan.config
    options = "".join(f" {name}={value:g}" for name, value in config.policy_options.items() if value)
    done = f", {len(plan.finished)} of them finished before" if plan.finished else ""
    parts = f"{count(plan.rows, 'row')} in {count(len(plan.shards), 'shard')}, {count(len(plan.units), 'unit')}{done}"
    tiles = f", up to {count(config.max_tiles, 'tile')} an image" if config.max_tiles is not None else ""
    tower = "" if config.tower_policy is None else f", tower {config.tower_policy} {config.recorded()['tower_keep']:g}"
    return f"{parts}; {config.model}, {config.policy}{options}{tiles}{tower}"


def skipped(plan: Plan) -> list[str]:
    """What lies in the input and is not read, in a line where there is such."""
    return [describe(plan.skipped)] if plan.skipped else []


def advice(plan: Plan) -> list[str]:
    """What is not read, and what to do about shards that are dear to read, in lines."""
    once = sum(unit.bytes for unit in plan.remaining)
    fetched = bytes_fetched(plan.shards, plan.remaining)
    if fetched - once < MUCH:
        return skipped(plan)
    largest = max(max(shard.groups, default=0) for shard in plan.shards)
    return [
        *skipped(plan),
        f"{size(fetched)} will be read for {size(once)} of shards, as their row groups of up to {largest:,} rows are read "
        f"whole for each unit of {plan.config.unit_rows}; rewrite them with smaller row groups, or raise unit_rows",
    ]


def dry_run(plan: Plan) -> str:
    """The plan in lines, with the first prompt that has a question."""
    config = plan.config
    gpus = "1 GPU where there is one" if config.gpus_per_actor is None else f"{config.gpus_per_actor:g} GPUs"
    columns = ", ".join(a if a == b else f"{a} → {b}" for a, b in plan.columns.passed)
    lines = [
        heading(plan),
        f"input       {config.input}, {size(sum(s.size for s in plan.shards))}",
        f"output      {config.output}, {count(len(plan.remaining), 'file')} to write"
        + (f", once {count(len(plan.removes), 'file')} of an earlier run are deleted" if plan.removes else ""),
        f"model       {plan.checkpoint.source} ({plan.checkpoint.identity})",
        f"actors      {config.num_actors}, each {config.cpus_per_actor:g} CPUs, {gpus}, up to {config.batch_size} rows at once",
        f"columns     {columns or 'none'}",
        f"roles       image {plan.columns.image!r}, id {plan.columns.id!r}, answer {plan.columns.answer!r}",
        f"prompt      {example_prompt(plan)!r}",
    ]
    return "\n".join([*lines, *(f"reading     {said}" for said in advice(plan))])


def example_prompt(plan: Plan) -> str:
    """The prompt of the first row that can be asked."""
    from pipeline import schema
    from pipeline.model import load_processor
    from pipeline.prompts import Prompter
    from pipeline.source import UnitReader

    prompter = Prompter(load_processor(plan.checkpoint))
    (block,) = UnitReader(plan.input, plan.columns, plan.image_roots)(plan.units[0])
    for row in block[schema.ROWS][0]:
        question = plan.config.prompt or row[schema.TEXT].as_py()
        if question:
            return prompter.text(question, len(row[schema.IMAGES].values))
    return ""


def table(summary: dict[str, Any], output: str) -> str:
    """The summary in a few lines."""
    seconds, working, actors = summary["seconds"], summary["seconds_working"], summary.get("actor_seconds")
    full, kept = summary["cross_kv_bytes_full"], summary["cross_kv_bytes"]
    fraction = summary["mean_keep_fraction"]
    lines = [
        ("rows", f"{summary['rows']:,}"),
        ("errors", f"{summary['errors']:,}"),
        *((f"  {found['rows']:,}", said) for found, said in _kinds(summary)),
        *_held(summary),
        ("seconds by stage", ", ".join(f"{summary['seconds_per_stage'].get(stage, 0):.1f} {stage}" for stage in STAGES)),
        ("seconds", f"{seconds:.1f}, {working:.1f} of them with the cluster up"),
        # Over all starts of the run, unlike the seconds.
        ("images/s per actor", f"{summary['images'] / actors:.1f}, once its model is loaded" if actors else "-"),
        ("mean kept fraction", "-" if fraction is None else f"{fraction:.3f}"),
        *_tower(summary),
        ("rows' own caches", f"{size(kept)}, with all features {size(full)}, as if no rows shared one"),
    ]
    if summary["accuracy"] is not None:
        lines.append(("accuracy", f"{summary['accuracy']:.1%} of {summary['judged']:,}"))
    if summary.get("gpu_seconds"):
        lines.append(("GPU hours", f"{summary['gpu_seconds'] / 3600:,.2f}"))
    lines.append(("device", f"{summary['device']}, {summary['dtype']}"))
    lines.append(("output", output))
    return "\n".join(f"{name:<20}{value}" for name, value in lines)


def _tower(summary: dict[str, Any]) -> list[tuple[str, str]]:
    share = summary.get("mean_tower_keep_fraction")
    return [] if share in (None, 1.0) else [("tower's kept share", f"{share:.3f} of its rows × layers")]


def _held(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What the machine held of images' keys and values, what rows share counted once, and a warning where that is more than
    all features would have taken."""
    peak, read = summary["peak_cross_kv_bytes"], summary.get("cross_kv_bytes_read")
    held, ratio = summary.get("cross_kv_byte_seconds"), held_of_full(summary)
    beside = "" if ratio is None else f", {ratio:.2f} × what all features would have held meanwhile (by formula)"
    lines = [
        ("peak cross KV held", f"{size(peak)}, the most of one actor"),
        ("cross KV held", UNKNOWN if held is None else f"{size(held)}·s{beside}"),
        ("cross KV read", UNKNOWN if read is None else f"{size(read)} in decoding"),
    ]
    if ratio is not None and ratio > MORE:
        lines.append(("WARNING", HOLDS_MORE.format(times=f"{ratio:.2f} ×")))
    return lines


def held_of_full(stats: Mapping[str, Any]) -> float | None:
    """Byte-seconds of cross KV that were held, over those that the running rows' images would have taken with all features
    kept, one set an image; None where a unit did not count them, and without images. The one is counted, the other computed."""
    held, full = stats.get("cross_kv_byte_seconds"), stats.get("cross_kv_byte_seconds_full")
    return held / full if held is not None and full else None


def too_many_errors(summary: dict[str, Any], most: float) -> str:
    """Why a run that is written ends with an error, in one line."""
    share = summary["errors"] / summary["rows"]
    found, said = _kinds(summary)[0]
    return (
        f"all rows are written, and {share:.1%} of them have an error, over max_error_rate={most:g}; most often "
        f"({count(found['rows'], 'row')}): {said} (ids {', '.join(found['ids'])})"
    )


def _kinds(summary: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """The most frequent kinds of errors, each with one row's own words."""
    kinds = list(summary.get("error_kinds", {}).items())[:KINDS]
    return [(found, errors.example(name, found)) for name, found in kinds]


def cause(error: BaseException) -> str:
    """Why a run broke off, in one line."""
    from ray.exceptions import RayError

    # An actor's exception comes wrapped in Ray's own, whose text is one traceback after another, the innermost first.
    first = str(error).split("The above exception was the direct cause")[0]
    lines = [line.strip() for line in first.splitlines() if line.strip()] or ["no message"]
    if not isinstance(error, RayError):
        return f"{type(error).__name__}: {' '.join(lines)}"[:500]
    # Ray Data adds advice on retries to the exception's own words, on lines below them.
    named = [line for line in lines if _NAMED.match(line)]
    return (named or lines)[-1][:500]
