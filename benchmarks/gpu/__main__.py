"""Measure the engine on a GPU: ``python -m benchmarks.gpu --output benchmarks/results``.

Llama-3.2-11B-Vision's geometry with random bf16 weights, made on the device: the tower, decode steps and captioning, beside
the roofline and the recipe users have today. At most nine minutes on an H200. Writes ``gpu.json`` and ``gpu.md`` after every
figure, so that what was measured stays when the program is cut off. Ends with a line and nothing else where there is no GPU.

Exit codes: 0 all measured, or no GPU; 1 a section failed, which the results then say.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.amounts import TINY_GPU, GpuAmounts

SECTIONS = ("tower", "decode", "captioning")
NO_GPU = "no CUDA device: the GPU benchmark was skipped"


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    options = _options(arguments)

    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(NO_GPU)
        return 0

    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.captioning import measure_captioning
    from benchmarks.gpu.decode import measure_decode
    from benchmarks.gpu.model import ELEVEN_B, build_on
    from benchmarks.gpu.results import conditions_of
    from benchmarks.gpu.tower import measure_tower
    from benchmarks.model import TINY, build_processor
    from benchmarks.gpu.roofline import measure_rates

    def say(line: str) -> None:
        print(f"[{(time.monotonic() - began) / 60:5.2f} min] {line}", file=sys.stderr, flush=True)

    amounts = TINY_GPU if options.size == "tiny" else GpuAmounts()
    if options.minutes is not None:
        amounts = replace(amounts, minutes=options.minutes)
    # With its index, as a model's own device has it.
    device = torch.zeros(1, device=options.device).device
    rates = measure_rates(device, amounts.matmul, amounts.copy_bytes, amounts.repeats)
    say(f"measured {rates.matmul / 1e12:.4g} TFLOP/s and {rates.copy / 1e9:.4g} GB/s")
    size = TINY if amounts.tiny else ELEVEN_B
    processor = build_processor(size)
    sections: dict[str, Any] = {}
    bench = Bench(
        device=device,
        amounts=amounts,
        size=size,
        model=build_on(device, size, processor, amounts.seed),
        processor=processor,
        rates=rates,
        save=lambda: write(options.output, sections, conditions),
        say=say,
        began=began,
    )
    conditions = conditions_of(bench)
    bench.save()
    say(f"the model is there: {conditions['model']['parameters'] / 1e9:.4g} G parameters")

    failed = False
    for name, measure in zip(SECTIONS, (measure_tower, measure_decode, measure_captioning), strict=True):
        sections[name] = {}
        try:
            measure(bench, sections[name])
        except Exception as error:  # noqa: BLE001 - a machine is lent seldom: one section's failure must not cost the others
            traceback.print_exc()
            sections[name]["error"] = f"{type(error).__name__}: {error}"
            failed = True
        bench.release()
        bench.save()
        say(f"{name}: done")
    print((options.output / "gpu.md").read_text())
    return int(failed)


def write(folder: Path, sections: dict[str, Any], conditions: dict[str, Any]) -> None:
    """Both files."""
    from benchmarks.gpu.page import markdown
    from benchmarks.gpu.results import result

    whole = result(sections, conditions)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(whole, indent=1) + "\n")
    (folder / "gpu.md").write_text(markdown(whole))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of gpu.json and gpu.md")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--size", choices=("11b", "tiny"), default="11b", help="tiny: does it run? default: 11b")
    parser.add_argument("--minutes", type=float, help=f"no pass begins that would end later; default: {GpuAmounts().minutes:g}")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and options.size != "tiny":
        parser.error("--device cpu takes --size tiny: 11b has 22 GB of weights")
    return options


if __name__ == "__main__":
    sys.exit(main())
