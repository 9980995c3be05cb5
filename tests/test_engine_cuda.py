"""The decode step that CUDA graphs capture: kernel by kernel in Triton's interpreter, and as graphs where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import BATCHES, IMAGE, PAD, RATIO_OF_TILES, Row, make_inputs, tiny_model

from trimming import Clusters, KeepAll, Policy, ThinK, TrimmedLlama, ZipVL
from trimming.engine import Engine, Image, Request, scheduler
from trimming.engine.cuda import GraphDecode, buckets
from trimming.engine.decode import Decode
from trimming.engine.memory import Memory

BATCH = [*BATCHES["mixed tiles"], *BATCHES["text-only among images"], *BATCHES["several images"]]


def make_requests(batch: Sequence[Row]) -> list[Request]:
    """A request a row, of 40 tokens in all."""
    inputs = make_inputs(batch)
    requests = []
    for i, row in enumerate(batch):
        tokens = inputs["input_ids"][i][inputs["attention_mask"][i].bool()].tolist()
        assert tokens.count(IMAGE) == len(row.tiles)
        assert PAD not in tokens
        pictures = [
            Image(f"{i}-{j}", inputs["pixel_values"][i, j, :tiles], RATIO_OF_TILES[tiles]) for j, tiles in enumerate(row.tiles)
        ]
        requests.append(Request(id=str(i), tokens=tokens, images=pictures, max_new_tokens=40 - len(tokens)))
    return requests


def answers(policy: Policy, decode: type[Decode] | None, device: str = "cpu") -> list[list[int]]:
    """Tokens of nine rows of 2 to 10 tokens in three slots, on the decode step given or on the device's own."""
    model = tiny_model().to(device)
    requests = [replace(request, max_new_tokens=2 + i) for i, request in enumerate(make_requests(BATCH))]
    chosen = scheduler._decode_for
    if decode is not None:
        made = (
            (lambda *parts: GraphDecode(*parts, capture=False))
            if decode is GraphDecode
            else (lambda *parts: Decode(*parts[:3]))
        )
        scheduler._decode_for = made
    try:
        engine = Engine(model, policy, normalise=lambda pixels: pixels.to(device), eos=(), kv_bytes=1 << 22, max_sequences=3)
        return [completion.tokens for completion in engine.generate(requests)]
    finally:
        scheduler._decode_for = chosen


def main() -> None:
    # Sets of each layer's own, and sliced keys. Others, with logits, are in the GPU kit's rehearsal (checks/captured.py).
    policy = ThinK(0.4, ZipVL(mass=0.7))
    plain, static = answers(policy, Decode), answers(policy, GraphDecode)
    assert plain == static, f"{policy}: {plain} {static}"


@pytest.mark.slow
def test_the_static_step_says_what_the_plain_one_does() -> None:
    """Nine rows through three slots: padding rows, leaving and moving in, rows without an image."""
    pytest.importorskip("triton")
    # Triton decides at its import whether it interprets.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, Path(__file__)], env=environment, check=True, timeout=300)


def test_buckets_reach_the_most() -> None:
    assert buckets(1) == [1]
    assert buckets(5) == [1, 2, 4, 5]
    assert buckets(70)[-3:] == [56, 64, 70]
    assert all(a < b for a, b in zip(buckets(3000), buckets(3000)[1:], strict=False))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("policy", [KeepAll(), TrimmedLlama(k_ratio=0.2), Clusters(0.3), ThinK(0.5)], ids=repr)
def test_graphs_say_what_the_cpu_does(policy: Policy) -> None:
    # The engine chooses graphs by itself there.
    assert answers(policy, None, "cuda") == answers(policy, Decode)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_slots_and_segments_beyond_2_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third slot begins there, and segments lie behind it: what is written is what is read, by kernels of every kind."""
    options = {"normalise": lambda pixels: pixels.to("cuda"), "eos": (), "max_sequences": 3}
    requests = make_requests(BATCHES["mixed tiles"][:3])
    model = tiny_model().to("cuda")
    wanted = [c.tokens for c in Engine(model, TrimmedLlama(0.2), kv_bytes=1 << 22, **options).generate(requests)]
    # All rows have one capacity: slots of a length that does not follow from it could not be resized.
    monkeypatch.setattr(Memory, "slot_elements_for", lambda memory, capacity: 2**30)
    engine = Engine(model, TrimmedLlama(0.2), kv_bytes=4 * (3 * 2**30 + 2**20), **options)
    assert [c.tokens for c in engine.generate(requests)] == wanted
    assert engine.statistics.peak_sequences == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_capture_that_cuda_invalidates_costs_no_answer() -> None:
    """What synchronises breaks a capture off. The step goes on uncaptured, others are captured, and memory can be freed."""
    model = tiny_model().to("cuda")
    options = {"eos": (), "kv_bytes": 1 << 22, "max_sequences": 3}
    engine = Engine(model, KeepAll(), normalise=lambda pixels: pixels.to("cuda"), **options)
    decode = engine.decode
    assert isinstance(decode, GraphDecode)
    forward = decode._forward

    def synchronising(bucket: int) -> None:
        if torch.cuda.is_current_stream_capturing() and bucket == 3:
            decode.place.sum().item()
        forward(bucket)

    decode._forward = synchronising  # type: ignore[method-assign]
    requests = [Request(id=str(i), tokens=[1, 5 + i, 7], max_new_tokens=3 + 2 * i) for i in range(3)]
    found = [completion.tokens for completion in engine.generate(requests)]
    assert decode.uncaptured == {3}
    assert set(decode.replays) == {1, 2}
    torch.cuda.empty_cache()
    plain = Engine(tiny_model(), KeepAll(), normalise=lambda pixels: pixels, **options)
    assert found == [completion.tokens for completion in plain.generate(requests)]


if __name__ == "__main__":
    main()
