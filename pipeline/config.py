"""The one typed configuration behind every job. Imports nothing heavy: ``--help`` and refusals must answer at once."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

Job = Literal["answer", "caption"]
RowSemantics = Literal["meta", "transformers"]
TowerTiles = Literal["pooled", "all", "real"]
KeptSets = Literal["image", "question"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

POLICIES: dict[str, tuple[str, dict[str, float | None]]] = {
    "none": ("KeepAll", {}),
    "trimmed-llama": ("TrimmedLlama", {"k_ratio": 0.25}),
    "random": ("Random", {"keep": 0.5}),
    "grid": ("Grid", {"keep": 0.5}),
    "fastv": ("FastV", {"keep": 0.5}),
    "zipvl": ("ZipVL", {"mass": 0.95}),
    "snapkv": ("SnapKV", {"keep": 0.5}),
    "csp": ("SnapKV", {"keep": 0.5}),
    "elastic": ("ElasticCache", {"keep": 0.5, "weighted": False}),
    "divprune": ("DivPrune", {"keep": 0.5}),
    "visionzip": ("VisionZip", {"keep": 0.5, "weighted": False}),
    "weighted-farthest": ("WeightedFarthest", {"keep": 0.5}),
    "think": ("ThinK", {"keep": 0.5}),
    "spread": ("Spread", {"keep": 0.5}),
    "clusters": ("Clusters", {"likeness": 0.9, "keep": None}),
}
"""By the name that ``--policy`` takes: its class in ``trimming``, its options and their defaults; one of None stands in the
others' place where it is given. A new policy is a line here."""
POLICY_OPTIONS: dict[str, dict[str, float | None]] = {name: options for name, (_, options) in POLICIES.items()}

TOWER_POLICIES: dict[str, str] = {
    "alike": "Alike",
    "tome": "ToMe",
    "windows": "Windows",
    "evit": "EViT",
    "random": "RandomRows",
    "grid": "GridRows",
}
"""By the name that ``--tower-policy`` takes: its class in ``trimming.tower``."""
TOWER_KEEP = 0.5

if TYPE_CHECKING:
    PolicyName = str
    TowerPolicyName = str
else:
    PolicyName, TowerPolicyName = Literal[tuple(POLICIES)], Literal[tuple(TOWER_POLICIES)]

