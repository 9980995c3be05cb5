"""Policies that decide in each layer, against a model that never lets anything go: it computes every row anew with all keys,
and hides from the answer's rows what each layer and head has dropped. None of ``trim`` and none of the engine is in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import BATCHES, TILES, TOKENS, Prompt, complete, lively_model, make_engine, make_prompts, record_logits, run_alone
from torch import Tensor

from trimming import ElasticCache, Policy, SnapKV, ThinK, VisualContext, ZipVL


class Masked:
    """Logits of a prompt and its answer so far, row by row. H heads, KV of them of keys, Q rows, N features."""

    def __init__(self, policy: Policy, prompt: Prompt) -> None:
        self.model: Any = lively_model().model
        self.policy, self.prompt = policy, prompt
        self.rows = len(prompt.tokens)
        inputs = prompt.inputs
        images = {name: inputs[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
        encoded = self.model.vision_model(**images).last_hidden_state
        self.features: Tensor = self.model.multi_modal_projector(encoded).flatten(0, -2)
        self.sees = inputs["cross_attention_mask"][0].bool().flatten(1).repeat_interleave(TOKENS, 1)
        """(prompt rows, N)"""

    def __call__(self, said: list[int]) -> Tensor:
        """(tokens said, V): what each of them was chosen from."""
        text = self.model.language_model
        tokens = torch.tensor([[*self.prompt.tokens, *said[:-1]]])
        states = text.embed_tokens(tokens)
        length = tokens.shape[1]
        rotary = text.rotary_emb(states, torch.arange(length)[None])
        causal = torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)
        for number, layer in enumerate(text.layers):
            if number in text.cross_attention_layers:
                states = self.cross(layer, states[0])[None]
            else:
                out = layer(states, attention_mask=causal, position_embeddings=rotary)
                states = out[0] if isinstance(out, tuple) else out
        logits: Tensor = lively_model().lm_head(text.norm(states))[0, self.rows - 1 :]
        return logits

    def cross(self, layer: Any, states: Tensor) -> Tensor:
        """(Q, width) → (Q, width), of which the first rows are the prompt's."""
        attention = layer.cross_attn
        heads, kv, width = attention.num_heads, attention.num_key_value_heads, attention.head_dim
        query = attention.q_norm(attention.q_proj(layer.input_layernorm(states)).view(-1, heads, width)).transpose(0, 1)
        key, value = self.projected(attention, self.features)
        scores = query @ key.repeat_interleave(heads // kv, 0).transpose(1, 2) * attention.scaling
        prompt = scores[:, : self.rows].masked_fill(~self.sees, -torch.inf).softmax(-1).nan_to_num()
        out = prompt @ value.repeat_interleave(heads // kv, 0)

        keep, features, members = self.decide(prompt)
        last = self.sees[-1]
        key, value = self.projected(attention, features)
        channels = torch.ones(kv, width)
        if self.policy.slices:
            asking = query[:, : self.rows][:, (self.sees == last).all(-1)].unflatten(0, (kv, -1)).flatten(1, 2)
            # A key that counts as several asks for its channels as several do.
            counted = key * members.sqrt()[:, None]
            left = torch.stack([counted[head][keep[head] & last] for head in range(kv)])
            channels = torch.zeros(kv, width).scatter(1, self.policy.channels(asking, left), 1.0)
        key = (key * channels[:, None]).repeat_interleave(heads // kv, 0)
        answer = query[:, self.rows :] @ key.transpose(1, 2) * attention.scaling + members.log()
        hidden = ~(keep & last).repeat_interleave(heads // kv, 0)[:, None]
        answer = answer.masked_fill(hidden, -torch.inf).softmax(-1) @ value.repeat_interleave(heads // kv, 0)
        out = torch.cat([out, answer], 1).transpose(0, 1).flatten(1)

        blind = torch.cat([~self.sees.any(-1), torch.zeros(len(states) - self.rows, dtype=torch.bool)])[:, None]
        states = states + layer.cross_attn_attn_gate.tanh() * attention.o_proj(out).masked_fill(blind, 0)
        forward = layer.mlp(layer.post_attention_layernorm(states)).masked_fill(blind, 0)
        added: Tensor = states + layer.cross_attn_mlp_gate.tanh() * forward
        return added

    def projected(self, attention: Any, features: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, attention.num_key_value_heads, attention.head_dim)
        key = attention.k_norm(attention.k_proj(features).view(shape)).transpose(0, 1)
        return key, attention.v_proj(features).view(shape).transpose(0, 1)

    def decide(self, prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(KV, N) bool of what stays, the features (N, width) with what is merged into them, and how often each counts (N,)."""
        seeing = self.sees.any(-1).nonzero()[:, 0]
        context = VisualContext(
            valid=self.sees.any(0)[None],
            images=len(self.prompt.images),
            tiles=TILES,
            tokens=TOKENS,
            sample_ids=("0",),
            kv_heads=2,
            attention=prompt[:, seeing].sum(1)[None],
            recent=prompt[:, seeing[-self.policy.recent_rows :]].sum(1)[None],
        )
        keep = self.policy.select(context)
        features, members = self.features, torch.ones(len(self.features))
        if self.policy.merges:
            targets = self.policy.merge(keep, context)[0]
            joined = [[i, *(targets == i).nonzero()[:, 0].tolist()] for i in range(len(features))]
            features = torch.stack([features[rows].mean(0) for rows in joined])
            if self.policy.weighs:
                members = torch.tensor([float(len(rows)) for rows in joined])
        return (keep[0] if keep.dim() == 3 else keep.expand(2, -1)), features, members


class Recent(SnapKV):
    """A window shorter than the prompts."""

    recent_rows = 3


@pytest.mark.parametrize("batch", ["mixed tiles", "several images", "adjacent images"])
@pytest.mark.parametrize(
    "policy",
    [
        SnapKV(0.3),
        Recent(0.2),
        ZipVL(0.6),
        ElasticCache(0.3),
        ElasticCache(0.3, weighted=True),
        ThinK(0.5, SnapKV(0.4)),
        ThinK(0.4, ZipVL(0.7)),
        ThinK(0.5, ElasticCache(0.3)),
        ThinK(0.5, ElasticCache(0.3, weighted=True)),
    ],
    ids=repr,
)
def test_decoding_sees_what_a_mask_would_leave(policy: Policy, batch: str) -> None:
    prompts = make_prompts(BATCHES[batch])
    engine = make_engine(policy)
    logits = record_logits(engine)
    completions = complete(engine, [p.request(str(i), 6) for i, p in enumerate(prompts)])
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        with torch.inference_mode():
            wanted = Masked(policy, prompt)(completion.tokens)
        torch.testing.assert_close(torch.stack(logits[str(number)]), wanted, atol=2e-4, rtol=1e-4)
        alone = run_alone(lively_model(), prompt, str(number), policy, new_tokens=6)
        torch.testing.assert_close(alone.logits, wanted, atol=2e-4, rtol=1e-4)
