"""The schedule beside the engine itself: the same rows, the same steps, the same sequences at once, the same bytes held."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest

from benchmarks import workloads
from benchmarks.model import TINY, build_config, build_model, build_processor
from benchmarks.ours import Ours
from benchmarks.workloads import Workload
from jobs.estimation.schedule import Call, Engine, Row
from trimming import Clusters, KeepAll, Policy, TrimmedLlama
from trimming.costs import Costs, Look
from trimming.engine import Completion, KeptSets, memory
from trimming.engine.request import GROUP_ROWS
from trimming.tower import Alike, TowerPolicy

LOADS = {
    "captioning": workloads.captioning,
    "questions": workloads.questions,
    "twenty questions": lambda images, seed, size: workloads.questions(images // 4, seed, size, per_image=20),
    "four tiles": workloads.four_tiles,
}


class Measure:
    """What the engine itself counts, and its answers."""

    def __init__(self) -> None:
        self.processor = build_processor(TINY)
        self.model = build_model(TINY, self.processor, 0)

    def __call__(
        self,
        load: Workload,
        policy: Policy,
        sequences: int,
        room: int,
        kept_sets: KeptSets,
        tower_policy: TowerPolicy | None = None,
    ) -> tuple[dict[str, float], list[Completion]]:
        """Of ``sequences`` at most, with ``room`` bytes for keys and values."""
        ours = Ours(self.model, self.processor, sequences, room)
        made = ours.engine(policy, kept_sets=kept_sets, tower_policy=tower_policy)
        answers = made.generate(ours.requests(load, range(len(load.rows)), {}))
        counted = made.statistics
        return {name: getattr(counted, name) for name in counted.__slots__}, answers


@pytest.fixture(scope="module")
def engine() -> Measure:
    return Measure()


@pytest.fixture(scope="module")
def costs() -> Costs:
    return Costs(build_config(TINY, build_processor(TINY)), 4)


def rows_of(load: Workload, costs: Costs, answers: list[Completion] | None = None) -> list[Row]:
    """As the benchmark's engine is given them; ``answers`` tell what each keeps, by default everything."""
    rows = []
    for place, row in enumerate(load.rows):
        tiles, prompt = load.tiles[row.image], len(row.prompt.split()) + 2
        kept = answers[place].trim.kept_visual_tokens if answers else tiles * costs.tokens
        rows.append(Row(row.image, tiles, prompt, row.length, kept, prompt + row.length))
    return rows


def of(calls: list[Call], stage: str) -> list[Call]:
    return [call for call in calls if call.stage == stage]


