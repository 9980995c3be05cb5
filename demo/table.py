"""Measure accuracy by kind of question, full and trimmed: ``python -m demo.table --output demo/results``.

Over easy-VQA's whole test split and held-out scenes: the full model; the full model with padding tiles left out of its vision
tower; ``TrimmedLlama`` at K = 0.25, 0.15 and 0.05; and beside each of these ``Random`` and ``Grid`` at the mean kept fraction
that TrimmedLlama was just measured to have on that data set. All of it goes through the engine that the jobs run. Writes
``accuracy.json`` after every configuration and continues from it, and ``accuracy.md`` at the end.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.conditions import commit, processor
from demo import scenes, shards

if TYPE_CHECKING:
    from demo.answerer import Answerer
    from pipeline.engine import Engine
    from trimming import Policy
    from trimming.engine.vision import TowerTiles

ROOT = Path(__file__).resolve().parent.parent
K_RATIOS = (0.25, 0.15, 0.05)
WEAK = 0.80
"""A kind answered less often than this is named."""
PROGRESS_ROWS = 64
ELSEWHERE = {Path("engine/cuda.py"), Path("engine/triton_attention.py")}
"""Modules of ``trimming`` that only a GPU runs."""

Result = dict[str, Any]
Counts = defaultdict[str, dict[str, int]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "demo/model")
    parser.add_argument("--output", type=Path, required=True, help="folder of accuracy.json and accuracy.md")
    parser.add_argument("--easy-vqa", type=int, metavar="N", default=shards.EASY_VQA_QUESTIONS["test"], help="default: all")
    parser.add_argument("--scenes", type=int, metavar="N", default=500, help="default: %(default)s, six questions each")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads; default: torch's own choice")
    options = parser.parse_args(arguments)

    import torch

    from demo.answerer import Answerer

    if options.threads:
        torch.set_num_threads(options.threads)
    sets = {
        "easy-vqa-test": [row for image in shards.easy_vqa_rows("test", options.easy_vqa) for row in image],
        "scenes-test": [row for image in shards.scene_rows("test", options.scenes, scenes.KINDS) for row in image],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "accuracy.json"
    report: Result = {"measured": identity(options.model, {name: len(rows) for name, rows in sets.items()}), "results": {}}
    if file.exists() and (old := json.loads(file.read_text())).get("measured") == report["measured"]:
        report = old
    report["conditions"] = conditions()
    answerer = Answerer(options.model)
    for name, rows in sets.items():
        results = report["results"].setdefault(name, {})
        for label in labels():
            if label not in results:
                engine = answerer.engine(policy_of(label, results), tower_tiles_of(label))
                results[label] = measure(answerer, engine, rows, f"{name}, {label}")
                write(file, json.dumps(report, indent=1) + "\n")
    write(options.output / "accuracy.md", markdown(report))
    print(markdown(report))
    return 0


# ---- what is measured -------------------------------------------------------------------------------------------------------


def labels() -> Iterator[str]:
    """The columns: everything kept, exactly and by the tower's approximation; for each K the method and its controls, named
    after the K whose kept fraction they match."""
    yield from ("full", "real-tiles")
    for k in K_RATIOS:
        yield from (f"trimmed-llama {k}", f"random {k}", f"grid {k}")


def policy_of(label: str, results: dict[str, Result]) -> Policy:
    """The policy of a column; a control takes the kept fraction that ``results`` has for its trimmed-llama."""
    from trimming import Grid, KeepAll, Random, TrimmedLlama

    name, _, k = label.partition(" ")
    if name in ("full", "real-tiles"):
        return KeepAll()
    if name == "trimmed-llama":
        return TrimmedLlama(k_ratio=float(k))
    keep = results[f"trimmed-llama {k}"]["keep_fraction"]
    return Random(keep=keep) if name == "random" else Grid(keep=keep)


def tower_tiles_of(label: str) -> TowerTiles:
    return "real" if label == "real-tiles" else "all"


def measure(answerer: Answerer, engine: Engine, rows: list[shards.Row], title: str) -> Result:
    """Answer all ``rows``; counts by kind and by the image's tiles, the mean kept fraction over rows, summed cache bytes."""
    kinds: Counts = defaultdict(lambda: {"rows": 0, "right": 0})
    tiles: Counts = defaultdict(lambda: {"rows": 0, "right": 0})
    kept, bytes_full, bytes_kept, began = 0.0, 0, 0, time.monotonic()
    for done, answered in enumerate(answerer.answer(engine, rows), 1):
        for counts in (kinds[answered.row.kind], tiles[str(answered.tiles)]):
            counts["rows"] += 1
            counts["right"] += answered.right
        kept += answered.said.keep_fraction or 0.0
        bytes_full += answered.said.cross_kv_bytes_full
        bytes_kept += answered.said.cross_kv_bytes
        if done % PROGRESS_ROWS == 0:
            print(f"\r{title}: {done:,} of {len(rows):,}", end="", file=sys.stderr, flush=True)
    seconds = time.monotonic() - began
    accuracy = sum(counts["right"] for counts in kinds.values()) / len(rows)
    print(f"\r{title}: {accuracy:.1%} right, {kept / len(rows):.1%} kept, {seconds:.0f} s", file=sys.stderr)
    return {
        "policy": repr(engine.batch.policy),
        "rows": len(rows),
        "accuracy": round(accuracy, 4),
        "keep_fraction": round(kept / len(rows), 4),
        "cross_kv_bytes_full": bytes_full,
        "cross_kv_bytes": bytes_kept,
        "kinds": dict(sorted(kinds.items())),
        "tiles": dict(sorted(tiles.items())),
        "seconds": round(seconds, 1),
        "images_encoded": engine.batch.statistics.images_encoded,
        "tower_seconds": round(engine.batch.seconds["tower"], 1),
    }


