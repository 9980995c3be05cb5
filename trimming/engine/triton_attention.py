"""Attention of one decode step over ragged keys and values that lie in one flat arena, in Triton.

Split-K as in Flash-Decoding (Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html) over the online softmax
of FlashAttention-2 (arXiv 2307.08691): a first kernel attends to shares of each sequence's rows, a second one combines them.
Lengths and places are read on the device and every shape is static, so a CUDA graph can hold the call.

Shapes: B sequences (a batch's padding counts), H query heads, KV key/value heads, Dk and Dv their widths, E elements of the
arena. Imports triton: leave this module alone where there is no CUDA device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

ALIGNMENT = 8
"""Elements. Arena offsets and head strides of widths that divide by it must divide by it: 16-byte loads rely on it."""

_BLOCK = 64
"""Rows of keys and values a program loads at once."""
_STAGES = {2: 3, 4: 2}
"""By bytes an element. At widths of 128 three programs in bf16 then fit on an H100's multiprocessor, with 70 KiB each."""
_TENSOR_CORE_ROWS = 16
LOG2_E = tl.constexpr(math.log2(math.e))
_PROGRAMS_PER_PROCESSOR = 4
_ROWS_PER_SPLIT = 256
_MOST_SPLITS = 64
"""The second kernel holds the partial results of all splits in registers."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """Partial results of the splits, float32. Calls on one stream may share it; its contents do not outlive a call."""

    output: Tensor
    """(room × H × Dv,), unnormalised."""
    maximum: Tensor
    """(room × H,) greatest logit, in units of log2(e)."""
    total: Tensor
    """(room × H,) sum of the softmax's numerators."""

    @classmethod
    def allocate(cls, room: int, heads: int, value_width: int, device: torch.device | str) -> Workspace:
        """``room``: the greatest batch × splits of any call; ``heads`` and ``value_width`` likewise the greatest."""
        sizes = (room * heads * value_width, room * heads, room * heads)
        return cls(*(torch.empty(size, dtype=torch.float32, device=device) for size in sizes))


