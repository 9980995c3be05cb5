"""The engine: requests wait, are prefilled as memory allows, decode side by side, and leave one by one."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import TypeVar, get_args

import torch
from torch import Tensor
from transformers import MllamaForConditionalGeneration

from trimming.clustering import Clustering
from trimming.costs import Costs, Geometry
from trimming.engine.decode import Decode
from trimming.engine.images import ImageCache, encoded_images, encoding_of
from trimming.engine.layers import Rotary, computing_on
from trimming.engine.limits import Limit
from trimming.engine.memory import Memory
from trimming.engine.onednn import through_onednn
from trimming.engine.prefill import NoRoomError, Prefill
from trimming.engine.request import GROUP_ROWS, GROUP_TOKENS, Completion, Image, KeptSets, Request, groups
from trimming.engine.sampling import choose
from trimming.engine.sequence import Encoded, Group, Sequence_, ceil_to, image_spans
from trimming.engine.sharded import ShardedMemory
from trimming.engine.stages import stage_geometries, stages
from trimming.mllama import Rows
from trimming.policies import Policy
from trimming.tower import Tower, TowerPolicy, TowerTiles

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

TOWER_IMAGES = 8
"""Images that go through the tower at once, at most."""
PREFILL_SEQUENCES = GROUP_ROWS
PREFILL_TOKENS = 8192
PREFILL_VISUAL_TOKENS = 1 << 16
"""Prompts, their tokens, and the visual tokens of their images, that are prefilled at once, at most: ten images of four tiles,
or twenty of two. What is longer goes alone, and so do prompts that decide together and are more."""
DECODE_PATIENCE = 1024
"""Decode steps before a lowered number of sequences is raised: preempted sequences start over, which is expensive."""
SILENT_TOKENS = 8
"""Tokens without text, special ones, that a stop string may hold and still be seen at once."""
SLOT_GRAIN = 32
"""Slots have room for a multiple of this many tokens."""


@dataclass(slots=True)
class Statistics:
    """Counts since ``Engine.reset_statistics``. Peaks of memory are in bytes."""

    images_encoded: int = 0
    image_hits: int = 0
    """Images of requests that did not go through the tower, as their like had."""
    prefill_tokens: int = 0
    decode_steps: int = 0
    decode_tokens: int = 0
    """Tokens that decode steps gave; each sequence's first one comes from its prefill."""
    peak_sequences: int = 0
    peak_kv_bytes: int = 0
    peak_cross_kv_bytes: int = 0
    cross_kv_byte_seconds: float = 0.0
    """Bytes of images' keys and values that were held, times the seconds of the stages (``Engine.seconds``) that they were held
    for. What several sequences share is counted once."""
    cross_kv_byte_seconds_full: float = 0.0
    """What the same would have been with all features kept of the same rows' images, by formula; rows of the same images share
    theirs then."""
    cross_kv_bytes_read: int = 0
    """Bytes of images' keys and values that decode steps attended to; what sequences share once a step, though a kernel may
    read it for each of them."""


