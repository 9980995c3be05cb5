"""The cost model against counts taken from the running engine, against real parameters, and against published figures."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import MllamaConfig, MllamaForConditionalGeneration

from tests import tiny
from trimming import Clusters, Grid, KeepAll, Policy, Random, TrimmedLlama
from trimming.clustering import Clustering
from trimming.costs import Cost, Costs, Look, Stages
from trimming.engine import Engine, Image, KeptSets, Request
from trimming.engine.gather import Gathered
from trimming.engine.onednn import OneDnnLinear
from trimming.engine.sequence import Encoded, Sequence_
from trimming.policies.policy import Where
from trimming.tower import Alike, Encoding, EViT, ToMe, Tower, TowerPolicy

CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
TEXT_90B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 100,
    "num_attention_heads": 64,
    "cross_attention_layers": list(range(3, 100, 5)),
}
# Of the published configurations; transformers' own default is a tile of 448 pixels.
CONFIG_11B = MllamaConfig(vision_config={"image_size": 560})
CONFIG_90B = MllamaConfig(vision_config={"image_size": 560}, text_config=TEXT_90B)
POLICIES = [KeepAll(), Grid(0.5), Random(0.3), TrimmedLlama(0.25), Clusters(0.3)]


def demo_model() -> MllamaForConditionalGeneration:
    from demo.architecture import build_model, build_processor

    return build_model(build_processor([])).eval()


@pytest.fixture(scope="module", params=[tiny.tiny_model, demo_model], ids=["tiny", "demo"])
def model(request: pytest.FixtureRequest) -> MllamaForConditionalGeneration:
    return request.param()


def name_of(policy: Policy) -> str:
    return type(policy).__name__


def make_engine(model: MllamaForConditionalGeneration, policy: Policy, **options: Any) -> Engine:
    return Engine(model, policy, normalise=lambda x: x.to(model.dtype), eos=(), kv_bytes=1 << 26, **options)


# ---- counting ------------------------------------------------------------------------------------------------------------


def attention_operations(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    out_val: Any = None,
) -> int:
    """What torch's counter lacks on a CPU: of causal attention and of masks the pairs that are seen."""
    batch, heads, rows, width = query.shape
    length = key.shape[2]
    if is_causal:
        assert rows == length
        pairs = batch * heads * rows * (rows + 1) // 2
    elif attn_mask is not None:
        # Of those that are seen some have a bias, the logarithm of a size.
        pairs = int((attn_mask >= 0).expand(batch, heads, rows, length).sum())
    else:
        pairs = batch * heads * rows * length
    return 2 * pairs * (width + value.shape[3])


attention_operations._get_raw = True  # type: ignore[attr-defined]  # tensors instead of shapes, for the masks


