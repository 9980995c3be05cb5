"""GPUs, geometries and the curve from K to the kept fraction."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.estimation import gpus, models
from trimming.costs import Costs

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(("model", "billions"), [("11b", 10.67), ("90B", 88.59)])
def test_the_known_sizes_are_llamas(model: str, billions: float) -> None:
    config = models.config_of(model)
    assert sum(Costs(config).weights.values()) / 2 == pytest.approx(billions * 1e9, rel=1e-3)
    assert models.size_of(config) == model.lower()


def test_a_folders_config_is_read() -> None:
    config = models.config_of(str(ROOT / "demo" / "model"))
    assert models.size_of(config) is None
    assert Costs(config).tokens < 1601


@pytest.mark.parametrize("size", models.KNOWN)
def test_the_curve_goes_through_what_was_published_and_rises(size: str) -> None:
    points = models.PUBLISHED[size]
    for k_ratio, kept in points.items():
        assert models.keep_fraction(k_ratio, points) == pytest.approx(kept)
    curve = [models.keep_fraction(k / 100, points) for k in range(1, 101)]
    assert curve == sorted(curve)
    assert curve[-1] == 1
    # A union of heads' picks is never smaller than one head's.
    assert all(kept >= k / 100 for k, kept in enumerate(curve, 1))


def test_one_point_alone_makes_a_curve_and_none_makes_none() -> None:
    assert models.keep_fraction(0.5, {0.25: 1 - 0.75**3}) == pytest.approx(1 - 0.5**3)
    with pytest.raises(ValueError, match="state --keep"):
        models.keep_fraction(0.25, {})
    with pytest.raises(ValueError, match=r"k_ratio=1.5 must lie in \(0, 1\]"):
        models.keep_fraction(1.5, models.PUBLISHED["11b"])


def test_the_curve_is_near_what_was_measured_on_the_demo_sets() -> None:
    """Held out: accuracy.md's kept fractions at K = 0.15, by the points at 0.05 and 0.25."""
    for points, measured in (({0.05: 0.154, 0.25: 0.669}, 0.457), ({0.05: 0.149, 0.25: 0.601}, 0.379)):
        assert models.keep_fraction(0.15, points) == pytest.approx(measured, abs=0.03)


def test_every_gpu_has_a_source_and_plausible_figures() -> None:
    for name, gpu in gpus.GPUS.items():
        assert name == name.lower()
        assert "NVIDIA" in gpu.source
        assert "data sheet" in gpu.source or "whitepaper" in gpu.source
        # Operations a byte: of cards made for this between a hundred and some four hundred.
        assert 100 < gpu.rate / gpu.bandwidth < 450, name
        assert 20e9 < gpu.memory < 200e9


@pytest.mark.parametrize(
    ("device", "title"),
    [
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 SXM"),
        ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe"),
        ("NVIDIA H200", "NVIDIA H200 SXM"),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100 40 GB"),
        ("NVIDIA A100 80GB PCIe", "NVIDIA A100 80 GB PCIe"),
        ("NVIDIA A10", "NVIDIA A10"),
        ("NVIDIA A10G", "NVIDIA A10G"),
        ("NVIDIA L4", "NVIDIA L4"),
        ("NVIDIA L40S", "NVIDIA L40S"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H200 NVL", None),
        ("Tesla T4", None),
    ],
)
def test_a_runs_device_is_found_in_the_table(device: str, title: str | None) -> None:
    found = gpus.reported(device)
    assert (found.title if found else None) == title


def test_an_unknown_gpu_is_refused_with_the_table() -> None:
    with pytest.raises(ValueError, match=r"gpu='tpu' is not in the table \(a10, .*h100.*--gpu-rate"):
        gpus.find("tpu")
    assert gpus.find("H100") is gpus.GPUS["h100"]
