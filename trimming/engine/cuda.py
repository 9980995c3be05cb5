"""Decode on CUDA: the whole step is one captured graph for each of a few batch sizes.

A graph replays fixed kernels over fixed addresses, so whatever changes from step to step lives in tensors made once: tokens,
positions, and where each row's keys and values lie. A batch is padded to the next captured size with rows that attend to
nothing and write to a scratch place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import MllamaForConditionalGeneration

from trimming.engine.decode import Decode
from trimming.engine.layers import Rotary, cross_queries, norm, self_projections, self_queries
from trimming.engine.memory import Memory
from trimming.engine.sequence import ceil_to

logger = logging.getLogger(__name__)

Attend = Callable[..., Tensor]

TABLE_GRAIN = 4
"""Numbers, of four bytes or more: Triton compiles a kernel anew for what does not begin at a multiple of 16 bytes."""


def buckets(most: int) -> list[int]:
    """Batch sizes to capture: dense where a step's time grows with every row, sparse above."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 32), *range(256, 4096, 128)]
    return [size for size in sizes if size < most] + [most]


class GraphDecode(Decode):
    """``Decode`` with static shapes.

    Args:
        most: rows of the largest batch.
        capture: whether to capture; without, the same step runs kernel by kernel, as tests on a CPU do.
    """

    memory: Memory

    def __init__(
        self, model: MllamaForConditionalGeneration, memory: Memory, rotary: Rotary, most: int, capture: bool = True
    ) -> None:
        # Triton comes with CUDA builds of torch only.
        from trimming.engine.triton_attention import Workspace, pick_splits, ragged_decode_attention

        super().__init__(model, memory, rotary)
        self.attend: Attend = ragged_decode_attention
        self.capture = capture
        geometry, device = memory.geometry, model.device
        self.buckets = buckets(most)
        self.input = torch.zeros(most, dtype=torch.long, device=device)
        """(most,) the tokens of a step, a sequence each."""
        columns = ceil_to(most, TABLE_GRAIN)
        self.table = torch.zeros(4 + 6 * geometry.cross_layers, columns, dtype=torch.long, device=device)
        """All else that a step needs to know of its sequences, one behind the other, so that it is one copy to the device."""
        # Where its token stands; 1 where it is no padding; where its slot begins, and the stride from head to head in it.
        self.place, self.alive, self.self_start, self.self_stride = self.table[:4]
        self.cross = self.table[4:].view(6, geometry.cross_layers, columns)
        """See ``Segment.places``."""
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        images = model.config.vision_config.max_num_tiles * model.model.vision_model.num_patches
        self.splits = {b: pick_splits(b, geometry.kv_heads, processors, images) for b in self.buckets}
        room = max(bucket * splits for bucket, splits in self.splits.items())
        self.workspace = Workspace.allocate(room, geometry.heads, geometry.head_dim, device)
        self.columns = torch.arange(geometry.head_dim, device=device)
        self.heads = torch.arange(geometry.kv_heads, device=device)[:, None]
        self.channels: Tensor | None = None
        """(cross layers, most, KV, key_width) the channels of a row's keys; None where keys have all of them."""
        self.weighs = False
        """Whether segments have biases."""
        self.logits = torch.zeros(most, model.config.text_config.vocab_size, dtype=model.dtype, device=device)
        """What every graph writes: a tensor in each of them would take as much again for every batch size."""
        self.replays: dict[int, Callable[[], object]] = {}
        """Of each batch size that has been captured."""
        self.uncaptured: set[int] = set()
        """Batch sizes whose capture failed: their steps run kernel by kernel."""
        self.pool: Any = None
        """Memory that graphs share, as one runs at a time. A handle is good for as long as any of its graphs lives, and they
        are let go of together: libraries' workspaces in it are used by all."""
        self.stream: Any = None
        """That captures run on. torch's own is of the device that captured first in this process."""

    def step(self) -> Tensor:
        """Logits (B, V) of each sequence's next token, which the next step overwrites."""
        count = len(self.running)
        bucket = next(b for b in self.buckets if b >= count)
        if self.changed:
            self._upload()
            self.changed = False
        self.input[:count] = self.tokens
        if self.capture and bucket not in self.replays and bucket not in self.uncaptured:
            self._capture(bucket)
        self.replays.get(bucket, lambda: self._forward(bucket))()
        return self.logits[:count]

    def slice_keys(self, width: int) -> None:
        if self.channels is not None and self.channels.shape[-1] == width:
            return
        # Graphs were captured for keys of another width.
        self.release()
        shape = (self.memory.geometry.cross_layers, len(self.input), self.memory.geometry.kv_heads, width)
        self.channels = torch.zeros(shape, dtype=torch.long, device=self.input.device)

    def weigh(self, weighs: bool) -> None:
        if weighs != self.weighs:
            # Graphs were captured for the other kernel.
            self.release()
            self.weighs = weighs

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compiles the kernels and captures every batch size, the largest first: smaller ones then find memory to share."""
        # Captures run the step, which writes to the slots of rows that run.
        if self.changed:
            self._upload()
        for bucket in reversed(self.buckets):
            if bucket not in self.replays and self.capture:
                self._capture(bucket)

    def release(self) -> bool:
        """Hands the graphs' memory back; they are captured again when their batch size comes. Whether there were any."""
        if not self.replays and not self.uncaptured:
            return False
        if self.input.device.type == "cuda":
            # One may be running.
            torch.cuda.synchronize(self.input.device)
        self.replays.clear()
        self.uncaptured.clear()
        self.pool = None
        return True

    def _upload(self) -> None:
        """Tells the device which rows run and where their keys and values lie."""
        # This runs whenever a sequence joins or leaves, mostly between two steps: its every call counts.
        memory, count = self.memory, len(self.running)
        width = memory.geometry.head_dim
        table = torch.zeros(self.table.shape, dtype=torch.long)
        table[0, :count] = torch.tensor(self.positions)
        table[1, :count] = 1
        table[2, :count] = torch.arange(count) * memory.slot_elements
        table[2, count:] = memory.scratch
        table[3, :count] = memory.capacity * width
        table[3, count:] = width
        nowhere = torch.zeros(6 * memory.geometry.cross_layers, dtype=torch.long)
        places = [sequence.segment.places if sequence.segment else nowhere for sequence in self.running]
        if places:
            torch.stack(places, -1, out=table[4:, :count])
        self.table.copy_(table)
        seeing = [(row, sequence.channels) for row, sequence in enumerate(self.running) if sequence.channels]
        if self.channels is not None and seeing:
            rows = torch.tensor([row for row, _ in seeing], device=self.input.device)
            together = torch.stack([channels for _, layers in seeing for channels in layers])
            self.channels[:, rows] = together.unflatten(0, (len(seeing), -1)).transpose(0, 1)

    def _capture(self, bucket: int) -> None:
        """Captures the step of this batch size. Where that fails, out of memory for example, it stays uncaptured."""
        # Once plainly, since a first call compiles and allocates; the keys and values it writes are written again.
        place = self.place.clone()
        self._forward(bucket)
        self.place.copy_(place)
        try:
            self.replays[bucket] = self._record(lambda: self._forward(bucket))
        except RuntimeError as error:
            # One cause raises many different messages in a capture, and none of them has changed the step's inputs.
            self.uncaptured.add(bucket)
            logger.warning(f"decode steps of {bucket} rows run without a CUDA graph: {str(error).partition(chr(10))[0]}")

    def _record(self, run: Callable[[], object]) -> Callable[[], object]:
        """``run``'s kernels as a graph, to be replayed over the same addresses."""
        device = self.input.device
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        self.stream = self.stream or torch.cuda.Stream(device)
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        try:
            # Other threads of an embedding program may allocate meanwhile, which the default mode would not stand.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                run()
        except RuntimeError:
            # torch before 2.12 leaves its allocator recording into the pool of a capture that CUDA has invalidated (PR 180395),
            # where it could neither capture nor free again. Where the recording has ended this is refused.
            with suppress(RuntimeError, AttributeError):
                torch._C._cuda_endAllocateToPool(device.index, self.pool)
            self.pool = None
            raise
        finally:
            # A capture that fails at its end leaves its own stream behind as the current one.
            torch.cuda.set_stream(before)
        return graph.replay

    def _forward(self, bucket: int) -> None:
        """Writes ``logits`` of the first ``bucket`` rows."""
        states = self.text.embed_tokens(self.input[:bucket])
        place = self.place[:bucket]
        cos, sin = self.rotary.at(place)
        alive, start, stride = self.alive[:bucket], self.self_start[:bucket], self.self_stride[:bucket]
        # Of whole rows, for parts that begin at multiples of ``TABLE_GRAIN``.
        length, lengths = ((place + 1) * alive).int(), self.cross[4].int()[:, :bucket]
        sees = (lengths > 0).any(0)[:, None].to(states.dtype)
        # A layer's keys, or values, in a slot; padding has no room but for one row, which all of it shares.
        layer_size = len(self.heads) * stride * alive
        row = (start + place * alive * len(self.columns))[:, None, None] + self.heads * stride[:, None, None] + self.columns
        own = crossed = 0
        for layer, is_cross in zip(self.text.layers, self.is_cross, strict=True):
            if is_cross:
                states = self._graph_cross(layer, crossed, states, lengths[crossed], sees, bucket)
                crossed += 1
            else:
                states = self._graph_self(layer, own, states, (cos, sin), row, layer_size, length, bucket)
                own += 1
        self.logits[:bucket] = self.model.lm_head(norm(self.text.norm, states))
        # Behind all that may fail: the same step can be taken again.
        self.place += self.alive

    def _graph_self(
        self,
        layer: Any,
        index: int,
        states: Tensor,
        rotary: tuple[Tensor, Tensor],
        row: Tensor,
        layer_size: Tensor,
        length: Tensor,
        bucket: int,
    ) -> Tensor:
        attention, flat = layer.self_attn, self.memory.flat
        normed = norm(layer.input_layernorm, states)
        query = self_queries(attention, normed, *rotary)
        key, value = self_projections(attention, normed, *rotary)
        key_at = 2 * index * layer_size
        value_at = key_at + layer_size
        flat[row + key_at[:, None, None]] = key
        flat[row + value_at[:, None, None]] = value
        start, stride = self.self_start[:bucket], self.self_stride[:bucket]
        places = (start + key_at, start + value_at, stride, stride)
        states = states + attention.o_proj(self._attend(query, places, length, attention.scaling, bucket))
        forward: Tensor = layer.mlp(norm(layer.post_attention_layernorm, states))
        return states + forward

    def _graph_cross(self, layer: Any, index: int, states: Tensor, length: Tensor, sees: Tensor, bucket: int) -> Tensor:
        attention = layer.cross_attn
        query = cross_queries(attention, norm(layer.input_layernorm, states))
        if self.channels is not None:
            channels = self.channels[index, :bucket, :, None]
            grouped = query.unflatten(1, (channels.shape[1], -1))
            query = grouped.gather(-1, channels.expand(*grouped.shape[:3], -1)).flatten(1, 2)
        # Keys, values, and their strides from head to head.
        places = tuple(self.cross[i, index, :bucket] for i in range(4))
        bias = self.cross[5, index, :bucket] if self.weighs else None
        attended = attention.o_proj(self._attend(query, places, length, attention.scaling, bucket, bias))
        states = states + layer.cross_attn_attn_gate.tanh() * attended * sees
        forward = layer.mlp(norm(layer.post_attention_layernorm, states))
        return states + layer.cross_attn_mlp_gate.tanh() * forward * sees

    def _attend(
        self,
        query: Tensor,
        places: tuple[Tensor, ...],
        length: Tensor,
        scaling: float,
        bucket: int,
        bias: Tensor | None = None,
    ) -> Tensor:
        """(B, heads × D). ``bias`` (B,): where those of each row begin."""
        geometry = self.memory.geometry
        attended = self.attend(
            query,
            self.memory.flat,
            *places,
            length,
            geometry.kv_heads,
            geometry.head_dim,
            scaling,
            self.workspace,
            self.splits[bucket],
            biases=None if bias is None else self.memory.biases,
            bias_offset=bias,
        )
        return attended.flatten(1)
