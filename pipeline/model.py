"""The checkpoint: what it is, told before a cluster starts, and loading it in an actor. Safetensors only, never remote code."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import POLICIES, TOWER_KEEP, TOWER_POLICIES, RunConfig

if TYPE_CHECKING:
    import torch
    from transformers import MllamaForConditionalGeneration, MllamaProcessor

    from trimming import Policy
    from trimming.tower import TowerPolicy


# What transformers loads of a folder, and so decides the answers: weights, configurations, tokenizer, templates.
_LOADED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)
_PIECE = 16 << 20


@dataclass(frozen=True)
class Checkpoint:
    """Where the model's files are, and which ones."""

    source: str
    """Folder, or name on the Hub."""
    revision: str | None
    """Commit on the Hub; None for a folder."""
    config: dict[str, Any]
    """Its config.json."""

    @cached_property
    def _read(self) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        """Stamps and digests of what is loaded of a folder, by name: all of it is read, on all cores, when first asked for."""
        stamps = self._stamps()
        pieces = [(name, start) for name, (size, *_) in stamps.items() for start in range(0, size, _PIECE)]
        digests = {name: hashlib.sha256() for name in stamps}
        with ThreadPoolExecutor() as pool:
            for (name, _), digest in zip(pieces, pool.map(self._piece, pieces), strict=True):
                digests[name].update(digest)
        return stamps, {name: digest.hexdigest()[:16] for name, digest in digests.items()}

    def _stamps(self) -> dict[str, tuple[int, ...]]:
        """What every change of a file changes: nobody sets its third, the time of its last change of any kind."""
        folder = Path(self.source)
        found = sorted({path for pattern in _LOADED for path in folder.glob(pattern) if path.is_file()})
        stats = {str(path.relative_to(folder)): path.stat() for path in found}
        return {name: (s.st_size, s.st_ino, s.st_ctime_ns) for name, s in stats.items()}

    def _piece(self, piece: tuple[str, int]) -> bytes:
        name, start = piece
        with (Path(self.source) / name).open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(_PIECE)).digest()

    @property
    def files(self) -> dict[str, str]:
        """Digests of what is loaded of a folder, by name; empty for the Hub, where the commit says as much."""
        return {} if self.revision is not None else self._read[1]

    @property
    def identity(self) -> str:
        """Commit, or a digest of ``files``: tells whether two runs had one model."""
        return self.revision or hashlib.sha256(json.dumps(self.files).encode()).hexdigest()[:16]

    @property
    def weight_bytes(self) -> int:
        """Of a folder's weights; 0 for the Hub."""
        return 0 if self.revision is not None else sum(path.stat().st_size for path in Path(self.source).glob("*.safetensors"))

    def check(self) -> None:
        """Raises ``ValueError`` where the folder holds something else than when ``identity`` was first asked for: another
        machine's folder of this name, or one that was saved over since."""
        if self.revision is not None or self._stamps() == self._read[0]:
            return
        there, here = self.files, Checkpoint(self.source, self.revision, self.config).files
        differ = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
        if differ:
            raise ValueError(f"model={self.source!r} is not the one that this run began with; changed: {', '.join(differ[:3])}")


def find_checkpoint(model: str, revision: str | None) -> Checkpoint:
    """Reads config.json alone. Raises ``ValueError``, in one line, for a checkpoint that is missing, gated or no Mllama."""
    folder = Path(model).expanduser()
    checkpoint = _local(folder, revision) if folder.exists() else _on_hub(model, revision)
    kind = checkpoint.config.get("model_type")
    if kind != "mllama":
        raise ValueError(f"model={model!r} is {_kind(kind)}, not a Mllama (Llama-3.2-Vision) checkpoint")
    return checkpoint


def _kind(kind: object) -> str:
    return f"of type {kind!r}" if kind else "of no named type"


def _local(folder: Path, revision: str | None) -> Checkpoint:
    if revision is not None:
        raise ValueError(f"revision={revision!r} has no effect on the folder model={str(folder)!r}; drop it")
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"model={str(folder)!r} has no config.json; name a folder that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"model={str(folder)!r} holds no *.safetensors; weights are read from nothing else")
    return Checkpoint(str(folder.resolve()), None, _parse(config.read_text(), str(folder)))


