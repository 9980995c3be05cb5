"""Measure accuracy and held cache, full and trimmed: ``python -m demo.table --output demo/results``.

Over easy-VQA's whole test split, held-out scenes, and held-out scenes over photographs with the second model: the full model;
the full model with padding tiles pooled and left out of its vision tower; ``TrimmedLlama`` at five K, with one kept set an
image and with one a question; at three of these K ``Random`` and ``Grid`` at the mean kept fraction that TrimmedLlama by image
was just measured to have on that data set; ``Clusters`` at a tenth of the features and at three likenesses; and rows that merge
inside the tower (``Alike``), alone and with clusters behind. All of it goes through the engine that the jobs run, with padding
tiles pooled where nothing else is said. Writes ``accuracy.json`` after every configuration and continues from it, and
``accuracy.md`` at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.conditions import commit, processor
from demo import MODEL, PHOTO_MODEL, scenes, shards
from demo.scenes import PHOTO
from jobs.comparison.bootstrap import Clusters, score

if TYPE_CHECKING:
    from demo.answerer import Answerer
    from pipeline.engine import Engine
    from trimming import Policy
    from trimming.engine import KeptSets
    from trimming.tower import TowerPolicy, TowerTiles

ROOT = Path(__file__).resolve().parent.parent
K_RATIOS = (0.4, 0.25, 0.15, 0.1, 0.05)
LIKENESSES = (0.9, 0.8, 0.7)
"""Of clusters; beside them a share of each image's features, whatever the image:"""
SHARE = 0.1
TOWER_KEEPS = (0.53, 0.45)
"""Shares of the tower's rows × layers that are left where rows merge; with the first also this share of the features behind:"""
TOWER_SHARE = 0.4
CONTROLLED = (0.25, 0.15, 0.05)
"""The K with controls, which are shown by kind of question."""
WEAK = 0.80
"""A kind answered less often than this is named."""
PROGRESS_ROWS = 64
TEXT_DIGITS = 6
"""Of a digest, to tell texts apart."""
ELSEWHERE = {Path("engine/cuda.py"), Path("engine/triton_attention.py")}
"""Modules of ``trimming`` that only a GPU runs."""
ONLY_SETS = {f"trimmed-llama {k}" for k in K_RATIOS if k not in CONTROLLED} | {f"by-question {k}" for k in K_RATIOS}
"""Configurations that only the tables of kept sets show."""

Result = dict[str, Any]
Counts = defaultdict[str, dict[str, int]]
SCORE = ("value", "low", "high")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="for easy-VQA and scenes (default: %(default)s)")
    parser.add_argument("--photo-model", type=Path, default=PHOTO_MODEL, help="for scenes over photographs")
    parser.add_argument("--output", type=Path, required=True, help="folder of accuracy.json and accuracy.md")
    parser.add_argument("--easy-vqa", type=int, metavar="N", default=shards.EASY_VQA_QUESTIONS["test"], help="default: all")
    parser.add_argument("--scenes", type=int, metavar="N", default=500, help="default: %(default)s, six questions each")
    parser.add_argument("--photo-scenes", type=int, metavar="N", default=500, help="default: %(default)s, six questions each")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads; default: torch's own choice")
    options = parser.parse_args(arguments)
    for name in ("easy_vqa", "scenes", "photo_scenes"):
        if (count := getattr(options, name)) < 0:
            parser.error(f"--{name.replace('_', '-')} {count}: give 0 or more")
    asked = [options.model] * (options.easy_vqa + options.scenes > 0) + [options.photo_model] * (options.photo_scenes > 0)
    if not asked:
        parser.error("nothing to measure")
    if lacking := [folder for folder in asked if not (folder / "model.safetensors").exists()]:
        parser.error(f"{lacking[0]} holds no model")

    import torch

    from demo.answerer import Answerer

    if options.threads:
        torch.set_num_threads(options.threads)
    by_image = {
        "easy-vqa-test": (options.model, shards.easy_vqa_rows("test", options.easy_vqa)),
        "scenes-test": (options.model, shards.scene_rows("test", options.scenes, scenes.KINDS)),
        "photo-scenes-test": (options.photo_model, shards.scene_rows("test", options.photo_scenes, scenes.KINDS, PHOTO)),
    }
    sets = {name: (model, [row for image in images for row in image]) for name, (model, images) in by_image.items()}
    sets = {name: (model, rows) for name, (model, rows) in sets.items() if rows}
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "accuracy.json"
    # Sets that this run is not asked for stay as they are.
    report: Result = {"sets": json.loads(file.read_text()).get("sets", {}) if file.exists() else {}}
    for name, one in report["sets"].items():
        if name not in sets and not one["results"].keys() >= set(labels()):
            parser.error(f"{file} has other columns of {name} than are measured now, or not all: ask for its images, too")
    answerers = {model: Answerer(model) for model, _ in sets.values()}
    for name, (model, rows) in sets.items():
        measured, answerer = identity(model, len(rows)), answerers[model]
        if report["sets"].get(name, {}).get("measured") != measured:
            report["sets"][name] = {"measured": measured, "conditions": conditions(), "results": {}}
        results = report["sets"][name]["results"]
        for label in labels():
            if label not in results:
                tower = tower_tiles_of(label), kept_sets_of(label), tower_policy_of(label)
                engine = answerer.engine(policy_of(label, results), *tower)
                results[label] = measure(answerer, engine, rows, f"{name}, {label}")
                results[label]["lost"] = lost(rows, results["full"], results[label])
                results[label]["same_texts"] = same_texts(results["full"], results[label])
                if label != "full":
                    del results[label]["texts"]
                write(file, json.dumps(report, indent=1) + "\n")
    write(options.output / "accuracy.md", markdown(report))
    print(markdown(report))
    return 0


