"""The report as people see it: in a browser at desktop and phone width, and as Markdown."""

from __future__ import annotations

import base64
import copy
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import Page, chromium
from run_folders import digest, write_run

from jobs.comparison import curves, full_tables, page, sentences, tables, words
from jobs.comparison.runs import Run, read_runs

HOSTILE = "图 <script>alert('x')</script> | **bold** $x$\n\n# heading </title></svg><img src=x onerror=alert(1)> \x00\u202e"


def score(value: float | None, rows: int = 9980) -> dict[str, Any]:
    spread = None if value is None else 0.01
    return {
        "value": value,
        "low": None if value is None else value - (spread or 0),
        "high": None if value is None else min(1.0, value + (spread or 0)),
        "rows": rows,
        "clusters": rows // 3,
    }


def difference(value: float, verdict: str, tells: int | None = None, spread: float = 0.004) -> dict[str, Any]:
    ends = {"low": value - spread, "high": value + spread}
    return {"value": value, **ends, "rows": 9980, "clusters": 3300, "verdict": verdict, "rows_that_would_tell": tells}


def run(
    name: str, policy: str, options: dict[str, float], cost: float, kept: float, accuracy: float, tiles: int | None = None
) -> dict[str, Any]:
    counts = [0] * 20
    counts[min(19, int(kept * 20))] = 10_000
    return {
        "name": name,
        "folder": f"s3://bucket/{policy}",
        "job": "answer",
        "policy": policy,
        "options": options,
        "max_tiles": tiles,
        "tower_tiles": "pooled",
        "tower": None,
        "tower_kept": 1.0,
        "kept_sets": None if policy == "none" else "image",
        "model": "meta-llama/Llama-3.2-11B-Vision-Instruct",
        "identity": "9eb2daaa8597bf19",
        "dtype": "bfloat16",
        "hardware": "NVIDIA H200",
        "partitions": 1,
        "units": 40,
        "units_finished": 40,
        "complete": True,
        "rows": 10_000,
        "errors": 12,
        "error_kinds": {"not an image (N bytes)": {"rows": 12, "ids": ["a|b", "c"], "example": "not an image (17 bytes)"}},
        "images": 10_000,
        "tiles": 23_456,
        "speed": {"gpu_seconds": 1234.5, "images_per_second": 972 / cost, "output_tokens_per_second": 512.3},
        "cost": {
            "price": 3.5,
            "price_name": "h200",
            "gpu_hours_per_million_images": cost / 3.5,
            "dollars_per_million_images": cost,
        },
        "output_tokens": {"mean": 12.4, "p5": 1, "p50": 9, "p95": 40, "p99": 64, "max": 64},
        "tiles_per_row": [[1, 10_000]] if tiles == 1 else [[1, 4000], [2, 2500], [4, 3500]],
        "questions_per_image": {"mean": 3.2, "histogram": [[1, 200], [2, 50]]},
        "peaks": {"memory_bytes": 90e9, "sequences": 180, "kv_bytes": 60e9, "cross_kv_bytes": 50e9},
        "kept": {
            "mean": kept,
            "std": 0.1,
            "p5": kept * 0.8,
            "p50": kept,
            "p95": min(1, kept * 1.2),
            "histogram": {"edges": [i / 20 for i in range(21)], "counts": counts},
        },
        "held": {
            "byte_seconds": 6e12 * kept,
            "byte_seconds_per_row": 6e8 * kept * (0.4 if tiles else 1),
            "of_full": kept,
            "bytes_read": 9e12 * kept,
            "bytes_read_per_token": 7e7 * kept,
        },
        "row_kv": {
            "cross_total": 2.1e12 * kept,
            "cross_full_total": 2.1e12,
            "self_total": 2e11,
            "cross_per_row": 2.1e8 * kept * (0.4 if tiles else 1),
            "cross_full_per_row": 2.1e8,
            "self_per_row": 2e7,
        },
        "stages": {"decode_images": 400.0, "tower": 300.0, "prefill": 250.0 * kept, "decode": 600.0 * kept, "read": 3.0},
        "scores": {"accuracy": score(accuracy), "vqa_accuracy": None, "anls": score(accuracy + 0.02)},
    }


