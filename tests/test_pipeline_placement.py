"""Which device holds what of a model that one device can't hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from devices import Placed, Pretending, pretended, use_pretended
from tiny import BATCHES, complete, lively_model, make_engine, make_prompts
from transformers import MllamaConfig, MllamaForConditionalGeneration

from pipeline.model import find_checkpoint, load_model
from pipeline.placement import device_map, split
from trimming import TrimmedLlama


def test_split_makes_the_largest_part_as_small_as_can_be() -> None:
    assert split([1, 1, 1, 1], 0, 0, 2) == [2, 4]
    assert split([1, 1, 1, 1], 2, 0, 2) == [1, 4]
    assert split([1, 1, 1, 1], 0, 2, 2) == [3, 4]
    assert split([5, 1, 1, 1], 0, 0, 2) == [1, 4]
    assert split([3, 1, 4, 1, 5, 9, 2, 6], 0, 0, 3) == [4, 6, 8]
    assert split([1, 1, 1], 100, 0, 3) == [1, 2, 3]


def test_the_90b_on_four_gpus() -> None:
    """Its sizes as published: 100 layers, every fifth a cross-attention layer, 177 GB in bf16; 44 GB each, to a layer."""
    config = MllamaConfig(
        vision_config={"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "vision_output_dim": 7680},
        text_config={
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 100,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "cross_attention_layers": list(range(3, 100, 5)),
            "vocab_size": 128256,
        },
    )
    devices = [pretended(i) for i in range(4)]
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(config)
    found = device_map(model, devices)
    loads = dict.fromkeys(devices, 0)
    for name, device in found.items():
        loads[device] += 2 * sum(p.numel() for p in model.get_submodule(name).parameters())
    assert 170e9 < sum(loads.values()) < 180e9
    assert max(loads.values()) - min(loads.values()) < 2e9
    assert sum(loads.values()) == 2 * sum(p.numel() for p in model.parameters())
    order = [found[f"model.language_model.layers.{i}"].index for i in range(100)]
    assert order == sorted(order)
    assert set(order) == {0, 1, 2, 3}


def test_more_gpus_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gpus_per_actor=8 is over the model's 7 layers"):
        device_map(lively_model(), [pretended(i) for i in range(8)])


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_engine_takes_a_model_that_is_loaded_so(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lively_model().save_pretrained(tmp_path)
    devices = [pretended(i) for i in range(count)]
    prompts = make_prompts(BATCHES["mixed tiles"])
    asked = [prompt.request(str(i)) for i, prompt in enumerate(prompts)]
    wanted = complete(make_engine(TrimmedLlama(0.2)), asked)
    use_pretended(monkeypatch)
    with Pretending():
        model = load_model(find_checkpoint(str(tmp_path), None), "auto", devices)
        assert all(isinstance(parameter, Placed) for parameter in model.parameters())
        engine = make_engine(TrimmedLlama(0.2), model, normalise=lambda pixels: pixels.to(devices[0]))
        assert [stage.device for stage in engine.stages] == devices
        assert [c.tokens for c in complete(engine, asked)] == [c.tokens for c in wanted]
