"""ToMe (arXiv 2210.09461, section 3): rows of like keys merge, pair by pair, and count as often as they have members."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from trimming.attention import CHUNK_ELEMENTS
from trimming.merging import follow, means_by, sums_by
from trimming.tower.policy import Look, Merging, TowerRows


@dataclass(frozen=True)
class ToMe(Merging):
    """Bipartite soft matching: of rows taken in turns into two sets, each of the first finds the one of the second whose key is
    most alike, and the most alike pairs merge, into means by size.

    The paper merges between a layer's attention and its MLP, the same number of rows in every layer; here behind the layer,
    whose whole states the projector may want, and the same share in every layer, as an image has one to four tiles of rows. The
    paper leaves the class token alone, and so does this.
    """

    looks_at: ClassVar[frozenset[Look]] = frozenset({"keys"})

    def metric(self, rows: TowerRows) -> Tensor:
        """(B, f, any): rows are as alike as their directions here."""
        assert rows.keys is not None
        return rows.keys

    def operations(self, count: int, left: int, width: int, head_width: int) -> int:
        compared = 0
        while count > left:
            compared += (count // 2) * (count - count // 2)
            count = max(left, count // 2)
        return 2 * compared * head_width

    def groups(self, rows: TowerRows, left: int) -> Tensor:
        keys, sizes = self.metric(rows), rows.sizes
        group = torch.arange(keys.shape[1], device=keys.device).expand(len(keys), -1)
        while (count := keys.shape[1]) > left:
            # At once half of them may go, at most.
            remaining = max(left, count // 2)
            into = _matched(keys, remaining)
            group = follow(group, into)
            if remaining > left:
                keys = means_by(keys, sizes, into, remaining)
                sizes = sums_by(sizes[..., None], into, remaining)[..., 0]
            else:
                break
        return group


def _matched(keys: Tensor, left: int) -> Tensor:
    """(B, f) long, below ``left``: where each of ``keys`` (B, f, width) goes, two or more that are alike into one."""
    batch, count = keys.shape[:2]
    ones, others = keys[:, ::2], keys[:, 1::2]
    # Not by the number of images: an image's rows are to merge as they do alone.
    step = max(1, CHUNK_ELEMENTS // others.shape[1])
    found = [_cosines(part, others).max(-1) for part in ones.split(step, 1)]
    alike, nearest = torch.cat([f.values for f in found], 1), torch.cat([f.indices for f in found], 1)
    goes = alike.argsort(dim=1, descending=True, stable=True)[:, : count - left]
    into = torch.arange(count, device=keys.device).repeat(batch, 1)
    into.scatter_(1, 2 * goes, 2 * nearest.gather(1, goes) + 1)
    stays = torch.ones_like(into, dtype=torch.bool).scatter_(1, 2 * goes, False)
    return (stays.cumsum(1) - 1).gather(1, into)


def _cosines(ones: Tensor, others: Tensor) -> Tensor:
    """(B, n, m) float32 of ones (B, n, width) and others (B, m, width)."""
    if ones.is_cuda and ones.dtype in (torch.bfloat16, torch.float16):
        # On tensor cores, whose sums are in float32.
        products = torch.bmm(ones, others.mT, out_dtype=torch.float32)
        lengths = (torch.linalg.vector_norm(t, dim=-1, dtype=torch.float32).clamp(min=1e-12) for t in (ones, others))
        return products / next(lengths)[..., None] / next(lengths)[:, None]
    return F.normalize(ones.float(), dim=-1) @ F.normalize(others.float(), dim=-1).mT