def comparison(
    name: str, kv: float, verdict: str, change: float, tells: int | None, examples: list[str], warnings: list[str]
) -> dict[str, Any]:
    return {
        "run": name, "warnings": warnings, "joined": 9990, "only_in_run": 3, "only_in_baseline": 7, "errors_in_run_only": 1,
        "errors_in_baseline_only": 0, "compared": 9980,
        "agreement": {"exact": score(0.971), "edit_similarity": score(0.985), "chrf": score(0.981)},
        "differences": {
            "accuracy": difference(change, verdict, tells), "vqa_accuracy": None, "anls": difference(change, verdict, tells),
            "output_tokens": difference(-0.3, "lower", spread=0.1), "cross_kv_bytes": difference(-8.1e7, "lower", spread=1e6),
        },
        "speed_ratio": 1.8, "cost_ratio": 0.55, "row_kv_ratio": kv, "held_ratio": kv, "read_ratio": kv, "peak_ratio": 0.9,
        "examples": examples,
    }  # fmt: skip


@pytest.fixture
def report() -> dict[str, Any]:
    """A baseline, one policy at two K, and fewer tiles; a hostile name among them."""
    runs = [
        run("none", "none", {}, 120.0, 1.0, 0.80),
        run("trimmed K=0.25", "trimmed-llama", {"k_ratio": 0.25}, 66.0, 0.6, 0.797),
        run(f"trimmed {HOSTILE}", "trimmed-llama", {"k_ratio": 0.05}, 48.0, 0.14, 0.72),
        run("one tile", "none", {}, 60.0, 1.0, 0.70, tiles=1),
    ]
    warned = ["The runs had other prompts: 'a' and 'b'."]
    comparisons = [
        comparison("trimmed K=0.25", 0.6, "not distinguishable", -0.003, 45_210, ["r1", "r2", "gone"], []),
        comparison(f"trimmed {HOSTILE}", 0.14, "worse", -0.08, None, ["r1"], warned),
        comparison("one tile", 0.4, "worse", -0.1, None, [], []),
    ]
    pair = {
        "run": "trimmed K=0.25",
        "tiles_run": "one tile",
        "by": "held",
        "ratio": 1.5,
        "score": "accuracy",
        "difference": difference(0.097, "better"),
    }
    return {
        "made": "2026-11-21T10:00:00+00:00", "version": "0.1.0", "baseline": "none", "prices": {"h200": 3.5},
        "runs": runs, "comparisons": comparisons, "equal_kv": [pair],
    }  # fmt: skip


@pytest.fixture
def empty(report: dict[str, Any]) -> dict[str, Any]:
    """The same with null wherever something may be unknown: no prices, references, kept fractions, times, nor a common row."""
    made = copy.deepcopy(report)
    made["prices"], made["equal_kv"] = {}, []
    for each in made["runs"]:
        each["error_kinds"], each["kept"], each["hardware"] = {}, None, "CPU, 2 threads"
        each["scores"] = dict.fromkeys(each["scores"])
        each["stages"], each["tiles_per_row"] = {}, []
        for name in ("speed", "cost", "peaks", "held", "row_kv", "output_tokens"):
            each[name] = dict.fromkeys(each[name])
        each["questions_per_image"] = {"mean": None, "histogram": []}
        each["complete"] = False
    for each in made["comparisons"]:
        each |= {"joined": 0, "compared": 0, "examples": []} | {name: None for name in each if name.endswith("_ratio")}
        each["agreement"] = {name: score(None, 0) for name in each["agreement"]}
        each["differences"] = dict.fromkeys(each["differences"])
    return made


