"""Linear layers through oneDNN: the same products, and a model that is left alone."""

from __future__ import annotations

import os

import pytest
import torch
from tiny import lively_model, make_engine
from torch import nn

from trimming.engine.onednn import OneDnnLinear, through_onednn


def layers(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("free", [1 << 40, 0], ids=["packed", "no memory for copies"])
def test_every_linear_layer_computes_the_same(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"SC_AVPHYS_PAGES": free, "SC_PAGE_SIZE": 1}
    monkeypatch.setattr(os, "sysconf", lambda name: sizes[name])
    model = lively_model()
    shadow = through_onednn(model)
    pairs = list(zip(layers(model), layers(shadow), strict=True))
    assert len(pairs) > 40
    for plain, other in pairs:
        assert (type(plain), type(other)) == (nn.Linear, OneDnnLinear)
        assert other.layout.is_mkldnn == bool(free)
        # Many rows, none, and a part of another tensor's channels, as callers have them.
        for states in (torch.randn(3, 7, plain.in_features), torch.randn(0, plain.in_features)):
            torch.testing.assert_close(other(states), plain(states))
        part = torch.randn(5, 2 * plain.in_features)[:, : plain.in_features]
        torch.testing.assert_close(other(part), plain(part))
    assert all(mine is theirs for mine, theirs in zip(shadow.parameters(), model.parameters(), strict=True))


def test_the_model_is_left_as_it_is() -> None:
    model = lively_model()
    before = [(name, type(m)) for name, m in model.named_modules()]
    engine = make_engine(model=model)
    assert any(isinstance(m, OneDnnLinear) for m in engine.model.modules())
    assert [(name, type(m)) for name, m in model.named_modules()] == before


def test_other_dtypes_stay_with_torch() -> None:
    model = lively_model(torch.bfloat16)
    assert through_onednn(model) is model
