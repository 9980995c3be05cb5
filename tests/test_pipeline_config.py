from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest

from pipeline.config import POLICIES, TOWER_POLICIES, RunConfig
from pipeline.model import build_policy, build_tower_policy

GIVEN: dict[str, Any] = {"job": "answer", "input": "in", "output": "out", "model": "m"}

FLOATS = [name for name, kind in get_type_hints(RunConfig).items() if float in (kind, *get_args(kind))]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"policy": "grid", "k_ratio": 0.5}, r"k_ratio=0\.5 .*policy='grid'.*'trimmed-llama'"),
        ({"keep": 0.5}, r"keep=0\.5 .*policy='trimmed-llama'.*'random'"),
        ({"policy": "none", "keep": 0.5}, r"keep=0\.5"),
        ({"k_ratio": 0.0}, r"k_ratio=0\.0 must lie in \(0, 1\]"),
        ({"policy": "random", "keep": 1.5}, r"keep=1\.5"),
        ({"policy": "zipvl", "keep": 0.5}, r"keep=0\.5 means nothing to policy='zipvl'; .*'random'"),
        ({"policy": "snapkv", "mass": 0.9}, r"mass=0\.9 means nothing to policy='snapkv'; .*'zipvl'"),
        ({"mass": 0.9}, r"mass=0\.9 .*policy='trimmed-llama'"),
        ({"policy": "zipvl", "mass": 0.0}, r"mass=0\.0 must lie in \(0, 1\]"),
        ({"policy": "zipvl", "mass": 1.01}, r"mass=1\.01 must lie in \(0, 1\]"),
        ({"policy": "fastv", "k_ratio": 0.5}, r"k_ratio=0\.5 .*policy='fastv'"),
        ({"key_channels": 0.0}, r"key_channels=0\.0 must lie in \(0, 1\]; leave it out"),
        ({"key_channels": 2.0}, r"key_channels=2\.0 must lie in \(0, 1\]"),
        ({"policy": "think", "key_channels": 0.5}, r"key_channels=0\.5 and policy='think' cut the same channels"),
        ({"max_new_tokens": 0}, r"max_new_tokens=0 must be at least 1"),
        ({"batch_size": -1}, r"batch_size=-1"),
        ({"limit": 0}, r"limit=0"),
        ({"max_tiles": 0}, r"max_tiles=0 must be at least 1"),
        ({"temperature": -0.1}, r"temperature=-0\.1"),
        ({"top_p": 0.9}, r"temperature=0\.0 .*top_p"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p=0\.0"),
        ({"gpus_per_actor": -1.0}, r"gpus_per_actor=-1\.0"),
        ({"input": " "}, r"input is empty"),
        ({"job": "caption"}, r"prompt=None"),
        ({"question_column": ""}, r"question_column=''"),
        ({"partition": "0/3"}, r"partition='0/3' is not i/n"),
        ({"partition": "3 of 8"}, r"such as 3/8"),
        ({"partition": "1/2", "overwrite": True}, r"overwrite would delete the other partitions"),
        ({"max_error_rate": 5.0}, r"max_error_rate=5\.0 must lie in \[0, 1\]"),
        ({"gpus_per_actor": 1.5}, r"gpus_per_actor=1\.5: a copy of the model takes a share of one GPU, or several whole ones"),
        ({"wait_minutes": -1.0}, r"wait_minutes=-1\.0"),
        ({"wait_minutes": 10.0}, r"needs gpus_per_actor"),
        ({"image_roots": "s3://photos"}, r"image_roots='s3://photos' is one text; give a list of texts"),
        ({"stop": "red"}, r"stop='red' is one text; give a list of texts: \['red'\]"),
        *(({name: float("nan")}, rf"{name}=nan is not a finite number") for name in FLOATS),
        ({"temperature": float("inf")}, r"temperature=inf is not a finite number"),
        ({"image_roots": ["https://example.com/photos"]}, r"image_roots=.*name folders"),
    ],
)
def test_errors_name_field_value_and_remedy(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RunConfig(**{**GIVEN, **fields})


def test_policies_take_their_own_options() -> None:
    assert RunConfig(**GIVEN).policy_options == {"k_ratio": 0.25}
    assert RunConfig(**GIVEN, policy="grid").policy_options == {"keep": 0.5}
    assert RunConfig(**GIVEN, policy="random", keep=0.1).policy_options == {"keep": 0.1}
    assert RunConfig(**GIVEN, policy="none").policy_options == {}


def test_every_policy_of_the_table_can_be_asked_for_by_name() -> None:
    import trimming

    assert set(get_args(get_type_hints(RunConfig)["policy"])) == set(POLICIES)
    kinds = {kind for kind, _ in POLICIES.values()}
    assert kinds == {name for name in trimming.__all__ if _is_policy(getattr(trimming, name))}


def _is_policy(value: Any) -> bool:
    from trimming import Policy

    return isinstance(value, type) and issubclass(value, Policy) and value is not Policy


@pytest.mark.parametrize("name", POLICIES)
def test_a_name_and_its_options_make_the_policy(name: str) -> None:
    import trimming

    kind, defaults = POLICIES[name]
    switches = {option: True for option, value in defaults.items() if value is False}
    given = {option: 0.125 for option, value in defaults.items() if value is not None and value is not False} | switches
    for own in ({}, given):
        config, options = RunConfig(**GIVEN, policy=name, **own), defaults | own
        policy = build_policy(config)
        assert type(policy) is getattr(trimming, kind)
        assert {option: getattr(policy, option) for option in options} == options
        assert config.policy_options == options
        assert {option: config.recorded()[option] for option in options} == options
    if name != "think":
        channels = RunConfig(**GIVEN, policy=name, key_channels=0.5)
        assert build_policy(channels) == trimming.ThinK(0.5, build_policy(RunConfig(**GIVEN, policy=name)))
        assert channels.decides_output() != RunConfig(**GIVEN, policy=name).decides_output()


def test_clusters_go_by_likeness_or_by_a_share() -> None:
    import trimming

    for own, wanted in (
        ({}, trimming.Clusters(likeness=0.9)),
        ({"likeness": 0.95}, trimming.Clusters(likeness=0.95)),
        ({"keep": 0.1}, trimming.Clusters(keep=0.1)),
    ):
        config = RunConfig(**GIVEN, policy="clusters", **own)
        assert build_policy(config) == wanted
        assert config.recorded()["likeness"] == wanted.likeness
        assert config.recorded()["keep"] == wanted.keep
    assert RunConfig(**GIVEN, policy="clusters").decides_output() != config.decides_output()
    with pytest.raises(ValueError, match=r"keep=0\.1 and likeness=0\.9 both say"):
        RunConfig(**GIVEN, policy="clusters", keep=0.1, likeness=0.9)
    with pytest.raises(ValueError, match=r"likeness=0\.9 means nothing to policy='grid'; drop it, or use policy='clusters'"):
        RunConfig(**GIVEN, policy="grid", likeness=0.9)
    with pytest.raises(ValueError, match=r"likeness=1\.5 must lie in"):
        RunConfig(**GIVEN, policy="clusters", likeness=1.5)


def test_merging_policies_may_weigh() -> None:
    import trimming

    assert build_policy(RunConfig(**GIVEN, policy="elastic", weighted=True)) == trimming.ElasticCache(0.5, weighted=True)
    assert build_policy(RunConfig(**GIVEN, policy="visionzip")) == trimming.VisionZip(0.5)
    with pytest.raises(ValueError, match="weighted=True means nothing to policy='grid'"):
        RunConfig(**GIVEN, policy="grid", weighted=True)


def test_the_tower_is_asked_for_by_name() -> None:
    from trimming import tower

    assert set(TOWER_POLICIES.values()) == {name for name in tower.__all__ if _trims_towers(getattr(tower, name))}
    assert build_tower_policy(RunConfig(**GIVEN)) is None
    for name, kind in TOWER_POLICIES.items():
        assert build_tower_policy(RunConfig(**GIVEN, tower_policy=name)) == getattr(tower, kind)(keep=0.5)
        assert build_tower_policy(RunConfig(**GIVEN, tower_policy=name, tower_keep=0.7)) == getattr(tower, kind)(keep=0.7)
    assert build_tower_policy(RunConfig(**GIVEN, tower_policy="random", seed=3)) == tower.RandomRows(0.5, seed=3)
    plain, half = RunConfig(**GIVEN), RunConfig(**GIVEN, tower_policy="alike")
    assert [plain.recorded()[name] for name in ("tower_tiles", "tower_policy", "tower_keep")] == ["pooled", None, None]
    assert [half.recorded()[name] for name in ("tower_tiles", "tower_policy", "tower_keep")] == ["pooled", "alike", 0.5]
    assert plain.decides_output() == RunConfig(**GIVEN, tower_tiles="pooled").decides_output() != half.decides_output()
    assert half.decides_output() == RunConfig(**GIVEN, tower_policy="alike", tower_keep=0.5).decides_output()
    assert RunConfig(**GIVEN, rows="transformers").recorded()["tower_tiles"] == "all"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"policy": "foo"}, r"policy='foo' is none of none, trimmed-llama, "),
        ({"tower_policy": "foo"}, r"tower_policy='foo' is none of alike, tome, "),
        ({"kept_sets": "both"}, r"kept_sets='both' is none of image, question"),
        ({"dtype": "int8"}, r"dtype='int8' is none of auto, "),
        ({"rows": "all"}, r"rows='all' is none of meta, transformers"),
        ({"tower_tiles": "some"}, r"tower_tiles='some' is none of pooled, all, real"),
        ({"tower_keep": 0.5}, r"tower_keep=0.5 means nothing without a tower_policy"),
        ({"tower_policy": "alike", "tower_keep": 0.0}, r"tower_keep=0.0 must lie in \(0, 1\]"),
        ({"tower_policy": "alike", "tower_keep": 1.5}, r"tower_keep=1.5 must lie in \(0, 1\]"),
        ({"rows": "transformers", "tower_tiles": "pooled"}, r"tower_tiles='pooled' leaves out .* use rows='meta'"),
        ({"rows": "transformers", "tower_tiles": "real"}, r"tower_tiles='real' leaves out .* use rows='meta'"),
        ({"rows": "transformers", "tower_policy": "tome"}, r"tower_policy='tome' leaves out .* use rows='meta'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_tower_that_can_not_be_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RunConfig(**GIVEN, **wrong)


def _trims_towers(value: Any) -> bool:
    from trimming.tower import TowerPolicy

    return isinstance(value, type) and issubclass(value, TowerPolicy) and value is not TowerPolicy


def test_secrets_are_never_recorded() -> None:
    config = RunConfig(**GIVEN, storage_options={"key": "AKIA", "secret": "hush"})
    assert config.recorded()["storage_options"] == ["key", "secret"]
    assert "hush" not in str(config.recorded())
    assert "storage_options" not in config.decides_output()


def test_a_default_and_its_value_decide_the_same_output() -> None:
    assert RunConfig(**GIVEN).decides_output() == RunConfig(**GIVEN, k_ratio=0.25).decides_output()
    assert RunConfig(**GIVEN).decides_output() == RunConfig(**GIVEN, batch_size=3, num_actors=7).decides_output()
    assert RunConfig(**GIVEN).decides_output() != RunConfig(**GIVEN, k_ratio=0.5).decides_output()
    assert RunConfig(**GIVEN).decides_output() != RunConfig(**GIVEN, max_tiles=2).decides_output()
    assert RunConfig(**GIVEN).decides_output() != RunConfig(**GIVEN, kept_sets="question").decides_output()