@pytest.fixture
def runs(tmp_path: Path, report: dict[str, Any], picture: Callable[..., bytes], checkpoint_folder: str) -> list[Run]:
    """Folders behind the report's names, in which rows r1 and r2 differ; r1's image can be read again, r2's not."""
    shards = tmp_path / "shards"
    shards.mkdir()
    file = picture(300, 200, seed=3, format="JPEG")
    table = pa.table({"id": ["r0", "r1", "r2"], "image": [picture(), file, picture(seed=8)], "question": ["?"] * 3})
    pq.write_table(table, shards / "shard.parquet")
    import hashlib

    from pipeline.units import Shard, unit_name

    unit = unit_name(Shard("shard.parquet", (3,), 0, pa.schema([])), 0, 3)
    given = []
    for number, each in enumerate(report["runs"]):
        folder = tmp_path / f"run-{number}"
        trimmed = each["policy"] != "none"
        # (1, 2) tiles of 64 patches: every third one stays.
        grid = {
            "tiles": 2,
            "visual_tokens": 130,
            "tile_grid": [{"columns": 2, "rows": 1}],
            "question": HOSTILE,
            "answer": "blue",
        }
        kept = (
            {"kept": list(range(0, 130, 3)), "keep_fraction": 44 / 130, "kept_visual_tokens": 44}
            if trimmed
            else {"kept": list(range(130))}
        )
        rows = [
            {"id": "r0", "text": "same", "question": "?", "answer": "same"},
            {"id": "r1", "text": f"{number} {HOSTILE}", "image_digest": hashlib.sha256(file).hexdigest(), **grid, **kept},
            {"id": "r2", "text": f"{number}\nlines", "image_digest": digest("lost"), **grid, **kept},
        ]
        config = {
            "policy": each["policy"],
            "input": str(shards),
            "write_kept": True,
            "model": checkpoint_folder,
            **each["options"],
        }
        write_run(folder, rows, config=config, unit_rows=3)
        # As the pipeline names the file of this unit of this shard.
        (written,) = folder.glob("*.parquet")
        (folder / f".run/units/{written.stem}.json").rename(folder / f".run/units/{unit}.json")
        written.rename(folder / f"{unit}.parquet")
        given.append(folder)
    read = read_runs([f"n{i}={folder}" for i, folder in enumerate(given)], "n0", {})
    from dataclasses import replace

    return [replace(one, name=each["name"]) for one, each in zip(read, report["runs"], strict=True)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if chromium() is None:
        pytest.skip("no Chromium; `make browser` installs Debian's")
    with Page(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def written(report: dict[str, Any], runs: list[Run], out: Path, examples: int = 10) -> Path:
    page.write(report, runs, out, examples=examples, input=None, storage_options={})
    return out


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (390, True)])
def test_the_page_in_a_browser(
    report: dict[str, Any], runs: list[Run], tmp_path: Path, browser: Page, width: int, dark: bool
) -> None:
    out = written(report, runs, tmp_path / "report")
    browser.open((out / "index.html").as_uri(), width, dark=dark)
    assert browser.complaints == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    size = "(e => { const r = e.getBoundingClientRect(); return [e.id, r.width, r.height, r.left, r.right] })"
    found = browser.evaluate(f"[...document.querySelectorAll('table')].map({size})")
    expected = [table.name for table in (tables.summary(report), tables.equal_kv(report), *full_tables.full(report))] + [
        "conditions"
    ]
    assert [name for name, *_ in found] == expected
    assert all(wide > 100 and high > 40 for _, wide, high, *_ in found)
    assert browser.evaluate(
        "[...document.querySelectorAll('.scroll')].every(e => e.getBoundingClientRect().right <= innerWidth)"
    )
    drawn = browser.evaluate(f"[...document.querySelectorAll('figure')].map({size})")
    names = [name for name, *_ in drawn]
    for name in (
        "quality-cost",
        "quality-kv",
        "kept-1",
        "kept-2",
        "tiles-1",
        "tiles-2",
        "questions-1",
        "output-tokens",
        "stages",
    ):
        assert name in names
    svgs = browser.evaluate(
        "[...document.querySelectorAll('figure svg')]"
        ".map(e => [e.getBBox(), e.getBoundingClientRect()]).map(([b, r]) => [b.width, r.width, r.height, r.right])"
    )
    assert len(svgs) == len(drawn)
    assert all(inner > 50 and wide > 250 and high > 100 and right <= width for inner, wide, high, right in svgs)
    outside = browser.evaluate(
        "[...document.querySelectorAll('figure svg text')]"
        ".map(e => [e.textContent, e.getBoundingClientRect(), e.ownerSVGElement.getBoundingClientRect()])"
        ".filter(([, e, s]) => e.left < s.left - 2 || e.right > s.right + 2 || e.top < s.top - 2 || e.bottom > s.bottom + 2)"
        ".map(([text]) => text)"
    )
    assert outside == [], "texts that a plot cuts off"
    # Letters of a plot as they come out on the screen.
    letters = browser.evaluate(
        "Math.min(...[...document.querySelectorAll('figure svg text')]"
        ".map(e => [parseFloat(getComputedStyle(e).fontSize), e.getScreenCTM()]).map(([s, m]) => s * Math.hypot(m.a, m.b)))"
    )
    assert letters >= 8
    images = browser.evaluate("[...document.images].map(e => [e.complete, e.naturalWidth, e.width])")
    assert len(images) == 4, "r1 in two comparisons, for the run and the baseline"
    assert all(complete and natural == 300 and shown > 100 for complete, natural, shown in images)
    assert browser.evaluate(
        "new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size == document.querySelectorAll('[id]').length"
    )
    assert browser.evaluate(
        "[...document.querySelectorAll('use')].every(e => document.querySelector(e.getAttribute('xlink:href')))"
    )
    # Ink on paper, and never ink on ink.
    colours = browser.evaluate(
        "[['svg text', 'fill'], ['body', 'color'], ['body', 'backgroundColor']]"
        ".map(([e, name]) => getComputedStyle(document.querySelector(e))[name])"
    )
    assert colours[0] == colours[1] != colours[2]
    light = sum(map(int, re.findall(r"\d+", colours[2])[:3])) > 380
    assert light != dark


