"""Captured decode steps without a GPU: a stand-in records a step's operations and replays them over the same tensors, as a CUDA
graph replays kernels over the same addresses. What a capture forbids, waiting for the device, is an error here too."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from operations import Watch
from test_engine_triton_attention import reference
from tiny import BATCHES, Prompt, Row, complete, drain, lively_model, make_engine, make_prompts, record_logits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trimming import Clusters, ElasticCache, KeepAll, Policy, SnapKV, ThinK, TrimmedLlama
from trimming.engine import Engine, Image, Request
from trimming.engine.decode import Decode
from trimming.engine.layers import computing_on

pytest.importorskip("triton")
from trimming.engine.cuda import GraphDecode

ROWS = [*BATCHES["mixed tiles"], *BATCHES["text-only among images"], *BATCHES["several images"]]
WAITS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.item.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.repeat_interleave.Tensor,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
}


class Recorder(TorchDispatchMode):
    """Runs operations and notes them, with the tensors they were given and those they gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        # oneDNN's weights have no storage to look at.
        dense = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]
        given = {leaf.untyped_storage().data_ptr() for leaf in dense}
        view = isinstance(out, Tensor) and out.untyped_storage().data_ptr() in given and not func._schema.is_mutable
        # Whether reshape and its like copy is known only now.
        if not view:
            self.note(func, tuple(args), kwargs or {}, out)
        return out

    def note(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.calls.append((func, args, kwargs, [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]))

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for old, new in zip(out, again, strict=True):
                if old is not new:
                    old.copy_(new)


class Recorded(GraphDecode):
    """``GraphDecode`` on a CPU, its graphs recordings, its attention in plain loops."""

    def __init__(self, *parts: Any, capture: bool = True) -> None:
        super().__init__(*parts, capture=capture)
        self.attend = self.plain_attend
        self.recorder: Recorder | None = None
        self.recorded: list[int] = []
        """Operations of each recording."""

    def _record(self, run: Callable[[], object]) -> Callable[[], object]:
        self.recorder = recorder = Recorder()
        place = self.place.clone()
        try:
            with recorder:
                run()
        finally:
            self.recorder = None
            # A capture runs nothing.
            self.place.copy_(place)
        self.recorded.append(len(recorder.calls))
        return recorder.replay

    def plain_attend(self, query: Tensor, arena: Tensor, *given: Any, **added: Any) -> Tensor:
        """One kernel to a graph, which reads places and lengths on the device."""
        names = (
            "key_offset",
            "value_offset",
            "key_head_stride",
            "value_head_stride",
            "length",
            "kv_heads",
            "value_width",
            "scaling",
        )

        def attend() -> Tensor:
            arguments = {"query": query, "arena": arena, **added, **dict(zip(names, given, strict=False))}
            return reference(arguments).to(query.dtype)

        if self.recorder is None:
            return attend()
        with torch.utils._python_dispatch._disable_current_modes():
            out = attend()
        self.recorder.note(attend, (), {}, out)
        return out


def make_recorded(policy: Policy, capture: bool = True, **options: Any) -> tuple[Engine, Recorded]:
    engine = make_engine(policy, **options)
    decode = Recorded(engine.model, engine.memory, engine.decode.rotary, engine.max_sequences.most, capture=capture)
    if policy.slices:
        decode.slice_keys(policy.key_width(engine.geometry.head_dim))
    decode.weigh(policy.weighs)
    engine.decode = decode
    return engine, decode


def waves(prompts: Sequence[Prompt]) -> list[list[Request]]:
    """Rows of many lengths, in three groups."""
    requests = [p.request(str(i), 3 + 5 * (i % 3)) for i, p in enumerate(prompts)]
    return [requests[:2], requests[2:7], requests[7:]]


def run(engine: Engine, groups: Sequence[Sequence[Request]]) -> dict[str, list[Tensor]]:
    """Each group comes two steps after the one before: batches grow, shrink and are refilled."""
    logits = record_logits(engine)
    for group in groups:
        for request in group:
            engine.submit(request)
        engine.step()
        engine.step()
    drain(engine)
    return logits


@pytest.mark.parametrize(
    "policy",
    [
        KeepAll(),
        TrimmedLlama(0.2),
        SnapKV(0.3),
        ThinK(0.5),
        ThinK(0.4, TrimmedLlama(0.3)),
        Clusters(0.3),
        ThinK(0.5, Clusters(0.4, policy=SnapKV(0.5))),
        ElasticCache(0.3, weighted=True),
    ],
    ids=repr,
)
def test_a_replayed_step_is_the_step(policy: Policy) -> None:
    prompts = make_prompts(ROWS)
    engine, decode = make_recorded(policy, max_sequences=5)
    found = run(engine, waves(prompts))
    assert sorted(decode.replays) == [1, 2, 4, 5]
    assert not decode.uncaptured
    plain, uncaptured = make_recorded(policy, capture=False, max_sequences=5)
    wanted = run(plain, waves(prompts))
    assert not uncaptured.replays
    eager = make_engine(policy, max_sequences=5)
    assert type(eager.decode) is Decode
    other = run(eager, waves(prompts))
    assert found.keys() == wanted.keys() == other.keys()
    for id, rows in found.items():
        torch.testing.assert_close(torch.stack(rows), torch.stack(wanted[id]), rtol=0, atol=0)
        torch.testing.assert_close(torch.stack(rows), torch.stack(other[id]), rtol=1e-4, atol=2e-4)


def test_a_captured_step_waits_for_nothing() -> None:
    """The stand-in refuses what a capture refuses: a step that waited would have stayed uncaptured."""
    engine, decode = make_recorded(TrimmedLlama(0.2))
    complete(engine, [p.request("0", 4) for p in make_prompts([Row((2,))])])
    assert list(decode.replays) == [1]
    engine, decode = make_recorded(TrimmedLlama(0.2))
    forward = decode._forward
    decode._forward = lambda bucket: (decode.place.sum().item(), forward(bucket))[1]  # type: ignore[method-assign, func-returns-value]
    complete(engine, [p.request("0", 4) for p in make_prompts([Row((2,))])])
    assert (decode.uncaptured, decode.replays) == ({1}, {})


@pytest.mark.parametrize("policy", [KeepAll(), SnapKV(0.3)], ids=repr)
def test_where_everything_lies_is_one_copy_to_the_device(policy: Policy) -> None:
    """Whenever a row joins or leaves: at nearly every step of a large batch. Sliced keys have their channels besides."""
    engine, decode = make_recorded(policy, max_sequences=5)
    copies: list[list[Tensor]] = []
    upload = decode._upload

    def see(func: Any, args: Sequence[Any], out: Any) -> None:
        if func is torch.ops.aten.copy_.default:
            # A non-blocking copy would need its source left alone until it is done.
            assert not any(args[2:])
            copies[-1].append(args[0])

    def watched() -> None:
        copies.append([])
        with Watch(see):
            upload()

    decode._upload = watched  # type: ignore[method-assign]
    run(engine, waves(make_prompts(ROWS)))
    assert len(copies) > 5
    # Others are within the host's own table.
    buffers = {t.untyped_storage().data_ptr() for t in vars(decode).values() if isinstance(t, Tensor)}
    assert [sum(t.untyped_storage().data_ptr() in buffers for t in each) for each in copies] == [1] * len(copies)


def test_captures_beside_running_rows_write_nothing_of_rows_that_left() -> None:
    """The first row leaves and the last one moves into its slot; then every batch size is captured, which runs the step."""
    requests = [p.request(str(i), 2 + 9 * i) for i, p in enumerate(make_prompts([Row((1,)), Row((2,)), Row((1,), after=9)]))]
    engine, decode = make_recorded(KeepAll(), max_sequences=5)
    for request in requests:
        engine.submit(request)
    while len(decode.running) != 2:
        engine.step()
    assert decode.changed

    def written() -> list[Tensor]:
        layers = [engine.memory.slot_layer(layer) for layer in range(engine.geometry.self_layers)]
        return [
            torch.stack([part[slot, :, :position] for layer in layers for part in layer])
            for slot, position in enumerate(decode.positions)
        ]

    before = written()
    decode.release()
    engine.warm_up()
    assert all(map(torch.equal, before, written()))


def test_the_rotary_tables_are_whole_from_the_start_and_stay_where_they_are() -> None:
    """Graphs read them where they lay when the step was captured."""
    engine, decode = make_recorded(KeepAll(), kv_bytes=1 << 24)
    most = engine.max_length
    assert len(decode.rotary.cos) == len(decode.rotary.sin) == most
    places = decode.rotary.cos.data_ptr(), decode.rotary.sin.data_ptr()
    (prompt,) = make_prompts([Row((1,))])
    complete(engine, [prompt.request("short", 4)])
    long = Request(
        id="long", tokens=prompt.tokens + [5] * (most - 40), images=prompt.images, max_new_tokens=40 - len(prompt.tokens)
    )
    found = run(engine, [[long]])["long"]
    assert (decode.rotary.cos.data_ptr(), decode.rotary.sin.data_ptr()) == places
    wanted = run(make_engine(KeepAll(), kv_bytes=1 << 24), [[long]])["long"]
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=1e-4, atol=2e-4)


