"""The memory of keys and values against a plain model of it, and what its budget means for the engine."""

from __future__ import annotations

import random
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny import Row, complete, drain, finish, lively_model, make_engine, make_prompts, run_alone
from torch import Tensor

from trimming import Grid, KeepAll, Policy, TrimmedLlama
from trimming.costs import Geometry
from trimming.engine import Engine, Image, Request
from trimming.engine.limits import Limit
from trimming.engine.memory import GRAIN, Memory, Segment, spare_bytes
from trimming.engine.scheduler import SLOT_GRAIN

GEOMETRY = Geometry(self_layers=2, cross_layers=3, heads=4, kv_heads=2, head_dim=4)
TOKEN = 2 * 2 * 2 * 4
"""Elements of one token in a slot."""


def make_memory(elements: int = 1 << 13) -> Memory:
    memory = Memory(GEOMETRY, elements * 4, torch.float32, torch.device("cpu"))
    memory.flat.fill_(torch.nan)
    return memory


# ---- against a plain model ----------------------------------------------------------------------------------------------


@dataclass
class Plain:
    """The same promises without any addresses: a list of slots, a list of segments."""

    memory: Memory
    slots: list[list[Tensor]] = field(default_factory=list)
    """A slot's keys and values (KV, capacity, D), layer by layer."""
    segments: list[tuple[Segment, list[Tensor], int]] = field(default_factory=list)
    """With what is in them, and how many use them."""
    peak: int = 0
    segment_peak: int = 0

    @property
    def used(self) -> int:
        return len(self.slots) * TOKEN * self.memory.capacity + self.segment_used

    @property
    def segment_used(self) -> int:
        return sum(segment.size for segment, _, _ in self.segments)

    def gap(self) -> int:
        """Room between the slots and the lowest segment."""
        frontier = len(self.slots) * TOKEN * self.memory.capacity
        return min((s.start for s, _, _ in self.segments if s.size), default=self.memory.size) - frontier

    def largest_hole(self) -> int:
        """From the segments' addresses alone."""
        at, largest = len(self.slots) * TOKEN * self.memory.capacity, 0
        for start, size in [*sorted((s.start, s.size) for s, _, _ in self.segments if s.size), (self.memory.size, 0)]:
            largest, at = max(largest, start - at), start + size
        return largest

    def views(self, slot: int) -> list[Tensor]:
        return [t[slot] for layer in range(GEOMETRY.self_layers) for t in self.memory.slot_layer(layer)]

    def check(self) -> None:
        memory = self.memory
        assert memory.slots == len(self.slots)
        # What is there covers the memory, once.
        parts = [(0, len(self.slots) * TOKEN * memory.capacity), *memory.holes]
        parts += [(segment.start, segment.size) for segment, _, _ in self.segments]
        at = 0
        for start, size in sorted(part for part in parts if part[1]):
            assert start == at
            at = start + size
        assert at == memory.size
        # Holes are coalesced.
        assert memory.holes == sorted(memory.holes)
        assert all(size > 0 for _, size in memory.holes)
        assert all(a + n < b for (a, n), (b, _) in zip(memory.holes, memory.holes[1:], strict=False))
        for slot, content in enumerate(self.slots):
            for found, wanted in zip(self.views(slot), content, strict=True):
                assert torch.equal(found, wanted)
        for segment, content, users in self.segments:
            assert segment.users == users
            assert segment.start % GRAIN == 0
            views = [t for layer in range(len(segment.layers)) for t in memory.segment_layer(segment, layer)]
            for extent in segment.layers:
                assert extent.key % GRAIN == extent.value % GRAIN == 0
            for found, wanted in zip(views, content, strict=True):
                assert torch.equal(found, wanted)
        assert memory.shared == {segment.share: segment for segment, _, _ in self.segments if segment.share is not None}
        self.peak, self.segment_peak = max(self.peak, self.used), max(self.segment_peak, self.segment_used)
        assert memory.free == memory.size - self.used
        assert memory.segment_elements == self.segment_used
        assert (memory.peak_elements, memory.peak_segment_elements) == (self.peak, self.segment_peak)
        assert (memory.peak_bytes, memory.peak_segment_bytes) == (self.peak * 4, self.segment_peak * 4)

    # ---- the calls: each returns whether it went through ----

    def open(self, count: int) -> bool:
        fits = count * TOKEN * self.memory.capacity <= self.gap()
        assert self.memory.open_slots(count) == fits
        for slot in range(len(self.slots), len(self.slots) + count * fits):
            for view in self.views(slot):
                view.normal_()
            self.slots.append([view.clone() for view in self.views(slot)])
        return fits

    def close(self, slot: int) -> bool:
        assert self.memory.close_slot(slot) == len(self.slots) - 1
        last = self.slots.pop()
        if slot < len(self.slots):
            self.slots[slot] = last
        return True

    def resize(self, capacity: int) -> bool:
        old = self.memory.capacity
        fits = len(self.slots) * TOKEN * (capacity - old) <= self.gap()
        assert self.memory.resize(capacity) == fits
        if fits:
            assert self.memory.capacity == capacity
            for slot, content in enumerate(self.slots):
                for found, wanted in zip(self.views(slot), content, strict=True):
                    kept = min(old, capacity)
                    assert torch.equal(found[:, :kept], wanted[:, :kept])
                    found[:, kept:].normal_()
                self.slots[slot] = [view.clone() for view in self.views(slot)]
        return fits

    def allocate(self, rows: list[int], keys: list[int], values: list[int], share: Hashable) -> bool:
        size = sum(
            -(-2 * n * width // GRAIN) * GRAIN for widths in (keys, values) for n, width in zip(rows, widths, strict=True)
        )
        assert self.memory.segment_elements_for(rows, keys, values) == size
        fits = size <= self.largest_hole()
        segment = self.memory.allocate(rows, keys, values, share)
        assert (segment is not None) == fits
        if segment is not None:
            assert (segment.size, segment.share, len(segment.layers)) == (size, share, len(rows))
            views = [t for layer in range(len(rows)) for t in self.memory.segment_layer(segment, layer)]
            shapes = [(2, n, width) for n, *widths in zip(rows, keys, values, strict=True) for width in widths]
            assert [tuple(view.shape) for view in views] == shapes
            self.segments.append((segment, [view.normal_().clone() for view in views], 1))
        return fits

    def find(self, share: Hashable) -> bool:
        place = next((i for i, (s, _, _) in enumerate(self.segments) if share is not None and s.share == share), None)
        found = self.memory.find(share)
        if place is None:
            assert found is None
            return False
        segment, content, users = self.segments[place]
        assert found is segment
        self.segments[place] = (segment, content, users + 1)
        return True

    def release(self, place: int) -> bool:
        segment, content, users = self.segments.pop(place)
        self.memory.release(segment)
        if users > 1:
            self.segments.insert(place, (segment, content, users - 1))
        return True


def snapshot(memory: Memory) -> tuple[Any, ...]:
    counts = (memory.capacity, memory.slots, list(memory.holes), dict(memory.shared), memory.segment_elements)
    return *counts, memory.peak_elements, memory.peak_segment_elements, memory.flat.nan_to_num(9e9).tolist()


@pytest.mark.parametrize("seed", range(8), ids="seed-{}".format)
def test_random_calls_against_a_plain_model(seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    plain = Plain(make_memory(5000))
    assert plain.memory.size == 5000 // GRAIN * GRAIN
    outcomes: dict[tuple[str, bool], int] = {}
    shares = 0
    for step in range(700):
        before = snapshot(plain.memory)
        # It fills for a while, and empties for a while.
        come, go = (2, 1) if step % 40 < 20 else (1, 3)
        calls = ["resize"] + ["allocate", "open"] * come
        calls += ["close"] * (go if plain.slots else 0) + [*["release"] * 2 * go, "find"] * bool(plain.segments)
        call = chance.choice(calls)
        if call == "open":
            done = plain.open(chance.randint(1, 3))
        elif call == "close":
            done = plain.close(chance.randrange(len(plain.slots)))
        elif call == "resize":
            done = plain.resize(chance.choice([1, 3, 4, 8, 12, 16]))
        elif call == "release":
            done = plain.release(chance.randrange(len(plain.segments)))
        elif call == "find":
            done = plain.find(chance.choice([segment.share for segment, _, _ in plain.segments]))
        else:
            rows = [chance.randint(0, 30) for _ in range(GEOMETRY.cross_layers)]
            keys, values = ([chance.randint(1, 6) for _ in rows] for _ in range(2))
            shares += 1
            done = plain.allocate(rows, keys, values, chance.choice([None, shares, ("image", shares)]))
        outcomes[call, done] = outcomes.get((call, done), 0) + 1
        plain.check()
        if not done:
            assert snapshot(plain.memory) == before
        if chance.random() < 0.02:
            plain.memory.reset_peaks()
            plain.peak, plain.segment_peak = plain.used, plain.segment_used
    # Both ways were gone often enough to mean something.
    for call in ("open", "allocate", "resize"):
        assert outcomes[call, True] > 10
        assert outcomes[call, False] > 2
    while plain.slots:
        plain.close(0)
    while plain.segments:
        plain.release(0)
    plain.check()
    assert plain.memory.holes == [(0, plain.memory.size)]


def test_all_slots_are_one_strided_tensor() -> None:
    """Of any layer; what is written through the view is in that slot, layer and place alone."""
    memory = make_memory()
    memory.resize(5)
    memory.open_slots(3)
    memory.flat[: 3 * memory.slot_elements] = 0
    for layer in range(GEOMETRY.self_layers):
        key, value = memory.slot_layer(layer)
        assert key.shape == value.shape == (3, 2, 5, 4)
        key[1, 0, 2] = 10 * layer + 1
        value[2, 1, 4] = 10 * layer + 2
    assert memory.slot_elements == 5 * TOKEN
    assert memory.flat[: memory.slot_elements].count_nonzero() == 0
    written = memory.flat[memory.slot_elements : 3 * memory.slot_elements]
    assert sorted(written[written != 0].tolist()) == sorted([1.0, 2.0, 11.0, 12.0] * 4)


def test_what_is_not_written_reads_as_a_number() -> None:
    """A decode step reads all slots as far as the longest: no weight times NaN is NaN. Neither fresh memory nor what lay there
    before may come through."""
    memory = make_memory(1 << 12)
    assert memory.resize(4)
    assert memory.open_slots(2)
    memory.flat[: 2 * memory.slot_elements] = torch.nan
    memory.close_slot(1)
    assert memory.open_slots(2)
    for layer in range(GEOMETRY.self_layers):
        assert all(t[1:].isfinite().all() for t in memory.slot_layer(layer))
    memory.flat[: 3 * memory.slot_elements] = 1
    assert memory.resize(7)
    for layer in range(GEOMETRY.self_layers):
        assert all(t.isfinite().all() for t in memory.slot_layer(layer))


def test_slots_grow_into_the_room_beside_them_alone() -> None:
    """However large the holes between the segments are."""
    memory = make_memory(1 << 11)
    assert memory.resize(4)
    assert memory.open_slots(2)
    segments = [memory.allocate([rows] * 3) for rows in (16, 8, 8)]
    assert all(segments)
    assert memory.open_slots(memory.holes[0][1] // memory.slot_elements)
    assert memory.holes == []
    memory.release(segments[1])  # type: ignore[arg-type]
    before = snapshot(memory)
    assert memory.holes[0][1] >= 2 * memory.slot_elements
    assert not memory.open_slots(1)
    assert not memory.resize(5)
    assert snapshot(memory) == before
    assert memory.resize(3)
    assert memory.open_slots(1)


def test_widths_default_to_the_head_dimension() -> None:
    memory = make_memory()
    segment = memory.allocate([3, 5, 7])
    assert segment is not None
    assert [tuple(t.shape) for layer in range(3) for t in memory.segment_layer(segment, layer)] == [
        shape for rows in (3, 5, 7) for shape in [(2, rows, 4)] * 2
    ]
    assert segment.size == 6 * GRAIN
    assert segment.start + segment.size == memory.size


def test_segments_say_where_their_layers_lie() -> None:
    """In a table for a decode step's kernels; a part of a model on several devices may have no cross-attention layer."""
    geometry = Geometry(self_layers=1, cross_layers=2, heads=4, kv_heads=2, head_dim=8)
    segment = Memory(geometry, 1 << 14, torch.float32, torch.device("cpu")).allocate([3, 5], [4, 8])
    assert segment is not None
    first, second = segment.layers
    strides = [3 * 4, 5 * 8, 3 * 8, 5 * 8]
    assert segment.places.tolist() == [first.key, second.key, first.value, second.value, *strides, 3, 5, 0, 0]
    none = Memory(Geometry(1, 0, 4, 2, 8), 1 << 14, torch.float32, torch.device("cpu"))
    # torch warns of some things only once, and another test may have been the first.
    torch.set_warn_always(True)
    try:
        segment = none.allocate([])
    finally:
        torch.set_warn_always(False)
    assert segment is not None
    assert segment.places.tolist() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "biases"), [((3, 3), 1), ((3, 5), 2), ((100, 100), 1)])
def test_segments_may_have_something_to_add_to_logits(rows: tuple[int, int], biases: int, dtype: torch.dtype) -> None:
    """In float32, whatever keys are in, for each head of keys; one for all layers, or one each."""
    geometry = Geometry(self_layers=1, cross_layers=2, heads=4, kv_heads=2, head_dim=8)
    memory = Memory(geometry, 1 << 17, dtype, torch.device("cpu"))
    wholes = [memory.allocate(rows, biases=biases) for _ in range(2)]
    for number, segment in enumerate(wholes):
        assert segment is not None
        assert [tuple(bias.shape) for bias in segment.biases if bias is not None] == [(2, n) for n in rows]
        assert len(segment.distinct_biases) == biases
        assert segment.size == memory.segment_elements_for(rows, [8, 8], [8, 8], biases)
        for layer, bias in enumerate(segment.biases):
            assert bias is not None
            bias.fill_(1000.1 * (number + 1) + (layer if biases > 1 else 0))
            for held in memory.segment_layer(segment, layer):
                held.fill_(number)
    for number, segment in enumerate(wholes):
        assert segment is not None
        for layer, bias in enumerate(segment.biases):
            wanted = torch.full((2, rows[layer]), 1000.1 * (number + 1) + (layer if biases > 1 else 0))
            assert bias is not None
            assert bias.equal(wanted)
            begin = segment.places.view(6, 2)[5, layer]
            assert memory.biases[begin : begin + 2 * rows[layer]].equal(wanted.flatten())
            assert all(held.eq(number).all() for held in memory.segment_layer(segment, layer))


def test_sharing_is_by_what_was_said_and_ends_with_the_last_user() -> None:
    memory = make_memory()
    segment = memory.allocate([4] * 3, share="kept")
    assert memory.find("kept") is segment
    assert memory.find("other") is None
    assert memory.find(None) is None
    private = memory.allocate([4] * 3)
    assert private is not None
    assert segment is not None
    assert memory.shared == {"kept": segment}
    memory.release(segment)
    assert memory.find("kept") is segment
    memory.release(segment)
    memory.release(segment)
    assert memory.find("kept") is None
    memory.release(private)
    assert memory.free == memory.size


def test_spare_bytes_of_a_cpu_leave_room_for_others() -> None:
    assert 1 << 28 <= spare_bytes(torch.device("cpu")) <= 4 << 30


# ---- what a budget means for the engine ---------------------------------------------------------------------------------

IMAGES = 24
"""Adjacent ones, so that decoding sees all of them: as in real models, cross-attention then has nearly all of the memory."""


def visual_requests(count: int, new_tokens: int = 4) -> list[Request]:
    """Prompts whose images are as large as they get, and no two the same."""
    prompts = make_prompts([Row((4,) * IMAGES, before=0, after=0)] * 2)
    requests = []
    for number in range(count):
        prompt = prompts[number % 2]
        images = [Image(f"{number}/{i}", image.pixels, image.ratio_id) for i, image in enumerate(prompt.images)]
        requests.append(Request(id=str(number), tokens=prompt.tokens, images=images, max_new_tokens=new_tokens))
    return requests


def need_of(kept: int, capacity: int = 32) -> int:
    """Bytes of one running sequence in fp32."""
    geometry = Geometry.of(lively_model().config)
    return capacity * geometry.self_kv_bytes(4) + kept * geometry.cross_kv_bytes(4)


def test_keeping_half_lets_nearly_twice_as_many_run() -> None:
    features = IMAGES * 40
    full, half = need_of(features), need_of(features // 2)
    budget = 4 * full
    peaks = {}
    for policy in (KeepAll(), Grid(0.5)):
        engine = make_engine(policy, kv_bytes=budget)
        complete(engine, visual_requests(12))
        peaks[policy] = engine.statistics.peak_sequences
        assert engine.statistics.peak_kv_bytes <= budget
        kept = features if policy == KeepAll() else features // 2
        assert engine.statistics.peak_kv_bytes == peaks[policy] * need_of(kept)
        assert engine.statistics.peak_cross_kv_bytes == peaks[policy] * need_of(kept, capacity=0)
    assert peaks[KeepAll()] == 4
    assert peaks[Grid(0.5)] == budget // half == 7


def test_a_request_that_can_never_fit_fails_alone() -> None:
    small, large = make_prompts([Row((2,)), Row((4,) * 3, after=0)])
    asked = [small.request("0"), large.request("1"), small.request("2"), small.request("3", 100), small.request("4")]
    engine = make_engine(kv_bytes=need_of(100))
    futures = finish(engine, asked)
    wanted = run_alone(lively_model(), small, "0", KeepAll()).tokens
    for number in (0, 2, 4):
        assert futures[number].result().tokens == wanted
    for number, need in ((1, need_of(120)), (3, need_of(20, 128))):
        with pytest.raises(
            ValueError, match=r"^the row needs \d+\.\d MiB for keys and values, and the engine has \d+\.\d$"
        ) as e:
            futures[number].result()
        assert f"{need / 2**20:.1f} MiB" in str(e.value)
        assert f"has {need_of(100) / 2**20:.1f}" in str(e.value)


@pytest.mark.parametrize("policy", [KeepAll(), Grid(0.5)], ids=repr)
def test_what_just_fits_runs_whoever_was_there_before(policy: Policy) -> None:
    """Slots that were long enough for another must not keep it out."""
    (prompt,) = make_prompts([Row((4, 4, 4), after=0)])
    long = Request(id="long", tokens=[1, 5, 6], max_new_tokens=SLOT_GRAIN * 2 - 3)
    engine = make_engine(policy, kv_bytes=need_of(120 if policy == KeepAll() else 60))
    for order in (["long", "visual"], ["visual", "long"]):
        futures = finish(engine, [long if name == "long" else prompt.request("visual") for name in order])
        assert [len(future.result().tokens) for future in futures] == [61 if name == "long" else 10 for name in order]


@pytest.mark.parametrize("policy", [KeepAll(), TrimmedLlama(0.3)], ids=repr)
def test_a_budget_for_one_gives_the_same_tokens(policy: Policy) -> None:
    rows = [Row((4,)), Row((4,), after=6), Row((3,)), Row((), before=6), Row((4,), before=0), Row((2, 4), after=0)]
    prompts = make_prompts(rows)
    requests = [prompt.request(str(i), 4 + 3 * i) for i, prompt in enumerate(prompts)]
    roomy, tight = make_engine(policy), make_engine(policy, kv_bytes=need_of(60))
    wanted, found = complete(roomy, requests), complete(tight, requests)
    assert [c.tokens for c in found] == [c.tokens for c in wanted]
    assert [c.trim.kept.tolist() for c in found] == [c.trim.kept.tolist() for c in wanted]
    assert roomy.statistics.peak_sequences == 6
    assert tight.statistics.peak_sequences <= 2


def guess_nothing(engine: Engine) -> None:
    """The engine expects no keys and values of images, and does not learn."""
    engine._expected = lambda sequence, here: 0  # type: ignore[method-assign]


def test_a_guess_that_was_too_low_costs_only_time() -> None:
    """The prefill finds no room for all it was given: it leaves nothing behind, and half of them are tried."""
    prompts = make_prompts([Row((4,), after=n) for n in (2, 3, 4, 5, 6, 7)])
    requests = [prompt.request(str(i), 5) for i, prompt in enumerate(prompts)]
    wanted = complete(make_engine(TrimmedLlama(0.3)), requests)
    engine = make_engine(TrimmedLlama(0.3), kv_bytes=3 * need_of(40))
    sizes: list[int] = []
    inner = engine.prefill

    def note(batch: Any) -> Tensor:
        sizes.append(len(batch))
        return inner(batch)

    engine.prefill = note  # type: ignore[assignment]
    guess_nothing(engine)
    futures = [engine.submit(request) for request in requests]

    def held_by_who_runs() -> None:
        segments = {s.segment for s in engine.decode.running if s.segment is not None}
        assert engine.memory.segment_elements == sum(segment.size for segment in segments)
        assert engine.memory.slots == len(engine.decode.running)

    drain(engine, held_by_who_runs)
    # As many as there is room for slots, and then half of them.
    assert sizes[:2] == [5, 2]
    assert [future.result().tokens for future in futures] == [completion.tokens for completion in wanted]


def test_a_full_memory_is_not_tried_again_before_somebody_leaves() -> None:
    prompts = make_prompts([Row((4,), after=n) for n in (2, 3, 4, 5, 6)])
    # Two fit, and the slot of a third.
    engine = make_engine(KeepAll(), kv_bytes=2 * need_of(40) + need_of(2))
    engine.prefill_sequences = Limit(2)
    guess_nothing(engine)
    sizes: list[tuple[int, int]] = []
    inner = engine.prefill

    def note(batch: Any) -> Tensor:
        sizes.append((len(batch), engine.statistics.decode_steps))
        return inner(batch)

    engine.prefill = note  # type: ignore[assignment]
    completions = complete(engine, [prompt.request(str(i)) for i, prompt in enumerate(prompts)])
    assert engine.statistics.peak_sequences == 2
    assert sizes == [(2, 0), (1, 0), (2, 9), (1, 9), (1, 18)]
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        assert completion.tokens == run_alone(lively_model(), prompt, str(number), KeepAll()).tokens


def test_records_say_what_the_memory_holds() -> None:
    (prompt,) = make_prompts([Row((3,))])
    (completion,) = complete(make_engine(Grid(0.5)), [prompt.request("0")])
    assert completion.trim.cross_kv_bytes == need_of(15, capacity=0)
    # Rounded up to whole grains: keys and values of three layers.
    assert completion.trim.cross_kv_bytes_allocated == 6 * -(-2 * 15 * 16 // GRAIN) * GRAIN * 4
    assert completion.trim.visual_tokens == 30
