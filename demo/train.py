"""Train a demo model: ``python -m demo.train --work build/demo-train --output demo/model``.

``--style photo-scenes --start demo/model`` trains the second one, with patches of half the size, from the first one's weights.
Three stages, one schedule (measured on two CPU cores, see the README's table for what they reach):

1. *tower*: the vision tower alone learns to label each patch with what the drawing knows of it: the object's shape, colour
   and letter, its rank from left to right and from top to bottom, its centre. Without this the language side does not bind
   colour to shape in any affordable time. Letters come last: "drills", one tile with a letter on every object, speed them up.
2. *language*: questions and captions, the tower's labels kept as a second loss. All texts of one image ride in one
   sequence: they share the prompt's prefix and see neither each other nor the positions before theirs, so an image is
   encoded once for some ten texts. The tower sees real tiles only, which is fast and not yet what inference computes.
3. *exact*: the same with the tower as it is at inference, padding tiles included.

Both are the engine's own tower, which needs no mask: what is learnt is what will be computed.

Training pictures are the train split of the style's scenes and, for the first model, easy-VQA's train split; test pictures and
questions never enter.
The cross-attention rows follow Meta's semantics (rows before the image get nothing from cross-attention layers). The run is
seeded, writes a checkpoint every few minutes and continues from it when started again.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import MllamaForConditionalGeneration, MllamaProcessor

from demo import easy_vqa, scenes
from demo.architecture import build_model, build_processor, start_from
from demo.scenes import FLAT, PHOTO, STYLES, Object, Style
from pipeline.images import Normaliser
from trimming.engine import Image as Encodable
from trimming.tower import Tower

IGNORE = -100
# Reading is learnt last: long after colours and shapes it still stands at "nothing is written".
LABEL_WEIGHT = {"glyph": 3.0, "second": 3.0}
# Pictures a micro-batch, by tile count: about as many visual tokens in each.
BATCH = {FLAT: {1: 20, 2: 14, 3: 10, 4: 8}, PHOTO: {1: 12, 2: 7, 3: 5, 4: 4}}
# The last stage's rate at its height: the second model still has much to learn in it.
LAST_RATE = {FLAT: 3e-4, PHOTO: 5e-4}


@dataclass(slots=True)
class Picture:
    """``tiles``: uint8 (T, 3, 112, 112); ``texts``: (question, answer) pairs; ``labels``: int64 (T × P, labels) or None."""

    tiles: Tensor
    ratio: int
    texts: list[tuple[str, str]]
    labels: Tensor | None = None
    centres: Tensor | None = None
    objects: int = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint and the log")
    parser.add_argument("--output", type=Path, required=True, help="folder the finished model is written to")
    parser.add_argument("--style", choices=tuple(STYLES), default=FLAT.name, help="scenes to learn (default: %(default)s)")
    parser.add_argument("--start", type=Path, help="folder of a demo model to start from; default: from scratch")
    parser.add_argument("--scenes", type=int, default=30_000, help="training scenes")
    parser.add_argument("--drills", type=int, default=12_000, help="training scenes of one tile, full of letters")
    parser.add_argument("--tower-steps", type=int, default=4_900)
    parser.add_argument("--language-steps", type=int, default=2_600)
    parser.add_argument("--exact-steps", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)

    style = STYLES[options.style]
    processor = build_processor(easy_vqa_texts(), style)
    trainer = Trainer(processor, options.seed, options.device, style)
    if options.start:
        words = MllamaProcessor.from_pretrained(options.start)
        start_from(trainer.model, processor, MllamaForConditionalGeneration.from_pretrained(options.start), words)
    steps = {"tower": options.tower_steps, "language": options.language_steps, "exact": options.exact_steps}
    checkpoint = options.work / "checkpoint.pt"

    began = time.time()
    train = [scene_picture(processor, "train", i, options.seed, style) for i in range(options.scenes)]
    drills = [scene_picture(processor, "train", i, options.seed, style, drill=True) for i in range(options.drills)]
    # Never trained on, drawn by the training scenes' rules.
    validation = [scene_picture(processor, "train", 10_000_000 + i, 1, style) for i in range(200)]
    # Of which the second model is asked nothing.
    easy = easy_pictures(processor, "train") if style == FLAT else []
    print(
        f"{len(train)} scenes, {len(drills)} drills and {len(easy)} easy-VQA images in {time.time() - began:.0f} s", flush=True
    )

    schedule = [stage for stage, n in steps.items() for _ in range(n)]
    optimizer = torch.optim.AdamW(trainer.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02)
    done = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=options.device, weights_only=True)
        trainer.load_state_dict(state["trainer"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
        print(f"continuing at step {done}", flush=True)

    sampler = Sampler(train, drills, easy, options.seed, BATCH[style])
    sums: dict[str, list[float]] = defaultdict(list)
    clock = time.time()
    for step in range(done, len(schedule)):
        stage = schedule[step]
        rate = learning_rate(step, steps, LAST_RATE[style])
        for group in optimizer.param_groups:
            group["lr"] = rate
        for micro in sampler.micro_batches(step, stage, step - steps["tower"]):
            loss, parts = trainer(micro, stage)
            loss.backward()
            for name, value in parts.items():
                sums[name].append(value)
        nn.utils.clip_grad_norm_(trainer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0:
            means = {name: round(float(np.mean(values)), 4) for name, values in sums.items()}
            record = {"step": step + 1, "of": len(schedule), "stage": stage, "s_per_step": (time.time() - clock) / 50, **means}
            if (step + 1) % 250 == 0 and stage != "tower":
                record["validation"] = evaluate(trainer, validation, stage)
            with (options.work / "log.jsonl").open("a") as log:
                print(json.dumps(record), file=log)
            print(json.dumps(record), flush=True)
            sums.clear()
            clock = time.time()
        if (step + 1) % 250 == 0 or step + 1 == len(schedule):
            state = {"trainer": trainer.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
            save(trainer.model, processor, options.work / "model")
    save(trainer.model, processor, options.output)
    print(json.dumps({"validation": evaluate(trainer, validation, "exact")}), flush=True)


def save(model: MllamaForConditionalGeneration, processor: MllamaProcessor, folder: Path) -> None:
    """bf16 safetensors (9.4 and 11.6 MB, as the published weights are bf16) with the processor beside them."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


