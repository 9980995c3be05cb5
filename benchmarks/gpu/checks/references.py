"""Checks that hold the engine on the device against a reference: the engine on a CPU, or transformers' own untouched model.

A check takes a ``Subject``, returns its figures, and raises ``WrongError`` where something is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import MllamaForConditionalGeneration, MllamaProcessor
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

import trimming
from benchmarks.gpu.bench import Result
from benchmarks.gpu.checks.subject import Question, Subject, answers, demand, error_of, record
from pipeline.images import Normaliser
from trimming import FastV, Grid, KeepAll, Policy, Rows, SnapKV, ThinK, TrimmedLlama, ZipVL
from trimming.engine import Completion, Engine, Image
from trimming.engine.layers import computing_on
from trimming.tower import Alike, Encoding, EViT, ToMe, TowerPolicy, Windows

LEAST_FP32, LEAST_BF16 = 0.98, 0.8
"""Shares of the rows whose tokens must be the CPU's. In fp32 only a near tie may fall the other way."""
MOST_BF16_ERROR = 1.5
"""The engine's bf16 error over transformers' own, both against transformers' fp32."""
MOST_ERROR = 3e-5
"""Relative error, by norm, of fp32 logits that another order of sums computes."""
LEAST_KEPT = 0.95
"""Share of the kept positions that must be the CPU's. Features whose scores nearly tie may change places."""
SAME: Result = {"kept_equal": 1.0, "rows_of_other_count": 0, "rows_of_other_tokens": 0}


# ---- transformers' own model ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def own_logits(
    model: MllamaForConditionalGeneration, processor: MllamaProcessor, question: Question, said: Sequence[int]
) -> Tensor:
    """(tokens said, V) float32: what transformers' model gives for each token that follows the prompt, in one forward."""
    tokens = [*question.tokens, *said[:-1]]
    inputs = {"input_ids": torch.tensor([tokens], device=model.device)}
    if question.images:
        inputs |= _image_inputs(model, processor, question.images, tokens)
    with computing_on(model.device):
        logits = model(**inputs, use_cache=False).logits
    return logits[0, len(question.tokens) - 1 :].float()


def _image_inputs(
    model: MllamaForConditionalGeneration, processor: MllamaProcessor, images: Sequence[Image], tokens: list[int]
) -> dict[str, Tensor]:
    vision, device = model.config.vision_config, model.device
    normalise = Normaliser(processor, device, model.dtype)
    most, side = vision.max_num_tiles, vision.image_size
    pixels = torch.zeros(1, len(images), most, 3, side, side, dtype=model.dtype, device=device)
    there = torch.zeros(1, len(images), most, dtype=torch.long, device=device)
    for number, image in enumerate(images):
        pixels[0, number, : len(image.pixels)] = normalise(image.pixels)
        there[0, number, : len(image.pixels)] = 1
    seen = get_cross_attention_token_mask(tokens, model.config.image_token_index)
    mask = convert_sparse_cross_attention_mask_to_dense([seen], [[len(i.pixels) for i in images]], most, len(tokens))
    return {
        "pixel_values": pixels,
        "aspect_ratio_ids": torch.tensor([[image.ratio_id for image in images]], device=device),
        "aspect_ratio_mask": there,
        "cross_attention_mask": torch.from_numpy(mask).to(device),
    }


