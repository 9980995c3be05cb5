"""The command as it is typed, on real runs: options, refusals, exit codes, what it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_folders import write_run

from jobs import compare
from pipeline.storage import Storage

ROOT = Path(__file__).resolve().parent.parent
ROWS = [{"id": str(i), "text": f"text {i % 3}", "answer": "text 1"} for i in range(12)]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.compare", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """Arguments: two runs that were made up, the baseline, and where the report goes."""
    write_run(tmp_path / "none", ROWS)
    write_run(tmp_path / "half", [row | {"keep_fraction": 0.5} for row in ROWS], config={"policy": "grid"})
    return [str(tmp_path / "half"), "--baseline", str(tmp_path / "none"), "--out", str(tmp_path / "report")]


def test_help_answers_at_once() -> None:
    began = time.monotonic()
    done = run("--help")
    assert time.monotonic() - began < 4
    assert done.returncode == 0
    for option in ("--baseline", "--out", "--price", "--prices", "--references", "--examples", "--storage-options", "--input"):
        assert option in done.stdout


def test_importing_does_nothing() -> None:
    heavy = "{'torch', 'ray', 'transformers', 'pyarrow', 'numpy', 'matplotlib', 'sacrebleu', 'rapidfuzz'}"
    code = f"import jobs.compare, sys; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    # Nor does a report need the model's packages: it is made on any machine that reaches the runs.
    code = "import jobs.comparison.report, sys; print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--price", "h200=3.5"], "price 'h200' matches no run's hardware, which is 'CPU, 2 threads'"),
        (["--price", "cpu"], "price='cpu' is not NAME=DOLLARS"),
        (["--price", "cpu=-1"], "price cpu=-1 is not a positive number"),
        (["--prices", "/no/such.yaml"], "/no/such.yaml"),
        (["--references", "truth"], "references='truth' is a column of no run's input; there are answer"),
        (["--examples", "-1"], "examples=-1 must not be negative"),
        (["--baseline", "other"], "baseline='other' is neither a folder nor one of the runs"),
        (["--out", "s3://bucket/report"], "out='s3://bucket/report' is not a local folder"),
        (["--no-such-option", "1"], "no-such-option"),
        (["/no/such/run"], "run '/no/such/run' holds no run"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(
    two: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    typed = [*arguments, *two] if arguments[0].startswith("/") else [*two, *arguments]
    assert compare.main(typed) == 2
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert captured.out == ""
    assert said in last
    assert last.startswith("python -m jobs.compare: ")
    assert not Path(two[-1]).exists()


def test_missing_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["x"]) == 2
    assert "baseline" in capsys.readouterr().err
    assert compare.main(["--baseline", "x", "--out", "y"]) == 2


def test_a_folder_of_something_else_is_refused(two: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(two[-1])
    out.mkdir()
    for name in ("notes.txt", "index.html"):
        (out / name).write_text("mine")
        assert compare.main(two) == 2
        assert f"holds something that is no report ({name})" in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == [name]
        (out / name).unlink()
    out.rmdir()
    out.write_text("a file")
    assert compare.main(two) == 2
    assert "is a file" in capsys.readouterr().err


def test_a_report_is_replaced_by_the_next(two: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(two) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{two[-1]}/index.html\n"
    assert "no price for 'CPU, 2 threads', so no dollars" in captured.err
    out = Path(two[-1])
    assert json.loads((out / "report.json").read_text())["runs"][0]["cost"]["dollars_per_million_images"] is None
    assert compare.main([*two, "--price", "cpu=0.1"]) == 0
    assert "no price" not in capsys.readouterr().err
    assert json.loads((out / "report.json").read_text())["runs"][0]["cost"]["price_name"] == "cpu"
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == []
    (out / "notes.txt").write_text("mine")
    assert compare.main(two) == 2


def test_a_run_that_trims_and_holds_more_is_warned_of_on_the_page(tmp_path: Path, two: list[str]) -> None:
    """As with a set of its own for each question: every row keeps half, the machine held twice."""
    rows = [row | {"keep_fraction": 0.5} for row in ROWS]
    write_run(tmp_path / "apart", rows, config={"policy": "grid"}, stats={"peak_cross_kv_bytes": 4000})
    assert compare.main([f"apart={tmp_path / 'apart'}", *two]) == 0
    out = Path(two[-1])
    found = {one["run"]: one["warnings"] for one in json.loads((out / "report.json").read_text())["comparisons"]}
    said = "apart trims and holds more cross KV than none: 3.9 KiB at its peak beside 2.0 KiB (2.00×)."
    assert found == {"apart": [said], "grid keep=0.5": []}
    for page in ("index.html", "report.md"):
        assert said in (out / page).read_text()


def test_an_incomplete_run_is_compared_by_what_it_has(
    tmp_path: Path, two: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "broke", ROWS, config={"policy": "random"}, unfinished=1)
    assert compare.main([f"broke={tmp_path / 'broke'}", *two]) == 0
    assert "broke is incomplete: 2 of 3 units are compared" in capsys.readouterr().err
    found = json.loads((Path(two[-1]) / "report.json").read_text())["comparisons"][0]
    assert (found["run"], found["joined"], found["only_in_baseline"]) == ("broke", 8, 4)
    assert any("incomplete" in said for said in found["warnings"])


def test_without_the_extra_it_says_how_to_get_it(two: list[str]) -> None:
    hidden = "import sys; sys.modules['sacrebleu'] = None; from jobs import compare; sys.exit(compare.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", hidden, *two], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "python -m jobs.compare: reports need sacrebleu; install the extra: pip install 'trimmed-mllama[report]'\n"
    )


def test_runs_on_s3_and_no_secret_in_the_report(s3: dict[str, Any], tmp_path: Path) -> None:
    configs: dict[str, dict[str, Any]] = {"none": {}, "half": {"policy": "grid", "keep": 0.5}}
    for name, config in configs.items():
        write_run(Storage(f"s3://bucket/command/{name}", s3), ROWS, config=config)
    out = tmp_path / "report"
    arguments = ["s3://bucket/command/half", "--baseline", "s3://bucket/command/none", "--out", str(out)]
    done = run(*arguments, "--storage-options", json.dumps(s3))
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "report.json").read_text())["comparisons"][0]["joined"] == len(ROWS)
    assert all(b"a-secret-key" not in path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert "a-secret-key" not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def real(ray_cluster: str, config: Any, picture: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three real runs of the tiny model: everything kept, a tenth, and one tile; three questions an image."""
    from pipeline import graph
    from pipeline.plan import make_plan

    base = tmp_path_factory.mktemp("real")
    cells = [picture(100 + 60 * (i % 4), 80, seed=i) for i in range(10) for _ in range(3)]
    table = pa.table(
        {"image": cells, "question": ["what is this", "how many", "describe this image."] * 10, "answer": ["x"] * 30}
    )
    pq.write_table(table, base / "shard.parquet", row_group_size=15)
    settings: dict[str, dict[str, Any]] = {
        "none": {"policy": "none"},
        "tenth": {"k_ratio": 0.1},
        "one": {"policy": "none", "max_tiles": 1},
    }
    for name, fields in settings.items():
        asked = config(input=str(base / "shard.parquet"), output=str(base / name), unit_rows=15, write_kept=True, **fields)
        graph.run(make_plan(asked))
    return base