def test_texts_of_rows_and_runs_are_only_texts(report: dict[str, Any], runs: list[Run], tmp_path: Path, browser: Page) -> None:
    out = written(report, runs, tmp_path / "report")
    browser.open((out / "index.html").as_uri(), 1280)
    assert browser.complaints == []
    assert browser.evaluate("document.scripts.length") == 0
    assert browser.evaluate("document.querySelectorAll('[onerror]').length") == 0
    assert browser.evaluate("document.title") == "Comparison of runs: what each held, took and got right"
    quotes = browser.evaluate("[...document.querySelectorAll('blockquote')].map(e => e.textContent)")
    assert any("<script>alert('x')</script>" in quote for quote in quotes)
    assert not re.search("[\0\u202e]", browser.evaluate("document.body.textContent"))
    # A row whose image is lost is there all the same, and says so.
    assert (
        browser.evaluate("[...document.querySelectorAll('.missing')].map(e => e.textContent)")
        == ["the input has changed: the row's image is another one now"] * 2
    )


def test_a_report_of_nothing_but_nulls(empty: dict[str, Any], tmp_path: Path, browser: Page) -> None:
    out = written(empty, [], tmp_path / "report")
    for width in (1280, 390):
        browser.open((out / "index.html").as_uri(), width)
        assert browser.complaints == []
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
    text = browser.evaluate("document.body.innerText")
    for gone in ("None", "nan", "null", "undefined"):
        assert not re.search(rf"\b{gone}\b(?!:)", text), gone
    assert text.count("No id is in both runs, so that no answers could be compared.") == 3
    assert "Without references" in text
    assert "the cheap alternative to trimming was not measured" in text
    assert browser.evaluate("document.querySelectorAll('figure').length") == 0


