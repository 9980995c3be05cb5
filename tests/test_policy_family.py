"""Every policy of the family, in the engine as under ``trim``: the same answers, the same features, the same bytes."""

from __future__ import annotations

import pytest
import torch
from tiny import BATCHES, complete, lively_model, make_engine, make_prompts, record_logits, run_alone

from trimming import (
    DivPrune,
    ElasticCache,
    FastV,
    Policy,
    Rows,
    SnapKV,
    ThinK,
    TrimmedLlama,
    VisionZip,
    WeightedFarthest,
    ZipVL,
)

FAMILY: list[Policy] = [
    FastV(0.4),
    ZipVL(0.7),
    SnapKV(0.4),
    ElasticCache(0.4),
    DivPrune(0.4),
    VisionZip(0.4),
    WeightedFarthest(0.4),
    ThinK(0.5),
    ThinK(0.3, TrimmedLlama(0.2)),
    ThinK(0.5, ElasticCache(0.3)),
    ThinK(0.5, SnapKV(0.3)),
]
NEW_TOKENS = 8


@pytest.mark.parametrize("policy", FAMILY, ids=repr)
@pytest.mark.parametrize("rows", ["meta", "transformers"])
@pytest.mark.parametrize("batch", ["mixed tiles", "several images", "adjacent images", "text-only among images"])
def test_the_engine_does_what_trim_does(batch: str, rows: Rows, policy: Policy) -> None:
    prompts = make_prompts(BATCHES[batch])
    engine = make_engine(policy, rows=rows)
    logits = record_logits(engine)
    completions = complete(engine, [p.request(str(i), NEW_TOKENS) for i, p in enumerate(prompts)])
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        alone = run_alone(lively_model(), prompt, str(i), policy, rows, NEW_TOKENS)
        torch.testing.assert_close(torch.stack(logits[str(i)]), alone.logits, atol=1e-4, rtol=1e-4)
        assert completion.tokens == alone.tokens
        assert completion.trim.kept.tolist() == alone.trim.kept.tolist()
        for field in ("visual_tokens", "kept_visual_tokens", "cross_kv_bytes_full", "cross_kv_bytes", "self_kv_bytes"):
            assert getattr(completion.trim, field) == getattr(alone.trim, field), field