# ---- what is measured -------------------------------------------------------------------------------------------------------


def labels() -> Iterator[str]:
    """What is measured: everything kept, exactly and by the tower's approximations; for each K the method with one kept set an
    image and with one a question, and the controls, named after the K whose kept fraction they match; clusters by share and by
    likeness; and rows that merge inside the tower."""
    yield from ("full", "pooled", "real-tiles")
    for k in K_RATIOS:
        yield from (f"trimmed-llama {k}", f"by-question {k}")
        if k in CONTROLLED:
            yield from (f"random {k}", f"grid {k}")
    yield f"share {SHARE}"
    yield from (f"clusters {likeness}" for likeness in LIKENESSES)
    yield from (f"tower {keep}" for keep in TOWER_KEEPS)
    yield f"tower-and-share {TOWER_KEEPS[0]}"


def policy_of(label: str, results: dict[str, Result]) -> Policy:
    """The policy of a column; a control takes the kept fraction that ``results`` has for its trimmed-llama."""
    from trimming import Clusters, Grid, KeepAll, Random, TrimmedLlama

    name, _, k = label.partition(" ")
    if name in ("full", "pooled", "real-tiles", "tower"):
        return KeepAll()
    if name == "tower-and-share":
        return Clusters(keep=TOWER_SHARE)
    if name in ("trimmed-llama", "by-question"):
        return TrimmedLlama(k_ratio=float(k))
    if name == "share":
        return Clusters(keep=float(k))
    if name == "clusters":
        return Clusters(likeness=float(k))
    keep = results[f"trimmed-llama {k}"]["keep_fraction"]
    return Random(keep=keep) if name == "random" else Grid(keep=keep)


def tower_tiles_of(label: str) -> TowerTiles:
    ways: dict[str, TowerTiles] = {"full": "all", "real-tiles": "real"}
    return ways.get(label, "pooled")


def tower_policy_of(label: str) -> TowerPolicy | None:
    from trimming.tower import Alike

    name, _, keep = label.partition(" ")
    return Alike(float(keep)) if name in ("tower", "tower-and-share") else None


def kept_sets_of(label: str) -> KeptSets:
    return "question" if label.startswith("by-question") else "image"