def linear_operations(states: tuple[int, ...], layout: tuple[int, ...], *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """What torch's counter lacks too: oneDNN's products."""
    return 2 * math.prod(states) * layout[0]


OPERATIONS = {CPU_ATTENTION: attention_operations, torch.ops.mkldnn._linear_pointwise: linear_operations}


def counted(function: Callable[..., Tensor], *args: Any) -> tuple[Tensor, int]:
    with FlopCounterMode(display=False, custom_mapping=OPERATIONS) as counter:
        result = function(*args)
    return result, counter.get_total_flops()


@dataclass(frozen=True)
class Watching:
    """In the place of ``Prefill``. What only decides is costed at nothing, and not counted either."""

    prefill: Callable[[Sequence[Sequence_]], Tensor]
    decide: Callable[[Sequence[Sequence_]], None]

    def __call__(self, sequences: Sequence[Sequence_]) -> Tensor:
        return self.prefill(sequences)


TOWER_POLICIES = [None, Alike(0.6), ToMe(0.6), EViT(0.6)]


class Watched:
    """An engine whose every call of tower, prefill and decoding is counted, and costed from what it was called with.

    ``calls`` holds (counted operations, costed ones) by stage.
    """

    def __init__(self, model: MllamaForConditionalGeneration, policy: Policy, **options: Any) -> None:
        self.policy, self.tower = policy, (options.get("tower_tiles", "pooled"), options.get("tower_policy"))
        self.engine = make_engine(model, policy, **options)
        self.costs = Costs(model.config, model.dtype.itemsize)
        self.calls: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        self._encode, self._prefill, self._step = self.engine.tower.encode, self.engine.prefill, self.engine.decode.step
        self.engine.tower.encode = self.encode  # type: ignore[method-assign]
        self.engine.prefill = Watching(self.prefill, self._prefill.decide)  # type: ignore[assignment]
        self.engine.decode.step = self.step  # type: ignore[method-assign]

    def encode(self, images: Sequence[Image]) -> Encoding:
        features, operations = counted(self._encode, images)
        tiles, count = len(images[0].pixels), len(images)
        cost = self.costs.tower(tiles, count, *self.tower) + self.costs.projector(tiles, count, self.tower[1])
        self.calls["tower"].append((operations, cost.operations))
        return features

    def prefill(self, sequences: Sequence[Sequence_]) -> Tensor:
        encoded = {id(s): list(s.group.encoded) for s in sequences}
        new = {id(e): len(e.features) for own in encoded.values() for e in own}
        there = {id(s.segment) for s in self.engine.decode.running}
        logits, operations = counted(self._prefill, sequences)
        # Of an image's features those that any new set holds.
        kept: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)
        for s in sequences:
            if s.segment is not None and id(s.segment) not in there:
                kept[tuple(map(id, encoded[id(s)]))].update(s.trim.kept.tolist())
        later = sum(map(len, kept.values()))
        scoring = self.policy.where == "first_layer"
        cost = self.costs.cross_kv(sum(new.values()) if scoring else later, later)
        looks = [look for s in sequences for look in self.looks(s, encoded[id(s)], scoring)]
        cost += self.costs.prefill([len(s.request.tokens) for s in sequences], looks)
        self.calls["prefill"].append((operations, cost.operations))
        return logits

    def looks(self, sequence: Sequence_, encoded: Sequence[Encoded], scoring: bool) -> Iterator[Look]:
        axis = tiny.TILES * self.costs.tokens
        for span in sequence.spans:
            (a, b), (c, d) = span.rows, span.images
            seen = sum(e.tiles for e in encoded[c:d]) * self.costs.tokens
            kept = int(((sequence.trim.kept >= c * axis) & (sequence.trim.kept < d * axis)).sum())
            yield Look(b - a, seen if scoring else kept, kept)

    def step(self) -> Tensor:
        decode = self.engine.decode
        lengths = [n + 1 for n in decode.positions]
        sharing = Counter(s.segment for s in decode.running if s.segment is not None)
        looks = [Look(rows, segment.layers[0].rows, segment.layers[0].rows) for segment, rows in sharing.items()]
        logits, operations = counted(self._step)
        self.calls["decode"].append((operations - self.padding(), self.costs.decode(lengths, looks).operations))
        return logits

    def padding(self) -> int:
        """Operations of the last step on what pads segments that go through one product: two products of every head."""
        text = self.engine.model.config.text_config
        shut = 0
        for bundle in self.engine.decode._members[0].bundles:
            sharers = bundle.size[1]
            masks = bundle.segments.masks if isinstance(bundle.segments, Gathered) else ()
            shut += sum(sharers * int((mask < 0).sum()) // self.costs.geometry.kv_heads for mask in masks)
        return 2 * 2 * text.hidden_size * shut

    def total(self, stage: str) -> int:
        return sum(operations for operations, _ in self.calls[stage])


def request(
    model: MllamaForConditionalGeneration,
    id: str,
    images: Sequence[Image],
    *,
    before: int = 2,
    after: int = 4,
    new: int = 3,
) -> Request:
    image_token = model.config.image_token_index
    tokens = [1, *[5] * before, *(t for _ in images for t in (image_token, *[6] * after)), 7]
    return Request(id=id, tokens=tokens, images=images, max_new_tokens=new)


def image(model: MllamaForConditionalGeneration, tiles: int, key: str) -> Image:
    side = model.config.vision_config.image_size
    generator = torch.Generator().manual_seed(len(key) + tiles)
    pixels = torch.randint(0, 256, (tiles, 3, side, side), generator=generator, dtype=torch.uint8)
    return Image(key, pixels, tiny.RATIO_OF_TILES[tiles])


def requests_of(model: MllamaForConditionalGeneration, rows: Sequence[tiny.Row]) -> list[Request]:
    """With answers of different lengths, so that later steps run on fewer."""
    return [
        request(
            model,
            f"row {i}",
            [image(model, tiles, f"image {i}.{j}") for j, tiles in enumerate(row.tiles)],
            before=row.before,
            after=row.after,
            new=3 + i,
        )
        for i, row in enumerate(rows)
    ]


# ---- operations ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES, ids=name_of)
@pytest.mark.parametrize("name", [*tiny.BATCHES, "text only"])
def test_every_call_does_the_operations_it_is_costed_at(
    model: MllamaForConditionalGeneration, name: str, policy: Policy
) -> None:
    rows = tiny.BATCHES.get(name) or [tiny.Row((), before=5), tiny.Row((), before=9)]
    watched = Watched(model, policy)
    watched.engine.generate(requests_of(model, rows))

    assert watched.calls["prefill"]
    assert watched.calls["decode"]
    for operations, cost in (call for calls in watched.calls.values() for call in calls):
        assert operations == cost


@pytest.mark.parametrize("tower_tiles", ["pooled", "all", "real"])
@pytest.mark.parametrize("tiles", [1, 2, 3, 4])
@pytest.mark.parametrize("tower_policy", TOWER_POLICIES, ids=repr)
def test_tower_operations(
    model: MllamaForConditionalGeneration, tiles: int, tower_tiles: str, tower_policy: TowerPolicy | None
) -> None:
    watched = Watched(model, KeepAll(), tower_tiles=tower_tiles, tower_policy=tower_policy)
    watched.engine.generate([request(model, str(i), [image(model, tiles, str(i))]) for i in range(3)])

    ((operations, cost),) = watched.calls["tower"]
    assert operations == cost


@pytest.mark.parametrize("tower_tiles", ["pooled", "all", "real"])
@pytest.mark.parametrize("tiles", [1, 2, 3, 4])
@pytest.mark.parametrize("tower_policy", TOWER_POLICIES, ids=repr)
def test_tower_operations_at_11b(tiles: int, tower_tiles: Any, tower_policy: TowerPolicy | None) -> None:
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(CONFIG_11B)
        tower = Tower(model, lambda pixels: pixels.float(), tower_tiles, tower_policy)
        images = [Image(str(i), torch.empty(tiles, 3, 560, 560, dtype=torch.uint8), 1) for i in range(2)]
    with torch.no_grad():
        _, operations = counted(tower.encode, images)

    costs = Costs(CONFIG_11B)
    tower_cost = costs.tower(tiles, 2, tower_tiles, tower_policy) + costs.projector(tiles, 2, tower_policy)
    assert operations == tower_cost.operations


@pytest.mark.parametrize("clustering", [Clustering(keep=0.1), Clustering(likeness=0.9)], ids=repr)
@pytest.mark.parametrize("tiles", [1, 2, 3, 4])
def test_clustering_takes_two_hundredths_of_the_tower_at_11b(tiles: int, clustering: Clustering) -> None:
    features = torch.empty(2, tiles * 1601, 4096, device="meta")
    _, operations = counted(clustering, features)

    costs = Costs(CONFIG_11B)
    assert operations == costs.clustering(tiles, 2).operations
    assert operations <= 0.02 * costs.tower(tiles, 2).operations
    # An H100's rates.
    rates = (989e12, 3.35e12)
    assert costs.clustering(tiles, 2).seconds(*rates) <= 0.05 * costs.tower(tiles, 2).seconds(*rates)
    # Its features are twice as wide.
    wider = Costs(CONFIG_90B).clustering(tiles, 2).operations
    assert wider == pytest.approx(2 * operations)
    assert wider <= 0.04 * costs.tower(tiles, 2).operations


@pytest.mark.parametrize("policy", POLICIES, ids=name_of)
@pytest.mark.parametrize("max_sequences", [1, 8])
@pytest.mark.parametrize("kept_sets", ["image", "question"])
def test_questions_that_share_an_image(
    model: MllamaForConditionalGeneration, policy: Policy, max_sequences: int, kept_sets: KeptSets
) -> None:
    shared = image(model, 3, "shared")
    asked = [request(model, str(i), [shared], after=3 + i) for i in range(4)]
    watched = Watched(model, policy, max_sequences=max_sequences, kept_sets=kept_sets)
    watched.engine.generate(asked)

    assert len(watched.calls["tower"]) == 1
    assert len(watched.calls["prefill"]) == (4 if max_sequences == 1 else 1)
    for operations, cost in (call for calls in watched.calls.values() for call in calls):
        assert operations == cost


class Drawn(Random):
    """As many features as asked for, after a first layer that sees all."""

    where: ClassVar[Where] = "first_layer"


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.1])
@pytest.mark.parametrize(("images", "questions"), [(1, 1), (3, 1), (2, 3)])
@pytest.mark.parametrize("kept_sets", ["image", "question"])
def test_a_batch_by_stage(
    model: MllamaForConditionalGeneration, keep: float, images: int, questions: int, kept_sets: KeptSets
) -> None:
    shown = [image(model, 2, f"image {i}") for i in range(images)]
    asked = [request(model, f"{i}/{j}", [shown[i]], new=5) for i in range(images) for j in range(questions)]
    watched = Watched(model, Drawn(keep), kept_sets=kept_sets)
    kept = [set(completion.trim.kept.tolist()) for completion in watched.engine.generate(asked)]

    prompt, costs = len(asked[0].tokens), watched.costs
    stages = costs.batch(
        tiles=2, prompt=prompt, output=5, keep=keep, images=images, questions=questions, before=3, kept_sets=kept_sets
    )
    assert watched.total("tower") == (stages.tower + stages.projector).operations
    # Sets that were drawn overlap more than is taken.
    unions = sum(len(set().union(*kept[i * questions : (i + 1) * questions])) for i in range(images))
    seen = images * 2 * costs.tokens
    overlap = stages.cross_kv.operations - costs.cross_kv(seen, unions).operations
    assert watched.total("prefill") == (stages.cross_kv + stages.prefill).operations - overlap
    assert overlap >= 0
    assert not overlap or (kept_sets == "question" and questions > 1 and keep < 1)
    assert watched.total("decode") == stages.decode.operations