@contextmanager
def hiding(model: MllamaForConditionalGeneration, kept: Tensor, untouched_rows: int) -> Iterator[None]:
    """Hides from cross-attention all visual features but ``kept``: from every row in every layer, except from the first
    ``untouched_rows`` rows in the first cross-attention layer, whose prefill attends to everything."""
    layers = [model.model.language_model.layers[i] for i in model.config.text_config.cross_attention_layers]

    def hide(first_row: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        mask = kwargs["attention_mask"].clone()
        dropped = torch.ones(mask.shape[-1], dtype=torch.bool, device=mask.device)
        dropped[kept.to(mask.device)] = False
        mask[..., first_row:, :].masked_fill_(dropped, -torch.inf)
        return kwargs | {"attention_mask": mask}

    with ExitStack() as hooks:
        for number, layer in enumerate(layers):
            first_row = untouched_rows if number == 0 else 0
            hook = layer.cross_attn.register_forward_pre_hook(
                lambda module, args, kwargs, first_row=first_row: (args, hide(first_row, kwargs)), with_kwargs=True
            )
            hooks.callback(hook.remove)
        yield


# ---- the checks -------------------------------------------------------------------------------------------------------------


def check_tokens(subject: Subject) -> Result:
    """Whole answers on the device, in fp32 and bf16, with all features and trimmed: the CPU's tokens."""
    questions = subject.questions(range(3 if subject.tiny else 9))
    figures: Result = {"rows": len(questions), "fp32_equal": {}, "bf16_equal": {}, "right": {}, "cpu_right": {}}
    faults = []
    for name, policy in (("full", KeepAll()), ("trimmed", TrimmedLlama(0.25))):
        eos = [subject.processor.tokenizer.eos_token_id]
        wanted = answers(subject.reference(policy, eos=eos), questions)
        fp32 = answers(subject.engine(policy, eos=eos), questions)
        bf16 = answers(subject.engine(policy, "bfloat16", eos=eos), questions)
        for label, found, least in (("fp32", fp32, LEAST_FP32), ("bf16", bf16, LEAST_BF16)):
            share = sum(f.tokens == w.tokens for f, w in zip(found, wanted, strict=True)) / len(wanted)
            figures[f"{label}_equal"][name] = share
            if share < least:
                faults.append(f"{name}, {label}: {share:.1%} of the rows have the CPU's tokens, under {least:.0%}")
        for label, found in (("right", fp32), ("cpu_right", wanted)):
            right = [subject.prompter.words(f.tokens).strip() == q.answer for f, q in zip(found, questions, strict=True)]
            figures[label][name] = sum(right) / len(right)
    return demand(faults, figures)


def check_logits(subject: Subject) -> Result:
    """bf16 logits along one text: the engine's are as near to fp32 as transformers' own are. fp32 logits are transformers'."""
    questions = subject.questions(range(2 if subject.tiny else 6), ["color", "letter", "caption"])
    engine = subject.engine(KeepAll(), rows="transformers")
    fp32 = record(engine)
    completions = answers(engine, questions, new_tokens=12)
    said = {question.id: completion.tokens for question, completion in zip(questions, completions, strict=True)}
    half = subject.engine(KeepAll(), "bfloat16", rows="transformers")
    bf16 = record(half, said)
    answers(half, questions, new_tokens=12)

    own = {"fp32": subject.model(), "bf16": subject.model("bfloat16")}
    logits = {
        name: torch.stack([own_logits(model, subject.processor, q, said[q.id]) for q in questions])
        for name, model in own.items()
    }
    ours = {name: torch.stack([torch.stack(seen[q.id]) for q in questions]) for name, seen in (("fp32", fp32), ("bf16", bf16))}
    exact = logits["fp32"]
    figures: Result = {"rows": len(questions), "steps": exact.shape[1] - 1, "fp32_error": error_of(ours["fp32"], exact)}
    faults = []
    if not figures["fp32_error"] <= MOST_ERROR:
        faults.append(f"fp32 logits are {figures['fp32_error']:.1e} from transformers', over {MOST_ERROR:.0e}")
    for stage, part in (("prefill", slice(0, 1)), ("decode", slice(1, None))):
        found, theirs = (error_of(t[:, part], exact[:, part]) for t in (ours["bf16"], logits["bf16"]))
        figures[stage] = {"bf16_error": found, "transformers_bf16_error": theirs}
        if not found <= MOST_BF16_ERROR * theirs:
            faults.append(f"{stage} in bf16: {found:.1e} from fp32, over {MOST_BF16_ERROR} times transformers' {theirs:.1e}")
    figures["bf16_best_equal"] = (ours["bf16"].argmax(-1) == exact.argmax(-1)).float().mean().item()
    return demand(faults, figures)


def check_masked(subject: Subject) -> Result:
    """Trimmed logits are those of transformers' untouched model whose masks hide what the engine dropped."""
    figures: Result = {"difference": {}, "without_masks": {}}
    faults = []
    policies = (TrimmedLlama(0.25), TrimmedLlama(0.05), FastV(0.3), Grid(0.5))
    for policy in policies[:2] if subject.tiny else policies:
        for rows in ("transformers", "meta"):
            apart, unmasked = _against_masks(subject, policy, rows)
            name = f"{policy}, {rows}"
            figures["difference"][name], figures["without_masks"][name] = apart, unmasked
            if not apart <= MOST_ERROR:
                faults.append(f"{name}: logits are {apart:.1e} from the masked model's, over {MOST_ERROR:.0e}")
            if not unmasked > 10 * MOST_ERROR:
                faults.append(f"{name}: without masks it is {unmasked:.1e}, so that this compares nothing")
    return demand(faults, figures)


def _against_masks(subject: Subject, policy: Policy, rows: Rows) -> tuple[float, float]:
    """The greatest relative difference of a row's logits, and what it is from the model that hides nothing."""
    questions = [question for question in subject.mixed() if question.images]
    if rows == "meta":
        # What the two kinds of rows differ in is rows before the image.
        questions = [replace(q, tokens=q.tokens[q.tokens.index(subject.image_token) :]) for q in questions]
    # The model's own tower sends all of padding through.
    engine = subject.engine(policy, rows=rows, tower_tiles="all")
    logits = record(engine)
    completions = answers(engine, questions, new_tokens=8)
    model = subject.model()
    masked, unmasked = [], []
    for question, completion in zip(questions, completions, strict=True):
        found = torch.stack(logits[question.id])
        full = own_logits(model, subject.processor, question, completion.tokens)
        prompt = len(question.tokens) if policy.where == "first_layer" else 0
        with hiding(model, completion.trim.kept, prompt):
            wanted = own_logits(model, subject.processor, question, completion.tokens)
        masked.append(error_of(found, wanted))
        unmasked.append(error_of(found, full))
    return max(masked), max(unmasked)


@torch.inference_mode()
def check_tower(subject: Subject) -> Result:
    """The tower on the device, padding pooled, all rows and under its policies: the CPU's features in fp32, of images whose
    rows went the same ways; and in bf16 no further from them than the tower that all of padding goes through from its own."""
    images = [subject.image(index) for index in (0, 2, 3, 4)]
    policies: list[TowerPolicy | None] = [None, Alike(0.5), EViT(0.5)] + ([] if subject.tiny else [ToMe(0.5), Windows(0.5)])
    figures: Result = {"images": len(images), "difference": {}, "same_ways": {}, "bf16_error": {}}
    faults = []

    def features(engine: Engine) -> list[Encoding]:
        with computing_on(engine.model.device):
            return [engine.tower.encode([image]) for image in images]

    def off(found: Sequence[Encoding], wanted: Sequence[Encoding]) -> tuple[list[float], int]:
        ways = [(a.group, b.group) for a, b in zip(found, wanted, strict=True)]
        same = [a is None or b is None or torch.equal(a.cpu(), b) for a, b in ways]
        pairs = zip(found, wanted, same, strict=True)
        return [error_of(a.features.float().cpu(), b.features) for a, b, fine in pairs if fine], sum(same)

    every = KeepAll()
    whole, _ = off(
        features(subject.engine(every, "bfloat16", tower_tiles="all")), features(subject.reference(every, tower_tiles="all"))
    )
    for policy in policies:
        name = "pooled" if policy is None else repr(policy)
        wanted = features(subject.reference(every, tower_policy=policy))
        errors, same = off(features(subject.engine(every, tower_policy=policy)), wanted)
        rounded, _ = off(features(subject.engine(every, "bfloat16", tower_policy=policy)), wanted)
        figures["difference"][name], figures["same_ways"][name] = max(errors, default=None), same
        figures["bf16_error"][name] = [max(rounded, default=None), max(whole)]
        # Who merges with whom may be decided by a hair.
        if same < len(images) - 1:
            faults.append(f"{name}: the rows of {len(images) - same} of {len(images)} images go other ways than on the CPU")
        if not max(errors, default=0.0) <= MOST_ERROR:
            faults.append(f"{name}: features are {max(errors):.1e} from the CPU's, over {MOST_ERROR:.0e}")
        # Means by attention in bf16, as EViT's are, are off by more than sizes are.
        sized = policy is None or policy.weighs
        if sized and not max(rounded, default=0.0) <= MOST_BF16_ERROR * max(whole):
            faults.append(f"{name} in bf16: {max(rounded):.1e} from fp32, over {MOST_BF16_ERROR} times {max(whole):.1e}")
    return demand(faults, figures)


def policy_family() -> list[Policy]:
    """One policy of each kind that ``trimming`` offers, key slicing over two."""
    kinds = [getattr(trimming, name) for name in trimming.__all__]
    kinds = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Policy) and kind not in (Policy, ThinK)]
    family = []
    for kind in kinds:
        # A policy's one setting without a default is the share that it keeps.
        wanted = [f for f in kind.__dataclass_fields__ if f in ("keep", "mass")]
        family.append(kind(**dict.fromkeys(wanted, 0.4)))
    return [*family, ThinK(0.5), ThinK(0.5, SnapKV(0.4))]