def measure(answerer: Answerer, engine: Engine, rows: list[shards.Row], title: str) -> Result:
    """Answer all ``rows``: counts by kind and by the image's tiles, the mean kept fraction over rows, what the engine held of
    images' keys and values, and its seconds, those of images apart."""
    answerer.encode(engine, rows)
    images, tower_seconds = engine.batch.statistics.images_encoded, engine.batch.seconds["tower"]
    engine.batch.reset_statistics()
    kinds: Counts = defaultdict(lambda: {"rows": 0, "right": 0})
    tiles: Counts = defaultdict(lambda: {"rows": 0, "right": 0})
    right, texts, kept, began = [], [], 0.0, time.monotonic()
    for done, answered in enumerate(answerer.answer(engine, rows), 1):
        for counts in (kinds[answered.row.kind], tiles[str(answered.tiles)]):
            counts["rows"] += 1
            counts["right"] += answered.right
        right.append(answered.right)
        texts.append(hashlib.sha256(answered.said.text.encode()).hexdigest()[:TEXT_DIGITS])
        kept += answered.said.keep_fraction or 0.0
        if done % PROGRESS_ROWS == 0:
            print(f"\r{title}: {done:,} of {len(rows):,}", end="", file=sys.stderr, flush=True)
    seconds = time.monotonic() - began
    accuracy = sum(right) / len(rows)
    print(f"\r{title}: {accuracy:.1%} right, {kept / len(rows):.1%} kept, {seconds:.0f} s", file=sys.stderr)
    statistics = engine.batch.statistics
    return {
        "policy": repr(engine.batch.policy),
        "tower": f"{engine.batch.tower.tower_tiles}, {engine.batch.tower.policy}",
        "kept_sets": engine.batch.kept_sets,
        "rows": len(rows),
        "accuracy": round(accuracy, 4),
        "keep_fraction": round(kept / len(rows), 4),
        "peak_cross_kv_bytes": statistics.peak_cross_kv_bytes,
        "cross_kv_byte_seconds": round(statistics.cross_kv_byte_seconds),
        "cross_kv_bytes_read": statistics.cross_kv_bytes_read,
        "prefill_seconds": round(engine.batch.seconds["prefill"], 2),
        "decode_seconds": round(engine.batch.seconds["decode"], 2),
        "seconds": round(seconds, 1),
        "images_encoded": images,
        "tower_seconds": round(tower_seconds, 1),
        "kinds": dict(sorted(kinds.items())),
        "tiles": dict(sorted(tiles.items())),
        "right": np.packbits(right).tobytes().hex(),
        "texts": "".join(texts),
    }


def same_texts(full: Result, result: Result) -> float:
    """The share of rows whose text is, to the letter, that of ``full``."""
    before, after = (np.frombuffer(one["texts"].encode(), f"S{TEXT_DIGITS}") for one in (full, result))
    return round(float((before == after).mean()), 5)


def lost(rows: Sequence[shards.Row], full: Result, result: Result) -> Result:
    """The share of right answers that ``result`` lacks and ``full`` has, with its paired 95 % interval over images."""
    before, after = (each_right(one).astype(np.float64) for one in (full, result))
    found = score(Clusters.of(np.array([row.path for row in rows]), before - after))
    return {name: getattr(found, name) and round(getattr(found, name), 5) for name in SCORE}


def each_right(result: Result) -> np.ndarray:
    """(rows,) of 0 and 1: whether each row's answer is right."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(result["right"]), np.uint8), count=result["rows"])


def identity(model: Path, rows: int) -> Result:
    """What a set's numbers depend on; they are measured anew where it is another."""
    settings = sorted(path for path in model.iterdir() if path.suffix in (".json", ".jinja"))
    return {
        "model_sha256": sha256(model / "model.safetensors"),
        "model_settings_sha256": digest(settings),
        "code_sha256": digest(code()),
        "rows": rows,
        "k_ratios": list(K_RATIOS),
        "likenesses": list(LIKENESSES),
        "share": SHARE,
        "tower_keeps": list(TOWER_KEEPS),
        "tower_share": TOWER_SHARE,
    }


def code() -> list[Path]:
    """The files that decide which rows are asked and what is answered to them on a CPU."""
    trimming = [path for path in (ROOT / "trimming").rglob("*.py") if path.relative_to(ROOT / "trimming") not in ELSEWHERE]
    asking = [ROOT / "pipeline" / f"{name}.py" for name in ("engine", "images", "model", "pictures", "prompts")]
    asked = [ROOT / "demo" / f"{name}.py" for name in ("answerer", "easy_vqa", "photographs", "scenes", "shards")]
    return sorted([*trimming, *asking, *asked])


