"""The commands as they are typed: options, refusals, exit codes, what is printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import answer, caption, report
from jobs.options import field_docs
from pipeline import plan
from pipeline.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def shard(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    cells = [picture(100 + 40 * i, 80, seed=i) for i in range(5)] + [b"broken"]
    table = pa.table({"image": cells, "question": ["how many"] * 6, "answer": ["x"] * 6})
    path = tmp_path / "shard.parquet"
    pq.write_table(table, path)
    return path


def run(job: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"jobs.{job}", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )


def given(shard: Path, checkpoint_folder: str) -> list[str]:
    return ["--input", str(shard), "--output", str(shard.parent / "out"), "--model", checkpoint_folder]


def test_every_option_says_what_it_is() -> None:
    assert set(field_docs()) == {f.name for f in fields(RunConfig)}
    for job in ("answer", "caption"):
        began = time.monotonic()
        done = run(job, "--help")
        # About a second on an idle machine; torch, transformers and ray alone would take six.
        assert time.monotonic() - began < 4
        assert done.returncode == 0
        assert "--k-ratio" in done.stdout
    assert "--prompt" in done.stdout
    assert "--question-column" not in done.stdout


def test_importing_does_nothing() -> None:
    modules = "jobs.answer, jobs.caption, jobs.options, pipeline.config"
    heavy = f"import {modules}, sys; print({{'torch', 'ray', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", heavy], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--k-ratio", "2"], "k_ratio=2.0 must lie in (0, 1]"),
        (["--k-ratio", "x"], "k_ratio"),
        (["--keep", "0.5"], "keep=0.5 means nothing to policy='trimmed-llama'"),
        (["--policy", "none", "--k-ratio", "0.5"], "k_ratio=0.5 means nothing to policy='none'"),
        (["--policy", "best"], "policy"),
        (["--kept-sets", "row"], "kept_sets"),
        (["--no-such-option", "1"], "no-such-option"),
        (["--top-p", "0.5"], "set a temperature"),
        (["--max-tiles", "0"], "max_tiles=0 must be at least 1"),
        (["--max-tiles", "5"], "max_tiles=5 is over the 4 tiles that model="),
        (["--image-column", "img"], "image_column='img' is not a column of shard.parquet, which has image, question, answer"),
        (["--answer-column", "truth"], "answer_column='truth'"),
        (["--input", "/no/such/place"], "input='/no/such/place' does not exist"),
        (["--input", "/no/such/*.parquet"], "holds no parquet file"),
        (["--model", "/no/such/model"], "model='/no/such/model' does not exist"),
        (["--model", "org/not-cached"], "the Hub cannot be reached"),
        (["--revision", "v1"], "revision='v1' has no effect"),
        (["--config", "/no/such.yaml"], "/no/such.yaml"),
        (["--max-new-tokens", "512"], "max_new_tokens=512 leaves a prompt no room in the 512 tokens that model="),
        (["--temperature", ".nan"], "temperature=nan is not a finite number"),
        (["--wait-minutes", ".inf", "--gpus-per-actor", "0"], "wait_minutes=inf is not a finite number"),
        (["--storage-options", "3"], "storage_options"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(
    shard: Path, checkpoint_folder: str, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert answer.main([*given(shard, checkpoint_folder), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert captured.err.startswith("python -m jobs.answer: ")
    assert not (shard.parent / "out").exists()


def test_missing_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer.main(["--input", "x"]) == 2
    assert "required" in capsys.readouterr().err


def test_refusals_from_the_command_line_itself(shard: Path, checkpoint_folder: str, tmp_path: Path) -> None:
    llava = tmp_path / "llava"
    llava.mkdir()
    (llava / "config.json").write_text(json.dumps({"model_type": "llava"}))
    (llava / "model.safetensors").write_bytes(b"")
    done = run("answer", *given(shard, checkpoint_folder), "--model", str(llava))
    assert (done.returncode, done.stdout) == (2, "")
    assert "of type 'llava', not a Mllama" in done.stderr
    assert done.stderr.count("\n") == 1


def test_another_runs_output_is_refused(shard: Path, checkpoint_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = shard.parent / "out"
    out.mkdir()
    (out / "mine.parquet").write_bytes(b"mine")
    assert answer.main(given(shard, checkpoint_folder)) == 2
    assert "files of something else (mine.parquet)" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["mine.parquet"]


def test_dry_run_writes_nothing(shard: Path, checkpoint_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer.main([*given(shard, checkpoint_folder), "--unit-rows", "4", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "6 rows in 1 shard, 2 units" in said
    assert "<|image|>how many" in said
    assert not (shard.parent / "out").exists()
    assert "tiles an image" not in said
    arguments = ["--prompt", "what is this", "--max-tiles", "2", "--dry-run"]
    assert caption.main([*given(shard, checkpoint_folder), *arguments]) == 0
    said = capsys.readouterr().out
    assert "<|image|>what is this" in said
    assert "k_ratio=0.25, up to 2 tiles an image\n" in said


def test_row_groups_that_are_read_again_and_again_are_worth_a_word(
    shard: Path, checkpoint_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*given(shard, checkpoint_folder), "--unit-rows", "2", "--dry-run"]
    assert answer.main(arguments) == 0
    assert "row groups" not in capsys.readouterr().out
    monkeypatch.setattr(report, "MUCH", 1)
    assert answer.main(arguments) == 0
    assert "as their row groups of up to 6 rows are read whole for each unit of 2; rewrite" in capsys.readouterr().out


def test_options_from_a_file(shard: Path, checkpoint_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = dict(zip(("input", "output", "model"), given(shard, checkpoint_folder)[1::2], strict=True))
    lines = [f"{k}: {json.dumps(v)}" for k, v in names.items()]
    file = tmp_path / "run.yaml"
    file.write_text("\n".join([*lines, "policy: grid", "keep: 0.25", "storage_options: {anon: true}", "batch-size: 3"]))
    assert answer.main(["--config", str(file), "--dry-run"]) == 0
    assert "grid keep=0.25" in capsys.readouterr().out
    # What is typed goes before what the file says.
    assert answer.main(["--config", str(file), "--keep", "0.5", "--dry-run"]) == 0
    assert "grid keep=0.5" in capsys.readouterr().out
    file.write_text("\n".join([*lines, "polcy: grid"]))
    assert answer.main(["--config", str(file), "--dry-run"]) == 2
    assert "polcy" in capsys.readouterr().err


def test_the_summary_in_words() -> None:
    summary: dict[str, Any] = {
        "rows": 4, "rows_this_start": 4, "errors": 1, "images": 3, "seconds": 10.0, "seconds_working": 6.0,
        "cross_kv_bytes_full": 4 * 2**20, "cross_kv_bytes": 2**20, "mean_keep_fraction": 0.25, "accuracy": 0.5,
        "judged": 2, "device": "CPU, 2 threads", "dtype": "float32",
        "error_kinds": {"needs N of N": {"rows": 1, "ids": ["a"], "example": "needs 9 of 3"}},
        "actor_seconds": 12.0, "gpu_seconds": 0.0, "seconds_per_stage": {"prefill": 4.0, "decode": 1.25},
        "peak_cross_kv_bytes": 3 * 2**19, "cross_kv_byte_seconds": 3.0 * 2**20, "cross_kv_byte_seconds_full": 6.0 * 2**20,
        "cross_kv_bytes_read": 2**30,
    }  # fmt: skip
    said = report.table(summary, "out")
    for line in (
        "rows                4",
        "errors              1",
        "  1                 needs 9 of 3",
        "images/s per actor  0.2, once its model is loaded",
        "peak cross KV held  1.5 MiB, the most of one actor",
        "cross KV held       3.0 MiB·s, 0.50 × what all features would have held meanwhile (by formula)",
        "cross KV read       1.0 GiB in decoding",
        "4.0 prefill, 1.2 decode",
        "rows' own caches    1.0 MiB, with all features 4.0 MiB, as if no rows shared one",
    ):
        assert line in said
    # Nothing is saved that the machine did not save.
    assert "saved" not in said
    assert "WARNING" not in said
    more = report.table(summary | {"cross_kv_byte_seconds": 12.0 * 2**20}, "out")
    assert "2.00 × what all features would have held" in more
    assert "WARNING             " in more
    assert "accuracy            50.0% of 2" in said
    assert "accuracy" not in report.table(summary | {"accuracy": None}, "out")
    assert "GPU hours" not in said
    assert "GPU hours           1.50\n" in report.table(summary | {"gpu_seconds": 5400.0}, "out")
    # Seconds of a part of the units say nothing about the run.
    unknown = report.table(summary | {"actor_seconds": None, "gpu_seconds": None}, "out")
    assert "images/s per actor  -\n" in unknown
    assert "GPU hours" not in unknown
    # After a continuation too, the rate is the whole run's.
    assert report.table(summary | {"rows_this_start": 1}, "out") == said
    assert [report.size(n) for n in (5, 1536, 3 * 2**30)] == ["5 B", "1.5 KiB", "3.0 GiB"]


@pytest.mark.ray
def test_a_run_that_breaks_off_is_no_refusal(
    shard: Path, checkpoint_folder: str, ray_cluster: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shard that shrinks between planning and reading raises a ValueError in a task, once the run has begun."""
    look = plan.make_plan

    def look_then_shrink(config: RunConfig, **options: Any) -> plan.Plan:
        made = look(config, **options)
        pq.write_table(pq.read_table(shard).slice(0, 2), shard)
        return made

    monkeypatch.setattr(plan, "make_plan", look_then_shrink)
    assert answer.main(given(shard, checkpoint_folder)) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the run broke off" in last
    assert "has changed" in last
    assert (shard.parent / "out/.run/run.json").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_and_its_repetition(shard: Path, checkpoint_folder: str) -> None:
    """The command starts a Ray of its own, answers, ends; the second time there is nothing to do."""
    arguments = [*given(shard, checkpoint_folder), "--max-new-tokens", "4"]
    first = run("answer", *arguments, "--max-error-rate", "0.2")
    assert first.returncode == 0, first.stderr
    assert "errors              1" in first.stdout
    assert "accuracy" in first.stdout
    assert "Traceback" not in first.stderr
    assert len(pq.read_table(shard.parent / "out")) == 6
    began = time.monotonic()
    again = run("answer", *arguments, "--max-error-rate", "0.2")
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert time.monotonic() - began < 5
    strict = run("answer", *arguments)
    assert (strict.returncode, strict.stdout) == (3, first.stdout)
    assert "16.7% of them have an error, over max_error_rate=0.05; most often (1 row): " in strict.stderr
    other = run("answer", *arguments, "--k-ratio", "0.5")
    assert other.returncode == 2
    assert "differs in k_ratio (0.25 there, 0.5 here)" in other.stderr
    anew = run("answer", *arguments, "--k-ratio", "0.5", "--overwrite", "--max-error-rate", "0.2")
    assert anew.returncode == 0, anew.stderr
    assert "deleting " in anew.stderr
    assert len(pq.read_table(shard.parent / "out")) == 6


@pytest.mark.ray
@pytest.mark.slow
def test_joining_a_cluster(shard: Path, checkpoint_folder: str, ray_cluster: str) -> None:
    done = run(
        "caption",
        *given(shard, checkpoint_folder),
        "--max-new-tokens",
        "2",
        "--ray-address",
        ray_cluster,
        "--max-error-rate",
        "1",
    )
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(shard.parent / "out").to_pylist()
    assert sum(r["error"] is None for r in rows) == 5
    # A cluster that cannot hold the actors is told before anything is written.
    arguments = ["--output", str(shard.parent / "none"), "--ray-address", ray_cluster, "--num-actors", "9"]
    done = run("caption", *given(shard, checkpoint_folder), *arguments)
    assert done.returncode == 2
    assert "num_actors=9 × cpus_per_actor=1 = 9 CPUs" in done.stderr
    assert not (shard.parent / "none").exists()
