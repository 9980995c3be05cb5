"""The checkpoint: what it is, told before a cluster starts, and loading it in an actor. Safetensors only, never remote code."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import POLICIES, RunConfig

if TYPE_CHECKING:
    import torch
    from transformers import MllamaForConditionalGeneration, MllamaProcessor

    from trimming import Policy


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where the model's files are, and which ones."""

    source: str
    """Folder, or name on the Hub."""
    revision: str | None
    """Commit on the Hub; None for a folder."""
    identity: str
    """Commit, or a digest of the folder's configuration and file sizes: tells whether two runs had one model."""
    config: dict[str, Any]
    """Its config.json."""


def find_checkpoint(model: str, revision: str | None) -> Checkpoint:
    """Looks at config.json alone. Raises ``ValueError``, in one line, for a checkpoint that is missing, gated or no Mllama."""
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
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"model={str(folder)!r} holds no *.safetensors; weights are read from nothing else")
    parsed = _parse(config.read_text(), str(folder))
    sizes = [(p.name, p.stat().st_size) for p in weights]
    identity = hashlib.sha256(json.dumps([parsed, sizes], sort_keys=True).encode()).hexdigest()[:16]
    return Checkpoint(str(folder.resolve()), None, identity, parsed)


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
    commit = path.parent.name
    return Checkpoint(model, commit, commit, _parse(path.read_text(), model))


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


def versions() -> dict[str, str]:
    """Versions of what decides an answer, without importing any of it."""
    from importlib.metadata import version

    names = ("torch", "transformers", "ray", "pyarrow", "pillow")
    return {name: version(name) for name in names} | {"python": platform.python_version()}