@pytest.mark.parametrize(("name", "sequences"), [*product(LOADS, (3, 64)), ("questions", 7)])
@pytest.mark.parametrize(
    ("policy", "kept_sets", "tower"),
    [
        (KeepAll(), "image", None),
        (TrimmedLlama(0.2), "image", None),
        (TrimmedLlama(0.2), "question", None),
        (Clusters(0.2), "image", None),
        (KeepAll(), "image", Alike(0.6)),
        (TrimmedLlama(0.2), "image", Alike(0.6)),
    ],
    ids=["all", "trimmed by image", "trimmed by question", "merged", "trimmed tower", "trimmed tower, trimmed"],
)
def test_it_makes_the_engines_calls(
    name: str,
    policy: Policy,
    kept_sets: KeptSets,
    tower: TowerPolicy | None,
    sequences: int,
    costs: Costs,
    engine: Measure,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With five questions an image and three sequences those that decide together can't all run at once."""
    # The tiny model's segments are so short that what aligns them would be a tenth of them.
    monkeypatch.setattr(memory, "GRAIN", 1)
    load = LOADS[name](12, 0, TINY)
    counted, answers = engine(load, policy, sequences, 1 << 26, kept_sets, tower)
    rows = rows_of(load, costs, answers)
    merged = policy.clustering is not None
    modelled = Engine(
        costs=costs, kv_bytes=1 << 26, max_sequences=sequences, kept_sets=kept_sets, tower_policy=tower, merged=merged
    )
    calls = list(modelled.calls(rows))
    steps = of(calls, "decode")
    assert len(steps) == counted["decode_steps"]
    assert sum(step.rows for step in steps) == counted["decode_tokens"]
    assert sum(call.rows for call in of(calls, "prefill")) == len(rows)
    # The engine counts those that leave with their prefill's token as well.
    most = max(step.rows for step in steps)
    assert most <= counted["peak_sequences"] <= most + sum(row.output == 1 for row in rows)
    assert sum(call.rows for call in of(calls, "tower")) == counted["images_encoded"]
    # Of questions that each keep a set of its own some keep the same, by chance, and share it in the engine.
    chance = 0.06 if kept_sets == "question" else 1e-9
    # What a merged feature counts is four bytes for each head of keys.
    heads, layers = costs.geometry.kv_heads, costs.geometry.cross_layers
    more = 1 + (merged or tower is not None) * heads * 4 / (layers * costs.geometry.layer_kv_bytes(4))
    assert more * max(call.held for call in calls) == pytest.approx(counted["peak_cross_kv_bytes"], rel=chance)
    assert more * sum(step.held for step in steps) == pytest.approx(counted["cross_kv_bytes_read"], rel=chance)


@pytest.mark.parametrize("budget", [2, 5])
def test_memory_decides_how_many_run_as_in_the_engine(budget: int, costs: Costs, engine: Measure) -> None:
    load = workloads.four_tiles(12, 0, TINY)
    longest = max(row.capacity for row in rows_of(load, costs))
    room = costs.kv_bytes(longest + 32, 4 * costs.tokens) * budget
    counted, _ = engine(load, KeepAll(), 64, room, "image")
    modelled = Engine(costs=costs, kv_bytes=room, max_sequences=64, kept_sets="image")
    steps = of(list(modelled.calls(rows_of(load, costs))), "decode")
    assert max(step.rows for step in steps) == counted["peak_sequences"]
    assert len(steps) == pytest.approx(counted["decode_steps"], rel=0.1)


@pytest.mark.parametrize("rows", [2, 4, 12])
@pytest.mark.parametrize("kept_sets", ["image", "question"])
def test_questions_in_tight_memory_run_as_in_the_engine(rows: int, kept_sets: KeptSets, costs: Costs, engine: Measure) -> None:
    """Room for so many rows with all features of two tiles: for two of them not even an image's five questions fit together."""
    load = workloads.questions(12, 0, TINY)
    longest = max(row.capacity for row in rows_of(load, costs))
    room = costs.kv_bytes(longest + 32, 2 * costs.tokens) * rows
    counted, answers = engine(load, TrimmedLlama(0.2), 64, room, kept_sets)
    modelled = Engine(costs=costs, kv_bytes=room, max_sequences=64, kept_sets=kept_sets)
    calls = list(modelled.calls(rows_of(load, costs, answers)))
    steps = of(calls, "decode")
    assert sum(step.rows for step in steps) == counted["decode_tokens"]
    assert len(steps) == pytest.approx(counted["decode_steps"], rel=0.15)
    assert max(call.held for call in calls) == pytest.approx(counted["peak_cross_kv_bytes"], rel=0.15)


# ---- by hand ----------------------------------------------------------------------------------------------------------------


def test_a_call_costs_what_the_cost_model_says(costs: Costs) -> None:
    """One row about one image of two tiles, half of it kept."""
    seen = 2 * costs.tokens
    engine = Engine(costs=costs, kv_bytes=1e9, max_sequences=8, kept_sets="image")
    tower, prefill, *steps = engine.calls([Row(0, 2, 10, 3, seen // 2, 13)])
    assert tower.parts == (costs.tower(2), costs.projector(2))
    look = Look(10, seen, seen // 2)
    assert prefill.parts == (costs.cross_kv(seen, seen // 2), costs.prefill([10], [look]))
    kept = Look(1, seen // 2, seen // 2)
    assert [step.cost for step in steps] == [costs.decode([11], [kept]), costs.decode([12], [kept])]
    assert [call.held for call in (tower, prefill, *steps)] == [0, *[costs.kv_bytes(0, seen // 2)] * 3]


def asked(rows: int, kept: int, output: int = 2) -> list[Row]:
    """Questions about one image of one tile."""
    return [Row(0, 1, 10, output, kept, 10 + output)] * rows


@pytest.mark.parametrize("kept_sets", ["image", "question"])
def test_with_all_features_questions_share_an_image_and_its_cache(kept_sets: KeptSets, costs: Costs) -> None:
    seen = costs.tokens
    calls = list(Engine(costs=costs, kv_bytes=1e9, max_sequences=8, kept_sets=kept_sets).calls(asked(2, seen)))
    assert Counter(call.stage for call in calls) == {"tower": 1, "prefill": 1, "decode": 1}
    assert calls[1].parts[0] == costs.cross_kv(seen, seen)
    assert calls[2].cost == costs.decode([11, 11], [Look(2, seen, seen)])
    assert calls[2].held == costs.kv_bytes(0, seen)


def test_trimmed_questions_share_a_set_where_they_decide_together(costs: Costs) -> None:
    seen, kept = costs.tokens, costs.tokens - 3
    made = {
        kept_sets: list(Engine(costs=costs, kv_bytes=1e9, max_sequences=8, kept_sets=kept_sets).calls(asked(3, kept)))
        for kept_sets in ("image", "question")
    }
    _, prefill, step = made["image"]
    assert prefill.parts == (costs.cross_kv(seen, kept), costs.prefill([10] * 3, [Look(30, seen, kept)]))
    assert step.cost == costs.decode([11] * 3, [Look(3, kept, kept)])
    assert prefill.held == step.held == costs.kv_bytes(0, kept)
    _, prefill, step = made["question"]
    # What several sets hold is projected once: three sets of 7 of 10 features are no more than the 10.
    assert prefill.parts == (costs.cross_kv(seen, seen), costs.prefill([10] * 3, [Look(10, seen, kept)] * 3))
    assert step.cost == costs.decode([11] * 3, [Look(1, kept, kept)] * 3)
    assert prefill.held == step.held == 3 * costs.kv_bytes(0, kept)


def test_what_rows_share_is_held_until_the_last_of_them_leaves(costs: Costs) -> None:
    """Answers of 1, 2 and 4 tokens: the first is the prefill's own."""
    kept = costs.tokens - 3
    rows = [Row(0, 1, 10, output, kept, 14) for output in (1, 2, 4)]
    for kept_sets, sets in {"image": [1, 1, 1, 1], "question": [3, 2, 1, 1]}.items():
        calls = list(Engine(costs=costs, kv_bytes=1e9, max_sequences=8, kept_sets=kept_sets).calls(rows))
        assert [call.held for call in calls[1:]] == [count * costs.kv_bytes(0, kept) for count in sets]
        assert [call.rows for call in calls[1:]] == [3, 2, 1, 1]


@pytest.mark.parametrize(("kept_sets", "images"), [("image", 1), ("question", 3)])
def test_without_a_cache_an_image_is_encoded_for_each_set(kept_sets: KeptSets, images: int, costs: Costs) -> None:
    engine = Engine(costs=costs, kv_bytes=1e9, max_sequences=8, kept_sets=kept_sets, encode_once=False)
    assert sum(call.rows for call in of(list(engine.calls(asked(3, 5))), "tower")) == images


def test_an_image_with_many_questions_keeps_a_set_for_each_group(costs: Costs) -> None:
    rows = asked(GROUP_ROWS + 2, costs.tokens - 3, output=9)
    engine = Engine(costs=costs, kv_bytes=1e9, max_sequences=256, kept_sets="image")
    calls = list(engine.calls(rows))
    half = GROUP_ROWS // 2 + 1
    assert [call.rows for call in of(calls, "prefill")] == [half, half]
    assert max(call.held for call in calls) == 2 * costs.kv_bytes(0, costs.tokens - 3)


def test_a_row_that_never_fits_is_refused(costs: Costs) -> None:
    engine = Engine(costs=costs, kv_bytes=1000, max_sequences=8, kept_sets="image")
    for rows in (1, 2):
        with pytest.raises(ValueError, match=r"one row needs .* GB for keys and values, and there are 1e-06"):
            list(engine.calls(asked(rows, costs.tokens)))
