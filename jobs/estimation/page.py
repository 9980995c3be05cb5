"""The estimate as a table for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jobs.report import MORE, STAGES, size

Report = dict[str, Any]
BAR = 40
"""Characters of the whole time."""
FED, BUSY = 0.7, 0.9
"""Shares under which a measured run is said to have been short of rows."""
GPU_RESULTS = "benchmarks/results/gpu.json"
"""As a reader finds it (jobs.estimation.gpu_benchmark.RESULTS)."""
_MARKS = {"tower": "#", "prefill": "+", "decode": "-"}


def text(report: Report) -> str:
    """What was asked and assumed, the table, where the time goes, and what to think of it."""
    return "\n".join([*_heading(report), "", *_table(report), "", *_bars(report), "", *_notes(report)])


def _heading(report: Report) -> list[str]:
    job, said = report["job"], report["job_from"]
    tiles = ", ".join(f"{share:.0%} of {count}" for count, share in job["tiles"].items())
    origin = {name: "" if where == "stated" else f" ({where})" for name, where in said.items()}
    per = f", {report['gpus_per_actor']} for each copy of the model" if report["gpus_per_actor"] > 1 else ""
    k_ratio = "" if report["k_ratio"] is None else f"K = {report['k_ratio']:g} keeps "
    return [
        f"{job['images']:,} images, {_short(job['questions'])} question{'s' if job['questions'] != 1 else ''} each"
        f"{origin['questions']}; {report['model']} on {report['gpus']} × {report['hardware']}{per}",
        f"tiles    {tiles}{origin['tiles']}"
        + {"real": ", padding tiles left out of the tower", "all": ", all of padding in the tower"}.get(job["tower_tiles"], ""),
        f"tokens   {_short(job['prompt'])} of prompt{origin['prompt_tokens']}, {_short(job['output'])} of answer"
        f"{origin['output_tokens']}, {job['longest']} at most{origin['max_new_tokens']}",
        *_tower(job["tower_policy"], origin),
        f"trimmed  {k_ratio}{report['keep']:.1%} of the features{' that the tower leaves' if job['tower_policy'] else ''} "
        f"({report['keep_from']})",
        "kept     what is left of an image once its alike features are merged"
        if job["merged"]
        else f"kept     one set {'an image' if job['kept_sets'] == 'image' else 'a question'}{origin['kept_sets']}",
        *_gpu(report),
        f"memory   {size(report['weights_bytes'])} of weights, {size(report['kv_bytes'])} for keys and values",
        f"speed    {report['calibration']}" + _shares(report),
    ]


def _tower(policy: Report | None, origin: Mapping[str, str]) -> Iterator[str]:
    if policy is not None:
        left = f"{policy['keep']:.0%} of rows × layers{origin['tower_keep']}, {policy['left']:.1%} of the features"
        yield f"tower    trimmed: {policy['name']}{origin['tower_policy']} leaves {left}"


def _gpu(report: Report) -> Iterator[str]:
    gpu = report["gpu"]
    if gpu is not None:
        peaks = f"{gpu['bandwidth'] / 1e9:,.0f} GB/s, {gpu['rate'] / 1e12:,.4g} TFLOP/s in bf16"
        yield f"each     {gpu['memory'] / 1e9:,.0f} GB, {peaks} ({gpu['source'].partition(',')[0]})"


def _shares(report: Report) -> str:
    shares, assumed = report["roofline_shares"], report["assumed_shares"]
    if shares is None:
        return ""
    # The line has said so already where all of them are.
    marked = assumed if len(assumed) < len(STAGES) else ()
    each = [f"{stage} {share:.0%}" + " assumed" * (stage in marked) for stage, share in shares.items()]
    return f" ({', '.join(each)})"


def _table(report: Report) -> Iterator[str]:
    one = report["unit"][:-1]
    rows: list[tuple[str, Callable[[Report], float | None], Callable[[float], str]]] = [
        ("rows that memory holds", lambda p: p["fits"], _whole),
        ("rows at once", lambda p: p["largest"], _whole),
        ("  on average", lambda p: p["mean_batch"], _digits),
        ("cross KV held, GB at most", lambda p: p["peak_cross_kv_bytes"] / 1e9, _digits),
        ("  GB s per 1,000 images", lambda p: p["cross_kv_byte_seconds"] / 1e9, _digits),
        ("  read, GB per 1,000 images", lambda p: p["cross_kv_bytes_read"] / 1e9, _digits),
        *((f"s per 1,000 images, {s}", lambda p, s=s: p["stages"][s]["seconds"], _digits) for s in STAGES),
        ("  all stages", lambda p: p["seconds"], _digits),
        (f"images/s per {one}", lambda p: p["images_per_second"], _digits),
        (f"{one} hours", lambda p: p["hours"], _digits),
        (f"days on {report['gpus']} {report['unit'] if report['gpus'] > 1 else one}", lambda p: p["days"], _digits),
    ]
    if report["price"] is not None:
        rows.append((f"dollars, at ${report['price']:g} an hour", lambda p: p["dollars"], _dollars))
    yield f"{'':<28}{'full':>12}{'trimmed':>12}{'ratio':>9}   bound by"
    for title, value, shape in rows:
        full, trimmed = value(report["full"]), value(report["trimmed"])
        ratio = f"{trimmed / full:.2f}" if full and trimmed is not None else "–"
        line = f"{title:<28}{shape(full or 0):>12}{shape(trimmed or 0):>12}{ratio:>9}"
        stage = title.rpartition(", ")[2]
        yield f"{line}   {_bound(report, stage)}".rstrip() if stage in STAGES else line


def _bound(report: Report, stage: str) -> str:
    """Which of operations and bytes takes the time, for both where they differ."""
    found = [report[which]["stages"][stage]["bound"] for which in ("full", "trimmed")]
    return found[0] if found[0] == found[1] else f"{found[0]}, trimmed {found[1]}"


def _bars(report: Report) -> Iterator[str]:
    yield "where the time goes: " + ", ".join(f"{_MARKS[stage]} {stage}" for stage in STAGES)
    whole = max(report[which]["seconds"] for which in ("full", "trimmed"))
    for which in ("full", "trimmed"):
        seconds = {stage: report[which]["stages"][stage]["seconds"] for stage in STAGES}
        ends, reached = [0], 0.0
        for stage in STAGES:
            reached += seconds[stage]
            ends.append(round(BAR * reached / whole))
        bar = "".join(_MARKS[stage] * (end - begin) for stage, begin, end in zip(STAGES, ends, ends[1:], strict=False))
        shares = ", ".join(f"{stage} {seconds[stage] / report[which]['seconds']:.0%}" for stage in STAGES)
        yield f"{which:<9}{bar:<{BAR}}  {shares}"


def _notes(report: Report) -> Iterator[str]:
    full, trimmed = (report[which]["cross_kv_byte_seconds"] for which in ("full", "trimmed"))
    if trimmed > MORE * full:
        yield (
            f"WARNING: trimmed is predicted to hold {trimmed / full:.2f} × all features' cross KV over time, as each question "
            "keeps a set of its own, and with all features those about one image share theirs; see --kept-sets."
        )
    if report["price"] is None:
        yield f"No dollars: state --price, dollars an hour for each of the {report['unit']}."
    said = (
        "this is a model: seconds and bytes are predicted, images are decoded beside the stages, and loading, starting and "
        "stopping are not in it; "
    )
    run, found = report["run"], report["errors"]
    if run is not None:
        yield from _run(report, run)
    if found is None:
        yield said + "its errors on measured runs are in the repository's docs/estimate.md"
    else:
        stages = ", ".join(f"{stage} {error:.0%}" for stage, error in found["largest"]["stages"].items())
        yield (
            f"{said}its largest error on the {found['runs']} measured runs it predicted, all on {found['hardware']}: {stages}, "
            f"all stages together {found['largest']['together']:.0%}"
        )
    if run is None:
        yield f"{_shares_from(report)}; --from a short run of your own replaces them."


def _shares_from(report: Report) -> str:
    """Which shares of the peaks the GPU benchmark measured, on which card, and which are assumed."""
    found, assumed = report["gpu_benchmark"], report["assumed_shares"]
    if found is None:
        return f"The shares of the peaks are assumptions, as there are no measurements of a GPU in {GPU_RESULTS}"
    if found["unused"] is not None:
        return f"The shares of the peaks are assumptions, as {GPU_RESULTS} is not used: {found['unused']}"
    carried = "" if found["gpu"] == report["gpu"] else f" and are carried over to {report['hardware']}"
    rest = f"; those of {', '.join(assumed)} are assumptions" if assumed else ""
    return (
        f"The shares of the peaks of {', '.join(found['shares'])} were measured on {found['hardware']} with the model "
        f"{found['model']} ({GPU_RESULTS}){carried}{rest}"
    )


def _run(report: Report, run: Report) -> Iterator[str]:
    """Where the run that calibrates is not like what is estimated."""
    expected = report[run["like"]]["mean_batch"]
    if run["mean_batch"] < FED * expected:
        yield (
            f"The run decoded {_digits(run['mean_batch'])} rows at once on average, and {_digits(expected)} are expected: it "
            "was short, or its rows came too slowly (reading, decoding images). If yours do too, state that as --batch-size."
        )
    if run["busy"] is not None and run["busy"] < BUSY:
        yield (
            f"The run's actors were in these stages for {run['busy']:.0%} of their time, and waited for rows in the rest, "
            "which is not in the hours above."
        )


def _short(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _digits(value: float) -> str:
    """Three significant digits, or all before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}".rstrip(".")


def _dollars(value: float) -> str:
    return f"${value:,.0f}" if value >= 99.5 else f"${value:,.2f}"
