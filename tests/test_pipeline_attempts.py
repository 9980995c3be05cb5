"""How a row that kills its actor is told from those beside it."""

from __future__ import annotations

from pipeline.attempts import CAREFUL, Attempts, Trial


def test_a_unit_that_ends_is_forgotten() -> None:
    log = Attempts()
    for _ in range(5):
        assert log.begin("u") == Trial(0, frozenset())
        log.at("u", [3])
        log.end("u")


def test_a_row_met_by_two_deaths_is_lethal() -> None:
    log = Attempts()
    trials = [log.begin("u") for _ in range(CAREFUL + 1)]
    assert [t.careful for t in trials] == [False] * CAREFUL + [True]
    log.at("u", [3])
    # A machine taken away while another row was answered is no proof against that row.
    assert log.begin("u").lethal == frozenset()
    log.at("u", [2])
    log.at("u", [3])
    assert log.begin("u").lethal == {3}
    log.at("u", [7])
    log.at("u", [])
    assert log.begin("u").lethal == {3}
    log.end("u")
    assert log.begin("u") == Trial(0, frozenset())


def test_a_group_is_lethal_whole() -> None:
    log = Attempts()
    log.begin("u")
    log.at("u", [1])
    log.begin("u")
    # One death met a row as it was examined, one its group: two things that may each have been by chance.
    log.at("u", [1, 4, 6])
    assert log.begin("u").lethal == frozenset()
    log.at("u", [1, 4, 6])
    assert log.begin("u").lethal == {1, 4, 6}


def test_units_are_told_apart() -> None:
    log = Attempts()
    log.begin("a")
    log.at("a", [1])
    assert log.begin("b") == Trial(0, frozenset())
    assert log.begin("a").deaths == 1