def test_a_share_is_of_what_the_tower_leaves() -> None:
    costs = Costs(CONFIG_11B)
    left = costs.tower_rows(2, Alike(0.5))[-1]
    half = costs.batch(tiles=2, prompt=30, output=2, keep=0.5, merged=True, tower_policy=Alike(0.5))
    assert half.cross_kv.operations == round(left / 2) * 8 * 2 * 4096 * 2 * 1024
    assert left < 2 * 1601 / 3


def test_six_questions_an_image_by_hand() -> None:
    """Of the 11B: 8 cross-attention layers of 8 heads of keys of 128, in bf16; two tiles of 1,601 tokens; 60 % of them stay."""
    costs = Costs(CONFIG_11B)
    visual, kept = 3202, 1921
    asked: dict[str, Any] = {"tiles": 2, "prompt": 30, "output": 2, "questions": 6, "images": 2}
    # Of one token in one layer: to project it to keys and values, and to hold them.
    project, bytes_held = 2 * 4096 * 2 * 1024, 2 * 8 * 128 * 2
    full = costs.batch(**asked)
    image = costs.batch(**asked, keep=0.6)
    question = costs.batch(**asked, keep=0.6, kept_sets="question")
    assert costs.batch(**asked, kept_sets="question").cross_kv == full.cross_kv
    assert full.cross_kv.operations == 2 * visual * 8 * project
    # What is merged is all that any layer sees, and that any question shares.
    merged = costs.batch(**asked, keep=0.6, merged=True)
    assert merged.cross_kv.operations == 2 * kept * 8 * project
    assert merged == costs.batch(**asked, keep=0.6, merged=True, kept_sets="question")
    assert (merged.tower, merged.decode) == (image.tower, image.decode)
    assert merged.projector.operations == image.projector.operations + 2 * 2 * visual**2 * 4096
    # The first layer sees all; the seven behind it one set an image.
    assert image.cross_kv.operations == 2 * (visual + 7 * kept) * project
    # Six sets of 60 %: together no more than all.
    assert question.cross_kv.operations == full.cross_kv.operations
    # One step: 2 images' sets are read, or 12 sets.
    less = full.decode.bytes - image.decode.bytes
    assert less == 2 * (visual - kept) * 8 * bytes_held
    assert question.decode.bytes - image.decode.bytes == 10 * kept * 8 * bytes_held
    # Each of the 12 rows attends to as much either way, and less than to all: two products, over 4,096 channels.
    assert question.decode.operations == image.decode.operations
    assert full.decode.operations - image.decode.operations == 12 * (visual - kept) * 8 * 2 * 2 * 4096
    assert question.prefill.operations == image.prefill.operations < full.prefill.operations
    # In a prefill keys are read once for all six prompts that decide together.
    assert question.prefill.bytes - image.prefill.bytes == 10 * (visual + 7 * kept) * bytes_held
    assert image.tower == question.tower == full.tower