class Engine:
    """Continuous batching for Mllama. ``submit`` may be called from any thread; ``step``, ``generate`` and ``serve`` from one.

    Args:
        model: left as it is.
        policy: which visual features stay in the cache.
        rows: what rows before the image do; see ``trimming.trim``.
        normalise: from uint8 tiles (n, 3, side, side) to the model's pixels, in its dtype and on its device.
        eos: tokens that end an answer.
        kv_bytes: memory for keys and values; as many sequences run as fit in. Of a model on several devices either each
            device's or the sum, which is then shared out by layers.
        max_sequences: and no more than these.
        image_cache_bytes: memory for encoded images that later requests may share; 0 encodes every request's images.
        tower_tiles: what becomes of padding tiles in the vision tower: see ``trimming.tower.TowerTiles``. By default
            ``pooled``; ``all`` under transformers' rows, which see padding tiles.
        tower_policy: which rows of real tiles go on through the tower, layer by layer; None: all.
        detokenize: from tokens to text, for ``Completion.text`` and stop strings.
        kept_sets: ``image``: requests that come together (``submit_together``, ``generate``) decide together, by the sum of
            their attention, and share what they keep. ``question``: each decides for itself.
    """

    def __init__(
        self,
        model: MllamaForConditionalGeneration,
        policy: Policy,
        *,
        rows: Rows = "meta",
        normalise: Callable[[Tensor], Tensor],
        eos: Collection[int],
        kv_bytes: int | Sequence[int],
        max_sequences: int = 256,
        image_cache_bytes: int = 1 << 30,
        tower_tiles: TowerTiles | None = None,
        tower_policy: TowerPolicy | None = None,
        detokenize: Callable[[Sequence[int]], str] | None = None,
        kept_sets: KeptSets = "image",
    ) -> None:
        tower_tiles = tower_tiles or ("all" if rows == "transformers" else "pooled")
        for name, given, kind in (
            ("rows", rows, Rows),
            ("tower_tiles", tower_tiles, TowerTiles),
            ("kept_sets", kept_sets, KeptSets),
        ):
            if given not in get_args(kind):
                raise ValueError(f"{name}={given!r} is none of {get_args(kind)}")
        model = through_onednn(model)
        self.model, self.policy, self.eos, self.detokenize = model, policy, frozenset(eos), detokenize
        self.kept_sets = kept_sets
        self.max_sequences = Limit(max_sequences, DECODE_PATIENCE)
        self.tower_images, self.prefill_sequences = Limit(TOWER_IMAGES), Limit(PREFILL_SEQUENCES)
        self.image_token: int = model.config.image_token_index
        self.vocabulary: int = model.get_input_embeddings().num_embeddings
        self.max_length: int = model.config.text_config.max_position_embeddings
        vision = model.config.vision_config
        self.side: int = vision.image_size
        # The first is that of ratio_id 1.
        self.tiles_of_ratio: list[int] = [rows * columns for rows, columns in vision.supported_aspect_ratios]
        self.tower = Tower(model, normalise, tower_tiles, tower_policy, keep_padding=rows == "transformers")
        self.images = ImageCache(image_cache_bytes)
        self.geometry = Geometry.of(model.config)
        self.stages = stages(model)
        self.memory = _memory_for(model, kv_bytes)
        rotary = Rotary(model)
        self.prefill = Prefill(model, policy, rows, self.memory, rotary, self.tower)
        self.decode = _decode_for(model, self.memory, rotary, max_sequences)
        if policy.slices:
            self.decode.slice_keys(policy.key_width(self.geometry.head_dim))
        self.decode.weigh(self.prefill.weighs)
        self.waiting: deque[Sequence_] = deque()
        self.statistics = Statistics()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Seconds of the device by stage: ``tower`` (with projector and clustering), ``prefill``, ``decode``."""
        self._share = _first_guess(policy)
        # What share of an image's features is left once they are merged.
        self._left = 1.0
        # How many running sequences have which images, and what these would hold if all features were kept.
        self._shown: Counter[Hashable] = Counter()
        self._full_elements = 0
        # Something that should have fitted did not: no use in trying before a sequence has left.
        self._full_house = False
        self.failed: BaseException | None = None
        """What ended ``serve`` too early."""
        self._warned = False
        # Keys of images that went through the tower with one that it refused: each goes alone.
        self._suspects: set[str] = set()
        self._arrived = threading.Condition()

    # ---- the outside ----------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Future[Completion]:
        """The completion to come.

        Raises ``ValueError`` for a request that can't be run, and ``RuntimeError`` once ``serve`` has failed.
        """
        return self.submit_together([request])[0]

    def submit_together(self, requests: Sequence[Request]) -> list[Future[Completion]]:
        """The completions to come of requests about the same images, one of ``groups``, which decide together what is kept.

        Raises as ``submit`` does, before any is submitted; also for requests that differ in their images, or in which of them
        their texts see last.
        """
        sequences = [self._sequence(request) for request in requests]
        if self.kept_sets == "image" and len(sequences) > 1:
            tokens = sum(len(request.tokens) for request in requests)
            if len(sequences) > GROUP_ROWS or tokens > GROUP_TOKENS:
                most = f"{GROUP_ROWS} requests of {GROUP_TOKENS:,} tokens at most"
                raise ValueError(f"{len(sequences)} requests of {tokens:,} tokens are too many to decide together: give {most}")
            group = sequences[0].group
            for sequence in sequences:
                if not sequence.spans or sequence.group.shown != group.shown:
                    raise ValueError(f"request {sequence.request.id!r} is not about the images of {requests[0].id!r}")
            self._unite(sequences)
        self._enqueue(sequences)
        return [sequence.future for sequence in sequences]

    def _unite(self, sequences: Sequence[Sequence_]) -> None:
        """Lets them decide together."""
        group = sequences[0].group
        for sequence in sequences:
            sequence.group = group
        group.size = group.waiting = len(sequences)

    def _enqueue(self, sequences: Sequence[Sequence_]) -> None:
        with self._arrived:
            if self.failed is not None:
                raise RuntimeError(f"the engine has failed: {self.failed}") from self.failed
            self.waiting.extend(sequences)
            self._arrived.notify()

    def _sequence(self, request: Request) -> Sequence_:
        """Raises ``ValueError`` for a request that can't be run."""
        self.check(request)
        future: Future[Completion] = Future()
        # It can no longer be cancelled: the engine would trip over it when it has its result.
        future.set_running_or_notify_cancel()
        sequence = Sequence_(request, future, image_spans(request.tokens, self.image_token))
        if not request.sampling.greedy:
            sequence.draws = request.sampling.stream(request.id, request.max_new_tokens)
        return sequence

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """All completions, in order. Raises ``ValueError`` for a request that can't be run, before any is."""
        sequences = [self._sequence(request) for request in requests]
        together = [[place] for place in range(len(sequences))]
        if self.kept_sets == "image":
            whose = [sequence.group.shown if sequence.spans else () for sequence in sequences]
            together = groups(whose, [len(sequence.request.tokens) for sequence in sequences])
        for places in together:
            party = [sequences[place] for place in places]
            self._unite(party)
            self._enqueue(party)
        while not all(sequence.future.done() for sequence in sequences):
            self.step()
        return [sequence.future.result() for sequence in sequences]

    def serve(self, stop: threading.Event) -> None:
        """Steps until ``stop`` is set (and ``wake`` called), and waits while there is nothing to do.

        Raises what ended it too early, such as a device's failure; every request under way then has it for its result, and no
        other is taken.
        """
        try:
            self.warm_up()
            while not stop.is_set():
                with self._arrived:
                    self._arrived.wait_for(lambda: self.waiting or self.decode.running or stop.is_set())
                self.step()
        except BaseException as error:
            with self._arrived:
                self.failed = error
                lost = [*self.decode.running, *self.waiting]
            for sequence in lost:
                if not sequence.future.done():
                    sequence.future.set_exception(error)
            raise

    def warm_up(self) -> None:
        """Compiles and captures what decode steps need, which the first steps would have to do; on CUDA some seconds. ``serve``
        begins with it."""
        try:
            with computing_on(self.model.device):
                self.decode.warm_up()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            # Steps capture as they come, once there is memory.
            self._warn("out of memory while decode steps were captured")

    def use(self, policy: Policy) -> None:
        """``policy`` for every request from now on; images that are encoded already stay so, if it can make use of them.

        Raises ``RuntimeError`` while requests wait or run, which were submitted under another.
        """
        with self._arrived:
            self._check_idle()
            if policy.slices != self.policy.slices:
                raise RuntimeError("a policy that slices keys needs an engine of its own")
            if policy.slices:
                self.decode.slice_keys(policy.key_width(self.geometry.head_dim))
            self.policy = self.prefill.policy = policy
            self.decode.weigh(self.prefill.weighs)
            self._left = 1.0
            self._share = _first_guess(policy)

    def use_tower(self, policy: TowerPolicy | None) -> None:
        """``policy`` for every image from now on. Raises ``ValueError`` as the engine does, and ``RuntimeError`` as ``use``."""
        with self._arrived:
            self._check_idle()
            self.tower = self.prefill.tower = self.tower.under(policy)
            self.decode.weigh(self.prefill.weighs)
            self._left = 1.0
            self._share = _first_guess(self.policy)

    def _check_idle(self) -> None:
        if self.waiting or self.decode.running:
            raise RuntimeError("the policy can't change while requests wait or run")

    def wake(self) -> None:
        """Lets ``serve`` look at its ``stop``."""
        with self._arrived:
            self._arrived.notify()

    @torch.inference_mode()
    def step(self) -> None:
        """Admits what fits, then one token for each running sequence."""
        with computing_on(self.model.device):
            self._admit()
            if self.decode.running:
                self._decode()

    def reset_statistics(self) -> None:
        self.statistics = Statistics()
        self.seconds.clear()
        self.memory.reset_peaks()

    def check(self, request: Request) -> None:
        """Raises ``ValueError`` for a request that can't be run."""
        places = request.tokens.count(self.image_token)
        if places != len(request.images):
            raise ValueError(f"request {request.id!r} has {places} image tokens for {len(request.images)} images")
        length = len(request.tokens) + request.max_new_tokens
        if length > self.max_length:
            raise ValueError(f"request {request.id!r} may reach {length} tokens, over the model's {self.max_length}")
        # On CUDA an index out of bounds would end the whole engine.
        if not 0 <= min(request.tokens) <= max(request.tokens) < self.vocabulary:
            raise ValueError(f"request {request.id!r} has a token outside of the vocabulary of {self.vocabulary}")
        if request.stop and self.detokenize is None:
            raise ValueError(f"request {request.id!r} has stop={request.stop}, which needs text: give the engine detokenize")
        for image in request.images:
            if fault := self._fault(image):
                raise ValueError(f"request {request.id!r} has an image {image.key!r} of {fault}")

    def _fault(self, image: Image) -> str | None:
        """What is wrong with it and what would be right, if anything."""
        shape, side, counts = tuple(image.pixels.shape), self.side, self.tiles_of_ratio
        if shape[1:] != (3, side, side):
            return f"pixels {shape}; the model's are (tiles, 3, {side}, {side})"
        tiles, id = shape[0], image.ratio_id
        if not 1 <= tiles <= self.tower.max_tiles:
            return f"{tiles} tiles, not 1 to {self.tower.max_tiles}"
        if not 1 <= id <= self.tower.max_ratio_id:
            return f"ratio_id={id}, not 1 to {self.tower.max_ratio_id}"
        if counts[id - 1] != tiles:
            fitting = ", ".join(str(n) for n, count in enumerate(counts, 1) if count == tiles)
            return f"{tiles} tiles and ratio_id={id}, which arranges {counts[id - 1]}; ids of {tiles} tiles are {fitting}"
        return None

    # ---- admission ------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Prefills waiting sequences while there is room; a few at a time, as a prefill of one reads all weights too."""
        while self.waiting and not self._full_house:
            first = next(self._next_parties())
            if len(first) > self.max_sequences.now:
                if not self._decide_ahead(first):
                    return
                continue
            batch, whole = self._fitting()
            enough = whole or len(batch) >= min(len(self.waiting), max(1, len(self.decode.running) // 8))
            if self.decode.running and not enough:
                return
            # With nothing running nothing will be freed: the estimate may be too high, so the first are tried all the same.
            if not self._start(batch or first):
                return

    def _next_parties(self) -> Iterator[list[Sequence_]]:
        """The first waiting sequences, in parties."""
        # A copy: other threads submit meanwhile.
        return self._parties(list(islice(self.waiting, self.prefill_sequences.now + 1 + GROUP_ROWS)))

    def _parties(self, sequences: Iterable[Sequence_]) -> Iterator[list[Sequence_]]:
        """``sequences`` parted into those that must be prefilled at once: a group that has yet to decide by what its members
        look at, and whose sequences stand one behind the other then, or one alone."""
        for group, several in groupby(sequences, key=lambda sequence: sequence.group):
            party = list(several)
            if self._looks and group.decision is None:
                yield party
            else:
                yield from ([sequence] for sequence in party)

    @property
    def _looks(self) -> bool:
        """Whether what is kept follows from texts, rather than from images alone."""
        return self.policy.where != "features" or self.policy.slices

    def _fitting(self) -> tuple[list[Sequence_], bool]:
        """The first waiting sequences that fit into the memory beside the running ones, and whether a prefill takes no more."""
        running, memory = self.decode.running, self.memory
        capacity = max((s.capacity for s in running), default=0)
        used = memory.segment_elements
        here, sharing = {s.group.keys for s in running}, {s.group for s in running}
        batch: list[Sequence_] = []
        tokens = visual = 0
        seen: set[str] = set()
        for party in self._next_parties():
            group = party[0].group
            tokens += sum(len(sequence.request.tokens) for sequence in party)
            # A group that decides by its texts has keys and values of its own, until they are stored.
            new = [image for image in group.images if self._looks or image.key not in seen]
            visual += int(sum(len(image.pixels) for image in new) * self.tower.tokens * self._left)
            seen |= {image.key for image in new}
            capacity = max(capacity, *(sequence.capacity for sequence in party))
            used += 0 if group in sharing else self._expected(group, group.keys in here)
            together = len(running) + len(batch) + len(party)
            large = tokens > PREFILL_TOKENS or visual > PREFILL_VISUAL_TOKENS
            if batch and (len(batch) + len(party) > self.prefill_sequences.now or large):
                return batch, True
            fits = memory.fits(together, ceil_to(capacity, SLOT_GRAIN), used)
            if together > self.max_sequences.now or not fits:
                break
            batch += party
            here.add(group.keys)
            sharing.add(group)
        return batch, False

    def _expected(self, group: Group, here: bool) -> int:
        """Elements that its segment will take, by what such groups took so far."""
        if group.cross_need is not None:
            return group.cross_need
        return int(self._full(group) * self._share[here])

    def _full(self, group: Group) -> int:
        """Elements that all features of its images take, of those that decoding sees."""
        if not group.images:
            return 0
        first, last = group.last_images
        rows = sum(len(image.pixels) for image in group.images[first:last]) * self.tower.tokens
        layers, width = self.geometry.cross_layers, self.geometry.head_dim
        return self.memory.segment_elements_for([rows] * layers, [width] * layers, [width] * layers)

    def _start(self, batch: list[Sequence_]) -> bool:
        """Encodes and prefills ``batch``, which stands first among the waiting, or its first ones; False where nothing more can
        start now."""
        if not self._encode(batch):
            return not self._full_house
        batch = self._within_bounds(batch)
        here = {s.group.keys for s in self.decode.running}
        first: list[int] = []

        def prefill() -> Tensor:
            if not self._reserve(batch):
                raise NoRoomError
            tokens = self._choose(self.prefill(batch), batch)
            first.extend(tokens.tolist())
            # Nothing fails any more. Within what is timed: what they hold counts from here on.
            for sequence in batch:
                self._enters(sequence)
            return tokens

        tokens, failure = self._attempt("prefill", prefill)
        if tokens is None:
            assert failure is not None
            self._unreserve(batch)
            return self._no_room(batch) if isinstance(failure, NoRoomError) else self._prefill_failed(batch, failure)
        self.prefill_sequences.passed(len(batch))
        self._learn(batch, here)
        for sequence in batch:
            self.waiting.remove(sequence)
        self.decode.add(batch, tokens)
        self.statistics.prefill_tokens += sum(len(s.request.tokens) for s in batch)
        self.statistics.peak_sequences = max(self.statistics.peak_sequences, len(self.decode.running))
        self._note_peaks()
        self._say(batch, first)
        return True

    def _within_bounds(self, batch: list[Sequence_]) -> list[Sequence_]:
        """Those of ``batch`` whose features a prefill may take: how many are left of an image that is merged is known only once
        it is encoded."""
        within: list[Sequence_] = []
        seen: dict[tuple[int, int], int] = {}
        for number, party in enumerate(self._parties(batch)):
            # A group that decides by its texts has keys and values of its own, until they are stored.
            seen |= {(id(image), number * self._looks): len(image.features) for image in party[0].group.encoded}
            if within and sum(seen.values()) > PREFILL_VISUAL_TOKENS:
                break
            within += party
        return within

    def _decide_ahead(self, party: list[Sequence_], at_once: int | None = None) -> bool:
        """Has ``party`` decide what is kept, so that its sequences can start one by one where they can't at once; False where
        nothing more can start now. ``at_once`` of them look at a time: fewer where memory runs out."""
        if not self._encode(party):
            return not self._full_house
        at_once = at_once or len(party)
        _, failure = self._attempt("prefill", partial(self.prefill.decide, party, at_once))
        if failure is None:
            return True
        if out_of_memory(failure):
            if at_once > 1 and not self.policy.slices:
                return self._decide_ahead(party, at_once // 2)
            if self._make_room(party[0].group):
                return not self._full_house
        self._fail(party, failure)
        return True

    def _attempt(
        self, stage: str, do: Callable[[], Result], may_fail: Callable[[Exception], bool] = lambda error: True
    ) -> tuple[Result | None, Exception | None]:
        """What ``do`` gives, or what it failed with, timed as ``stage``. Raises where it may not fail so, and where the device
        itself has failed."""
        began = time.perf_counter()
        try:
            return do(), None
        except Exception as error:
            if not may_fail(error) or not self._healthy():
                raise
            # The traceback's frames hold the batch's tensors, which the next attempt may need the memory of.
            return None, error.with_traceback(None)
        finally:
            self._charge(stage, time.perf_counter() - began)

    def _charge(self, stage: str, seconds: float) -> None:
        """Counts seconds, and what has been held for so long."""
        self.seconds[stage] += seconds
        itemsize = self.memory.itemsize
        self.statistics.cross_kv_byte_seconds += self.memory.segment_elements * itemsize * seconds
        self.statistics.cross_kv_byte_seconds_full += self._full_elements * itemsize * seconds

    def _enters(self, sequence: Sequence_) -> None:
        """Takes a note that it has been prefilled."""
        group = sequence.group
        self._waits_no_more(group)
        if sequence.segment is not None:
            self._shown[group.shown] += 1
            if self._shown[group.shown] == 1:
                self._full_elements += self._full(group)

    def _waits_no_more(self, group: Group) -> None:
        """One of its sequences less."""
        group.waiting -= 1
        if not group.waiting:
            group.encoded = []

    def _reserve(self, batch: Sequence[Sequence_]) -> bool:
        """Opens a slot for each sequence."""
        memory = self.memory
        need = ceil_to(max(s.capacity for s in [*self.decode.running, *batch]), SLOT_GRAIN)
        # Slots that are far too long for what runs now would keep others out.
        fits = need <= memory.capacity <= 2 * need if memory.slots else need == memory.capacity
        if not fits and not self.decode.resize(need):
            return False
        first = memory.slots
        if not memory.open_slots(len(batch)):
            return False
        for i, sequence in enumerate(batch):
            sequence.slot = first + i
        return True

    def _unreserve(self, batch: Sequence[Sequence_]) -> None:
        for sequence in reversed(batch):
            if sequence.slot >= 0:
                self.memory.close_slot(sequence.slot)
                sequence.slot = -1
            if sequence.segment is not None:
                self.memory.release(sequence.segment)
                sequence.segment = None

    def _no_room(self, batch: list[Sequence_]) -> bool:
        """Half the batch may fit; one alone in an empty memory never will."""
        parties = list(self._parties(batch))
        if len(parties) > 1:
            return self._start([sequence for party in parties[: len(parties) // 2] for sequence in party])
        if self.decode.running:
            self._full_house = True
            return False
        if len(batch) > 1:
            return self._decide_ahead(batch)
        (sequence,) = batch
        need = self.memory.slot_elements_for(ceil_to(sequence.capacity, SLOT_GRAIN)) + self._expected(sequence.group, False)
        need_mib, have_mib = (n * self.memory.itemsize / 2**20 for n in (need, self.memory.size))
        said = f"the row needs {need_mib:.1f} MiB for keys and values, and the engine has {have_mib:.1f}"
        self._fail(batch, ValueError(said))
        return True

    def _prefill_failed(self, batch: list[Sequence_], error: Exception) -> bool:
        """Takes a failed batch apart, so that only its culprit fails, with those that would have decided with it."""
        parties = list(self._parties(batch))
        if len(parties) == 1:
            if out_of_memory(error) and self._make_room(batch[0].group):
                return not self._full_house
            if out_of_memory(error) and len(batch) > 1 and not self.policy.slices:
                return self._decide_ahead(batch, len(batch) // 2)
            self._fail(batch, error)
            return True
        if out_of_memory(error):
            self.prefill_sequences.lower(len(batch) // 2)
            self._warn(f"out of memory in a prefill of {len(batch)} prompts: {len(batch) // 2} at a time for now")
            return True
        started = [self._start(party) for party in parties]
        return all(started)

    def _learn(self, batch: Sequence[Sequence_], here: set[tuple[str, ...]]) -> None:
        seen = set()
        for group in dict.fromkeys(sequence.group for sequence in batch):
            segments = [sequence.segment for sequence in batch if sequence.group is group]
            segment = segments[0]
            if segment is None:
                continue
            known = group.keys in here
            took = 0 if segment in seen or (known and segment.users > len(segments)) else segment.size
            seen.add(segment)
            # Rather a little too much: a sequence that does not fit after all costs its prefill.
            self._share[known] += 0.2 * (1.05 * took / self._full(group) - self._share[known])
            here.add(group.keys)

    # ---- images ---------------------------------------------------------------------------------------------------------

    def _encode(self, batch: Sequence[Sequence_]) -> bool:
        """Gives every group of ``batch`` its encoded images; False where one of them could not have them: it has failed, waits
        for another to leave, or lost them to a neighbour that ran out of memory."""
        fine = True
        groups = dict.fromkeys(sequence.group for sequence in batch)
        for group in groups:
            while fine and len(group.encoded) < len(group.images):
                fine = self._encode_next(group)
        return fine and all(len(group.encoded) == len(group.images) for group in groups)

    def _encode_next(self, group: Group) -> bool:
        """The group's next image: from the cache, as it is or merged anew, or from the tower, with others of its tile count."""
        image = group.images[len(group.encoded)]
        cached = self._cached(image, self.policy.clustering)
        if cached is not None:
            group.encoded.append(cached)
            self.statistics.image_hits += group.waiting
            return True
        # With all its features, by an engine that shares the cache.
        whole = self._cached(image, None)
        together = [(group, image)] if whole else self._alike(group, image)
        pictures = [image for _, image in together]

        def encode() -> list[Encoded]:
            if whole:
                encoding = encoding_of(whole, self.tower.tokens)
            else:
                look = "class_attention" in self.policy.looks_at
                encoding = self.tower.look(pictures) if look else self.tower.encode(pictures)
            encoded = encoded_images(len(image.pixels), encoding, self.policy.clustering)
            self._synchronise()
            return encoded

        encoded, failure = self._attempt("tower", encode)
        if encoded is None:
            assert failure is not None
            return self._tower_failed(together, failure)
        self.tower_images.passed(len(together))
        self.statistics.images_encoded += 0 if whole else len(together)
        for (owner, image), one in zip(together, encoded, strict=True):
            if self.images.limit_bytes:
                self.images.put(image.key, one, self.policy.clustering, self.tower.policy)
            owner.encoded.append(one)
            self.statistics.image_hits += owner.waiting - (0 if whole else 1)
            self._left += 0.2 * (one.real(self.tower.tokens) / (one.tiles * self.tower.tokens) - self._left)
        return True

    def _cached(self, image: Image, clustering: Clustering | None) -> Encoded | None:
        """The image from the cache, merged like this or with all of its features, where it has all that the policy looks at."""
        found = self.images.get(image.key, clustering, self.tower.policy) if self.images.limit_bytes else None
        lacks = found is not None and found.class_attention is None and "class_attention" in self.policy.looks_at
        return None if lacks else found

    def _alike(self, group: Group, image: Image) -> list[tuple[Group, Image]]:
        """``image`` and images of its tile count that waiting groups need next, each key once."""
        together = [(group, image)]
        if image.key in self._suspects:
            return together
        keys = {image.key}
        most = 2 * self.tower_images.now + self.prefill_sequences.now
        waiting = dict.fromkeys(sequence.group for sequence in list(islice(self.waiting, GROUP_ROWS * most)))
        ahead = list(islice(waiting, most))
        # Prompts of many images take as many neighbours' along: what waits encoded is held to what a prefill takes.
        held = sum(len(encoded.features) for other in ahead for encoded in other.encoded)
        for other in ahead:
            if len(together) >= self.tower_images.now or held > PREFILL_VISUAL_TOKENS:
                break
            done = len(other.encoded)
            if other is group or done == len(other.images):
                continue
            candidate = other.images[done]
            there = (self._cached(candidate, clustering) for clustering in (self.policy.clustering, None))
            known = self.images.limit_bytes and (candidate.key in keys or any(there))
            if len(candidate.pixels) == len(image.pixels) and not known and candidate.key not in self._suspects:
                together.append((other, candidate))
                keys.add(candidate.key)
        return together

    def _tower_failed(self, together: list[tuple[Group, Image]], error: Exception) -> bool:
        """Fewer images at a time where memory ran out; one alone fails once nothing can be let go of. Whether to try again."""
        if len(together) == 1:
            owner = together[0][0]
            if out_of_memory(error) and self._make_room(owner):
                # Fewer images are held at once from now on: the rest of this batch may just have lost its own.
                self.prefill_sequences.lower(self.prefill_sequences.now // 2)
                return not self._full_house
            self._fail([sequence for sequence in list(self.waiting) if sequence.group is owner], error)
            return False
        if out_of_memory(error):
            self._warn(f"out of memory in the vision tower: {len(together) // 2} images at a time for now")
            self.tower_images.lower(len(together) // 2)
        else:
            self._suspects.update(image.key for _, image in together)
        return True

    # ---- decoding -------------------------------------------------------------------------------------------------------

    def _decode(self) -> None:
        running = list(self.decode.running)
        said: list[int] = []

        def decode() -> None:
            tokens = self._choose(self.decode.step(), running)
            said.extend(tokens.tolist())
            self.decode.advance(tokens)

        _, failure = self._attempt("decode", decode, may_fail=out_of_memory)
        if failure is not None:
            self._decode_failed(running, failure)
            return
        self.max_sequences.passed(len(running))
        self.statistics.decode_steps += 1
        self.statistics.decode_tokens += len(said)
        self.statistics.cross_kv_bytes_read += self.memory.segment_elements * self.memory.itemsize
        self._say(running, said)

    def _choose(self, logits: Tensor, sequences: Sequence[Sequence_]) -> Tensor:
        draws = [s.draws[len(s.said)] if s.draws else 0.0 for s in sequences]
        return choose(logits, [s.request.sampling for s in sequences], draws)

    def _say(self, sequences: Sequence[Sequence_], tokens: Sequence[int]) -> None:
        """Takes each running sequence's next token, and lets those leave that it ends."""
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.said.append(token)
            try:
                if token in self.eos or self._stopped(sequence):
                    self._finish(sequence, "stop")
                elif len(sequence.said) == sequence.request.max_new_tokens:
                    self._finish(sequence, "length")
            except Exception as error:  # noqa: BLE001 - the detokenizer is the caller's: its failure is this row's
                self._leave(sequence)
                sequence.future.set_exception(error)

    def _stopped(self, sequence: Sequence_) -> bool:
        """Whether the last token has completed a stop string."""
        stops, said = sequence.request.stop, sequence.said
        if not stops:
            return False
        # Its last tokens are enough to see one, a byte of it in each at least: the whole answer at every step would take time
        # by the square of its length. A tail may read otherwise than as a part of the whole, which has the last word.
        tail = said[-(max(len(stop.encode(errors="surrogatepass")) for stop in stops) + SILENT_TOKENS) :]
        return self._cut(sequence, tail)[1] and (len(tail) == len(said) or self._cut(sequence, said)[1])

    def _cut(self, sequence: Sequence_, tokens: Sequence[int]) -> tuple[str, bool]:
        """The tokens' text before the first stop string, and whether there is one."""
        assert self.detokenize is not None
        text = self.detokenize(tokens)
        found = [place for stop in sequence.request.stop if (place := text.find(stop)) >= 0]
        return (text[: min(found)], True) if found else (text, False)

    def _finish(self, sequence: Sequence_, reason: str) -> None:
        said = sequence.said[:-1] if sequence.said[-1] in self.eos else sequence.said
        text = None
        if self.detokenize is not None:
            text, stopped = self._cut(sequence, said)
            # Its tail may not have shown it.
            reason = "stop" if stopped else reason
        self._leave(sequence)
        assert sequence.trim is not None
        completion = Completion(
            tokens=said, text=text, finish_reason=reason, output_tokens=len(sequence.said), trim=sequence.trim
        )
        sequence.future.set_result(completion)

    def _leave(self, sequence: Sequence_) -> None:
        self.decode.remove(sequence)
        self._full_house = False
        if sequence.segment is not None:
            self.memory.release(sequence.segment)
            sequence.segment = None
            self._shown[sequence.group.shown] -= 1
            if not self._shown[sequence.group.shown]:
                del self._shown[sequence.group.shown]
                self._full_elements -= self._full(sequence.group)

    def _decode_failed(self, running: Sequence[Sequence_], error: Exception) -> None:
        """After a step that ran out of memory: the others take it again, one alone once more memory is free."""
        # The device's places may be those of the step after.
        self.decode.changed = True
        if len(running) > 1:
            self._preempt(running[len(running) // 2 :])
        elif not self._free_memory():
            (sequence,) = running
            self._leave(sequence)
            sequence.future.set_exception(error)

    def _preempt(self, sequences: Sequence[Sequence_]) -> None:
        """Sends ``sequences`` back to wait, to be begun anew: their random streams are their own, so they will say the same."""
        rest = len(self.decode.running) - len(sequences)
        self.max_sequences.lower(rest)
        self._warn(f"out of memory in decoding: {rest} sequences at a time for now")
        for sequence in sequences:
            self._leave(sequence)
            sequence.said = []
            sequence.group.waiting += 1
        self.waiting.extendleft(reversed(sequences))

    # ---- memory that ran out --------------------------------------------------------------------------------------------

    def _make_room(self, group: Group) -> bool:
        """For a group that ran out of memory alone: whether it may try again, at once or, with a full house, when others have
        left.

        Nobody is sent back for it: the memory of keys and values is of a fixed size, so that this would give the device
        nothing but the little that a step of fewer rows takes.
        """
        if self._free_memory(group):
            return True
        self._full_house = bool(self.decode.running)
        return self._full_house

    def _free_memory(self, group: Group | None = None) -> bool:
        """Lets go of what can be made anew, but for what ``group`` needs: encoded images and captured graphs. Whether there
        was any."""
        waiting = dict.fromkeys(sequence.group for sequence in list(self.waiting))
        held = [other for other in waiting if other.encoded and other is not group]
        freed = bool(held or self.images)
        for other in held:
            other.encoded = []
        self.images.clear()
        freed = self.decode.release() or freed
        if freed and self.model.device.type == "cuda":
            # Refused while some other capture of this process is under way.
            with suppress(RuntimeError):
                torch.cuda.empty_cache()
        return freed

    # ---- the rest -------------------------------------------------------------------------------------------------------

    def _fail(self, sequences: Sequence[Sequence_], error: Exception) -> None:
        for sequence in sequences:
            self.waiting.remove(sequence)
            self._waits_no_more(sequence.group)
            # The traceback's frames hold a batch's tensors.
            sequence.future.set_exception(error.with_traceback(None))

    def _note_peaks(self) -> None:
        self.statistics.peak_kv_bytes = self.memory.peak_bytes
        self.statistics.peak_cross_kv_bytes = self.memory.peak_segment_bytes

    def _warn(self, said: str) -> None:
        if not self._warned:
            logger.warning(said)
            self._warned = True

    def _synchronise(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def _healthy(self) -> bool:
        """Whether the device still works: after a fault of its own, CUDA fails every later call too."""
        try:
            for stage in self.stages:
                torch.ones(1, device=stage.device).add(1).item()
        except torch.OutOfMemoryError:
            return True
        except RuntimeError:
            return False
        return True


def _first_guess(policy: Policy) -> dict[bool, float]:
    """What a group's segment takes of what all its features would, for groups whose images are new to the memory and for those
    whose images another group has in it; measured from then on."""
    # Policies that do not look at the text keep the same of an image for each of its groups, until one is seen not to.
    return {False: 1.0, True: 0.0 if policy.where == "features" else 1.0}


def _memory_for(model: MllamaForConditionalGeneration, kv_bytes: int | Sequence[int]) -> Memory | ShardedMemory:
    geometries, devices = stage_geometries(model), [stage.device for stage in stages(model)]
    if isinstance(kv_bytes, int):
        layers = [geometry.self_layers + geometry.cross_layers for geometry in geometries]
        kv_bytes = [kv_bytes * count // sum(layers) for count in layers]
    if len(devices) == 1:
        return Memory(geometries[0], kv_bytes[0], model.dtype, devices[0])
    return ShardedMemory(geometries, kv_bytes, model.dtype, devices)


def activation_bytes(model: MllamaForConditionalGeneration, policy: Policy, max_sequences: int) -> int:
    """What an engine's stages may take of a device beside weights, keys and values, at most; about."""
    return Costs(model.config, model.dtype.itemsize).activations(
        images=TOWER_IMAGES,
        visual=PREFILL_VISUAL_TOKENS,
        prompt=PREFILL_TOKENS,
        sequences=max_sequences,
        each_layer=policy.where == "each_layer",
    )


def _decode_for(model: MllamaForConditionalGeneration, memory: Memory | ShardedMemory, rotary: Rotary, most: int) -> Decode:
    # A graph is one device's. On several each step launches its kernels, behind which the weights of a model that needs
    # several take their time to read.
    if model.device.type != "cuda" or isinstance(memory, ShardedMemory):
        return Decode(model, memory, rotary)
    from trimming.engine.cuda import GraphDecode

    return GraphDecode(model, memory, rotary, most)


_OUT_OF_MEMORY_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means out of memory: from torch's allocator on a device, from what allocates beside it (the driver, its
    libraries, Triton), or from the CPU's allocator."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in _OUT_OF_MEMORY_MESSAGES)
    )
