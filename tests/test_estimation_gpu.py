"""The GPU benchmark's results instead of assumed shares: real files, read by the command; seconds are chosen so that each share
can be worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import estimate
from jobs.estimation import gpu_benchmark

H100 = ("--images", "1e6", "--gpu", "h100", "--model", "11b")
# The data sheet's H100, as --gpu h100 has it.
RATE, BANDWIDTH = 989.5e12, 3350e9
Write = Callable[[Any], None]


def entry(seconds: float, operations: float = 1, bytes: float = 1) -> dict[str, Any]:
    """One measurement. ``operations`` and ``bytes`` are in seconds at the data sheet's peaks; the roofline at measured rates is
    there as well, and is not used."""
    return {
        "seconds": seconds,
        "operations": round(operations * RATE),
        "bytes": round(bytes * BANDWIDTH),
        "roofline_seconds": 1.0,
        "roofline_share": 0.99,
    }


def results(**sections: Any) -> dict[str, Any]:
    conditions = {"hardware": "NVIDIA H100 80GB HBM3", "size": "11b", "commit": "it", "model": {"parameters": 10.67e9}}
    return {"rehearsal": False, "conditions": conditions, "sections": sections}


OOM = {"error": "out of memory"}
TOWER = {
    "status": "done",
    # The longer of operations and bytes counts, and real tiles do not: (2 + 4 + 3) / (5 + 7 + 8) = 45 %.
    "tiles": {
        "1": {"all": entry(5, operations=2), "real": entry(100)},
        "2": {"all": entry(7, bytes=4), "real": entry(100)},
        "4": {"all": entry(8, operations=3, bytes=0.1)},
    },
}
PREFILL = {
    "status": "timed out",
    "policies": {
        "full": {"batches": {"1": entry(100), "16": entry(10, operations=4)}},
        # The largest batch that was reached: (4 + 2) / (10 + 10) = 30 %.
        "half": {"batches": {"8": entry(10, bytes=2), "16": OOM, "1": entry(100)}},
        "quarter": {"batches": {}},
    },
}
DECODE = {
    "status": "failed",
    "error": "RuntimeError: it broke off",
    "policies": {
        # From 32 on: (7 + 6 + 1) / (10 + 8 + 2) = 70 %.
        "full": {"batches": {"8": entry(100), "32": entry(10, bytes=7), "64": entry(8, bytes=6), "128": OOM}},
        "half": {"batches": {"8": entry(100), "32": entry(2)}},
        "quarter": {"batches": {"8": entry(100)}},
    },
}
ALL = {"tower": TOWER, "prefill": PREFILL, "decode": DECODE}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Puts gpu.json, of an object or of text, where the command looks for it."""
    file = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu_benchmark, "RESULTS", file)

    def write(found: Any) -> None:
        file.write_text(found if isinstance(found, str) else json.dumps(found))

    return write