def learning_rate(step: int, steps: dict[str, int], last: float) -> float:
    """Each stage warms up over 100 steps. The tower's rate then stays up until its last fifth, as letters are learnt late; the
    others' follow cosines, the last from ``last``, which is lower, as it mostly has to make room for padding tiles."""
    tower, language, exact = steps.values()
    if step < tower:
        return 9e-4 * min(1.0, (step + 1) / 100) * min(1.0, max(0.1, (tower - step) / (0.2 * tower)))
    at, length, peak = (step - tower, language, 9e-4) if step < tower + language else (step - tower - language, exact, last)
    return peak * min(1.0, (at + 1) / 100) * max(0.03, 0.5 * (1 + math.cos(math.pi * at / length)))


def easy_vqa_texts() -> Iterator[str]:
    for split_question in easy_vqa.questions("train"):
        yield split_question.text
        yield split_question.answer


# ---- pictures ---------------------------------------------------------------------------------------------------------------


def to_tiles(processor: MllamaProcessor, image: Image.Image, **how: object) -> tuple[Tensor, int]:
    """The processor's own resizing and tiling, undone of nothing but the normalisation: uint8 real tiles, ratio id."""
    out = processor.image_processor([[image]], do_rescale=False, do_normalize=False, return_tensors="pt", **how)
    return out["pixel_values"][0, 0, : out["num_tiles"][0][0]].round().to(torch.uint8), int(out["aspect_ratio_ids"][0, 0])


def scene_picture(
    processor: MllamaProcessor, split: str, index: int, seed: int, style: Style = FLAT, drill: bool = False
) -> Picture:
    scene = scenes.scene(split, index, drill, style)
    tiles, ratio = to_tiles(processor, scenes.draw(scene))
    owner, _ = to_tiles(processor, scenes.owners(scene).convert("RGB"), resample=Image.Resampling.NEAREST)
    labels, centres = patch_labels(scene, owner[:, 0], style)
    rng = random.Random(f"{seed}/{index}")
    texts = [scenes.question(scene, kind, rng) for kind in scenes.KINDS for _ in range(1 if kind == "caption" else 2)]
    return Picture(tiles, ratio, list(dict.fromkeys(t for t in texts if t)), labels, centres, len(scene.objects))


