"""Rows that become one: sums and means of those that go into each, and who stands for whom.

Shapes: B images of one size, n rows each.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sums_by(rows: Tensor, into: Tensor, count: int) -> Tensor:
    """(B, count, width) float32: sums of those of ``rows`` (B, n, width) that go ``into`` (B, n) each; −1 for none.

    The same on every run: sums go in the order of rows, not by atomic additions as ``index_add`` has them on CUDA.
    """
    if rows.device.type != "cpu":
        return sorted_sums(rows, into, count)
    flat = _places(into, count)
    sums = rows.new_zeros(len(rows) * (count + 1), rows.shape[-1], dtype=torch.float32)
    return sums.index_add_(0, flat, rows.flatten(0, 1).float()).view(len(rows), count + 1, -1)[:, :count]


def sorted_sums(rows: Tensor, into: Tensor, count: int) -> Tensor:
    """``sums_by``, of rows that are sorted first."""
    flat = _places(into, count)
    lengths = torch.zeros(len(rows) * (count + 1), dtype=torch.long, device=into.device)
    lengths.index_add_(0, flat, torch.ones_like(flat))
    runs = rows.flatten(0, 1)[flat.argsort(stable=True)].float()
    # ``unsafe`` leaves out a look at the lengths, for which the host would wait.
    sums = torch.segment_reduce(runs, "sum", lengths=lengths, unsafe=True)
    return sums.view(len(rows), count + 1, -1)[:, :count]


def _places(into: Tensor, count: int) -> Tensor:
    """(B × n,) long: of each row in all images' sums, one behind the other; those that go nowhere have a place of their own."""
    images = torch.arange(len(into), device=into.device)[:, None] * (count + 1)
    return (into.masked_fill(into < 0, count) + images).flatten()


def means_by(rows: Tensor, weights: Tensor, into: Tensor, count: int) -> Tensor:
    """(B, count, width), in the rows' own type: means of ``rows`` (B, n, width) by ``weights`` (B, n) float32, of those that go
    ``into`` (B, n) each; −1 for none."""
    weighed = torch.cat([rows.float() * weights[..., None], weights[..., None]], -1)
    sums = sums_by(weighed, into, count)
    return (sums[..., :-1] / sums[..., -1:]).to(rows.dtype)


def first_members(into: Tensor, count: int) -> Tensor:
    """(B, count) long: the first of those that go ``into`` (B, n) each of ``count``, n where none does; −1 goes nowhere."""
    batch, rows = into.shape
    places = torch.arange(rows, device=into.device).expand(batch, -1)
    found = torch.full((batch, count + 1), rows, device=into.device)
    return found.scatter_reduce_(1, into.masked_fill(into < 0, count), places, "amin")[:, :count]


def follow(group: Tensor, into: Tensor) -> Tensor:
    """(B, n) long: where rows are that went into ``group`` (B, n), or −1 for none, and then ``into`` (B, m) of these."""
    return into.gather(1, group.clamp(min=0)).masked_fill(group < 0, -1)