def built(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What ``--json`` writes."""
    file = tmp_path / "estimate.json"
    assert estimate.main([*arguments, "--json", str(file)]) == 0
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_measured_shares_stand_instead_of_the_assumed_ones(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write(results(**ALL))
    found = built(tmp_path, *H100)
    assert found["roofline_shares"] == pytest.approx({"tower": 0.45, "prefill": 0.3, "decode": 0.7})
    assert found["assumed_shares"] == []
    assert found["gpu_benchmark"]["shares"] == found["roofline_shares"]
    assert found["gpu_benchmark"]["hardware"] == "NVIDIA H100 80GB HBM3"
    assert found["rates"]["tower"]["operations_per_second"] == pytest.approx(0.45 * RATE)
    assert found["rates"]["decode"]["bytes_per_second"] == pytest.approx(0.7 * BANDWIDTH)
    out = capsys.readouterr().out
    peaks = "speed    shares of the data sheet's peaks measured on NVIDIA H100 80GB HBM3"
    assert f"{peaks} (tower 45%, prefill 30%, decode 70%)\n" in out
    said = "The shares of the peaks of tower, prefill, decode were measured on NVIDIA H100 80GB HBM3 with the model 11b"
    assert f"{said} (benchmarks/results/gpu.json); --from a short run of your own replaces them." in out


def test_a_stage_takes_seconds_by_its_share(tmp_path: Path, write: Write) -> None:
    assumed = built(tmp_path, *H100)
    write(results(**ALL))
    found = built(tmp_path, *H100)
    for stage, factor in {"tower": 0.5 / 0.45, "prefill": 0.5 / 0.3, "decode": 0.6 / 0.7}.items():
        was, now = (one["full"]["stages"][stage]["seconds"] for one in (assumed, found))
        assert now == pytest.approx(factor * was)


@pytest.mark.parametrize("missing", [{}, {"prefill": {"status": "failed", "error": "it"}}, {"prefill": {"policies": {}}}])
def test_a_stage_that_was_not_measured_stays_assumed(
    missing: dict[str, Any], tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write(results(tower=TOWER, decode=DECODE, **missing))
    found = built(tmp_path, *H100)
    assert found["roofline_shares"] == pytest.approx({"tower": 0.45, "prefill": 0.5, "decode": 0.7})
    assert found["assumed_shares"] == ["prefill"]
    assert set(found["gpu_benchmark"]["shares"]) == {"tower", "decode"}
    out = capsys.readouterr().out
    assert "(tower 45%, prefill 50% assumed, decode 70%)" in out
    assert "of tower, decode were measured" in out
    assert "; those of prefill are assumptions; --from" in out
    assert max(len(line) for line in out.splitlines()[:-2]) < 128


def test_without_large_batches_the_largest_decodes(tmp_path: Path, write: Write) -> None:
    small = {"full": {"batches": {"1": entry(100), "8": entry(4)}}, "half": {"batches": {"1": entry(100), "32": OOM}}}
    write(results(decode={"policies": small}))
    found = built(tmp_path, *H100)
    assert found["roofline_shares"] == pytest.approx({"tower": 0.5, "prefill": 0.5, "decode": 0.25})
    assert found["assumed_shares"] == ["tower", "prefill"]


@pytest.mark.parametrize("other", [("--gpu", "l4"), ("--gpu-memory", "80", "--gpu-bandwidth", "300", "--gpu-rate", "121")])
def test_shares_are_carried_over_to_another_gpu(
    other: tuple[str, ...], tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write(results(**ALL))
    found = built(tmp_path, "--images", "1e6", "--model", "11b", "--gpus-per-actor", "2", "--gpus", "2", *other)
    assert found["roofline_shares"] == pytest.approx({"tower": 0.45, "prefill": 0.3, "decode": 0.7})
    assert found["rates"]["decode"]["bytes_per_second"] == pytest.approx(0.7 * 300e9)
    out = capsys.readouterr().out
    assert "peaks measured on NVIDIA H100 80GB HBM3 (tower 45%" in out
    assert f"(benchmarks/results/gpu.json) and are carried over to {found['hardware']}; --from" in out


# ---- results that are not used ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", [None, results(**ALL) | {"rehearsal": True}, {"rehearsal": True}])
def test_a_rehearsal_is_like_no_file(found: Any, tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    if found is not None:
        write(found)
    made = built(tmp_path, *H100)
    assert made["roofline_shares"] == {"tower": 0.5, "prefill": 0.5, "decode": 0.6}
    assert (made["gpu_benchmark"], made["assumed_shares"]) == (None, ["tower", "prefill", "decode"])
    out = capsys.readouterr().out
    assert "not calibrated: assumed shares of the data sheet's peaks (tower 50%, prefill 50%, decode 60%)" in out
    assert "assumptions, as there are no measurements of a GPU in benchmarks/results/gpu.json; --from" in out


@pytest.mark.parametrize(
    ("hardware", "sections", "why"),
    [
        ("NVIDIA Abacus", ALL, "it was measured on 'NVIDIA Abacus', which is not in the table of GPUs"),
        ("NVIDIA H100 80GB HBM3", {}, "it has no seconds of any stage"),
        ("NVIDIA H100 80GB HBM3", {"tower": {"tiles": {"1": {"all": OOM}, "4": OOM}}}, "it has no seconds of any stage"),
    ],
)
def test_it_is_told_why_the_results_are_not_used(
    hardware: str, sections: dict[str, Any], why: str, tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    found = results(**sections)
    found["conditions"]["hardware"] = hardware
    write(found)
    made = built(tmp_path, *H100)
    assert made["roofline_shares"] == {"tower": 0.5, "prefill": 0.5, "decode": 0.6}
    assert made["gpu_benchmark"]["unused"].startswith(why)
    out = capsys.readouterr().out
    assert "not calibrated: assumed shares" in out
    assert f"The shares of the peaks are assumptions, as benchmarks/results/gpu.json is not used: {why}" in out


def changed(*path: str, to: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(results(**ALL)))
    inner = found
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = to
    return found


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ("", "Expecting value"),
        ('{"rehearsal": fal', "Expecting value"),
        ([], "it holds [] instead of an object"),
        ({"ratios": {}, "tower": {}}, "rehearsal=None is no bool"),
        ({"rehearsal": False}, "conditions=None is no dict"),
        (changed("sections", to=[1]), "sections=[1] is no dict"),
        (changed("conditions", "hardware", to=None), "hardware=None is no str"),
        (changed("sections", "decode", to="done"), "decode='done' is no dict"),
        (changed("sections", "tower", "tiles", to=[1, 2, 4]), "tiles=[1, 2, 4] is no dict"),
        (changed("sections", "decode", "policies", "full", "batches", "many", to=entry(1)), "'many'"),
        (changed("sections", "tower", "tiles", "4", "all", "seconds", to={"median": 1}), "seconds={'median': 1} is no int"),
        (changed("sections", "tower", "tiles", "4", "all", "seconds", to=0), "seconds=0 must be positive"),
        (changed("sections", "tower", "tiles", "4", "all", "seconds", to=float("nan")), "seconds=nan must be positive"),
        (changed("sections", "tower", "tiles", "4", "all", to={"seconds": 1}), "operations=None is no int"),
    ],
)
def test_a_file_of_another_form_is_refused_in_one_line(
    found: Any, said: str, tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write(found)
    assert estimate.main(H100) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"python -m jobs.estimate: {tmp_path / 'gpu.json'} is no result of the GPU benchmark: ")
    assert said in printed.err
    assert printed.err.endswith("; run make gpu-kit, or remove it\n")
    assert printed.err.count("\n") == 1