def label_classes(style: Style) -> dict[str, int]:
    """Labels of a patch: name, number of classes; 0 is the background's, and that of an object without a mark."""
    first, second = characters(style)
    most = max(style.most.values())
    labels = {"shape": len(scenes.SHAPES) + 1, "color": len(scenes.COLORS) + 1, "glyph": len(first) + 1}
    labels |= {"second": len(second) + 1} if second else {}
    return labels | {"rank_x": most + 1, "rank_y": most + 1}


def characters(style: Style) -> tuple[list[str], list[str]]:
    """The first and the second characters of a style's marks."""
    marks = [mark for alphabet in style.marks for mark in alphabet]
    return list(dict.fromkeys(mark[0] for mark in marks)), sorted({mark[1] for mark in marks if len(mark) > 1})


def labels_of(item: Object, rank_x: int, rank_y: int, style: Style) -> list[int]:
    """The classes of an object's patches, in the order of ``label_classes``."""
    first, second = characters(style)
    labels = [1 + scenes.SHAPES.index(item.shape), 1 + list(scenes.COLORS).index(item.color)]
    labels.append(1 + first.index(item.glyph[0]) if item.glyph else 0)
    if second:
        labels.append(1 + second.index(item.glyph[1]) if len(item.glyph) > 1 else 0)
    return [*labels, 1 + rank_x, 1 + rank_y]


def patch_labels(scene: scenes.Scene, owner: Tensor, style: Style) -> tuple[Tensor, Tensor]:
    """Labels (T × patches, labels) and centres (T × patches, 2) of each patch; ``owner`` is (T, 112, 112).

    Patches that an object barely touches are ignored."""
    patch = style.patch
    side = scenes.TILE // patch
    cut = owner.reshape(-1, side, patch, side, patch).permute(0, 1, 3, 2, 4).reshape(-1, patch * patch)
    covered = torch.stack([(cut == i).sum(-1) for i in range(len(scene.objects) + 1)], dim=-1)
    best = covered[:, 1:].argmax(-1)
    share = covered[:, 1:].amax(-1) / patch**2
    ranks = {o: r for r, o in enumerate(sorted(range(len(scene.objects)), key=lambda i: scene.objects[i].y))}
    table = torch.tensor([labels_of(o, i, ranks[i], style) for i, o in enumerate(scene.objects)])
    labels = table[best]
    labels[share < 0.25] = IGNORE
    labels[share == 0] = 0
    centres = torch.tensor([[o.x / (3 * scenes.TILE), o.y / (3 * scenes.TILE)] for o in scene.objects])[best]
    centres[share < 0.25] = float("nan")
    return labels, centres


def easy_pictures(processor: MllamaProcessor, split: str) -> list[Picture]:
    texts: dict[Path, list[tuple[str, str]]] = defaultdict(list)
    for item in easy_vqa.questions(split):
        texts[item.path].append((item.text, item.answer))
    return [Picture(*to_tiles(processor, Image.open(path).convert("RGB")), asked) for path, asked in texts.items()]


class Sampler:
    """Micro-batches of pictures with one tile count each, decided by the seed and the step alone."""

    def __init__(
        self, train: list[Picture], drills: list[Picture], easy: list[Picture], seed: int, batch: dict[int, int]
    ) -> None:
        self.drills, self.easy, self.seed, self.batch = drills, easy, seed, batch
        fewest = min(picture.objects for picture in train)
        self.groups: dict[tuple[int, bool], list[Picture]] = defaultdict(list)
        for picture in train:
            self.groups[len(picture.tiles), False].append(picture)
            if picture.objects <= fewest + 1:
                self.groups[len(picture.tiles), True].append(picture)

    def micro_batches(self, step: int, stage: str, language_step: int) -> Iterator[list[Picture]]:
        rng = random.Random(f"{self.seed}/{step}")
        few = stage == "language" and language_step < 500 and rng.random() < 0.7
        tiles = rng.choice((2, 3, 4))
        yield thinned(rng.sample(self.groups[tiles, few], self.batch[tiles]), rng)
        if stage == "tower":
            yield rng.sample(self.drills, 2 * self.batch[1])
        else:
            # Three tenths scenes, a quarter drills, the rest easy-VQA, where it is learnt.
            single, drills = round(0.3 * self.batch[1]), self.batch[1] // 4
            easy = self.batch[1] - single - drills if self.easy else 0
            mix = ((self.groups[1, few], single), (self.drills, drills), (self.easy, easy))
            yield thinned([picture for pictures, count in mix for picture in rng.sample(pictures, count)], rng)


