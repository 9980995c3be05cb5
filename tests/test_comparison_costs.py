"""What a run cost, in numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from run_folders import SELF_TOKEN_BYTES, TOKEN_BYTES, TOKENS_PER_TILE, digest, write_run

from jobs.comparison import costs
from jobs.comparison.prices import Price
from jobs.comparison.runs import Run, read_run
from pipeline.storage import Storage


def made(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Run:
    write_run(folder, rows, **settings)
    return read_run(Storage(str(folder)), "run")


def spread(run: Run) -> costs.Distributions:
    found = costs.Distributions()
    for table in run.rows(costs.COLUMNS):
        found.add(table)
    return found


def test_speed_and_dollars_are_per_gpu(tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": "one two", "images": 2} for i in range(8)]
    rows[3] = {"id": "3", "error": "broken", "images": 2}
    run = made(tmp_path, rows, unit_rows=4, device="NVIDIA H200", stats={"actor_seconds": 10.0, "gpus": 0.5})
    # Seven answered rows of two images, on half a GPU for 20 seconds.
    assert costs.speed(run) == {"gpu_seconds": 10.0, "images_per_second": 1.4, "output_tokens_per_second": 1.4}
    hours = 10.0 / 3600 * 1e6 / 14
    assert costs.cost(run, Price("h200", 3.5)) == {
        "price": 3.5,
        "price_name": "h200",
        "gpu_hours_per_million_images": pytest.approx(hours),
        "dollars_per_million_images": pytest.approx(3.5 * hours),
    }
    unpriced = costs.cost(run, None)
    assert unpriced["gpu_hours_per_million_images"] == pytest.approx(hours)
    assert unpriced["dollars_per_million_images"] is unpriced["price"] is unpriced["price_name"] is None


def test_without_images_or_time_there_are_no_rates(tmp_path: Path) -> None:
    run = made(tmp_path / "text", [{"id": "a", "text": "x", "images": 0}])
    found = costs.cost(run, Price("cpu", 0.1))
    assert found["gpu_hours_per_million_images"] is found["dollars_per_million_images"] is None
    assert costs.speed(run)["images_per_second"] == 0
    assert spread(run).kept() is None
    assert spread(run).questions_per_image() == {"mean": None, "histogram": []}
    run = made(tmp_path / "failed", [{"id": "a", "error": "x"}], stats={"actor_seconds": 0.0})
    assert costs.speed(run)["images_per_second"] is None
    assert spread(run).output_tokens() == dict.fromkeys(("mean", "p5", "p50", "p95", "p99", "max"))
    assert set(costs.row_kv(run).values()) == {0, None}
    assert costs.held(run) == {
        "byte_seconds": 0,
        "byte_seconds_per_row": None,
        "of_full": None,
        "bytes_read": 0,
        "bytes_read_per_token": None,
    }


def test_kv_peaks_and_stages(tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": "one two", "tiles": 2, "keep_fraction": 0.5, "prompt_tokens": 8} for i in range(5)]
    run = made(tmp_path, [*rows, {"id": "e", "error": "x"}], stats={"peak_sequences": 7, "peak_cross_kv_bytes": None})
    full = 2 * TOKENS_PER_TILE * TOKEN_BYTES
    assert costs.row_kv(run) == {
        "cross_total": 5 * full / 2,
        "cross_full_total": 5 * full,
        "self_total": 5 * 10 * SELF_TOKEN_BYTES,
        "cross_per_row": full / 2,
        "cross_full_per_row": full,
        "self_per_row": 10 * SELF_TOKEN_BYTES,
    }
    assert costs.peaks(run) == {"memory_bytes": 2**30, "sequences": 7, "kv_bytes": 3000, "cross_kv_bytes": None}
    # Two units.
    assert costs.stages(run) == {"decode_images": 0.5, "tower": 1.0, "prefill": 1.0, "decode": 2.0}


def test_held_bytes_are_by_row_and_token_or_unknown(tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": "one two three", "keep_fraction": 0.5} for i in range(7)]
    counted = {"cross_kv_byte_seconds": 140.0, "cross_kv_byte_seconds_full": 100.0, "cross_kv_bytes_read": 2100}
    # Two units with four rows, of which one has no answer.
    run = made(tmp_path / "new", [*rows, {"id": "e", "error": "x"}], stats=counted)
    assert costs.held(run) == {
        "byte_seconds": 280.0,
        "byte_seconds_per_row": 40.0,
        "of_full": 1.4,
        "bytes_read": 4200,
        "bytes_read_per_token": 200.0,
    }
    older = made(tmp_path / "old", rows, stats=dict.fromkeys(counted))
    assert set(costs.held(older).values()) == {None}
    # Rows' own caches are no stand-in: they are sums, and may have been shared.
    assert costs.row_kv(older)["cross_per_row"] == TOKENS_PER_TILE * TOKEN_BYTES / 2


def test_distributions(tmp_path: Path) -> None:
    # 100 rows of 1 to 100 tokens, four questions an image, and two whose image no one else asks about.
    rows = [
        {"id": str(i), "text": "x", "output_tokens": i + 1, "tiles": 1 + i % 2, "image_digest": digest(str(i // 4))}
        for i in range(100)
    ]
    rows += [{"id": "e", "error": "x", "image_digest": digest("e")}, {"id": "t", "text": "", "images": 0, "output_tokens": 500}]
    found = spread(made(tmp_path, rows))
    assert found.output_tokens() == {
        "mean": pytest.approx((5050 + 500) / 101),
        "p5": 6,
        "p50": 51,
        "p95": 96,
        "p99": 100,
        "max": 500,
    }
    assert found.tiles_per_row() == [[0, 1], [1, 50], [2, 50]]
    assert found.questions_per_image() == {"mean": pytest.approx(101 / 26), "histogram": [[1, 1], [4, 25]]}


def test_kept_fractions_are_near_their_exact_numbers() -> None:
    random = np.random.default_rng(0)
    kept = random.beta(2, 5, 50_000)
    found = costs.Distributions()
    for part in np.array_split(kept, 7):
        n = len(part)
        columns = {name: pa.array([1] * n, pa.int32()) for name in ("output_tokens", "tiles")}
        more = {"image_digest": pa.nulls(n, pa.string()), "keep_fraction": part}
        found.add(pa.table(columns | more))
    numbers = found.kept()
    assert numbers is not None
    assert numbers["mean"] == pytest.approx(kept.mean())
    assert numbers["std"] == pytest.approx(kept.std())
    for percent in (5, 50, 95):
        assert numbers[f"p{percent}"] == pytest.approx(np.percentile(kept, percent), abs=2e-4)
    assert numbers["histogram"]["counts"] == np.histogram(kept, 20, (0, 1))[0].tolist()


def test_all_kept_is_exactly_one(tmp_path: Path) -> None:
    numbers = spread(made(tmp_path, [{"id": str(i), "text": "x"} for i in range(3)])).kept()
    assert numbers is not None
    assert [numbers[name] for name in ("mean", "std", "p5", "p50", "p95")] == [1, 0, 1, 1, 1]
    assert numbers["histogram"]["counts"][-1] == 3
    assert len(numbers["histogram"]["edges"]) == 21


def test_hashes_tell_texts_apart_and_are_the_same_in_any_order() -> None:
    texts = pa.chunked_array([["a", "b"], ["a", "c"]])
    found = costs.hashes(texts)
    assert found.dtype == np.uint64
    assert found[0] == found[2]
    assert len(set(found.tolist())) == 3
    assert costs.hashes(pa.array(["c", "a"])).tolist() == [found[3], found[0]]
    assert len(costs.hashes(pa.chunked_array([], pa.string()))) == 0
