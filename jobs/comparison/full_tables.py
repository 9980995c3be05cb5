"""Tables of everything that is known of each run and of each comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from jobs.comparison import words
from jobs.comparison.tables import (
    AGREEMENT,
    SCORES,
    Cell,
    Report,
    Table,
    compared,
    cost_of,
    device,
    difference_cell,
    held,
    hours,
    make,
    name_of,
    peak,
    ratio_of,
    scored,
    verdict_cell,
)
from jobs.comparison.words import (
    UNKNOWN,
    byte_seconds,
    bytes_of,
    dollars,
    hundredths,
    known,
    number,
    points,
    share,
    signed,
    times,
    whole,
)
from pipeline.errors import example


def full(report: Report) -> Iterator[Table]:
    """All of them; those with nothing to say are left out."""
    for table in (held_bytes, memory, throughput, kept, tokens, scores, agreement, differences, joined, completeness, errors):
        made = table(report)
        if made.rows and len(made.columns) > 1:
            yield made


def throughput(report: Report) -> Table:
    return make(
        "throughput",
        "Throughput and cost",
        {
            "run": name_of(report),
            "rows": lambda run: whole(run["rows"]),
            "images": lambda run: whole(run["images"]),
            f"images/s per {device(report)}": lambda run: Cell(
                known(run["speed"]["images_per_second"], number), ratio_of(report, run, "speed_ratio")
            ),
            f"tokens/s per {device(report)}": lambda run: known(run["speed"]["output_tokens_per_second"], number),
            f"{hours(report)} in all": lambda run: known(run["speed"]["gpu_seconds"], lambda s: number(s / 3600)),
            f"{hours(report)} per million images": lambda run: known(run["cost"]["gpu_hours_per_million_images"], number),
            "price per hour": lambda run: Cell(known(run["cost"]["price"], dollars), run["cost"]["price_name"] or ""),
            "$ per million images": lambda run: cost_of(report, run, "dollars_per_million_images", dollars),
        },
        report["runs"],
    )


def held_bytes(report: Report) -> Table:
    return make(
        "held",
        "Cross KV held and read, once however many rows share it",
        {
            "run": name_of(report),
            "peak": peak(report),
            "rows at once, most": lambda run: known(run["peaks"]["sequences"], whole),
            "held per row": held(report, "byte_seconds_per_row", byte_seconds, "held_ratio"),
            "held in all": held(report, "byte_seconds", byte_seconds),
            "of all features, by formula": held(report, "of_full", times),
            "read per token": held(report, "bytes_read_per_token", bytes_of, "read_ratio"),
            "read in all": held(report, "bytes_read", bytes_of),
        },
        report["runs"],
        notes=[
            "By formula: what was held, over what the rows that ran at the same moments would have held with all features of "
            "their tiles, one set an image. The first is counted, the second computed."
        ],
    )


def memory(report: Report) -> Table:
    return make(
        "memory",
        "Memory, and rows' own caches",
        {
            "run": name_of(report),
            "peak memory": lambda run: known(run["peaks"]["memory_bytes"], bytes_of),
            "peak KV": lambda run: known(run["peaks"]["kv_bytes"], bytes_of),
            "own cross KV per row": lambda run: Cell(
                known(run["row_kv"]["cross_per_row"], bytes_of), ratio_of(report, run, "row_kv_ratio")
            ),
            "all features": lambda run: known(run["row_kv"]["cross_full_per_row"], bytes_of),
            "self KV per row": lambda run: known(run["row_kv"]["self_per_row"], bytes_of),
            "own cross KV in all": lambda run: known(run["row_kv"]["cross_total"], bytes_of),
            "self KV in all": lambda run: known(run["row_kv"]["self_total"], bytes_of),
        },
        report["runs"],
        notes=[
            "A row's own cross KV is what it would hold alone; rows about one image may share it, so sums of them are not what "
            "the machine held. All features: the same with all of its tiles' features kept."
        ],
    )


def kept(report: Report) -> Table:
    return make(
        "kept",
        "Share of the visual features kept, over rows with an image",
        {"run": name_of(report)}
        | {_percentile(key): _kept(key) for key in ("mean", "std", "p5", "p50", "p95")}
        | {"tower's rows × layers": lambda run: known(run["tower_kept"], share)},
        [run for run in report["runs"] if run["kept"]],
    )


def tokens(report: Report) -> Table:
    return make(
        "tokens",
        "Output tokens of a row",
        {"run": name_of(report)}
        | {_percentile(key): _tokens(key) for key in ("mean", "p5", "p50", "p95", "p99", "max")}
        | {
            "mean, minus the baseline's": lambda run: _run_difference(report, run, "output_tokens", hundredths),
            "verdict": lambda run: _run_verdict(report, run, "output_tokens"),
        },
        report["runs"],
        prose=("verdict",),
    )


def scores(report: Report) -> Table:
    present = [name for name in SCORES if any(words.score(run["scores"].get(name)) for run in report["runs"])]
    return make(
        "scores",
        "Scores against the references, with 95% intervals",
        {"run": name_of(report)} | {words.METRICS[s]: _score(s) for s in present},
        report["runs"],
    )


def agreement(report: Report) -> Table:
    return make(
        "agreement",
        "Agreement of the texts with the baseline's, with 95% intervals",
        {"run": lambda c: c["run"], "rows compared": lambda c: whole(c["compared"])}
        | {words.METRICS[a]: _agreement(a) for a in AGREEMENT},
        report["comparisons"],
    )


def differences(report: Report) -> Table:
    return make(
        "differences",
        "Differences from the baseline, with paired 95% intervals",
        {
            "run": lambda found: found[0],
            "of": lambda found: found[1],
            "difference": lambda found: difference_cell(found[2], found[3]),
            "verdict": lambda found: verdict_cell(found[2]),
            "rows": lambda found: known(found[2].get("rows"), whole),
            "groups of one image": lambda found: known(found[2].get("clusters"), whole),
        },
        list(_differences(report)),
        prose=("of", "verdict"),
    )


def joined(report: Report) -> Table:
    return make(
        "joined",
        "Rows joined by id, and rows that are missing on a side",
        {
            "run": lambda c: c["run"],
            "in both": lambda c: whole(c["joined"]),
            "answered in both": lambda c: whole(c["compared"]),
            "only in the run": lambda c: whole(c["only_in_run"]),
            "only in the baseline": lambda c: whole(c["only_in_baseline"]),
            "error in the run alone": lambda c: whole(c["errors_in_run_only"]),
            "error in the baseline alone": lambda c: whole(c["errors_in_baseline_only"]),
        },
        report["comparisons"],
    )


def completeness(report: Report) -> Table:
    return make(
        "completeness",
        "What is finished, and errors",
        {
            "run": name_of(report),
            "units finished": lambda run: f"{run['units_finished']:,} of {run['units']:,}",
            "partitions": lambda run: whole(run["partitions"]),
            "complete": lambda run: "yes" if run["complete"] else Cell("no", tone="bad"),
            "rows": lambda run: whole(run["rows"]),
            "errors": lambda run: Cell(whole(run["errors"]), share(run["errors"] / run["rows"]) if run["errors"] else ""),
        },
        report["runs"],
    )


def errors(report: Report) -> Table:
    kinds = [(run["name"], kind, found) for run in report["runs"] for kind, found in run["error_kinds"].items()]
    return make(
        "errors",
        "Errors by kind",
        {
            "run": lambda found: found[0],
            "kind": lambda found: example(found[1], found[2]),
            "rows": lambda found: whole(found[2]["rows"]),
            "ids, for example": lambda found: ", ".join(map(str, found[2]["ids"])) or UNKNOWN,
        },
        kinds,
        prose=("kind", "ids, for example"),
    )


def _percentile(key: str) -> str:
    names = {
        "std": "standard deviation",
        "p50": "median",
        "p5": "5th percentile",
        "p95": "95th percentile",
        "p99": "99th percentile",
    }
    return names.get(key, key)


def _kept(key: str) -> Callable[[Report], str]:
    return lambda run: known((run["kept"] or {}).get(key), share)


def _tokens(key: str) -> Callable[[Report], str]:
    return lambda run: known((run["output_tokens"] or {}).get(key), number if key == "mean" else whole)


def _score(name: str) -> Callable[[Report], Cell]:
    return lambda run: scored(run["scores"].get(name))


def _agreement(name: str) -> Callable[[Report], Cell]:
    return lambda comparison: scored(comparison["agreement"].get(name))


def _differences(report: Report) -> Iterator[tuple[str, str, Report, Callable[[float], str]]]:
    for comparison in report["comparisons"]:
        for name in SCORES:
            if found := words.score(comparison["differences"].get(name)):
                yield comparison["run"], f"{words.METRICS[name]}, points", found, points
        for name, label, shape in (
            ("output_tokens", "output tokens per row", hundredths),
            ("cross_kv_bytes", "own cross KV per row", bytes_of),
        ):
            if found := words.score(comparison["differences"].get(name)):
                yield comparison["run"], label, found, signed(shape)


def _run_difference(report: Report, run: Report, name: str, shape: Callable[[float], str]) -> Cell:
    found = compared(report, run)
    return Cell("") if found is None else difference_cell(found["differences"].get(name), signed(shape))


def _run_verdict(report: Report, run: Report, name: str) -> Cell:
    found = compared(report, run)
    return Cell("") if found is None else verdict_cell(found["differences"].get(name))
