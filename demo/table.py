"""Measure accuracy by kind of question, full and trimmed: ``python -m demo.table --output demo/results``.

Over easy-VQA's whole test split and held-out scenes: the full model; ``TrimmedLlama`` at K = 0.25, 0.15 and 0.05; and beside
each of these ``Random`` and ``Grid`` at the mean kept fraction that TrimmedLlama was just measured to have on that data set.
Writes ``accuracy.json`` after every configuration and continues from it, and ``accuracy.md`` at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo import scenes, shards

if TYPE_CHECKING:
    from demo.answerer import Answerer
    from trimming import Policy

ROOT = Path(__file__).resolve().parent.parent
K_RATIOS = (0.25, 0.15, 0.05)
WEAK = 0.80
"""A kind answered less often than this is named."""

Result = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "demo/model")
    parser.add_argument("--output", type=Path, required=True, help="folder of accuracy.json and accuracy.md")
    parser.add_argument("--easy-vqa", type=int, metavar="N", default=shards.EASY_VQA_QUESTIONS["test"], help="default: all")
    parser.add_argument("--scenes", type=int, metavar="N", default=500, help="default: %(default)s, six questions each")
    parser.add_argument("--batch-size", type=int, metavar="N", default=64)
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
    report["conditions"] = conditions(options.batch_size)
    answerer = Answerer(options.model)
    for name, rows in sets.items():
        results = report["results"].setdefault(name, {})
        for label in labels():
            if label not in results:
                results[label] = measure(answerer, rows, policy_of(label, results), options.batch_size, f"{name}, {label}")
                write(file, json.dumps(report, indent=1) + "\n")
    write(options.output / "accuracy.md", markdown(report))
    print(markdown(report))
    return 0


# ---- what is measured -------------------------------------------------------------------------------------------------------


def labels() -> Iterator[str]:
    """The columns: ``full``, then for each K the method and its controls, named after the K whose kept fraction they match."""
    yield "full"
    for k in K_RATIOS:
        yield from (f"trimmed-llama {k}", f"random {k}", f"grid {k}")


def policy_of(label: str, results: dict[str, Result]) -> Policy:
    """The policy of a column; a control takes the kept fraction that ``results`` has for its trimmed-llama."""
    from trimming import Grid, KeepAll, Random, TrimmedLlama

    name, _, k = label.partition(" ")
    if name == "full":
        return KeepAll()
    if name == "trimmed-llama":
        return TrimmedLlama(k_ratio=float(k))
    keep = results[f"trimmed-llama {k}"]["keep_fraction"]
    return Random(keep=keep) if name == "random" else Grid(keep=keep)


def measure(answerer: Answerer, rows: list[shards.Row], policy: Policy, batch_size: int, title: str) -> Result:
    """Answer all ``rows``; counts by kind, the mean kept fraction over rows, summed cache bytes."""
    asked: dict[str, int] = defaultdict(int)
    right: dict[str, int] = defaultdict(int)
    kept, bytes_full, bytes_kept, began = 0.0, 0, 0, time.monotonic()
    # Captions apart, as one long answer keeps its whole batch decoding. The sort is stable: images stay together.
    ordered = sorted(rows, key=lambda row: row.kind == "caption")
    for start in range(0, len(ordered), batch_size):
        for answered in answerer.answer(ordered[start : start + batch_size], policy):
            asked[answered.row.kind] += 1
            right[answered.row.kind] += answered.right
            kept += answered.trim.keep_fraction or 0.0
            bytes_full += answered.trim.cross_kv_bytes_full
            bytes_kept += answered.trim.cross_kv_bytes
        done = min(start + batch_size, len(ordered))
        print(f"\r{title}: {done:,} of {len(ordered):,}", end="", file=sys.stderr, flush=True)
    seconds = time.monotonic() - began
    accuracy = sum(right.values()) / len(rows)
    print(f"\r{title}: {accuracy:.1%} right, {kept / len(rows):.1%} kept, {seconds:.0f} s", file=sys.stderr)
    return {
        "policy": repr(policy),
        "rows": len(rows),
        "accuracy": round(accuracy, 4),
        "keep_fraction": round(kept / len(rows), 4),
        "cross_kv_bytes_full": bytes_full,
        "cross_kv_bytes": bytes_kept,
        "kinds": {kind: {"rows": asked[kind], "right": right[kind]} for kind in sorted(asked)},
        "seconds": round(seconds, 1),
    }


def identity(model: Path, rows: dict[str, int]) -> Result:
    """What the numbers depend on; a report of another identity is not continued."""
    code = [*sorted((ROOT / "trimming").rglob("*.py")), *(ROOT / "demo" / f"{n}.py" for n in ("scenes", "easy_vqa", "shards"))]
    return {
        "model_sha256": hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest(),
        "code_sha256": hashlib.sha256(b"".join(path.read_bytes() for path in code)).hexdigest(),
        "rows": rows,
        "k_ratios": list(K_RATIOS),
    }


def conditions(batch_size: int) -> Result:
    import torch
    import transformers

    cpu = [line.split(":")[1].strip() for line in _text("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    return {
        "commit": _git("rev-parse", "HEAD") + (" and uncommitted changes" if _git("status", "--porcelain") else ""),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "hardware": f"{os.cpu_count()} cores, {cpu[0] if cpu else platform.machine()}, {torch.get_num_threads()} threads",
        "dtype": "float32",
        "decoding": "greedy",
        "batch_size": batch_size,
    }


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _text(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


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
            heads.append(f"K = {k}" if policy == "trimmed-llama" else policy)
        lines += [row(heads), row(["---", *["---:"] * (len(heads) - 1)])]
        for kind, counts in full["kinds"].items():
            lines.append(row([kind, f"{counts['rows']:,}", *(percent(share(result, kind)) for result in results.values())]))
        if "caption" in full["kinds"]:
            asked = full["rows"] - full["kinds"]["caption"]["rows"]
            lines.append(row(["all but captions", f"{asked:,}", *(percent(without_captions(r)) for r in results.values())]))
        lines.append(row(["**all**", f"{full['rows']:,}", *(f"**{percent(r['accuracy'])}**" for r in results.values())]))
        lines.append(row(["features kept", "", *(percent(result["keep_fraction"]) for result in results.values())]))
        saved = (1 - result["cross_kv_bytes"] / result["cross_kv_bytes_full"] for result in results.values())
        lines.append(row(["cross-attention KV saved", "", *map(percent, saved)]))
        lines += ["", f"Kinds under {WEAK:.0%}:", ""]
        for label, result in results.items():
            weak = [f"{kind} {percent(share(result, kind))}" for kind in result["kinds"] if share(result, kind) < WEAK]
            lines.append(f"- {label}: {', '.join(weak) or 'none'}")
    listed = "; ".join(f"{name} {value}" for name, value in report["conditions"].items())
    digest = report["measured"]["model_sha256"][:12]
    lines += [
        "",
        f"random and grid: at the kept fraction measured for the K on their left. Conditions: {listed}; model {digest}.",
    ]
    return "\n".join(lines) + "\n"


def share(result: Result, kind: str) -> float:
    counts = result["kinds"][kind]
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
