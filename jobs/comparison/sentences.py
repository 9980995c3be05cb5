"""The report in whole sentences: what it begins with, and what there is to say of each run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.comparison import tables, words
from jobs.comparison.words import dollars, known, number, points, share, times

Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Finding:
    """What there is to say of one run, in whole sentences."""

    run: str
    sentences: Sequence[str]
    warnings: Sequence[str]
    tone: str = ""


def lead(report: Report) -> str:
    """How much was compared with what."""
    base, others = report["runs"][0], len(report["comparisons"])
    rest = "one run" if others == 1 else f"{others} runs"
    return (
        f"{rest[0].upper()}{rest[1:]} beside the baseline “{base['name']}”, which has {base['rows']:,} rows with "
        f"{base['images']:,} images on {base['hardware'] or 'unknown hardware'}. "
        "Intervals are 95% bootstrap intervals, drawn by image."
    )


def bottom_line(report: Report) -> Iterator[str]:
    """The cheapest run that is not measurably worse and the one that holds least, or what keeps from naming them."""
    score = tables.quality(report)
    if score in tables.AGREEMENT:
        yield "Without references nothing here says which answers are right: agreement tells how often the answers change."
        return
    differences = {c["run"]: words.score(c["differences"].get(score)) for c in report["comparisons"]}
    fit = [run for run in report["runs"][1:] if (found := differences[run["name"]]) and found["verdict"] != "worse"]
    if not fit:
        yield f"Every run that could be compared is measurably worse in {words.METRICS[score]} than the baseline."
        return
    cost, shape, unit = "gpu_hours_per_million_images", number, f" {tables.hours(report)}"
    if tables.priced(report):
        cost, shape, unit = "dollars_per_million_images", dollars, ""
    base, metric = report["runs"][0], words.METRICS[score]
    named = set()
    if cheap := _least(fit, base, lambda run: run["cost"][cost]):
        here, there = cheap["cost"][cost], base["cost"][cost]
        named.add(cheap["name"])
        costs = f"{shape(here)}{unit} per million images, {times(here / there)} the baseline"
        yield f"The cheapest run that is not measurably worse in {metric} is {cheap['name']}: {costs}."
    else:
        yield f"No run is cheaper than the baseline without being measurably worse in {metric}."
    if all(run["held"]["byte_seconds_per_row"] is None for run in fit) or base["held"]["byte_seconds_per_row"] is None:
        yield "Which of such runs held the least cross KV is unknown: runs of an older version did not count it."
    elif small := _least(fit, base, lambda run: run["held"]["byte_seconds_per_row"]):
        again = "It also holds" if named == {small["name"]} else f"{small['name']} is not measurably worse and holds"
        named.add(small["name"])
        found = next(c for c in report["comparisons"] if c["run"] == small["name"])
        yield f"{again} the least of such runs: {_held(found)}."
    else:
        yield f"No run holds less cross KV than the baseline without being measurably worse in {metric}."
    unsure = [
        found for run in fit if (found := differences[run["name"]]) and run["name"] in named and found["verdict"] != "better"
    ]
    if unsure:
        widest = max(unsure, key=lambda found: found["high"] - found["low"])
        yield f"That is no proof of equality: the difference may be anything from {words.interval(widest, points)} points."


def _least(runs: Sequence[Report], base: Report, of: Callable[[Report], float | None]) -> Report | None:
    """The run with the least of something, if that is less than the baseline's."""
    ceiling = of(base)
    found = [(value, place) for place, run in enumerate(runs) if (value := of(run)) is not None]
    return runs[min(found)[1]] if found and ceiling is not None and min(found)[0] < ceiling else None