def check_policies(subject: Subject) -> Result:
    """Every policy on the device: the CPU's tokens, counts and kept positions; ``different`` has those where not all is."""
    questions = subject.mixed()
    family = policy_family()
    figures: Result = {"rows": len(questions), "policies": len(family), "kept_equal": 1.0, "different": {}}
    faults = []
    for policy in family:
        wanted = answers(subject.reference(policy), questions, new_tokens=8)
        found = answers(subject.engine(policy), questions, new_tokens=8)
        # A union of heads, or a mass of attention, may be one feature larger where scores nearly tie.
        part, wrong = _compare(found, wanted, 1 if isinstance(policy, TrimmedLlama | ZipVL) else 0)
        figures["kept_equal"] = min(figures["kept_equal"], part["kept_equal"])
        if part != SAME:
            figures["different"][repr(policy)] = part
        faults += [f"{policy!r}: {fault}" for fault in wrong]
    return demand(faults, figures)


def _compare(found: Sequence[Completion], wanted: Sequence[Completion], margin: int) -> tuple[Result, list[str]]:
    """Figures and faults of one policy. Counts of kept features may differ by ``margin``."""
    both = held = counts = tokens = excused = 0
    for one, reference in zip(found, wanted, strict=True):
        mine, theirs = set(one.trim.kept.tolist()), set(reference.trim.kept.tolist())
        both, held = both + len(mine & theirs), held + max(len(mine), len(theirs))
        counts += abs(one.trim.kept_visual_tokens - reference.trim.kept_visual_tokens) > margin
        if one.tokens != reference.tokens:
            tokens += 1
            # Another feature may well lead to another token.
            excused += mine != theirs
    share = both / held if held else 1.0
    part = {"kept_equal": share, "rows_of_other_count": counts, "rows_of_other_tokens": tokens}
    faults = []
    if share < LEAST_KEPT:
        faults.append(f"{share:.1%} of the kept positions are the CPU's, under {LEAST_KEPT:.0%}")
    if counts:
        faults.append(f"{counts} of {len(found)} rows keep another number of features than on the CPU")
    if tokens > excused:
        faults.append(f"{tokens} of {len(found)} rows say other tokens than on the CPU")
    return part, faults
