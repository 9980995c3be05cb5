"""The command as it is typed: options, refusals, exit codes, what it prints, and calibration by runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from run_folders import digest, write_run

from jobs import estimate
from jobs.estimation import gpu_benchmark, report
from jobs.estimation.machine import Machine, roofline
from jobs.estimation.measured import read
from jobs.estimation.models import config_of
from jobs.report import STAGES, Stage
from pipeline.model import tower_policy_of
from pipeline.storage import Storage
from trimming.costs import Costs

ROOT = Path(__file__).resolve().parent.parent
DEMO = str(ROOT / "demo" / "model")
H100 = ("--images", "10e6", "--gpu", "h100", "--model", "11b")


@pytest.fixture(autouse=True)
def no_gpu_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares are assumed, whatever the repository has measured (tests/test_estimation_gpu.py)."""
    monkeypatch.setattr(gpu_benchmark, "RESULTS", tmp_path / "missing.json")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = estimate.main(arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


def built(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What ``--json`` writes."""
    file = tmp_path / "estimate.json"
    assert estimate.main([*arguments, "--json", str(file)]) == 0
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def measured(folder: Path, machine: Machine, costs: Costs, **given: Any) -> None:
    """A run of 64 rows, two about each image, whose stages took what they take on ``machine``. ``keep`` is of what the tower
    leaves."""
    policy = given.get("policy", {"policy": "trimmed-llama", "k_ratio": 0.25} if "keep" in given else {})
    tower = tower_policy_of(policy.get("tower_policy"), policy.get("tower_keep"))
    rows = [
        {
            "id": str(i),
            "image_digest": digest(str(i // 2)),
            "tiles": 1 + i // 2 % 2,
            "visual_tokens": (1 + i // 2 % 2) * costs.tokens,
            "kept_visual_tokens": round(given.get("keep", 1.0) * costs.tower_rows(1 + i // 2 % 2, tower)[-1]),
            "keep_fraction": given.get("keep", 1.0),
            "prompt_tokens": 12,
            "output_tokens": 2 + i % 7,
        }
        for i in range(64)
    ]
    tokens = sum(int(row["output_tokens"]) - 1 for row in rows)
    options: dict[str, Any] = {
        "config": policy,
        "device": given.get("device", "CPU, 2 threads"),
        "dtype": given.get("dtype", "float32"),
        "run": {"checkpoint": {"source": given.get("model", DEMO), "identity": "it"}},
        "unit_rows": 64,
    }
    stats = {"decode_steps": 10, "decode_tokens": tokens, "peak_sequences": 40, "actor_seconds": given.get("actor_seconds")}
    write_run(folder, rows, stats=stats, **options)
    times = machine.by_stage(read(str(folder), {}).calls(costs))
    seconds = {stage: times[stage].seconds for stage in STAGES}
    for file in folder.rglob("*"):
        if file.is_file() and file.name != "lock":
            file.unlink()
    write_run(folder, rows, stats=stats, seconds=seconds, **options)


# ---- the command ------------------------------------------------------------------------------------------------------------


def test_help_answers_at_once() -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "jobs.estimate", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert time.monotonic() - began < 4
    assert done.returncode == 0
    for option in ("--images", "--gpu", "--k-ratio", "--tiles", "--from", "--price", "--json", "--gpus-per-actor"):
        assert option in done.stdout


def test_importing_does_nothing() -> None:
    code = (
        "import sys, jobs.estimate, jobs.estimation.gpus; sys.exit(bool({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *H100, "--k-ratio", "0.25", "--gpus", "8", "--price", "2.5")
    assert (code, err) == (0, "")
    for said in (
        "10,000,000 images, 1 question each (default); 11b on 8 × NVIDIA H100 SXM",
        "K = 0.25 keeps 61.5% of the features (published for the 11b",
        "kept     one set an image (default)",
        "cross KV held, GB at most",
        "GB s per 1,000 images",
        "read, GB per 1,000 images",
        "80 GB, 3,350 GB/s, 989.5 TFLOP/s in bf16 (NVIDIA H100 Tensor Core GPU data sheet (2023))",
        "not calibrated: assumed shares of the data sheet's peaks (tower 50%, prefill 50%, decode 60%)",
        "s per 1,000 images, tower",
        "images/s per GPU",
        "days on 8 GPUs",
        "dollars, at $2.5 an hour",
        "where the time goes",
        "this is a model: ",
        "seconds and bytes are predicted",
        "largest error on the ",
    ):
        assert said in out
    assert "####" in out
    assert max(len(line) for line in out.splitlines()[:-2]) < 128


def test_a_set_a_question_is_predicted_to_hold_more_than_all_features_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = (*H100, "--keep", "0.6", "--questions", "5", "--output-tokens", "16")
    image = built(tmp_path, *asked)
    said = capsys.readouterr().out
    assert "WARNING" not in said
    question = built(tmp_path, *asked, "--kept-sets", "question")
    said = capsys.readouterr().out
    assert "kept     one set a question\n" in said
    times = question["trimmed"]["cross_kv_byte_seconds"] / question["full"]["cross_kv_byte_seconds"]
    assert times > 1.5
    assert f"WARNING: trimmed is predicted to hold {times:.2f} × all features' cross KV over time" in said
    for name in ("peak_cross_kv_bytes", "cross_kv_byte_seconds", "cross_kv_bytes_read"):
        assert image["full"][name] == pytest.approx(question["full"][name], rel=0.05)
        # Over time a little less than 60 %, as decoding goes faster.
        assert 0.55 < image["trimmed"][name] / image["full"][name] < 0.61


def test_without_a_price_there_are_no_dollars(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, *H100)
    assert "$" not in out
    assert "No dollars: state --price" in out


def test_json_is_unrounded_and_adds_up(tmp_path: Path) -> None:
    found = built(tmp_path, *H100, "--gpus", "8", "--price", "2.5")
    for which in ("full", "trimmed"):
        one = found[which]
        assert one["seconds"] == pytest.approx(sum(stage["seconds"] for stage in one["stages"].values()))
        assert one["dollars"] == 2.5 * one["hours"]
        assert one["days"] == pytest.approx(one["hours"] / 8 / 24)
    assert found["job"]["images"] == 10_000_000
    assert found["gpu"]["source"].startswith("NVIDIA H100")
    assert found["keep"] == pytest.approx(0.615)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--images", "0.5", "--gpu", "h100", "--model", "11b"), "images=0.5 must be a whole number"),
        (("--images", "10", "--model", "11b"), "gpu=None: name one (a10, "),
        (("--images", "10", "--gpu", "h100"), "model=None: state --model"),
        (("--images", "10", "--gpu", "abacus", "--model", "11b"), "gpu='abacus' is not in the table"),
        (("--images", "10", "--gpu-memory", "80", "--model", "11b"), "gpu_bandwidth=None"),
        ((*H100, "--gpu-rate", "1"), "gpu='h100' is in the table; drop --gpu-rate"),
        ((*H100, "--k-ratio", "0.25", "--keep", "0.5"), "state one"),
        ((*H100, "--k-ratio", "1.5"), "k_ratio=1.5 must lie in (0, 1]"),
        ((*H100, "--tiles", "5"), "tiles='5'"),
        ((*H100, "--price", "-1"), "price=-1.0 must not be negative"),
        ((*H100, "--gpus", "6", "--gpus-per-actor", "4"), "gpus=6 is no multiple of gpus_per_actor=4"),
        ((*H100, "--kv-gib", "200"), "kv_gib=200 is over the"),
        ((*H100, "--kv-gib", "0.1", "--tiles", "4"), "one row needs"),
        ((*H100, "--max-new-tokens", "10"), "max_new_tokens=10 is under output_tokens=64"),
        ((*H100, "--output-tokens", "100000"), "over the model's 131072"),
        (("--images", "10", "--gpu", "h100", "--model", "90b"), "use --gpus-per-actor 3"),
        (("--images", "10", "--gpu", "h100", "--model", DEMO), "state --keep"),
        (("--images", "10", "--gpu", "h100", "--model", "./missing"), "model='./missing' does not exist"),
        ((*H100, "--from", "./missing"), "run './missing' holds no run"),
        ((*H100, "--json", "/missing/folder/file"), "No such file"),
        ((*H100, "--colour", "blue"), "colour"),
        ((*H100, "--kept-sets", "both"), "kept_sets"),
        ((*H100, "--tower-policy", "foo"), "tower_policy"),
        ((*H100, "--tower-keep", "0.4"), "tower_keep=0.4 means nothing without a tower_policy"),
        ((*H100, "--tower-policy", "tome", "--tower-keep", "1.5"), "keep=1.5 is not a share of the tower"),
        ((*H100, "--tower-policy", "tome", "--tower-keep", "0.01"), "keep=0.01 of the tower: its first layer alone"),
        ((), "images"),
    ],
)
def test_refusals_are_one_line(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("python -m jobs.estimate: ")
    assert err.count("\n") == 1


def test_a_tower_policy_shortens_the_tower_and_all_behind_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = (*H100, "--tower-policy", "alike")
    found = built(tmp_path, *asked, "--keep", "1")
    said = capsys.readouterr().out
    left = found["job"]["tower_policy"]["left"]
    assert f"tower    trimmed: Alike leaves 50% of rows × layers (default), {left:.1%} of the features\n" in said
    assert "keeps" not in said.partition("trimmed  ")[2].partition("\n")[0]
    full, trimmed = found["full"], found["trimmed"]
    assert full == built(tmp_path, *H100, "--keep", "1")["trimmed"]
    for stage in STAGES:
        assert trimmed["stages"][stage]["seconds"] < full["stages"][stage]["seconds"]
    # Attention shrinks with the square.
    assert trimmed["stages"]["tower"]["seconds"] < 0.5 * full["stages"]["tower"]["seconds"]
    assert trimmed["cross_kv_bytes_read"] == pytest.approx(left * full["cross_kv_bytes_read"], rel=0.02)
    assert built(tmp_path, *asked, "--keep", "1", "--tower-keep", "1")["trimmed"] == full


def test_a_published_share_behind_a_trimmed_tower_is_an_assumption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = built(tmp_path, *H100, "--tower-policy", "evit", "--tower-keep", "0.4")
    assert "trimmed: EViT leaves 40% of rows × layers, " in capsys.readouterr().out
    assert (found["keep"], found["k_ratio"]) == (0.615, 0.25)
    assert "published for the 11b" in found["keep_from"]
    assert found["keep_from"].endswith("that this much stays of what another tower leaves is an assumption")


def test_the_documented_bill_is_what_the_command_says(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/estimate.md, "What the tower makes of the bill"."""
    table = (ROOT / "docs" / "estimate.md").read_text().partition("## What the tower makes")[2].partition("| ---")[2]
    lines = [line.strip("| ").split(" | ")[1:] for line in table.splitlines()[1:6]]
    every, alike = ("--tower-tiles", "all"), ("--tower-policy", "alike")
    commands = [
        ("full", every),
        ("trimmed", (*every, "--k-ratio", "0.25")),
        ("full", ()),
        ("trimmed", (*alike, "--keep", "1")),
        ("trimmed", (*alike, "--merged", "--keep", "0.5")),
    ]
    places = [("11b", "h100", "1"), ("11b", "l40s", "1"), ("90b", "h100", "4"), ("90b", "l40s", "8")]
    for line, (which, options) in zip(lines, commands, strict=True):
        for said, (model, gpu, each) in zip(line, places, strict=True):
            where = ("--images", "1e6", "--gpus", "8", "--model", model, "--gpu", gpu, "--gpus-per-actor", each)
            code, out, _ = run(capsys, *where, *options)
            assert code == 0
            column = {"full": 0, "trimmed": 1}[which]
            names = [f"s per 1,000 images, {stage} " for stage in STAGES] + ["GPU hours "]
            found = [float(out.partition(name)[2].split()[column].replace(",", "")) for name in names]
            documented = [float(part) for part in said.replace("(", "· ").replace(")", "").split(" · ")]
            assert documented == pytest.approx(found, rel=1e-9), (which, options, model, gpu)


def test_a_gpu_that_the_table_lacks(tmp_path: Path) -> None:
    stated = ("--gpu-memory", "80", "--gpu-bandwidth", "3350", "--gpu-rate", "989.5")
    own = built(tmp_path, "--images", "1e6", "--model", "11b", *stated)
    known = built(tmp_path, "--images", "1e6", "--model", "11b", "--gpu", "h100")
    assert own["full"] == known["full"]
    assert own["hardware"] == "the stated GPU"


def test_a_folders_model_takes_the_stated_fraction(tmp_path: Path) -> None:
    found = built(tmp_path, "--images", "1000", "--gpu", "l4", "--model", DEMO, "--keep", "0.6")
    assert (found["keep"], found["k_ratio"], found["keep_from"]) == (0.6, None, "stated")


def test_without_the_errors_file_it_says_where_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(report, "ERRORS", tmp_path / "missing.json")
    _, out, _ = run(capsys, *H100)
    assert "docs/estimate.md" in out


# ---- from a run -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def costs() -> Costs:
    return Costs(config_of(DEMO), 4)


CPU = Machine(
    "it",
    {"tower": 200e9, "prefill": 300e9, "decode": 300e9},
    {"tower": float("inf"), "prefill": 20e9, "decode": 20e9},
    adds=True,
)


def test_a_cpu_runs_rates_are_found_again_and_predict_other_settings(tmp_path: Path, costs: Costs) -> None:
    measured(tmp_path / "run", CPU, costs)
    found = built(tmp_path, "--images", "1000", "--from", str(tmp_path / "run"), "--keep", "0.5", "--batch-size", "16")
    for stage in STAGES:
        assert found["rates"][stage]["operations_per_second"] == pytest.approx(CPU.operations[stage], rel=0.05)
    assert found["rates"]["decode"]["bytes_per_second"] == pytest.approx(20e9, rel=0.05)
    # A summary's seconds have three digits behind the point. What was not stated is the run's.
    assert found["job"]["questions"] == 2
    assert {int(tiles): share for tiles, share in found["job"]["tiles"].items()} == {1: 0.5, 2: 0.5}
    assert (found["job"]["prompt"], found["job"]["longest"]) == (12, 64)
    assert found["job"]["output"] == pytest.approx(sum(2 + i % 7 for i in range(64)) / 64)
    assert found["unit"] == "actors"
    assert found["trimmed"]["largest"] <= 16


def test_a_gpu_runs_shares_go_to_another_gpu(tmp_path: Path) -> None:
    shares: dict[Stage, float] = {"tower": 0.4, "prefill": 0.3, "decode": 0.7}
    machine = roofline("it", 989.5e12, 3350e9, shares)
    bf16 = Costs(config_of("11b"))
    measured(tmp_path / "run", machine, bf16, device="NVIDIA H100 80GB HBM3", dtype="bfloat16", model="11b", keep=0.5)
    # A run of the user's own is nearer than the GPU benchmark, which is not even read.
    gpu_benchmark.RESULTS.write_text("no JSON")
    found = built(tmp_path, "--images", "1000", "--from", str(tmp_path / "run"), "--gpu", "h200")
    assert found["roofline_shares"] == pytest.approx(shares, rel=0.01)
    assert (found["gpu_benchmark"], found["assumed_shares"]) == (None, [])
    assert found["rates"]["decode"]["bytes_per_second"] == pytest.approx(0.7 * 4800e9, rel=0.01)
    # The kept fraction at the run's own K is the run's, and at another one follows from it.
    assert found["keep"] == pytest.approx(0.5, abs=1e-3)
    assert "measured by the run" in found["keep_from"]
    other = built(tmp_path, "--images", "1000", "--from", str(tmp_path / "run"), "--k-ratio", "0.1")
    assert other["hardware"] == "NVIDIA H100 SXM"
    assert 0.1 < other["keep"] < 0.5


def test_a_cpu_run_says_nothing_of_a_gpu(tmp_path: Path, costs: Costs, capsys: pytest.CaptureFixture[str]) -> None:
    measured(tmp_path / "run", CPU, costs)
    code, _, err = run(capsys, *H100, "--from", str(tmp_path / "run"))
    assert code == 2
    assert "ran on CPU, 2 threads, which says nothing of a GPU" in err


def test_a_run_of_many_rows_is_read_in_part(tmp_path: Path, costs: Costs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of it calibrates like the whole: its rows repeat every fourteen."""
    measured(tmp_path / "run", CPU, costs)
    whole = read(str(tmp_path / "run"), {})
    monkeypatch.setattr("jobs.estimation.measured.SAMPLE_ROWS", 28)
    part = read(str(tmp_path / "run"), {})
    assert (len(whole.rows), len(part.rows)) == (64, 28)
    assert part.seconds["tower"] == pytest.approx(whole.seconds["tower"] * 28 / 64)
    assert part.decode_steps == pytest.approx(10 * 28 / 64)
    assert part.machine(costs).operations["tower"] == pytest.approx(whole.machine(costs).operations["tower"], rel=0.05)


def test_another_policys_kept_fraction_is_taken(tmp_path: Path, costs: Costs) -> None:
    measured(tmp_path / "run", CPU, costs, keep=0.5, policy={"policy": "grid", "keep": 0.5})
    found = built(tmp_path, "--images", "1000", "--from", str(tmp_path / "run"))
    assert found["keep"] == pytest.approx(0.5, abs=0.01)
    assert (found["k_ratio"], found["keep_from"]) == (None, "measured by the run")


TOWER = {"policy": "none", "tower_policy": "windows", "tower_keep": 0.6}


def test_a_run_with_a_trimmed_tower_is_estimated_as_it_was(
    tmp_path: Path, costs: Costs, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is left out behind it: that is what the run kept, not the default K."""
    measured(tmp_path / "run", CPU, costs, policy=TOWER)
    assert read(str(tmp_path / "run"), {}).keep < 0.6
    asked = ("--images", "1000", "--from", str(tmp_path / "run"))
    found = built(tmp_path, *asked)
    assert (found["keep"], found["k_ratio"], found["keep_from"]) == (1, None, "measured by the run")
    assert (found["job"]["tower_policy"]["name"], found["job"]["tower_policy"]["keep"]) == ("Windows", 0.6)
    assert found["run"]["like"] == "trimmed"
    said = capsys.readouterr().out
    assert "tower    trimmed: Windows (the run's) leaves 60% of rows × layers (the run's), " in said
    # Rates come from the rows that went through.
    assert found["rates"]["tower"]["operations_per_second"] == pytest.approx(CPU.operations["tower"], rel=0.05)
    half = built(tmp_path, *asked, "--keep", "0.5")
    assert half["trimmed"]["stages"]["tower"] == found["trimmed"]["stages"]["tower"]


@pytest.mark.parametrize(
    ("stated", "kind", "keep"),
    [
        (("--tower-keep", "0.45"), "Windows", 0.45),
        (("--tower-policy", "windows"), "Windows", 0.6),
        (("--tower-policy", "tome"), "ToMe", 0.5),
        (("--tower-policy", "tome", "--tower-keep", "0.7"), "ToMe", 0.7),
    ],
)
def test_a_stated_tower_stands_in_for_the_runs(
    stated: tuple[str, ...], kind: str, keep: float, tmp_path: Path, costs: Costs
) -> None:
    measured(tmp_path / "run", CPU, costs, keep=0.5, policy={**TOWER, "policy": "trimmed-llama", "k_ratio": 0.25})
    found = built(tmp_path, "--images", "1000", "--from", str(tmp_path / "run"), *stated)
    assert (found["job"]["tower_policy"]["name"], found["job"]["tower_policy"]["keep"]) == (kind, keep)
    # In whole features of what the tower left.
    assert found["keep"] == pytest.approx(0.5, abs=0.02)
    same = (kind, keep) == ("Windows", 0.6)
    assert ("what another tower leaves is an assumption" in found["keep_from"]) != same
    assert found["keep_from"].startswith("measured by the run at this K")


def test_a_run_whose_heads_together_kept_everything(tmp_path: Path, costs: Costs) -> None:
    """No curve goes through that, and none is asked for."""
    measured(tmp_path / "run", CPU, costs, keep=1.0)
    found = built(tmp_path, "--images", "1000", "--from", str(tmp_path / "run"))
    assert (found["keep"], found["k_ratio"], found["keep_from"]) == (1, 0.25, "measured by the run at this K")


def test_a_share_of_another_tower_is_carried_over(tmp_path: Path, costs: Costs) -> None:
    measured(tmp_path / "run", CPU, costs, keep=0.5, policy={"policy": "grid", "keep": 0.5})
    asked = ("--images", "1000", "--from", str(tmp_path / "run"))
    found = built(tmp_path, *asked, "--tower-policy", "alike")
    assert found["keep"] == pytest.approx(0.5, abs=0.02)
    assert "another tower" in found["keep_from"]
    # Letting all rows through is no other tower.
    assert "another tower" not in built(tmp_path, *asked, "--tower-policy", "alike", "--tower-keep", "1")["keep_from"]


def test_a_run_on_s3(tmp_path: Path, costs: Costs, s3: dict[str, Any]) -> None:
    measured(tmp_path / "run", CPU, costs)
    files = Storage("s3://bucket/estimated", s3)
    for file in (tmp_path / "run").rglob("*.*"):
        if file.is_file():
            files.write(str(file.relative_to(tmp_path / "run")), file.read_bytes(), temporary=".run/unfinished")
    asked = ("--images", "1000", "--keep", "0.5")
    there = built(tmp_path, *asked, "--from", files.url, "--storage-options", json.dumps(s3))
    here = built(tmp_path, *asked, "--from", str(tmp_path / "run"))
    assert there["full"] == here["full"]
    assert s3["secret"] not in json.dumps(there)


@pytest.mark.parametrize("kept_sets", ["image", "question"])
def test_who_decided_in_the_run_decides_in_the_estimate(kept_sets: str, tmp_path: Path, costs: Costs) -> None:
    """Two questions an image: its decode steps read a set of each image, or of each row."""
    policy = {"policy": "trimmed-llama", "k_ratio": 0.25, "kept_sets": kept_sets}
    measured(tmp_path / "run", CPU, costs, keep=0.5, policy=policy)
    run = read(str(tmp_path / "run"), {})
    assert run.kept_sets == kept_sets
    # 25 rows at once on average.
    step = run.calls(costs)[-1]
    kept = step.held / costs.kv_bytes(0, 1)
    sets = {"image": 13, "question": 25}[kept_sets]
    assert kept == pytest.approx(sets * 0.5 * 1.5 * costs.tokens, rel=0.05)
    found = built(tmp_path, "--images", "1000", "--from", str(tmp_path / "run"))
    assert (found["job"]["kept_sets"], found["job_from"]["kept_sets"]) == (kept_sets, "the run's")
    other = built(tmp_path, "--images", "1000", "--from", str(tmp_path / "run"), "--kept-sets", "image")
    assert other["trimmed"]["cross_kv_bytes_read"] < 0.6 * other["full"]["cross_kv_bytes_read"]


def test_merged_features_are_shared_and_cost_their_clustering(tmp_path: Path, costs: Costs) -> None:
    """By a run of clusters, or as it is told; what stays is all that any layer sees."""
    measured(tmp_path / "run", CPU, costs, keep=0.1, policy={"policy": "clusters", "likeness": 0.9, "kept_sets": "question"})
    assert read(str(tmp_path / "run"), {}).merged
    found = built(tmp_path, "--images", "1000", "--from", str(tmp_path / "run"))
    assert found["job"]["merged"]
    asked = (*H100, "--questions", "5", "--keep", "0.1")
    trimmed, merged = (built(tmp_path, *asked, *more)["trimmed"] for more in ((), ("--merged",)))
    assert merged["stages"]["prefill"]["seconds"] < trimmed["stages"]["prefill"]["seconds"]
    assert merged["stages"]["tower"]["seconds"] > trimmed["stages"]["tower"]["seconds"]
    assert estimate.main([*asked[:-2], "--merged"]) == 2


def test_a_run_that_waited_for_rows_is_told(tmp_path: Path, costs: Costs, capsys: pytest.CaptureFixture[str]) -> None:
    measured(tmp_path / "run", CPU, costs, actor_seconds=1000.0)
    _, out, _ = run(capsys, "--images", "1000", "--from", str(tmp_path / "run"), "--keep", "0.5", "--batch-size", "256")
    assert "The run decoded 25.3 rows at once on average" in out
    assert "waited for rows in the rest" in out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"seconds": {"tower": 1.0, "prefill": 1.0}}, "has no seconds of decode"),
        ({"stats": {"decode_steps": 0, "decode_tokens": 0}}, "counts no decode steps"),
        ({"device": "NVIDIA Abacus"}, "ran on 'NVIDIA Abacus', which is not in the table"),
        ({"dtype": "int8"}, "mixes weights' types (int8)"),
    ],
)
def test_runs_that_teach_nothing_are_refused(
    given: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": str(i), "text": "a b c"} for i in range(4)]
    options = {"stats": {"decode_steps": 3, "decode_tokens": 8}, "run": {"checkpoint": {"source": DEMO, "identity": "it"}}}
    write_run(tmp_path / "run", rows, **{**options, **given})
    code, _, err = run(capsys, "--images", "1000", "--from", str(tmp_path / "run"), "--keep", "0.5")
    assert code == 2
    assert said in err


def test_rows_without_one_image_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": str(i), "text": "a b c", "images": 2, "tiles": 2} for i in range(4)]
    write_run(tmp_path / "run", rows, stats={"decode_steps": 3, "decode_tokens": 8})
    code, _, err = run(capsys, "--images", "1000", "--from", str(tmp_path / "run"), "--keep", "0.5")
    assert code == 2
    assert "0 of 4 rows have one image" in err