def pick_splits(batch: int, kv_heads: int, processors: int, longest: int) -> int:
    """Into how many shares to cut each sequence, so that two to four programs come to each streaming multiprocessor.

    Args:
        batch: B.
        kv_heads: KV.
        processors: ``torch.cuda.get_device_properties(device).multi_processor_count``.
        longest: rows of the longest sequence that may come; a share has no fewer than 256 of them.
    """
    filling = _PROGRAMS_PER_PROCESSOR * processors // (batch * kv_heads)
    return max(1, min(filling, longest // _ROWS_PER_SPLIT, _MOST_SPLITS))


def ragged_decode_attention(
    query: Tensor,
    arena: Tensor,
    key_offset: Tensor,
    value_offset: Tensor,
    key_head_stride: Tensor,
    value_head_stride: Tensor,
    length: Tensor,
    kv_heads: int,
    value_width: int,
    scaling: float,
    partial: Workspace,
    splits: int,
    out: Tensor | None = None,
    biases: Tensor | None = None,
    bias_offset: Tensor | None = None,
) -> Tensor:
    """Softmax attention of one query row a sequence over that sequence's rows; heads are shared in groups of H / KV.

    Nothing is allocated where ``out`` is given, and the host waits for nothing. The first call with new widths or a new dtype
    compiles: make one before capturing a CUDA graph. Sequences may share their rows. Places against ``ALIGNMENT`` are an error
    of the device, which TRITON_DEBUG=1 names.

    Args:
        query: (B, H, Dk), the last axis dense.
        arena: (E,) of the query's dtype: bf16, fp16, or fp32 (then without tf32).
        key_offset: (B,) int64, the element of the arena where a sequence's keys begin. They lie as (KV, rows, Dk): Dk elements
            from row to row, ``key_head_stride`` from head to head.
        value_offset: (B,) int64, likewise for values (KV, rows, Dv).
        key_head_stride: (B,) int64, elements: a slot may have room for more rows than count.
        value_head_stride: (B,) int64.
        length: (B,) int32, rows that count; 0 gives zeros.
        kv_heads: KV.
        value_width: Dv.
        scaling: what the products of queries and keys are multiplied with.
        partial: room for at least B × splits.
        splits: shares a sequence is cut into, see ``pick_splits``.
        out: (B, H, Dv) of the query's dtype, the last axis dense; made where None.
        biases: float32, what is added to scaled logits; None: nothing.
        bias_offset: (B,) int64, the element of ``biases`` where a sequence's begin, (KV, rows). Both or none are given.

    Returns:
        ``out``.

    Raises:
        ValueError: heads, dtypes, strides, splits or the workspace do not fit.
    """
    batch, heads, key_width = query.shape
    if out is None:
        out = query.new_empty(batch, heads, value_width)
    _check(query, arena, kv_heads, value_width, partial, splits, out)
    if (biases is None) != (bias_offset is None):
        raise ValueError("biases and bias_offset belong together: give both or none")
    if batch == 0:
        return out
    group = heads // kv_heads
    widths = {"VALUE_WIDTH": value_width, "VALUE_PAD": _padded(value_width), "BLOCK": _BLOCK}
    results = (partial.output, partial.maximum, partial.total)
    _attend_to_share[(batch, kv_heads, splits)](
        query,
        arena,
        # The kernel does not look at them where they are None.
        query if biases is None else biases,
        length if bias_offset is None else bias_offset,
        key_offset,
        value_offset,
        key_head_stride,
        value_head_stride,
        length,
        *results,
        query.stride(0),
        query.stride(1),
        # exp2 is what the hardware has.
        scaling * LOG2_E.value,
        GROUP=group,
        ROWS=_padded(group),
        KEY_WIDTH=key_width,
        KEY_PAD=_padded(key_width),
        ALIGN=ALIGNMENT,
        BIASED=biases is not None,
        **widths,
        num_stages=_STAGES[query.element_size()],
    )
    _combine_shares[(batch, heads)](
        *results, length, out, out.stride(0), out.stride(1), splits, SPLITS_PAD=triton.next_power_of_2(splits), **widths
    )
    return out


def _check(query: Tensor, arena: Tensor, kv_heads: int, value_width: int, partial: Workspace, splits: int, out: Tensor) -> None:
    batch, heads, _ = query.shape
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"kv_heads={kv_heads} does not divide the query's {heads} heads: give the model's own")
    if not query.dtype == arena.dtype == out.dtype or query.element_size() not in _STAGES:
        raise ValueError(f"query, arena and out are {query.dtype}, {arena.dtype} and {out.dtype}: give them one, bf16 say")
    if tuple(out.shape) != (batch, heads, value_width):
        raise ValueError(f"out has shape {tuple(out.shape)}: give it {(batch, heads, value_width)}")
    if query.stride(-1) != 1 or out.stride(-1) != 1:
        raise ValueError("query and out must be dense along their last axis: call .contiguous() first")
    if splits < 1:
        raise ValueError(f"splits={splits} is no number of shares: give pick_splits(...)")
    rows = batch * heads * splits
    if partial.output.numel() < rows * value_width or partial.maximum.numel() < rows:
        raise ValueError(f"partial is too small: Workspace.allocate(room={batch * splits}, heads={heads}, {value_width=}, ...)")


def _padded(size: int) -> int:
    """Blocks have powers of two as sides, and tensor cores no fewer than 16."""
    return max(_TENSOR_CORE_ROWS, triton.next_power_of_2(size))


@triton.jit
def _share(count: tl.tensor, splits: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Rows a split gets: whole blocks, as even as they go; the last splits of a short sequence get none."""
    return tl.cdiv(tl.cdiv(count, BLOCK), splits) * BLOCK


@triton.jit
def _place(
    offset: tl.tensor, head_stride: tl.tensor, batch: tl.tensor, head: tl.tensor, WIDTH: tl.constexpr, ALIGN: tl.constexpr
) -> tl.tensor:
    """Element (int64) of the arena where a head's rows begin."""
    first, stride = tl.load(offset + batch), tl.load(head_stride + batch)
    # What comes from memory may be anything to the compiler; rows of a crooked width cannot be loaded in 16 bytes anyhow.
    if WIDTH % ALIGN == 0:
        tl.device_assert((first % ALIGN == 0) & (stride % ALIGN == 0), "offset or head stride against ALIGNMENT")
        first, stride = tl.multiple_of(first, ALIGN), tl.multiple_of(stride, ALIGN)
    return first + head * stride


@triton.jit
def _attend_to_share(
    query: tl.tensor,
    arena: tl.tensor,
    biases: tl.tensor,
    bias_offset: tl.tensor,
    key_offset: tl.tensor,
    value_offset: tl.tensor,
    key_head_stride: tl.tensor,
    value_head_stride: tl.tensor,
    length: tl.tensor,
    output: tl.tensor,
    maximum: tl.tensor,
    total: tl.tensor,
    query_stride: tl.tensor,
    query_head_stride: tl.tensor,
    scaling: tl.tensor,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    BIASED: tl.constexpr,
) -> None:
    """Grid (B, KV, splits): the query heads of one key/value head, as rows of one tile, over one share of the sequence."""
    # int64 from here on: all that is multiplied with it may pass 2**31.
    batch, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(2)
    count = tl.load(length + batch)
    share = _share(count, splits, BLOCK)
    begin = split * share
    if begin >= count:
        return
    end = tl.minimum(begin + share, count)

    rows, places = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    key_columns, value_columns = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    heads = head * GROUP + rows
    query_tile = tl.load(
        query + batch * query_stride + heads[:, None] * query_head_stride + key_columns[None, :],
        mask=(rows < GROUP)[:, None] & (key_columns < KEY_WIDTH)[None, :],
        other=0.0,
    )
    key_at = _place(key_offset, key_head_stride, batch, head, KEY_WIDTH, ALIGN) + begin.to(tl.int64) * KEY_WIDTH
    value_at = _place(value_offset, value_head_stride, batch, head, VALUE_WIDTH, ALIGN) + begin.to(tl.int64) * VALUE_WIDTH
    key_tile = arena + key_at + places[:, None] * KEY_WIDTH + key_columns[None, :]
    value_tile = arena + value_at + places[:, None] * VALUE_WIDTH + value_columns[None, :]

    bias_at = biases
    if BIASED:
        bias_at += tl.load(bias_offset + batch) + head * count
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    denominator = tl.zeros((ROWS,), tl.float32)
    numerator = tl.zeros((ROWS, VALUE_PAD), tl.float32)
    for position in range(begin, end, BLOCK):
        there = position + places < end
        key = tl.load(key_tile, mask=there[:, None] & (key_columns < KEY_WIDTH)[None, :], other=0.0)
        logits = tl.dot(query_tile, tl.trans(key), input_precision="ieee") * scaling
        if BIASED:
            bias = tl.load(bias_at + position + places, mask=there, other=0.0)
            logits += (bias * LOG2_E)[None, :]
        logits = tl.where(there[None, :], logits, float("-inf"))
        # Every block has a row that counts, so the maximum is finite and no difference of infinities arises.
        higher = tl.maximum(top, tl.max(logits, 1))
        weights, decay = tl.exp2(logits - higher[:, None]), tl.exp2(top - higher)
        # Rows that do not count may hold anything, and zero weights do not silence NaN.
        value = tl.load(value_tile, mask=there[:, None] & (value_columns < VALUE_WIDTH)[None, :], other=0.0)
        numerator = numerator * decay[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        denominator = denominator * decay + tl.sum(weights, 1)
        top = higher
        key_tile += BLOCK * KEY_WIDTH
        value_tile += BLOCK * VALUE_WIDTH

    place = (batch * tl.num_programs(1) * GROUP + heads) * splits + split
    tl.store(maximum + place, top, mask=rows < GROUP)
    tl.store(total + place, denominator, mask=rows < GROUP)
    tl.store(
        output + place[:, None] * VALUE_WIDTH + value_columns[None, :],
        numerator,
        mask=(rows < GROUP)[:, None] & (value_columns < VALUE_WIDTH)[None, :],
    )


@triton.jit(do_not_specialize=["splits"])
def _combine_shares(
    output: tl.tensor,
    maximum: tl.tensor,
    total: tl.tensor,
    length: tl.tensor,
    out: tl.tensor,
    out_stride: tl.tensor,
    out_head_stride: tl.tensor,
    splits: tl.tensor,
    SPLITS_PAD: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (B, H): the partial results of one query head, brought to one maximum and added up."""
    batch, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count = tl.load(length + batch)
    split, columns = tl.arange(0, SPLITS_PAD), tl.arange(0, VALUE_PAD)
    # Splits without rows wrote nothing: what lies in their place is of another call.
    worked = (split < splits) & (split * _share(count, splits, BLOCK) < count)
    place = (batch * tl.num_programs(1) + head) * splits + split
    tops = tl.load(maximum + place, mask=worked, other=float("-inf"))
    weights = tl.exp2(tops - tl.where(count > 0, tl.max(tops, 0), 0.0))
    # At least 1 wherever there is a row, its maximum's own numerator; 0 where there is none.
    denominator = tl.maximum(tl.sum(weights * tl.load(total + place, mask=worked, other=0.0), 0), 1.0)
    partial = tl.load(
        output + place[:, None] * VALUE_WIDTH + columns[None, :],
        mask=worked[:, None] & (columns < VALUE_WIDTH)[None, :],
        other=0.0,
    )
    result = tl.sum(weights[:, None] * partial, 0) / denominator
    tl.store(
        out + batch * out_stride + head * out_head_stride + columns,
        result.to(out.dtype.element_ty),
        mask=columns < VALUE_WIDTH,
    )