_CHOICES: dict[str, Collection[str]] = {
    "job": get_args(Job),
    "dtype": get_args(Dtype),
    "policy": POLICIES,
    "kept_sets": get_args(KeptSets),
    "rows": get_args(RowSemantics),
    "tower_tiles": get_args(TowerTiles),
    "tower_policy": TOWER_POLICIES,
}
# What decides a row's answer. The rest (actors, batches, where the cluster is) may change between a run and its continuation.
_DECIDES = (
    "job",
    "policy",
    "k_ratio",
    "keep",
    "mass",
    "likeness",
    "weighted",
    "key_channels",
    "kept_sets",
    "rows",
    "dtype",
    "prompt",
    "image_column",
    "image_roots",
    "question_column",
    "id_column",
    "answer_column",
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "stop",
    "max_tiles",
    "tower_tiles",
    "tower_policy",
    "tower_keep",
    "limit",
    "unit_rows",
    "write_kept",
    "partitions",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run: what is read, what answers it, where it goes. Raises ``ValueError`` naming the field, its value and a remedy."""

    job: Job
    """What is asked of each row: ``answer`` its question, or ``caption`` its images."""

    input: str
    """Parquet shards: a file, a folder, a glob, each local or ``s3://``."""

    output: str
    """Folder of the output, local or ``s3://``; the run's own records go to ``.run/`` inside."""

    model: str
    """Folder or Hugging Face name of a Mllama checkpoint, e.g. ``meta-llama/Llama-3.2-11B-Vision-Instruct``."""

    revision: str | None = None
    """Branch, tag or commit of the model on the Hub."""

    dtype: Dtype = "auto"
    """Weights' type; ``auto`` is bfloat16 on CUDA and float32 on CPU."""

    policy: PolicyName = "trimmed-llama"
    """Which visual tokens the cross-attention layers keep; ``none`` keeps all of them."""

    k_ratio: float | None = None
    """trimmed-llama: share of the visual tokens, or of what a tower policy leaves, that each head picks, 0 < K <= 1;
    default 0.25."""

    keep: float | None = None
    """All policies but none, trimmed-llama and zipvl: share kept of the visual tokens, or of what a tower policy leaves (think:
    of the key channels), 0 < keep <= 1; default 0.5, for clusters what ``likeness`` leaves."""

    mass: float | None = None
    """zipvl: share of each layer's attention that what it keeps holds, 0 < mass <= 1; default 0.95."""

    likeness: float | None = None
    """clusters: least cosine of an image's visual token to the one that it is merged around, 0 < likeness <= 1; default 0.9."""

    weighted: bool | None = None
    """elastic and visionzip: true where a merged visual token counts as often as it has members; default: false, it counts
    once, as the papers have it."""

    key_channels: float | None = None
    """Share of the channels of the kept keys that stay, with any policy (ThinK), 0 < share <= 1; default: all."""

    kept_sets: KeptSets = "image"
    """Who decides what is kept of an image: all questions about it in one unit of work together, which then share one kept set
    (``image``), or each question for itself (``question``)."""

    rows: RowSemantics = "meta"
    """What text before the image sees of it: nothing (``meta``, as trained), or everything (``transformers``)."""

    prompt: str | None = None
    """What is asked of every row, where the job takes no question column."""

    image_column: str = "image"
    """Column of images: bytes, a {bytes, path} struct, a URI, or a list of these."""

    image_roots: list[str] = field(default_factory=list)
    """Folders besides the input's own, local or s3://, that URIs of images may point into; all others are refused."""

    question_column: str | None = "question"
    """Column of questions."""

    id_column: str | None = None
    """Column of row ids, all different; default: ``id`` where the input has one. Without one, or where this is '', ids are
    digests of shard and row index."""

    answer_column: str | None = None
    """Column of true answers, for accuracy; default: ``answer`` where the input has one."""

    max_new_tokens: int = 64
    """Longest answer, in tokens."""

    temperature: float = 0.0
    """0 answers greedily; above, tokens are sampled."""

    top_p: float | None = None
    """Sampling: the smallest set of tokens with this much probability."""

    top_k: int | None = None
    """Sampling: the k likeliest tokens."""

    seed: int = 0
    """Seed of sampling and of the random policies."""

    stop: list[str] = field(default_factory=list)
    """Texts that end an answer and are cut off it."""

    max_tiles: int | None = None
    """Most tiles an image is cut into; default: the model's own, 4. Fewer cost less and show an image at a lower resolution."""

    tower_tiles: TowerTiles | None = None
    """What becomes of padding tiles in the vision tower: a few rows stand for each (``pooled``), all of them go through it
    (``all``), or none does (``real``), an approximation that shows; default: pooled, for rows='transformers' all."""

    tower_policy: TowerPolicyName | None = None
    """Which of an image's rows go on through the vision tower, layer by layer: rows that are alike merge (``alike``, ``tome``),
    neighbours that are alike do (``windows``), or those that class tokens attend to least leave (``evit``); ``random`` and
    ``grid`` are controls; default: all rows go through all layers."""

    tower_keep: float | None = None
    """With a tower policy: share of the tower's rows × layers that is left, about its share of the work, 0 < share <= 1;
    default 0.5."""

    batch_size: int = 256
    """Rows that decode at once, at most; fewer where the memory for keys and values is full."""

    kv_gib: float | None = None
    """Memory for keys and values, in GiB; default: what a GPU has left, a quarter of a machine's free memory up to 4."""

    image_cache_gib: float = 1.0
    """Memory for encoded images that several rows ask about, in GiB; 0 encodes an image anew for each row, or for all rows that
    decide together what is kept of it."""

    num_actors: int = 1
    """Copies of the model."""

    gpus_per_actor: float | None = None
    """GPUs for each copy: a share of one, or several, which then hold consecutive layers each; default: 1 where the cluster has
    GPUs, else 0."""

    cpus_per_actor: float = 1.0
    """Logical CPUs for each copy."""

    wait_minutes: float = 0.0
    """How long to wait for a cluster that is too small; its autoscaler is asked to make room for all actors."""

    limit: int | None = None
    """Only the first rows, in the order of the shards' names."""

    unit_rows: int = 256
    """Rows of one unit of work, one contiguous range of a shard and one output file; up to half as many again where a cut would
    part the rows of one image."""

    write_kept: bool = False
    """Also write each row's kept positions, what each position was merged into, and its images' tile grids."""

    partition: str | None = None
    """``i/n``: only the i-th of n parts of the units, for independent jobs that share an output folder."""

    overwrite: bool = False
    """Delete the run that the output folder holds, and begin anew; files of something else are never deleted."""

    max_error_rate: float = 0.05
    """Share of rows with an error above which a run, though written whole, ends with exit code 3."""

    storage_options: dict[str, Any] = field(default_factory=dict)
    """Options for s3fs (JSON or YAML), such as {"endpoint_url": "http://..."}; never recorded."""

    ray_address: str | None = None
    """Cluster to join (``auto``, ``host:port``); default: RAY_ADDRESS, else Ray is started on this machine alone."""

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(f"{name}={value!r} is none of {', '.join(known)}")
        for name in ("image_roots", "stop"):
            if isinstance(value := getattr(self, name), str):
                raise ValueError(f"{name}={value!r} is one text; give a list of texts: [{value!r}]")
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{f.name}={value} is not a finite number; give one, or leave it out")
        for name in ("input", "output", "model"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} is empty; give a path or a name")
        if self.job == "caption" and not (self.prompt or "").strip():
            raise ValueError(f"prompt={self.prompt!r}: a caption needs one; try prompt='Describe this image.'")
        if self.job == "answer" and not self.question_column:
            raise ValueError(f"question_column={self.question_column!r}: name the column that holds the questions")
        self._check_policy()
        for name in ("max_new_tokens", "batch_size", "num_actors", "unit_rows", "limit", "top_k", "max_tiles"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must not be negative; 0 answers greedily")
        if self.temperature == 0 and (self.top_p is not None or self.top_k is not None):
            raise ValueError("temperature=0.0 answers greedily and takes no top_p or top_k; set a temperature, or drop them")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        self._check_tower()
        if not all(self.stop):
            raise ValueError(f"stop={self.stop} holds an empty text, which would end every answer at once; drop it")
        if self.image_cache_gib < 0 or (self.kv_gib is not None and self.kv_gib <= 0):
            given = f"image_cache_gib={self.image_cache_gib}, kv_gib={self.kv_gib}"
            raise ValueError(f"{given}: memory must be positive (or image_cache_gib=0 for no cache)")
        if self.partition is not None:
            found = re.fullmatch(r"(\d+)/(\d+)", self.partition)
            if not found or not 1 <= int(found[1]) <= int(found[2]):
                raise ValueError(f"partition={self.partition!r} is not i/n with 1 <= i <= n, such as 3/8")
            if self.overwrite:
                raise ValueError(
                    "overwrite would delete the other partitions' work too; run it without partition, or choose a folder"
                )
        for url in self.image_roots:
            if not url.strip() or url.startswith(("http:", "https:")):
                raise ValueError(
                    f"image_roots={self.image_roots}: name folders, local or s3://; a web server may send the cluster elsewhere"
                )
        if not 0 <= self.max_error_rate <= 1:
            raise ValueError(f"max_error_rate={self.max_error_rate} must lie in [0, 1]; 1 puts up with everything")
        if self.wait_minutes < 0:
            raise ValueError(f"wait_minutes={self.wait_minutes} must not be negative; 0 refuses at once")
        if self.wait_minutes and self.gpus_per_actor is None:
            raise ValueError(
                f"wait_minutes={self.wait_minutes} needs gpus_per_actor: a cluster yet to grow does not tell if it has GPUs"
            )
        if self.cpus_per_actor < 0 or (self.gpus_per_actor or 0) < 0:
            given = f"cpus_per_actor={self.cpus_per_actor}, gpus_per_actor={self.gpus_per_actor}"
            raise ValueError(f"{given} must not be negative; use 0 for none")
        gpus = self.gpus_per_actor or 0
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(f"gpus_per_actor={gpus:g}: a copy of the model takes a share of one GPU, or several whole ones")

    def _check_policy(self) -> None:
        takes = POLICY_OPTIONS[self.policy]
        if self.key_channels is not None and not 0 < self.key_channels <= 1:
            raise ValueError(f"key_channels={self.key_channels} must lie in (0, 1]; leave it out to keep all channels")
        if self.key_channels is not None and self.policy == "think":
            raise ValueError(f"key_channels={self.key_channels} and policy='think' cut the same channels; give one of them")
        if self.keep is not None and self.likeness is not None and {"keep", "likeness"} <= takes.keys():
            raise ValueError(f"keep={self.keep} and likeness={self.likeness} both say how much stays; give one of them")
        for name in ("k_ratio", "keep", "mass", "likeness", "weighted"):
            value = getattr(self, name)
            if value is None:
                continue
            if name not in takes:
                users = [policy for policy, options in POLICY_OPTIONS.items() if name in options]
                raise ValueError(f"{name}={value} means nothing to policy={self.policy!r}; drop it, or use policy={users[0]!r}")
            if name != "weighted" and not 0 < value <= 1:
                raise ValueError(f"{name}={value} must lie in (0, 1]; policy='none' keeps everything")

    def _check_tower(self) -> None:
        if self.tower_keep is not None and self.tower_policy is None:
            raise ValueError(f"tower_keep={self.tower_keep} means nothing without a tower_policy; give one, or drop it")
        if self.tower_keep is not None and not 0 < self.tower_keep <= 1:
            raise ValueError(f"tower_keep={self.tower_keep} must lie in (0, 1]; without tower_policy all rows stay")
        if self.rows == "transformers":
            given = {"tower_tiles": self.tower_tiles, "tower_policy": self.tower_policy if self.tower_keep != 1 else None}
            for name, value in given.items():
                if value not in (None, "all"):
                    raise ValueError(
                        f"{name}={value!r} leaves out features of padding tiles, which rows='transformers' looks at; "
                        "use rows='meta'"
                    )

    @property
    def policy_options(self) -> dict[str, float | None]:
        """The policy's own options with their defaults filled in; None for what another one stands in the place of."""
        defaults = POLICY_OPTIONS[self.policy]
        given = {name: getattr(self, name) for name in defaults if getattr(self, name) is not None}
        replaced = any(defaults[name] is None for name in given)
        return {name: given.get(name, None if replaced else default) for name, default in defaults.items()}

    def recorded(self) -> dict[str, Any]:
        """The resolved configuration as JSON values, without anything that may hold a secret."""
        values = asdict(self) | self.policy_options
        values["tower_tiles"] = self.tower_tiles or ("all" if self.rows == "transformers" else "pooled")
        values["tower_keep"] = self.tower_keep or (None if self.tower_policy is None else TOWER_KEEP)
        values["storage_options"] = sorted(values["storage_options"])
        values["partitions"] = self.part[1]
        return values

    @property
    def part(self) -> tuple[int, int]:
        """(i, n) of ``partition``; (1, 1) without."""
        i, _, n = (self.partition or "1/1").partition("/")
        return int(i), int(n)

    def decides_output(self) -> dict[str, Any]:
        """The part of ``recorded`` that two runs must share to write into one folder, input and model apart."""
        values = self.recorded()
        return {name: values[name] for name in _DECIDES}