def _on_hub(model: str, revision: str | None) -> Checkpoint:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision={revision!r}" if revision else ""
    # A path that is missing is told from a name on the Hub by its shape.
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ValueError(f"model={model!r} does not exist")
    try:
        path = Path(hf_hub_download(model, "config.json", revision=revision))
    except GatedRepoError as error:
        raise ValueError(
            f"model={model!r} is gated: accept its licence on huggingface.co/{model}, then set HF_TOKEN or run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"model={model!r} has no revision={revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"model={model!r} is neither a folder here nor a repository on the Hub you may see; check the name and HF_TOKEN"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"model={model!r}{at} is neither a folder here nor in the local cache, and the Hub cannot be reached; "
            "check the path, the network or HF_HUB_OFFLINE"
        ) from error
    except EntryNotFoundError as error:
        raise ValueError(f"model={model!r}{at} has no config.json; name a repository that holds a model") from error
    except HFValidationError as error:
        raise ValueError(f"model={model!r} is neither a folder here nor a name that the Hub allows") from error
    except OSError as error:
        raise ValueError(f"model={model!r}{at} cannot be looked up: {' '.join(str(error).split())[:200]}") from error
    return Checkpoint(model, path.parent.name, _parse(path.read_text(), model))


def _parse(text: str, model: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise ValueError(f"model={model!r}: its config.json is not JSON ({error})") from error
    return parsed if isinstance(parsed, dict) else {}


def load_processor(checkpoint: Checkpoint) -> MllamaProcessor:
    """The checkpoint's processor, padding on the left, as generation needs it."""
    from transformers import MllamaProcessor

    processor = MllamaProcessor.from_pretrained(checkpoint.source, revision=checkpoint.revision or "main")
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def load_model(checkpoint: Checkpoint, dtype: str, devices: Sequence[torch.device]) -> MllamaForConditionalGeneration:
    """The model on one device, or its layers on several, ready for the engine. ``dtype`` is ``RunConfig.dtype``.

    It comes by way of the machine's memory, which has to hold all of it for a while. (transformers' own ``device_map`` would
    spare that, and leave accelerate's hooks on every module, which move all that passes.)
    """
    import torch
    from transformers import MllamaForConditionalGeneration

    from pipeline import placement

    automatic = "bfloat16" if devices[0].type == "cuda" else "float32"
    model = MllamaForConditionalGeneration.from_pretrained(
        checkpoint.source,
        revision=checkpoint.revision or "main",
        dtype=getattr(torch, automatic if dtype == "auto" else dtype),
        use_safetensors=True,
        trust_remote_code=False,
    )
    places = placement.device_map(model, devices) if len(devices) > 1 else {"": devices[0]}
    for name, device in places.items():
        model.get_submodule(name).to(device)
    return model.eval()


def build_policy(config: RunConfig) -> Policy:
    """The policy that the configuration names."""
    import trimming

    kind = getattr(trimming, POLICIES[config.policy][0])
    seeded = {"seed": config.seed} if "seed" in kind.__dataclass_fields__ else {}
    policy: Policy = kind(**config.policy_options, **seeded)
    return policy if config.key_channels is None else trimming.ThinK(config.key_channels, policy)


def build_tower_policy(config: RunConfig) -> TowerPolicy | None:
    """The tower policy that the configuration names, or None."""
    return tower_policy_of(config.tower_policy, config.tower_keep, config.seed)


def tower_policy_of(name: str | None, keep: float | None, seed: int = 0) -> TowerPolicy | None:
    """The tower policy of a name and a share, or of its default. Raises ``ValueError`` for a share without a name."""
    if name is None:
        if keep is not None:
            raise ValueError(f"tower_keep={keep} means nothing without a tower_policy; give one, or drop it")
        return None
    from trimming import tower

    kind = getattr(tower, TOWER_POLICIES[name])
    seeded = {"seed": seed} if "seed" in kind.__dataclass_fields__ else {}
    policy: TowerPolicy = kind(keep=TOWER_KEEP if keep is None else keep, **seeded)
    return policy


def versions() -> dict[str, str]:
    """Versions of what decides an answer, without importing any of it."""
    from importlib.metadata import version

    names = ("torch", "transformers", "ray", "pyarrow", "pillow")
    return {name: version(name) for name in names} | {"python": platform.python_version()}
