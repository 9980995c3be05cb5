"""A model on several devices says what it says on one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from devices import Pretending, place, pretended, use_pretended
from tiny import BATCHES, TOKENS, Prompt, Row, assert_empty, complete, lively_model, make_engine, make_prompts
from transformers import MllamaForConditionalGeneration

from trimming import Clusters, Grid, KeepAll, Policy, Rows, TrimmedLlama
from trimming.costs import Geometry
from trimming.engine import Completion, Engine, Sampling
from trimming.engine.sharded import ShardedMemory
from trimming.engine.stages import stage_geometries, stages
from trimming.tower import Alike, EViT, ToMe, TowerPolicy, Windows


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    use_pretended(monkeypatch)
    with Pretending():
        yield


def shard(model: MllamaForConditionalGeneration, cuts: Sequence[int]) -> MllamaForConditionalGeneration:
    """A copy of ``model`` whose layers change the device at ``cuts``."""
    model = copy.deepcopy(model)
    inner: Any = model.model
    place(model, pretended(0))
    for number, layer in enumerate(inner.language_model.layers):
        place(layer, pretended(sum(number >= cut for cut in cuts)))
    place(inner.language_model.norm, pretended(len(cuts)))
    place(model.lm_head, pretended(len(cuts)))
    return model


def make_sharded(policy: Policy, cuts: Sequence[int], **options: Any) -> Engine:
    model = shard(lively_model(), cuts)
    return make_engine(policy, model, normalise=lambda pixels: pixels.to(pretended(0)), **options)


def answers(engine: Engine, prompts: Sequence[Prompt]) -> list[Completion]:
    return complete(engine, [p.request(str(i), 5 + 3 * (i % 3)) for i, p in enumerate(prompts)])


@pytest.mark.parametrize(
    ("cuts", "policy", "rows"),
    [
        ((1,), TrimmedLlama(0.2), "meta"),
        ((2, 4), TrimmedLlama(0.2), "transformers"),
        ((3,), Grid(0.5), "meta"),
        ((3,), KeepAll(), "transformers"),
        ((1, 2, 3, 4, 5, 6), TrimmedLlama(0.2), "meta"),
    ],
    ids=str,
)
def test_several_devices_say_what_one_says(cuts: tuple[int, ...], policy: Policy, rows: Rows, several: None) -> None:
    """Layers 1, 3 and 5 of 7 are cross-attention layers: cuts before, between and behind them, and every layer alone."""
    for batch in ("mixed tiles", "several images", "text-only among images"):
        prompts = make_prompts(BATCHES[batch])
        wanted = answers(make_engine(policy, rows=rows), prompts)
        engine = make_sharded(policy, cuts, rows=rows)
        for one, other in zip(answers(engine, prompts), wanted, strict=True):
            assert one.tokens == other.tokens
            assert one.trim.kept.tolist() == other.trim.kept.tolist()
            assert one.trim.cross_kv_bytes == other.trim.cross_kv_bytes
        assert engine.statistics.peak_sequences == len(prompts)
        assert isinstance(engine.memory, ShardedMemory)
        assert [part.flat.device for part in engine.memory.parts] == [pretended(i) for i in range(len(cuts) + 1)]


@pytest.mark.parametrize("tower", [Alike(0.7), ToMe(0.7), Windows(0.8), EViT(0.7)], ids=str)
@pytest.mark.parametrize("policy", [Clusters(keep=0.5), TrimmedLlama(0.2)], ids=str)
def test_sizes_of_rows_reach_every_device(tower: TowerPolicy, policy: Policy, several: None) -> None:
    """What merges in the tower, on the first device, counts as often in cross-attention layers on all."""
    prompts = make_prompts(BATCHES["mixed tiles"])
    wanted = answers(make_engine(policy, tower_policy=tower), prompts)
    got = answers(make_sharded(policy, (2, 4), tower_policy=tower), prompts)
    assert [one.tokens for one in got] == [one.tokens for one in wanted]
    for one, other in zip(got, wanted, strict=True):
        assert one.trim.kept.tolist() == other.trim.kept.tolist()
        assert one.trim.tower_keep_fraction == other.trim.tower_keep_fraction < 1


def test_sequences_that_share_images_come_and_go(several: None) -> None:
    """Questions about one image, some of which arrive while others decode, with sampled answers and slots that grow."""
    image = make_prompts([Row((2,))])[0].images
    asked = [Prompt([*range(3, 3 + words), 64, 7, 8], image, {}) for words in (2, 40, 5, 3)]

    def run(engine: Engine) -> list[list[int]]:
        futures = []
        for number, prompt in enumerate(asked):
            futures.append(engine.submit(prompt.request(str(number), 12, sampling=Sampling(temperature=0.8, seed=3))))
            for _ in range(3):
                engine.step()
        assert len(engine.memory.shared) == 1
        while not all(future.done() for future in futures):
            engine.step()
        assert_empty(engine)
        return [future.result().tokens for future in futures]

    assert run(make_sharded(Grid(0.5), (2, 4))) == run(make_engine(Grid(0.5)))


def test_little_memory_on_one_device_limits_all(several: None) -> None:
    """The second device has room for two sequences, the first for all: nothing is lost, and two run at a time."""
    prompts = make_prompts([Row((2,), after=6)] * 5)
    wanted = answers(make_engine(KeepAll()), prompts)
    model = shard(lively_model(), (4,))
    roomy, tight = stage_geometries(model)
    one = tight.self_kv_bytes(4) * 32 + tight.cross_kv_bytes(4) * 2 * TOKENS
    engine = make_sharded(KeepAll(), (4,), kv_bytes=[1 << 22, 2 * one + 1024])
    assert [c.tokens for c in answers(engine, prompts)] == [c.tokens for c in wanted]
    assert engine.statistics.peak_sequences == 2
    assert engine.statistics.peak_kv_bytes == 2 * (one + roomy.self_kv_bytes(4) * 32 + roomy.cross_kv_bytes(4) * 2 * TOKENS)


def memory(*kv_bytes: int) -> ShardedMemory:
    first, second = Geometry(3, 1, 4, 2, 16), Geometry(1, 2, 4, 2, 16)
    return ShardedMemory([first, second], kv_bytes, torch.float32, [torch.device("cpu")] * 2)


def test_what_one_device_has_no_room_for_is_left_allocated_on_none() -> None:
    sharded = memory(1 << 20, 1 << 14)
    assert sharded.resize(8)
    assert sharded.open_slots(2)
    free = [part.free for part in sharded.parts]
    assert not sharded.open_slots(10)
    assert sharded.allocate([50, 50, 50]) is None
    assert not sharded.resize(64)
    assert [part.free for part in sharded.parts] == free
    assert (sharded.slots, sharded.capacity, sharded.segment_elements) == (2, 8, 0)
    assert sharded.fits(2, 8, 0)
    assert not sharded.fits(2, 64, 0)


def test_a_segment_lies_with_its_layers() -> None:
    sharded = memory(1 << 20, 1 << 20)
    segment = sharded.allocate([5, 6, 7], share="it")
    assert segment is not None
    assert sharded.find("it") is segment
    for layer, rows in enumerate([5, 6, 7]):
        key, value = sharded.segment_layer(segment, layer)
        assert key.shape == value.shape == (2, rows, 16)
        home = sharded.parts[0 if layer == 0 else 1].flat
        assert home.data_ptr() <= key.data_ptr() < home.data_ptr() + home.nbytes
    assert sharded.segment_elements == segment.size == sum(part.segment_elements for part in sharded.parts)
    sharded.release(segment)
    assert sharded.segment_elements > 0
    sharded.release(segment)
    assert (sharded.segment_elements, sharded.shared) == (0, {})


@pytest.mark.parametrize(
    ("moved", "reads"),
    [
        ("model.vision_model", r"vision_model is on meta:1, and has to be on meta:0"),
        ("lm_head", r"lm_head is on meta:0, and has to be on meta:1"),
        ("model.language_model.layers.0", r"must be consecutive, and are on meta:1, meta:0"),
        ("model.language_model.layers.2.mlp", r"layer 2 is on 2 devices: meta:0, meta:1"),
    ],
)
def test_a_model_that_lies_otherwise_is_refused(moved: str, reads: str) -> None:
    model = shard(lively_model(), (4,))
    place(model.get_submodule(moved), pretended(0 if moved == "lm_head" else 1))
    with pytest.raises(ValueError, match=reads):
        stages(model)


def test_pretended_devices_do_not_mix() -> None:
    """The premise of this file."""
    with Pretending(), pytest.raises(RuntimeError, match="meets tensors on meta:0, meta:1"):
        torch.ones(2, device=pretended(0)) + torch.ones(2, device=pretended(1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("policy", [KeepAll(), TrimmedLlama(0.2)], ids=repr)
def test_a_gpu_and_a_cpu_say_what_one_says(policy: Policy) -> None:
    """Two real devices, wherever there is one GPU."""
    model = copy.deepcopy(lively_model())
    inner: Any = model.model
    model.cuda()
    for layer in inner.language_model.layers[3:]:
        layer.cpu()
    inner.language_model.norm.cpu()
    model.lm_head.cpu()
    prompts = make_prompts(BATCHES["mixed tiles"])
    engine = make_engine(policy, model, normalise=lambda pixels: pixels.cuda())
    assert [c.tokens for c in answers(engine, prompts)] == [c.tokens for c in answers(make_engine(policy), prompts)]