def test_the_answer_comes_first_and_warnings_above_it(report: dict[str, Any], runs: list[Run], tmp_path: Path) -> None:
    html = (written(report, runs, tmp_path / "report") / "index.html").read_text()
    order = [
        html.index(each)
        for each in (
            "other prompts",
            "The cheapest run",
            '<table id="summary"',
            "<svg",
            '<table id="held"',
            '<table id="memory"',
            "<img",
            '<table id="conditions"',
        )
    ]
    assert order == sorted(order)
    line = " ".join(sentences.bottom_line(report))
    assert (
        "The cheapest run that is not measurably worse in accuracy is trimmed K=0.25: $66.00 per million images, 0.55×" in line
    )
    assert "from −0.7 to +0.1 points" in line


def test_sentences_of_one_run(report: dict[str, Any]) -> None:
    said = " ".join(sentences.finding(report, report["comparisons"][0]).sentences)
    assert "It costs $66.00 per million images where the baseline costs $120 (0.55×)" in said
    assert said.startswith(
        "It holds 0.60× the baseline's cross KV in byte-seconds per row (0.90× at its peak), reads 0.60× as many bytes per "
        "output token and keeps 60.0% of the visual features."
    )
    assert "exactly the baseline's in 97.1% (96.1% to 98.1%) of 9,980 rows" in said
    assert "accuracy is 79.7%, the baseline's 80.0%" in said
    assert "−0.3 points (−0.7 to +0.1): not distinguishable in 9,980 rows; about 45,000 rows would tell" in said
    assert (
        "alternative one tile, with 1.50× its cross KV held per row, accuracy differs by +9.7 points (+9.3 to +10.1): better"
        in said
    )


def test_only_held_bytes_are_said_to_be_held(
    report: dict[str, Any], empty: dict[str, Any], runs: list[Run], tmp_path: Path
) -> None:
    for number, made in enumerate((report, empty)):
        out = written(made, runs if made is report else [], tmp_path / f"report-{number}")
        for text in ((out / "index.html").read_text(), (out / "report.md").read_text()):
            assert not re.search(r"\bsaved?\b|\bsaves\b", text)
    line = " ".join(sentences.bottom_line(report))
    assert "It also holds the least of such runs: 0.60× the baseline's cross KV in byte-seconds per row (0.90× at" in line
    # A trimmed run that held more than the baseline is not the one with the least, whatever its rows' own caches are.
    report["runs"][1]["held"]["byte_seconds_per_row"] = 9e8
    assert "No run holds less cross KV than the baseline without being" in " ".join(sentences.bottom_line(report))
    report["runs"][0]["held"] = dict.fromkeys(report["runs"][0]["held"])
    assert "the least cross KV is unknown" in " ".join(sentences.bottom_line(report))


def test_held_bytes_that_are_not_counted_are_unknown(report: dict[str, Any]) -> None:
    trimmed, compared = report["runs"][1], report["comparisons"][0]
    trimmed["held"] = dict.fromkeys(trimmed["held"])
    compared |= {"held_ratio": None, "read_ratio": None}
    assert sentences.finding(report, compared).sentences[0].startswith("It holds 0.90× the baseline's cross KV at its peak and")
    compared["peak_ratio"] = None
    assert (
        sentences.finding(report, compared).sentences[0].startswith("It holds an unknown part of the baseline's cross KV and")
    )
    summary = tables.summary(report)
    columns = [summary.columns.index(name) for name in ("held per row", "read per token")]
    assert [[row[column].text for column in columns] for row in summary.rows[:2]] == [
        ["572.2 MiB·s", "66.8 MiB"],
        ["unknown"] * 2,
    ]
    # Beside fewer tiles, rows' own caches may stand in; that is said.
    (pair,) = report["equal_kv"]
    pair["by"] = "row_kv"
    assert "held bytes are not comparable" in tables.equal_kv(report).rows[0][2].note
    assert any("1.50× its own cross KV per row (held bytes are not" in s for s in sentences.finding(report, compared).sentences)


