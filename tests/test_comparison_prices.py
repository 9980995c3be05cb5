"""Prices find their hardware by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.comparison.prices import Price, blend, check_typed, match, read_prices

DEVICES = ("NVIDIA H200", "CPU, 2 threads", "NVIDIA A100-SXM4-80GB")


@pytest.mark.parametrize(
    ("name", "fits"),
    [("h200", 0), ("H200", 0), ("NVIDIA H200", 0), ("cpu", 1), ("a100", 2), ("A100-SXM4", 2), ("a100_sxm4_80gb", 2)],
)
def test_a_price_matches_a_word_of_the_name(name: str, fits: int) -> None:
    assert [match(device, {name: 2.0}) is not None for device in DEVICES] == [i == fits for i in range(3)]


@pytest.mark.parametrize("name", ["h20", "200", "a10", "sxm", "h100", "sxm4-a100", "A100 80GB"])
def test_a_part_of_a_word_matches_nothing(name: str) -> None:
    assert not any(match(device, {name: 2.0}) for device in DEVICES)


def test_the_longest_match_wins() -> None:
    prices = {"nvidia": 1.0, "a100-sxm4": 3.0, "a100": 2.0}
    assert match("NVIDIA A100-SXM4-80GB", prices) == Price("a100-sxm4", 3.0)
    assert match("NVIDIA A100-PCIE-40GB", prices) == Price("nvidia", 1.0)


def test_what_is_typed_goes_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text("h200: 3.5\nCPU: 0.1\n4090: 1\n")
    prices, typed = read_prices(["h200=4"], str(file))
    assert prices == {"h200": 4.0, "CPU": 0.1, "4090": 1.0}
    # A price list may hold what these runs had no use for; what is typed may not.
    check_typed(typed, DEVICES)
    with pytest.raises(ValueError, match="price 'h20' matches no run's hardware, which is 'NVIDIA H200', 'CPU, 2 threads', "):
        check_typed(["h200", "h20"], DEVICES)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("h200", "not NAME=DOLLARS"),
        ("h200=free", "h200=free is not a positive number"),
        ("h200=-1", "h200=-1 is not a positive number"),
        ("h200=0", "not a positive number"),
        ("h200=nan", "not a positive number"),
        ("h200=inf", "not a positive number"),
        ("=1", "names no hardware"),
    ],
)
def test_no_prices(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_prices([text], None)


def test_two_prices_of_one_thing() -> None:
    with pytest.raises(ValueError, match="has a price already"):
        read_prices(["h200=1", "h200=2"], None)


@pytest.mark.parametrize(("text", "said"), [("- 3", "holds no mapping"), ("a: [", "is not YAML"), ("h200: true", "h200=True")])
def test_no_price_file(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "prices.yaml").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_prices([], str(tmp_path / "prices.yaml"))


def test_a_run_on_two_devices_costs_what_each_cost() -> None:
    prices = {"h200": 4.0, "a100": 2.0}
    assert blend({"NVIDIA H200": 30.0}, prices) == Price("h200", 4.0)
    mixed = blend({"NVIDIA H200": 30.0, "NVIDIA A100-SXM4-80GB": 10.0}, prices)
    assert mixed == Price("h200 and a100", 3.5)
    assert blend({"NVIDIA H200": 30.0, "CPU, 2 threads": 1.0}, prices) is None
    assert blend({"NVIDIA H200": 30.0, "NVIDIA L4": 1.0}, {"nvidia": 1.5}) == Price("nvidia", 1.5)
    assert blend({"NVIDIA H200": 30.0}, {}) is None
