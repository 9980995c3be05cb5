"""What can't be used is refused, with what to do, before anything is written: it is no interruption that passes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from whole_jobs import ROOT, given, write_shard

from jobs import answer, calibrate, estimate
from pipeline import record
from pipeline.lock import locked
from pipeline.plan import make_plan
from pipeline.storage import Storage

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture
def shard(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    return write_shard(tmp_path, picture)


def run(shard: Path, model: str, output: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # The token, which this switches off, is what Ray has in HOME.
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    command = [sys.executable, "-m", "jobs.answer", *given(shard, model), "--output", output]
    return subprocess.run(
        command, cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("output", ["/etc/passwd/out", "/proc/out", "made/" + "n" * 300])
def test_a_folder_that_cannot_be_made(
    shard: Path, checkpoint_folder: str, output: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shard.parent)
    assert answer.main([*given(shard, checkpoint_folder), "--output", output]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"output='{output}' can't be used: " in said
    assert said.endswith("; name a folder that can be written, or mend this one")
    assert os.listdir(shard.parent) == ["in.parquet"]


def test_a_calibration_in_such_a_folder(shard: Path, checkpoint_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--input", str(shard), "--model", checkpoint_folder, "--target-agreement", "0.5", "--output", "/proc/out"]
    assert calibrate.main(options) == 2
    assert "output='/proc/out/runs/all' can't be used: " in capsys.readouterr().err.splitlines()[-1]


def test_a_report_in_such_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--images", "1e6", "--model", "11b", "--gpu", "h100", "--json", "/proc/out.json"]
    assert estimate.main(options) == 2
    assert "/proc/out.json" in capsys.readouterr().err


def test_a_run_with_a_torn_marker(shard: Path, config: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    """As a disk leaves it that loses power: no start of this run gets past it."""
    options = [*given(shard, config().model), "--output", str(shard.parent / "out")]
    plan = make_plan(config(input=str(shard), output=options[-1], unit_rows=4, max_new_tokens=48))
    record.begin(plan.output, plan.record())
    for name in (f"{plan.units[0].name}.parquet", record.marker(plan.units[0].name)):
        plan.output.write(name, b"{", temporary=".run/unfinished")
    assert answer.main(options) == 2
    assert "can't be used" in capsys.readouterr().err.splitlines()[-1]


def test_a_bucket_that_is_not_there(
    shard: Path, checkpoint_folder: str, s3: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--output", "s3://no-such-bucket/out", "--storage-options", json.dumps(s3)]
    assert answer.main([*given(shard, checkpoint_folder), *options]) == 2
    assert "output='s3://no-such-bucket/out' can't be used: The specified bucket" in capsys.readouterr().err.splitlines()[-1]


def test_a_store_that_cannot_be_reached_is_no_refusal(free_port: Callable[[], int]) -> None:
    options: dict[str, Any] = {"endpoint_url": f"http://127.0.0.1:{free_port()}", "key": "test", "secret": "test"}
    options |= {"config_kwargs": {"retries": {"max_attempts": 0}}}
    with pytest.raises(Exception, match="connect") as raised, locked(Storage("s3://bucket/out", options, patience=1)):
        pass
    assert not isinstance(raised.value, record.RefusalError)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", ["HOME", "RAY_TMPDIR", "long"])
def test_folders_that_ray_cannot_use(shard: Path, checkpoint_folder: str, name: str) -> None:
    long = shard.parent / ("n" * 90)
    long.mkdir()
    environment = {"TMPDIR": str(long)} if name == "long" else {name: "/etc/passwd/x"}
    done = run(shard, checkpoint_folder, str(shard.parent / "out"), **environment)
    assert done.returncode == 2, done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith("python -m jobs.answer: Ray can't start here: ")
    assert "point HOME and TMPDIR" in said
    assert not (shard.parent / "out").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_letter_that_the_locale_lacks(shard: Path, checkpoint_folder: str) -> None:
    done = run(shard, checkpoint_folder, str(shard.parent / "café"), **ASCII)
    assert done.returncode == 2, done.stderr
    assert "set PYTHONUTF8=1" in done.stderr.splitlines()[-1]
    assert os.listdir(shard.parent).count("café") == 0


def test_what_is_printed_has_letters_that_the_locale_lacks(shard: Path, checkpoint_folder: str) -> None:
    command = [sys.executable, "-m", "jobs.answer", *given(shard, checkpoint_folder), "--output", "café", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **ASCII}, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr
    assert b"output      caf" in done.stdout