def digest(files: Sequence[Path]) -> str:
    """Of the files' names and contents."""
    return hashlib.sha256("".join(f"{path.name} {sha256(path)}\n" for path in files).encode()).hexdigest()


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def conditions() -> Result:
    import torch
    import transformers

    from demo.answerer import LIMITS

    return {
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "hardware": f"{os.cpu_count()} cores, {processor()}, {torch.get_num_threads()} threads",
        "dtype": "float32",
        "decoding": "greedy",
        "rows_at_once": LIMITS.max_sequences,
    }


def write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


# ---- the page ---------------------------------------------------------------------------------------------------------------


def markdown(report: Result) -> str:
    """Tables, the kinds that fall short, and the conditions."""
    sets = {name: one["results"] for name, one in report["sets"].items()}
    lines = ["Share of answers that are right as a whole, in %; captions must be exact.", "", *summary(sets)]
    lines += ["", "By kind of question:"]
    for name, results in sets.items():
        shown = {label: results[label] for label in results if label not in ONLY_SETS}
        lines += ["", f"**{name}**, {results['full']['rows']:,} questions", "", *accuracy_table(shown)]
        lines += ["", f"Kinds under {WEAK:.0%}:", ""]
        for label, result in shown.items():
            weak = [f"{kind} {percent(share(result, kind))}" for kind in result["kinds"] if share(result, kind) < WEAK]
            lines.append(f"- {label}: {', '.join(weak) or 'none'}")
        lines += ["", f"One kept set an image and one a question on {name}, from the highest peak held to the lowest:", ""]
        lines += kept_sets_table(results)
    lines += [
        "",
        "K: trimmed-llama with one kept set for all questions about an image. by question: the same K with a kept set for each "
        "question. random and grid: at the kept fraction measured for the K on their left. clusters: features of an image "
        "merged to this share or up to this likeness, whatever is asked, each mean counting as often as it has members.",
        "",
        "lost: percentage points below full on the same rows, with a 95 % interval (bootstrap over images).",
        "",
        "held: cross-attention keys and values in the engine's memory, what rows share counted once: most at once, and bytes "
        "times the seconds of prefill and decoding that they were held for. Images were encoded beforehand. × is a multiple of "
        "full's. One pass each, one after the other: a drift of the machine's speed is in byte-seconds (full and real tiles "
        "hold nearly the same); seconds beside each other are `make bench`'s.",
        "",
        "full: all rows of padding tiles go through the vision tower, as it was trained; pooled: a few rows stand for each, as "
        "in all other columns; real tiles: they are left out. An image of four tiles has none. tower: rows of real tiles that "
        "are alike merge on their way, and this share of rows × layers is left; then clusters of what is left. The tower's "
        "seconds:",
        "",
        *tower_seconds(sets),
    ]
    for name, one in report["sets"].items():
        listed = "; ".join(f"{key} {value}" for key, value in one["conditions"].items())
        lines += ["", f"Conditions, {name}: {listed}; model {one['measured']['model_sha256'][:12]}."]
    return "\n".join(lines) + "\n"


def summary(sets: dict[str, dict[str, Result]]) -> list[str]:
    """A line a configuration: on each set what is right, what was lost, and the most bytes held."""
    lines = [row(["", *(f"{name}: right · lost · held" for name in sets)]), row(["---", *["---:"] * len(sets)])]
    for label in labels():
        cells = []
        for results in sets.values():
            full, result = results["full"], results[label]
            held = times(COSTS["peak held"](result), COSTS["peak held"](full))
            cells.append(f"{percent(result['accuracy'])} · {'' if label == 'full' else interval(result['lost'])} · {held}")
        lines.append(row([title(label), *cells]))
    return lines


def title(label: str) -> str:
    """A line's, where nothing stands on its left."""
    name, _, k = label.partition(" ")
    if name == "by-question":
        return f"K = {k}, a set a question"
    return f"{name}, as many as K = {k}" if name in ("random", "grid") else heading(label)


