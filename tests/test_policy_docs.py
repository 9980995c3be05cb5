"""The policy that docs/policies.md adds, taken from there as it stands."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_policy_family import test_the_engine_does_what_trim_does as agree
from tiny import BATCHES

import trimming
from pipeline.config import POLICIES, POLICY_OPTIONS, TOWER_POLICIES, RunConfig
from pipeline.model import build_policy
from trimming import Policy, ThinK, VisualContext

DOCS = Path(__file__).resolve().parent.parent / "docs" / "policies.md"


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """The class, exported and with its line in the table."""
    code, line = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    file = tmp_path / "heavy_hitters.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location("heavy_hitters", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "heavy_hitters", module)
    spec.loader.exec_module(module)
    (name, (kind, options)) = next(iter(eval(f"{{{line}}}").items()))
    monkeypatch.setitem(POLICIES, name, (kind, options))
    monkeypatch.setitem(POLICY_OPTIONS, name, options)
    monkeypatch.setattr(trimming, kind, getattr(module, kind), raising=False)
    return getattr(module, kind)


def test_the_file_of_the_docs_is_a_policy(added: type[Any]) -> None:
    attention = torch.zeros(1, 4, 10)
    attention[0, :, [2, 5, 7]] = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 3], [0.5, 0, 0]])
    valid = torch.arange(10)[None] < 8
    context = VisualContext(valid=valid, images=1, tiles=1, tokens=10, sample_ids=("0",), attention=attention)
    assert added(0.25).select(context)[0].nonzero()[:, 0].tolist() == [5, 7]
    for batch in BATCHES:
        agree(batch, "meta", added(0.4))
    agree("several images", "transformers", ThinK(0.5, added(0.4)))


def test_its_line_makes_it_a_name_for_jobs(added: type[Any]) -> None:
    given: dict[str, Any] = {"job": "answer", "input": "in", "output": "out", "model": "m", "policy": "h2o"}
    assert build_policy(RunConfig(**given)) == added(0.5)
    assert build_policy(RunConfig(**given, keep=0.3, key_channels=0.5)) == ThinK(0.5, added(0.3))
    with pytest.raises(ValueError, match=r"keep=2\.0 must lie in"):
        RunConfig(**given, keep=2.0)


def test_the_docs_list_every_policy() -> None:
    family, towers = DOCS.read_text().split("## The family")[1].split("## Adding one")[0].split("## Inside the vision tower")
    kinds = {value.__name__ for value in vars(trimming).values() if isinstance(value, type) and issubclass(value, Policy)}
    assert set(re.findall(r"^\| `(\w+)`", family, re.MULTILINE)) == kinds - {"Policy"}
    assert dict(re.findall(r"^\| `(\w+)`, `(?:--tower-policy )?(\w+)`", towers, re.MULTILINE)) == {
        kind: name for name, kind in TOWER_POLICIES.items()
    }