def test_held_bytes_are_an_axis(report: dict[str, Any]) -> None:
    _, held = curves.curves(report)
    assert held.title == "Accuracy against cross KV held per row, MiB·s"
    for each in report["runs"][1:]:
        each["held"]["byte_seconds_per_row"] = None
    assert [plot.name for plot in curves.curves(report)] == ["quality-cost"]


def test_without_prices_costs_are_hours(report: dict[str, Any]) -> None:
    for each in report["runs"]:
        each["cost"] |= {"price": None, "price_name": None, "dollars_per_million_images": None}
    summary = tables.summary(report)
    assert "GPU-hours per million images" in summary.columns
    assert not any("$" in column for column in summary.columns)
    assert next(curves.curves(report)).title == "Accuracy against GPU-hours per million images"
    assert "18.9 GPU-hours" in sentences.finding(report, report["comparisons"][0]).sentences[1]
    # One price of two is no axis: both columns, and the plot in hours.
    report["runs"][0]["cost"]["dollars_per_million_images"] = 120.0
    assert {"GPU-hours per million images", "$ per million images"} <= set(tables.summary(report).columns)
    assert next(curves.curves(report)).title == "Accuracy against GPU-hours per million images"


def test_runs_of_one_policy_are_joined_in_the_order_of_k(report: dict[str, Any]) -> None:
    """The line's corners, from left to right, are at rising K: here as at rising cost, in whichever order the runs came."""
    report["runs"].append(run("trimmed K=0.15", "trimmed-llama", {"k_ratio": 0.15}, 57.0, 0.4, 0.76))
    report["comparisons"].append(comparison("trimmed K=0.15", 0.4, "worse", -0.04, None, [], []))
    for plot in curves.curves(report):
        text = ElementTree.fromstring(plot.svg)
        ids = {element.get("id") for element in text.iter()}
        assert all(each is None or each.startswith(f"{plot.name}-") for each in ids)
        words_in = [element.text for element in text.iter("{http://www.w3.org/2000/svg}text")]
        assert {"K = 0.25", "K = 0.05", "1 tile", "none"} <= set(words_in)
        lines = [
            element.get("d", "")
            for element in text.iter("{http://www.w3.org/2000/svg}path")
            if "#0072b2" in (element.get("style") or "")
        ]
        corners = [[float(x) for x in re.findall(r"[ML] ([\d.]+)", line)] for line in lines]
        (curve,) = (each for each in corners if len(each) == 3 and len(set(each)) == 3)
        assert curve == sorted(curve)


def test_other_options_and_other_parameters_are_other_lines(report: dict[str, Any]) -> None:
    asked = [("elastic", {"keep": 0.15}), ("elastic", {"keep": 0.15, "weighted": 1.0})]
    asked += [("clusters", {"likeness": 0.9}), ("clusters", {"keep": 0.1})]
    for number, (policy, options) in enumerate(asked):
        report["runs"].append(run(str(number), policy, options, 57.0 + number, 0.4, 0.76))
        report["comparisons"].append(comparison(str(number), 0.4, "worse", -0.04, None, [], []))
    for plot in curves.curves(report):
        said = {element.text for element in ElementTree.fromstring(plot.svg).iter("{http://www.w3.org/2000/svg}text")}
        assert {"elastic", "elastic, weighted", "clusters", "clusters, keep"} <= said