def accuracy_table(results: dict[str, Result]) -> list[str]:
    """By kind of question; a column for each of ``results``, of which the first is full."""
    full = results["full"]
    heads = ["question", "rows", *map(heading, results)]
    lines = [row(heads), row(["---", *["---:"] * (len(heads) - 1)])]
    for kind, counts in full["kinds"].items():
        lines.append(row([kind, f"{counts['rows']:,}", *(percent(share(result, kind)) for result in results.values())]))
    if "caption" in full["kinds"]:
        asked = full["rows"] - full["kinds"]["caption"]["rows"]
        lines.append(row(["all but captions", f"{asked:,}", *(percent(without_captions(r)) for r in results.values())]))
    if len(full["tiles"]) > 1:
        for tiles, counts in full["tiles"].items():
            shares = (percent(share(result, tiles, "tiles")) for result in results.values())
            lines.append(row([f"on images of {count(tiles, 'tile')}", f"{counts['rows']:,}", *shares]))
    lines.append(row(["**all**", f"{full['rows']:,}", *(f"**{percent(r['accuracy'])}**" for r in results.values())]))
    lines.append(row(["lost", "", "", *(interval(r["lost"]) for label, r in results.items() if label != "full")]))
    lines.append(row(["texts as full's", "", *(percent(r["same_texts"]) for r in results.values())]))
    lines.append(row(["features kept", "", *(percent(result["keep_fraction"]) for result in results.values())]))
    return lines + [row([title, "", *(times(of(r), of(full)) for r in results.values())]) for title, of in COSTS.items()]


def kept_sets_table(results: dict[str, Result]) -> list[str]:
    """Trimmed-llama at every K with both kinds of kept sets, a line each, from the highest peak to the lowest."""
    heads = ["K", "a kept set for each", "right", "lost", "features kept", *COSTS]
    lines = [row(heads), row(["---:", "---", *["---:"] * (len(heads) - 2)])]
    found = {label: r for label, r in results.items() if label.startswith(("trimmed-llama", "by-question"))}
    for label, result in sorted(found.items(), key=lambda item: -item[1]["peak_cross_kv_bytes"]):
        cells = [percent(result["accuracy"]), interval(result["lost"]), percent(result["keep_fraction"])]
        costs = [times(of(result), of(results["full"])) for of in COSTS.values()]
        lines.append(row([label.split()[1], result["kept_sets"], *cells, *costs]))
    return lines


COSTS: dict[str, Callable[[Result], float]] = {
    "peak held": lambda result: result["peak_cross_kv_bytes"],
    "byte-seconds held": lambda result: result["cross_kv_byte_seconds"],
    "bytes read in decoding": lambda result: result["cross_kv_bytes_read"],
}
"""What is shown as a multiple of the full model's."""


def heading(label: str) -> str:
    name, _, k = label.partition(" ")
    named = {
        "trimmed-llama": f"K = {k}",
        "clusters": label,
        "share": f"clusters, {SHARE:.0%}",
        "tower": f"tower at {k}",
        "tower-and-share": f"tower at {k}, clusters of {TOWER_SHARE:.0%} of it",
    }
    return named.get(name, name.replace("-", " "))


def interval(lost: Result) -> str:
    """A loss in percentage points and its interval, where there are images enough for one."""
    value, *ends = (lost[name] if lost[name] is None else f"{round(100 * lost[name], 1) + 0:.1f}" for name in SCORE)
    return f"{value} ({' to '.join(ends)})" if None not in ends else f"{value}"


def times(value: float, base: float) -> str:
    return f"{value / base:.2f} ×" if base else "-"


def tower_seconds(sets: dict[str, dict[str, Result]]) -> list[str]:
    """A line a set: what the tower takes for its images, and how many tiles these have."""
    shown = ["full", "pooled", "real-tiles", *(f"tower {keep}" for keep in TOWER_KEEPS)]
    lines = [row(["", "questions by tiles", "images", *map(heading, shown)]), row(["---", "---", *["---:"] * (len(shown) + 1)])]
    for name, results in sets.items():
        full = results["full"]
        tiles = ", ".join(f"{counts['rows']:,} on {count(tiles, 'tile')}" for tiles, counts in full["tiles"].items())
        seconds = [f"{results[label]['tower_seconds']:.1f}" for label in shown]
        lines.append(row([name, tiles, f"{full['images_encoded']:,}", *seconds]))
    return lines


def count(number: str, thing: str) -> str:
    return f"{number} {thing}{'' if number == '1' else 's'}"


def share(result: Result, kind: str, by: str = "kinds") -> float:
    counts = result[by][kind]
    return counts["right"] / counts["rows"]


def without_captions(result: Result) -> float:
    counts = [counts for kind, counts in result["kinds"].items() if kind != "caption"]
    return sum(c["right"] for c in counts) / sum(c["rows"] for c in counts)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