def test_slots_that_are_resized_leave_graphs_as_they_are() -> None:
    """The arena stays; where a row lies is told anew."""
    prompts = make_prompts([Row((1,)), Row((2,), after=40)])
    groups = [[prompts[0].request("a", 30)], [prompts[1].request("b", 20)]]
    engine, decode = make_recorded(KeepAll())
    capacities = []
    resize = engine.decode.resize
    engine.decode.resize = lambda to: (capacities.append(to), resize(to))[1]  # type: ignore[method-assign]
    found = run(engine, groups)
    assert len(set(capacities)) > 1
    assert len(decode.recorded) == 2
    wanted = run(make_engine(KeepAll()), groups)
    for id, rows in found.items():
        torch.testing.assert_close(torch.stack(rows), torch.stack(wanted[id]), rtol=1e-4, atol=2e-4)


def test_released_graphs_are_captured_again_in_a_pool_of_their_own() -> None:
    engine, decode = make_recorded(KeepAll())
    prompts = make_prompts([Row((1,))])
    first = complete(engine, [p.request("0", 5) for p in prompts])
    decode.pool = object()
    assert decode.release()
    # A handle whose graphs are gone names no pool any more.
    assert (decode.replays, decode.uncaptured, decode.pool) == ({}, set(), None)
    assert not decode.release()
    assert [c.tokens for c in complete(engine, [p.request("0", 5) for p in prompts])] == [c.tokens for c in first]
    assert len(decode.recorded) == 2


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: operation failed due to a previous error during capture"),
    ],
    ids=["out of memory", "invalidated"],
)
def test_a_capture_that_fails_costs_no_answer(error: RuntimeError, caplog: pytest.LogCaptureFixture) -> None:
    prompts = make_prompts(ROWS)
    engine, decode = make_recorded(TrimmedLlama(0.2), max_sequences=4)
    record = decode._record

    def fail_once(run: Callable[[], object]) -> Callable[[], object]:
        if not decode.recorded:
            decode.recorded.append(0)
            raise error
        return record(run)

    decode._record = fail_once  # type: ignore[method-assign]
    requests = [p.request(str(i), 3 + i) for i, p in enumerate(prompts)]
    wanted = complete(make_engine(TrimmedLlama(0.2), max_sequences=4), requests)
    assert [c.tokens for c in complete(engine, requests)] == [c.tokens for c in wanted]
    assert decode.uncaptured == {4}
    assert set(decode.replays) == {1, 2}
    (record_,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert record_.getMessage() == f"decode steps of 4 rows run without a CUDA graph: {error}"


def test_a_policy_of_another_width_is_captured_anew() -> None:
    engine, decode = make_recorded(ThinK(0.5))
    prompts = make_prompts(BATCHES["mixed tiles"])
    complete(engine, [p.request(str(i), 4) for i, p in enumerate(prompts)])
    assert decode.channels is not None
    width, policy, replays = decode.channels.shape[-1], ThinK(0.25), dict(decode.replays)
    engine.use(ThinK(0.5, SnapKV(0.3)))
    assert decode.replays == replays
    engine.use(policy)
    assert not decode.replays
    found = complete(engine, [p.request(str(i), 4) for i, p in enumerate(prompts)])
    assert decode.channels.shape[-1] == width // 2
    wanted = complete(make_engine(policy), [p.request(str(i), 4) for i, p in enumerate(prompts)])
    assert [c.tokens for c in found] == [c.tokens for c in wanted]


@pytest.mark.parametrize("policy", [KeepAll(), ThinK(0.5)], ids=repr)
def test_serving_begins_with_every_batch_size_captured_once(policy: Policy) -> None:
    """The largest first: smaller ones then find memory to share. None is captured again when its rows come."""
    engine, decode = make_recorded(policy, max_sequences=5)
    stop = threading.Event()
    server = threading.Thread(target=engine.serve, args=(stop,))
    server.start()
    prompts = make_prompts(BATCHES["mixed tiles"])
    found = [engine.submit(p.request(str(i), 4)).result(timeout=60).tokens for i, p in enumerate(prompts)]
    stop.set()
    engine.wake()
    server.join(60)
    assert list(decode.replays) == [5, 4, 2, 1]
    assert len(decode.recorded) == 4
    assert found == [c.tokens for c in complete(make_engine(policy), [p.request(str(i), 4) for i, p in enumerate(prompts)])]


def test_serving_begins_without_graphs_where_there_is_no_memory_for_them(caplog: pytest.LogCaptureFixture) -> None:
    engine, decode = make_recorded(KeepAll(), max_sequences=5)
    forward = decode._forward

    def fail(bucket: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    decode._forward = fail  # type: ignore[method-assign]
    engine.warm_up()
    assert decode.replays == {}
    assert "out of memory while decode steps were captured" in caplog.text
    decode._forward = forward  # type: ignore[method-assign]
    assert complete(engine, [p.request("0", 3) for p in make_prompts([Row((1,))])])
    assert list(decode.replays) == [1]


def test_the_engine_computes_without_cudnns_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose plans take 0.4 seconds for each new shape."""
    seen = []
    encode = make_engine().tower.encode
    engine = make_engine()

    def look(images: list[Image]) -> Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return encode(images)

    monkeypatch.setattr(engine.tower, "encode", look)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    complete(engine, [p.request("0", 3) for p in make_prompts([Row((1,))])])
    assert seen == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_the_engines_own_device_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches, captures and synchronises where torch's current device is."""
    entered: list[Any] = []

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *_: object) -> None:
            entered.append(None)

    monkeypatch.setattr(torch.cuda, "device", Device)
    with computing_on(torch.device("cuda", 1)):
        assert entered == [torch.device("cuda", 1)]
    assert entered[-1] is None
    with computing_on(torch.device("cpu")):
        assert len(entered) == 2


def test_a_graph_is_captured_on_the_models_device_and_disturbs_no_other_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls to torch's capture, which a CPU build lacks: a stream of the device, errors of this thread alone, and whatever
    happens the stream that was current before."""
    _, decode = make_recorded(KeepAll())
    calls: list[tuple[str, Any]] = []

    class Graph:
        def __init__(self, graph: Any, **options: Any) -> None:
            calls.append(("capture", options))

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    class CUDAGraph:
        def replay(self) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"before on {device}")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: calls.append(("current", stream)))
    # torch before 2.12 goes on recording into the pool of a capture that CUDA has invalidated.
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *given: calls.append(("end", given)), raising=False)
    with pytest.raises(RuntimeError, match="previous error"):
        GraphDecode._record(decode, lambda: None)
    options = {"pool": "pool", "stream": "stream of cpu", "capture_error_mode": "thread_local"}
    assert calls == [("capture", options), ("end", (None, "pool")), ("current", "before on cpu")]
    # The next capture gets a pool of its own.
    assert decode.pool is None
    assert lively_model().device.type == "cpu"