def test_the_same_report_is_the_same_bytes(report: dict[str, Any], runs: list[Run], tmp_path: Path) -> None:
    one, other = (written(report, runs, tmp_path / name) for name in ("one", "other"))
    files = [path.relative_to(one) for path in one.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".svg"]) == 9
    assert len([path for path in files if path.suffix == ".jpg"]) == 4
    for path in files:
        assert (one / path).read_bytes() == (other / path).read_bytes(), path


def test_plots_are_files_of_their_own(report: dict[str, Any], runs: list[Run], tmp_path: Path) -> None:
    out = written(report, runs, tmp_path / "report")
    for path in (out / "plots").iterdir():
        root = ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root[0].text
        assert "date" not in path.read_text().lower()


def test_markdown_says_the_same_and_its_pictures_are_there(report: dict[str, Any], runs: list[Run], tmp_path: Path) -> None:
    out = written(report, runs, tmp_path / "report")
    text = (out / "report.md").read_text()
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert (out / target).stat().st_size > 100, target
    assert len(re.findall(r"!\[", text)) == len(list((out / "plots").iterdir())) + len(list((out / "examples").iterdir()))
    for table in (tables.summary(report), *full_tables.full(report)):
        lines = text[text.index(f"**{table.caption}**") :].splitlines()[2:]
        rows = lines[: lines.index("")] if "" in lines else lines
        # Texts with a pipe or a line break in them don't make a cell or a row more.
        assert len(rows) == len(table.rows) + 2, table.name
        assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {len(table.columns) + 1}, table.name
    assert "<script" not in text
    assert "<img" not in text
    assert "> **Warning**, trimmed" in text
    # A kind of error in one row's own words.
    assert "not an image (17 bytes)" in text
    assert "N bytes" not in text
    html_pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)", (out / "index.html").read_text())
    assert {base64.b64decode(each) for each in html_pictures} == {path.read_bytes() for path in (out / "examples").iterdir()}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("a|b", r"a\|b"),
        ("two\nlines", "two<br>lines"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
        ("*x* _y_ `z` [l](u) $m$", r"\*x\* \_y\_ \`z\` \[l\](u) \$m\$"),
        ("back\\|slash", r"back\\\|slash"),
        (3, "3"),
    ],
)
def test_markdown_of_a_text_is_the_text(value: object, said: str) -> None:
    assert page.markdown(value) == said


@pytest.mark.parametrize(
    ("shape", "value", "said"),
    [
        (words.number, 0.012345, "0.0123"),
        (words.number, 12.34, "12.3"),
        (words.number, 12345.6, "12,346"),
        (words.number, -0.5, "−0.5"),
        (words.dollars, 0.001234, "$0.0012"),
        (words.dollars, 61.4, "$61.40"),
        (words.dollars, 12345.0, "$12,345"),
        (words.times, 0.5449, "0.54×"),
        (words.times, 1.8, "1.80×"),
        (words.points, -0.0031, "−0.3"),
        (words.about, 45210.0, "45,000"),
        (words.share, 0.97123, "97.1%"),
    ],
)
def test_numbers(shape: Callable[[float], str], value: float, said: str) -> None:
    assert shape(value) == said


def test_the_number_of_examples_is_kept_to(report: dict[str, Any], runs: list[Run], tmp_path: Path) -> None:
    html = (written(report, runs, tmp_path / "report", examples=1) / "index.html").read_text()
    assert html.count('<article class="example">') == 2
    out = written(report, runs, tmp_path / "none", examples=0)
    assert "<img" not in (out / "index.html").read_text()
    assert list((out / "examples").iterdir()) == []


def test_json_alone_is_enough_for_a_page(report: dict[str, Any], tmp_path: Path) -> None:
    """What was written as report.json and read again makes the same page, without the runs' rows."""
    out = written(json.loads(json.dumps(report)), [], tmp_path / "report")
    assert (out / "index.html").read_text() == (written(report, [], tmp_path / "other") / "index.html").read_text()