def thinned(pictures: list[Picture], rng: random.Random, most: int = 6) -> list[Picture]:
    """The pictures with ``most`` of their texts each; a scene's caption, its last, always among them."""
    return [replace(p, texts=[*rng.sample(p.texts[:-1], min(most, len(p.texts)) - 1), p.texts[-1]]) for p in pictures]


# ---- model and losses -------------------------------------------------------------------------------------------------------


class Trainer(nn.Module):
    """The model with the patch-label heads that only training needs."""

    def __init__(self, processor: MllamaProcessor, seed: int, device: str, style: Style = FLAT) -> None:
        super().__init__()
        self.processor = processor
        self.labels = label_classes(style)
        self.model = build_model(processor, seed, style.patch).to(device)
        width = self.model.config.text_config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(width, n) for name, n in self.labels.items()}).to(device)
        self.centre_head = nn.Linear(width, 2).to(device)
        normalise = Normaliser(processor, torch.device(device), torch.float32)
        self.exact, self.real = Tower(self.model, normalise, "all"), Tower(self.model, normalise, "real")
        self.tokens: dict[str, list[int]] = {}
        self.rows: Tensor | None = None
        for layer in self.model.model.language_model.layers:
            if hasattr(layer, "cross_attn"):
                # Without a mask, sdpa would take the module for causal and cut the keys to the rows' length.
                layer.cross_attn.is_causal = False
                # Meta's rows: those before the image take nothing from the attention branch either.
                layer.cross_attn.register_forward_hook(lambda module, args, out: (out[0] * self.rows, *out[1:]))

    def forward(self, pictures: list[Picture], stage: str) -> tuple[Tensor, dict[str, float]]:
        features = self.encode(pictures, exact=stage == "exact")
        loss = features.new_zeros(())
        parts: dict[str, float] = {}
        if any(p.labels is not None for p in pictures):
            patch, parts = self.patch_loss(pictures, features)
            loss = loss + (patch if stage == "tower" else 0.3 * patch)
        if stage != "tower":
            text, hits, _ = self.text_loss(pictures, features)
            loss = loss + text
            parts |= {"text": float(text.detach()), "exact": float(hits.mean())}
        return loss, parts

    def encode(self, pictures: list[Picture], exact: bool) -> Tensor:
        """Projected features (B, T × visual tokens, width) of pictures that all have T tiles."""
        return (self.exact if exact else self.real).encode([Encodable("", p.tiles, p.ratio) for p in pictures]).features

    def patch_loss(self, pictures: list[Picture], features: Tensor) -> tuple[Tensor, dict[str, float]]:
        with_labels = [i for i, p in enumerate(pictures) if p.labels is not None]
        tokens = self.model.model.vision_model.num_patches
        patches = features[with_labels].unflatten(1, (-1, tokens))[:, :, 1:].flatten(0, 2)
        labels = torch.cat([pictures[i].labels for i in with_labels]).to(features.device)
        centres = torch.cat([pictures[i].centres for i in with_labels]).to(features.device)
        known = ~centres.isnan().any(-1)
        loss = 10 * F.smooth_l1_loss(self.centre_head(patches[known]), centres[known], beta=0.05)
        parts: dict[str, float] = {"centre": float(loss.detach())}
        for column, name in enumerate(self.labels):
            logits, wanted = self.heads[name](patches), labels[:, column]
            # Most patches are background: the objects' own count four times.
            each = F.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="none")
            weight = (wanted > 0) * 3.0 + 1.0
            loss = loss + LABEL_WEIGHT.get(name, 1.0) * (each * weight).sum() / (weight * (wanted != IGNORE)).sum()
            there = labels[:, 0] > 0
            parts[name] = float((logits[there].argmax(-1) == wanted[there]).float().mean())
        return loss, parts

    def text_loss(self, pictures: list[Picture], features: Tensor) -> tuple[Tensor, Tensor, list[tuple[int, str]]]:
        """Mean loss over answer tokens, whether each answer is right as a whole, and whose answers they are."""
        packed = [self.pack(p.texts) for p in pictures]
        length = max(len(ids) for ids, *_ in packed)
        device = features.device
        ids = torch.zeros(len(packed), length, dtype=torch.long)
        segment = torch.full((len(packed), length), -1)
        position = torch.zeros(len(packed), length, dtype=torch.long)
        answer = torch.zeros(len(packed), length, dtype=torch.bool)
        for row, (tokens, segments, positions, answers) in enumerate(packed):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            segment[row, : len(tokens)] = torch.tensor(segments)
            position[row, : len(tokens)] = torch.tensor(positions)
            answer[row, : len(tokens)] = torch.tensor(answers)
        ids, segment, position, answer = (t.to(device) for t in (ids, segment, position, answer))
        own = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
        visible = (own & torch.ones(length, length, dtype=torch.bool, device=device).tril())[:, None]
        # Rows from the image token onward see the image; it is the prefix's last.
        self.rows = ((segment != 0) | (ids == self.model.config.image_token_index)).to(features.dtype)[..., None]
        hidden = self.model.model.language_model(
            input_ids=ids,
            attention_mask=visible,
            position_ids=position,
            cross_attention_states=features,
            full_text_row_masked_out_mask=self.rows[:, None],
            use_cache=False,
        ).last_hidden_state
        # Position i predicts token i + 1; segments are contiguous and no answer is a segment's first token.
        logits = self.model.lm_head(hidden[:, :-1][answer[:, 1:]])
        wanted = ids[:, 1:][answer[:, 1:]]
        each = F.cross_entropy(logits, wanted, reduction="none")
        owner = (torch.arange(len(packed), device=device)[:, None] * 100 + segment)[:, 1:][answer[:, 1:]]
        wrong = (logits.argmax(-1) != wanted).float()
        which, inverse = owner.unique(return_inverse=True)
        hits = 1 - torch.zeros(len(which), device=device).scatter_reduce_(0, inverse, wrong, "amax")
        texts = [(int(w) // 100, pictures[int(w) // 100].texts[int(w) % 100 - 1][0]) for w in which]
        return each.mean(), hits, texts

    def pack(self, texts: list[tuple[str, str]]) -> tuple[list[int], list[int], list[int], list[bool]]:
        """Token ids, segment (0: the shared prefix), position and whether a token is to be learnt, of one image's texts."""
        prefix = self.encode_text("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|>")
        ids, segments = list(prefix), [0] * len(prefix)
        positions, answers = list(range(len(prefix))), [False] * len(prefix)
        for number, (question, answer) in enumerate(texts, start=1):
            asked = self.encode_text(f"{question}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
            told = self.encode_text(f"{answer}<|eot_id|>")
            ids += asked + told
            segments += [number] * len(asked + told)
            positions += range(len(prefix), len(prefix) + len(asked + told))
            answers += [False] * len(asked) + [True] * len(told)
        return ids, segments, positions, answers

    def encode_text(self, text: str) -> list[int]:
        if text not in self.tokens:
            self.tokens[text] = self.processor.tokenizer(text, add_special_tokens=False).input_ids
        return self.tokens[text]


@torch.no_grad()
def evaluate(trainer: Trainer, pictures: list[Picture], stage: str) -> dict[str, float]:
    """Share of answers that are right as a whole, by kind of question (teacher-forced, which greedy decoding equals there)."""
    found: dict[str, list[float]] = defaultdict(list)
    ordered = sorted(pictures, key=lambda p: len(p.tiles))
    for _, group in itertools.groupby(ordered, key=lambda p: len(p.tiles)):
        batch = list(group)
        _, hits, texts = trainer.text_loss(batch, trainer.encode(batch, exact=stage == "exact"))
        for hit, (_, text) in zip(hits.tolist(), texts, strict=True):
            found[text.split()[0] + " " + text.split()[1]].append(hit)
    return {name: round(float(np.mean(values)), 3) for name, values in sorted(found.items())}


if __name__ == "__main__":
    main()