# ---- bytes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [448, 560])
@pytest.mark.parametrize("text", [{}, TEXT_90B], ids=["11B", "90B"])
def test_weights_are_the_models_parameters(text: dict[str, Any], image_size: int) -> None:
    config = MllamaConfig(vision_config={"image_size": image_size}, text_config=text)
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(config)

    check_weights(model, 2)


def test_weights_of_small_models(model: MllamaForConditionalGeneration) -> None:
    check_weights(model, 4)


def check_weights(model: MllamaForConditionalGeneration, itemsize: int) -> None:
    weights = Costs(model.config, itemsize).weights
    parts = (model.model.vision_model, model.model.multi_modal_projector, model)
    tower, projector, total = (itemsize * sum(p.numel() for p in part.parameters()) for part in parts)
    assert weights == {"tower": tower, "projector": projector, "language": total - tower - projector}


def place(tensor: Tensor) -> int:
    """Tells tensors apart by their memory, of which those in oneDNN's layout have none to show."""
    return id(tensor) if tensor.is_mkldnn else tensor.data_ptr()


class Touched(TorchDispatchMode):
    """Bytes of the parameters that operations take, each counted once, and of the keys and values that attention takes.

    Embedding tables do not count: a few of their rows are read.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        linear = [m for m in engine.model.modules() if isinstance(m, OneDnnLinear)]
        self.parameters = {place(p): p.nbytes for p in engine.model.parameters()} | {
            place(m.layout): m.weight.nbytes for m in linear
        }
        self.seen: set[int] = set()
        self.kv_bytes = 0

    @property
    def weight_bytes(self) -> int:
        return sum(self.parameters[pointer] for pointer in self.seen)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket is not torch.ops.aten.embedding:
            given = tree_leaves((args, kwargs))
            self.seen |= {place(t) for t in given if isinstance(t, Tensor)} & self.parameters.keys()
        # Under inference mode composite operations arrive whole.
        if function.overloadpacket is torch.ops.aten.scaled_dot_product_attention:
            self.kv_bytes += args[1].nbytes + args[2].nbytes
        if function.overloadpacket is torch.ops.aten.index_select:
            # Keys or values that are gathered; what pads them is read again.
            memory, _, places = args
            self.kv_bytes += len(places.unique()) * memory[0].nbytes
        return function(*args, **(kwargs or {}))


def touching(engine: Engine, method: Callable[..., Tensor], records: list[Touched]) -> Any:
    """``method``, with a record for each of its calls."""

    def recorded(*args: Any) -> Tensor:
        with Touched(engine) as touched:
            records.append(touched)
            return method(*args)

    return recorded


@pytest.mark.parametrize("policy", [KeepAll(), TrimmedLlama(0.25)], ids=name_of)
@pytest.mark.parametrize("tiles", [None, 1, 4])
def test_bytes_that_calls_read(model: MllamaForConditionalGeneration, policy: Policy, tiles: int | None) -> None:
    engine, costs = make_engine(model, policy), Costs(model.config, model.dtype.itemsize)
    encodes: list[Touched] = []
    prefills: list[Touched] = []
    steps: list[Touched] = []
    engine.tower.encode = touching(engine, engine.tower.encode, encodes)  # type: ignore[method-assign]
    engine.prefill = touching(engine, engine.prefill, prefills)
    engine.decode.step = touching(engine, engine.decode.step, steps)  # type: ignore[method-assign]
    asked = [request(model, str(i), [image(model, tiles, str(i))] if tiles else []) for i in range(3)]
    kept = [completion.trim.kept_visual_tokens for completion in engine.generate(asked)]

    # Costs of no images and no rows are those of the weights alone.
    none = [Look(0, 0, 0)] if tiles else []
    assert [t.weight_bytes for t in encodes] == ([costs.tower(1, 0).bytes + costs.projector(1, 0).bytes] if tiles else [])
    assert [t.weight_bytes for t in prefills] == [costs.prefill([], none).bytes + (cross_weights(costs) if tiles else 0)]
    text = model.config.text_config
    for number, step in enumerate(steps, 1):
        length = len(asked[0].tokens) + number
        assert step.weight_bytes == costs.decode([], none).bytes
        assert step.kv_bytes == sum(costs.kv_bytes(length, n) for n in kept)
        # Beside what it reads: the new tokens' keys and values, their embeddings, their logits.
        rest = 3 * (costs.kv_bytes(1, 0) + costs.itemsize * (text.hidden_size + text.vocab_size))
        looks = [Look(1, n, n) for n in kept if n]
        assert costs.decode([length] * 3, looks).bytes == step.weight_bytes + step.kv_bytes + rest


def cross_weights(costs: Costs) -> int:
    """Of the keys' and values' projections in all cross-attention layers: what one token costs less what a second one adds."""
    return costs.cross_kv(1, 1).bytes * 2 - costs.cross_kv(2, 2).bytes


@pytest.mark.parametrize("policy", POLICIES, ids=name_of)
def test_kv_bytes_are_those_of_the_memory(model: MllamaForConditionalGeneration, policy: Policy) -> None:
    engine, costs = make_engine(model, policy), Costs(model.config, model.dtype.itemsize)
    held = {}
    step = engine.decode.step

    def look_and_step() -> Tensor:
        for sequence in engine.decode.running:
            layers = sequence.segment.layers if sequence.segment else ()
            elements = sum(e.rows * (e.key_width + e.value_width) * costs.geometry.kv_heads for e in layers)
            held[sequence.request.id] = elements * engine.memory.itemsize
        assert engine.memory.slot_elements * engine.memory.itemsize == costs.kv_bytes(engine.memory.capacity, 0)
        return step()

    engine.decode.step = look_and_step  # type: ignore[method-assign]
    asked = requests_of(model, [row for name in ("mixed tiles", "text-only among images") for row in tiny.BATCHES[name]])
    for made, completion in zip(asked, engine.generate(asked), strict=True):
        trim = completion.trim
        # A cluster's bias is four bytes for each head of keys.
        biases = policy.weighs * 4 * costs.geometry.kv_heads * trim.kept_visual_tokens
        assert held[made.id] == costs.kv_bytes(0, trim.kept_visual_tokens) == trim.cross_kv_bytes - biases
        assert trim.cross_kv_bytes_full == costs.kv_bytes(0, trim.visual_tokens)
        assert trim.self_kv_bytes == costs.kv_bytes(len(made.tokens), 0)


# ---- figures -------------------------------------------------------------------------------------------------------------


def test_parameters_as_published() -> None:
    """The model cards say 10.6B and 88.8B."""
    for config, billions in ((CONFIG_11B, 10.67), (CONFIG_90B, 88.59)):
        assert sum(Costs(config).weights.values()) / 2e9 == pytest.approx(billions, abs=0.005)


def test_one_caption_at_11b() -> None:
    """TFLOP at 4 tiles, 256 + 128 tokens."""
    stages = Costs(CONFIG_11B).batch(tiles=4, prompt=256, output=128)
    tera = {name: getattr(stages, name).operations / 1e12 for name in ("tower", "projector", "cross_kv", "prefill", "decode")}
    assert tera == pytest.approx({"tower": 18.6, "projector": 0.4, "cross_kv": 0.86, "prefill": 4.56, "decode": 2.46}, rel=0.01)
    assert stages.tower_share == pytest.approx(0.69, abs=0.005)


@pytest.mark.parametrize(("batch", "full", "half"), [(8, 4.25, 4.07), (32, 5.50, 4.81), (128, 10.5, 7.7)])
def test_decode_steps_on_an_h200(batch: int, full: float, half: float) -> None:
    """Milliseconds at 4 tiles, in the middle of an answer of 128 tokens to 256; 4.8 TB/s and 989 TFLOP/s dense in bf16."""
    costs = Costs(CONFIG_11B)
    steps = [costs.decode([320] * batch, [Look(1, kept, kept)] * batch) for kept in (6404, 3202)]
    assert [1e3 * step.seconds(989e12, 4.8e12) for step in steps] == pytest.approx([full, half], rel=0.01)


def test_costs_add_and_scale() -> None:
    cost = Cost(10, 4)
    assert cost + Cost(1, 2) == Cost(11, 6)
    assert cost * 2 == Cost(20, 8)
    assert cost * (1 / 4) == Cost(2, 1)
    assert cost.seconds(5, 1) == 4
    assert cost.seconds(1, 5) == 10
    one = Stages(tower=cost, projector=Cost(), cross_kv=Cost(), prefill=cost, decode=cost)
    assert (one + one).total == cost * 6
    assert (one + one).tower_share == 1 / 3


def test_kv_bytes_of_a_token() -> None:
    """KiB in bf16."""
    for config, visual, text in ((CONFIG_11B, 32, 128), (CONFIG_90B, 80, 320)):
        costs = Costs(config)
        assert costs.kv_bytes(0, 1) == visual * 1024
        assert costs.kv_bytes(1, 0) == text * 1024