def finding(report: Report, comparison: Report) -> Finding:
    """One run beside the baseline in sentences."""
    base = report["runs"][0]
    run = next(run for run in report["runs"] if run["name"] == comparison["run"])
    score = tables.quality(report)
    difference = words.score(comparison["differences"].get(score))
    sentences = [
        _memory(run, comparison),
        _cost(report, base, run, comparison),
        *_quality(report, base, run, comparison, score),
    ]
    sentences += [
        _equal_kv(pair) for pair in report["equal_kv"] if pair["run"] == run["name"] and words.score(pair["difference"])
    ]
    return Finding(run["name"], [each for each in sentences if each], comparison["warnings"], words.tone(difference))


def _cost(report: Report, base: Report, run: Report, comparison: Report) -> str:
    parts = []
    for name, shape, unit in (
        ("dollars_per_million_images", dollars, ""),
        ("gpu_hours_per_million_images", number, f" {tables.hours(report)}"),
    ):
        here, there = run["cost"][name], base["cost"][name]
        if here is not None:
            beside = f" where the baseline costs {shape(there)} ({times(here / there)})" if there else ""
            parts.append(f"It costs {shape(here)}{unit} per million images{beside}")
            break
    speed = run["speed"]["images_per_second"]
    if speed is not None:
        ratio = comparison["speed_ratio"]
        faster = f", {times(ratio)} the baseline's speed" if ratio is not None else ""
        parts.append(f"{'at' if parts else 'It runs at'} {number(speed)} images/s per {tables.device(report)}{faster}")
    return f"{', '.join(parts)}." if parts else ""


def _memory(run: Report, comparison: Report) -> str:
    held = _held(comparison)
    parts = [f"holds {held}" if held else "holds an unknown part of the baseline's cross KV"]
    if comparison["read_ratio"] is not None:
        parts.append(f"reads {times(comparison['read_ratio'])} as many bytes per output token")
    if run["kept"] and run["kept"]["mean"] is not None:
        parts.append(f"keeps {share(run['kept']['mean'])} of the visual features")
    return f"It {', '.join(parts[:-1])}{' and ' if parts[1:] else ''}{parts[-1]}."


def _held(comparison: Report) -> str:
    """What a run held beside the baseline, as far as both counted it."""
    held, peak = comparison["held_ratio"], comparison["peak_ratio"]
    if held is None:
        return "" if peak is None else f"{times(peak)} the baseline's cross KV at its peak"
    return f"{times(held)} the baseline's cross KV in byte-seconds per row{f' ({times(peak)} at its peak)' if peak else ''}"


def _quality(report: Report, base: Report, run: Report, comparison: Report, score: str) -> Iterator[str]:
    name = score if score in tables.AGREEMENT else "exact"
    agreement = words.score(comparison["agreement"][name])
    if not comparison["joined"]:
        yield "No id is in both runs, so that no answers could be compared."
    elif agreement is None:
        yield "No row is answered in both runs, so that no answers could be compared."
    else:
        said = f"{share(agreement['value'])} ({words.interval(agreement, share)})"
        rows_compared = f"{comparison['compared']:,} rows"
        if name == "exact":
            yield f"Its answers are exactly the baseline's in {said} of {rows_compared}."
        else:
            yield f"Its texts agree with the baseline's to {said} by {words.METRICS[name]}, over {rows_compared}."
    difference = words.score(comparison["differences"].get(score))
    if difference is None:
        return
    metric = words.METRICS[score]
    here, there = (known((words.score(each["scores"].get(score)) or {}).get("value"), share) for each in (run, base))
    yield (
        f"Its {metric} is {here}, the baseline's {there}; over the rows of both, {points(difference['value'])} points "
        f"({words.interval(difference, points)}): {words.verdict(difference)}."
    )


def _equal_kv(pair: Report) -> str:
    difference = pair["difference"]
    of = "cross KV held per row" if pair["by"] == "held" else "own cross KV per row (held bytes are not comparable)"
    return (
        f"Beside the cheap alternative {pair['tiles_run']}, with {times(pair['ratio'])} its {of}, "
        f"{words.METRICS.get(pair['score'], pair['score'])} differs by {points(difference['value'])} points "
        f"({words.interval(difference, points)}): {words.verdict(difference)}."
    )