def identity(model: Path, rows: dict[str, int]) -> Result:
    """What the numbers depend on; a report of another identity is not continued."""
    settings = sorted(path for path in model.iterdir() if path.suffix in (".json", ".jinja"))
    return {
        "model_sha256": sha256(model / "model.safetensors"),
        "model_settings_sha256": digest(settings),
        "code_sha256": digest(code()),
        "rows": rows,
        "k_ratios": list(K_RATIOS),
    }


def code() -> list[Path]:
    """The files that decide which rows are asked and what is answered to them on a CPU."""
    trimming = [path for path in (ROOT / "trimming").rglob("*.py") if path.relative_to(ROOT / "trimming") not in ELSEWHERE]
    asking = [ROOT / "pipeline" / f"{name}.py" for name in ("engine", "images", "model", "pictures", "prompts")]
    asked = [ROOT / "demo" / f"{name}.py" for name in ("answerer", "easy_vqa", "scenes", "shards")]
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
    lines = ["Share of answers that are right as a whole, in %, by kind of question; captions must be exact."]
    for name, results in report["results"].items():
        full = results["full"]
        lines += ["", f"**{name}**, {full['rows']:,} questions", ""]
        heads = ["question", "rows", "full"]
        for label in list(results)[1:]:
            policy, _, k = label.partition(" ")
            heads.append(f"K = {k}" if policy == "trimmed-llama" else policy.replace("-", " "))
        lines += [row(heads), row(["---", *["---:"] * (len(heads) - 1)])]
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
        lines.append(row(["features kept", "", *(percent(result["keep_fraction"]) for result in results.values())]))
        saved = (1 - result["cross_kv_bytes"] / result["cross_kv_bytes_full"] for result in results.values())
        lines.append(row(["cross-attention KV saved", "", *map(percent, saved)]))
        lines += ["", f"Kinds under {WEAK:.0%}:", ""]
        for label, result in results.items():
            weak = [f"{kind} {percent(share(result, kind))}" for kind in result["kinds"] if share(result, kind) < WEAK]
            lines.append(f"- {label}: {', '.join(weak) or 'none'}")
    listed = "; ".join(f"{name} {value}" for name, value in report["conditions"].items())
    lines += [
        "",
        "real tiles: everything kept. An approximation: padding tiles are left out of the vision tower, which was trained with "
        f"them; an image of four tiles has none. {' '.join(map(tower, report['results'], report['results'].values()))}",
        "",
        "random and grid: at the kept fraction measured for the K on their left.",
        "",
        f"Conditions: {listed}; model {report['measured']['model_sha256'][:12]}.",
    ]
    return "\n".join(lines) + "\n"


def tower(name: str, results: dict[str, Result]) -> str:
    """What real tiles save, and on which images."""
    full, real = results["full"], results["real-tiles"]
    tiles = ", ".join(f"{counts['rows']:,} on {count(tiles, 'tile')}" for tiles, counts in full["tiles"].items())
    seconds = f"{full['tower_seconds']} s for its {full['images_encoded']:,} images, {real['tower_seconds']} s with real tiles"
    return f"{name} ({tiles}): the tower takes {seconds}."


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