@pytest.mark.ray
def test_real_runs(real: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    folders = [str(real / name) for name in ("tenth", "one")]
    done = run(*folders, "--baseline", str(real / "none"), "--out", str(out), "--price", "cpu=0.1", "--examples", "3")
    assert (done.returncode, done.stdout) == (0, f"{out}/index.html\n"), done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads((out / "report.json").read_text())
    assert [one["name"] for one in found["runs"]] == ["none", "trimmed-llama k_ratio=0.1", "none max_tiles=1"]
    for one in found["runs"]:
        summary = json.loads((Path(one["folder"]) / ".run/summary.json").read_text())
        assert all(one[name] == summary[name] for name in ("rows", "errors", "images", "tiles"))
        assert one["complete"]
        assert one["speed"]["gpu_seconds"] > 0
        assert one["cost"]["dollars_per_million_images"] == pytest.approx(one["speed"]["gpu_seconds"] / 36000 * 1e6 / 30)
        assert one["questions_per_image"] == {"mean": 3.0, "histogram": [[3, 10]]}
        assert {"decode_images", "tower", "prefill", "decode"} <= set(one["stages"])
        assert one["peaks"]["cross_kv_bytes"] > 0
    trimmed, tiles = found["comparisons"]
    assert trimmed["warnings"] == tiles["warnings"] == []
    assert trimmed["compared"] == tiles["compared"] == 30
    assert max(trimmed["row_kv_ratio"], tiles["row_kv_ratio"], trimmed["read_ratio"]) < 1
    # What is held of 30 rows, and for how long, is a matter of when they arrive; not so how much of what all features hold.
    for name in ("peak_ratio", "held_ratio", "read_ratio"):
        assert min(trimmed[name], tiles[name]) > 0, name
    # In fact, not only by rows' own caches: the three questions about an image share one set.
    assert [one["held"]["of_full"] < 0.8 for one in found["runs"]] == [False, True, False]
    assert trimmed["differences"]["cross_kv_bytes"]["verdict"] == "lower"
    assert trimmed["agreement"]["exact"]["clusters"] == 10
    assert len(trimmed["examples"]) <= 3
    (beside,) = found["equal_kv"]
    assert (beside["run"], beside["tiles_run"], beside["score"]) == (*(one["name"] for one in found["runs"][1:]), "accuracy")
    assert (out / "report.md").is_file()
