"""The schedule beside the engine itself: the same rows, the same steps, the same sequences at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from benchmarks import workloads
from benchmarks.model import TINY, build_config, build_model, build_processor
from benchmarks.ours import Ours
from benchmarks.workloads import Workload
from jobs.estimation import schedule
from jobs.estimation.schedule import Call, Engine, Row
from trimming import Grid, KeepAll, Policy
from trimming.costs import Costs, Look
from trimming.engine import scheduler

Measure = Callable[[Workload, Policy, int, int], dict[str, float]]


@pytest.fixture(scope="module")
def engine() -> Measure:
    """What the engine itself counts: a workload, a policy, sequences and bytes of KV at most."""
    processor = build_processor(TINY)
    model = build_model(TINY, processor, 0)
    return lambda load, policy, sequences, room: Ours(model, processor, sequences, room)(load, policy).measured


@pytest.fixture(scope="module")
def costs() -> Costs:
    return Costs(build_config(TINY, build_processor(TINY)), 4)


def rows_of(load: Workload, costs: Costs, keep: float = 1.0) -> list[Row]:
    """As the benchmark's engine is given them."""
    rows = []
    for row in load.rows:
        tiles, prompt = load.tiles[row.image], len(row.prompt.split()) + 2
        rows.append(Row(row.image, tiles, prompt, row.length, round(keep * tiles * costs.tokens), prompt + row.length))
    return rows


def of(calls: list[Call], stage: str) -> list[Call]:
    return [call for call in calls if call.stage == stage]


@pytest.mark.parametrize("name", ["captioning", "questions", "four tiles"])
@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("sequences", [3, 64])
def test_it_makes_the_engines_calls(name: str, keep: float, sequences: int, costs: Costs, engine: Measure) -> None:
    make = {"captioning": workloads.captioning, "questions": workloads.questions, "four tiles": workloads.four_tiles}
    load = make[name](12, 0, TINY)
    measured = engine(load, KeepAll() if keep == 1 else Grid(keep=keep), sequences, 1 << 26)
    modelled = Engine(costs=costs, kv_bytes=1 << 26, max_sequences=sequences, shared=keep == 1)
    calls = list(modelled.calls(rows_of(load, costs, keep)))
    steps = of(calls, "decode")
    assert len(steps) == measured["decode_steps"]
    assert sum(step.rows for step in steps) == measured["decode_tokens"]
    # The engine counts those that leave with their prefill's token as well.
    assert max(step.rows for step in steps) == pytest.approx(measured["peak_sequences"], abs=1)
    assert sum(call.rows for call in of(calls, "tower")) == measured["images_encoded"]


@pytest.mark.parametrize("budget", [2, 5])
def test_memory_decides_how_many_run_as_in_the_engine(budget: int, costs: Costs, engine: Measure) -> None:
    load = workloads.four_tiles(12, 0, TINY)
    longest = max(row.capacity for row in rows_of(load, costs))
    room = costs.kv_bytes(longest + 32, 4 * costs.tokens) * budget
    measured = engine(load, KeepAll(), 64, room)
    modelled = Engine(costs=costs, kv_bytes=room, max_sequences=64, shared=True)
    steps = of(list(modelled.calls(rows_of(load, costs))), "decode")
    assert max(step.rows for step in steps) == measured["peak_sequences"]
    assert len(steps) == pytest.approx(measured["decode_steps"], rel=0.1)


def test_the_limits_are_the_schedulers() -> None:
    for name in ("TOWER_IMAGES", "PREFILL_SEQUENCES", "PREFILL_TOKENS", "PREFILL_VISUAL_TOKENS", "SLOT_GRAIN"):
        assert getattr(schedule, name) == getattr(scheduler, name)


def test_a_call_costs_what_the_cost_model_says(costs: Costs) -> None:
    """One row about one image of two tiles, half of it kept: by hand."""
    seen = 2 * costs.tokens
    engine = Engine(costs=costs, kv_bytes=1e9, max_sequences=8, shared=False)
    tower, prefill, *steps = engine.calls([Row(0, 2, 10, 3, seen // 2, 13)])
    assert tower.parts == (costs.tower(2), costs.projector(2))
    look = Look(10, seen, seen // 2)
    assert prefill.parts == (costs.cross_kv(seen, seen // 2), costs.prefill([10], [look]))
    kept = Look(1, seen // 2, seen // 2)
    assert [step.cost for step in steps] == [costs.decode([11], [kept]), costs.decode([12], [kept])]


def test_questions_share_an_image_and_with_all_features_its_cache(costs: Costs) -> None:
    seen = costs.tokens
    asked = [Row(0, 1, 10, 2, seen, 12), Row(0, 1, 10, 2, seen, 12)]
    engine = Engine(costs=costs, kv_bytes=1e9, max_sequences=8, shared=True)
    calls = list(engine.calls(asked))
    assert Counter(call.stage for call in calls) == {"tower": 1, "prefill": 1, "decode": 1}
    assert calls[2].cost == costs.decode([11, 11], [Look(2, seen, seen)])
    trimmed = [Row(row.image, 1, 10, 2, seen - 1, 12) for row in asked]
    own = list(Engine(costs=costs, kv_bytes=1e9, max_sequences=8, shared=False).calls(trimmed))
    assert own[2].cost == costs.decode([11, 11], [Look(1, seen - 1, seen - 1)] * 2)
    without = Engine(costs=costs, kv_bytes=1e9, max_sequences=8, shared=True, encode_once=False)
    assert len(of(list(without.calls(asked)), "tower")) == 2


def test_a_row_that_never_fits_is_refused(costs: Costs) -> None:
    engine = Engine(costs=costs, kv_bytes=1000, max_sequences=8, shared=True)
    with pytest.raises(ValueError, match=r"one row needs .* GB for keys and values, and there are 1e-06"):
        list(engine.calls([Row(0, 1, 10, 3, costs.tokens, 13)]))
