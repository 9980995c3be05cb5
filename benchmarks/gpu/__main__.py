"""Run sections of the GPU kit in this process: ``python -m benchmarks.gpu --output FOLDER --only tower,decode``.

Llama-3.2-11B-Vision's geometry with random bf16 weights made on the device, and the demo model. Writes ``gpu.json`` and
``gpu.md`` after every figure, so that what was measured stays when the program is cut off. ``benchmarks.gpu_kit`` runs this
program, watches it and goes on when it hangs or dies. Ends with a line and nothing else where there is no GPU.

Exit codes: 0 all measured, or no GPU; 1 a section failed, which the results then say; 2 refused.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.gpu.amounts import TINY_GPU, GpuAmounts
from benchmarks.gpu.options import parse
from benchmarks.gpu.results import Result
from benchmarks.gpu.store import Store

if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench

NO_GPU = "no CUDA device: the GPU benchmark was skipped"
WITH_MODEL = {"tower", "prefill", "decode", "captioning", "questions"}


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    options = parse(__doc__ or "", arguments)
    store = options.store
    if options.device == "cpu":
        # Decides at its import whether it interprets.
        os.environ.setdefault("TRITON_INTERPRET", "1")

    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(NO_GPU)
        return 0

    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.conditions import conditions_of

    def say(line: str) -> None:
        print(f"[{(time.monotonic() - began) / 60:5.2f} min] {line}", file=sys.stderr, flush=True)

    # With its index, as a model's own device has it.
    device = torch.zeros(1, device=options.device).device
    amounts = TINY_GPU if options.size == "tiny" else GpuAmounts()
    bench = Bench(device=device, amounts=amounts, save=store.save, say=say)
    here = conditions_of(bench)
    # A run that continues may do so elsewhere, or on mended code: what is of the model and the rates is made anew all the same.
    store.conditions, store.rehearsal = here, amounts.tiny
    store.save()
    end = began + options.minutes * 60
    failed = False
    for name in options.sections:
        if time.monotonic() >= end:
            say(f"no time for {name}")
            continue
        failed |= not run(name, bench, store, here, options.seconds[name], end)
    print((options.output / "gpu.md").read_text())
    return int(failed)


def run(name: str, bench: Bench, store: Store, here: Result, seconds: float, end: float) -> bool:
    """Whether the section went well, in so many seconds and before ``end``. What it found stays whatever happens."""
    out: Result = {"status": "loading", "conditions": here}
    store.sections[name] = out
    store.save()
    before = bench.allocator()
    try:
        if name in WITH_MODEL and "model" not in store.conditions:
            add_model(bench, store.conditions)
        out |= {"status": "running", "began": time.time()}
        store.save()
        bench.deadline = min(time.monotonic() + seconds, end)
        module = importlib.import_module(f"benchmarks.gpu.{name}")
        getattr(module, f"measure_{name}")(bench, out)
        out["status"] = "done"
    except Exception as error:  # noqa: BLE001 - a machine is lent seldom: one section's failure must not cost the others
        traceback.print_exc()
        out |= {"status": "failed", "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        # Its frames hold the section's tensors.
        traceback.clear_frames(error.__traceback__)
    out["took"] = time.time() - out.setdefault("began", time.time())
    store.save()
    # Where the device is broken this ends the program; the kit starts another.
    if before:
        out["allocator"] = {what: count - before[what] for what, count in bench.allocator().items()}
    bench.release()
    store.save()
    bench.say(f"{name}: {out['status']} after {out['took']:.1f} s")
    return bool(out["status"] == "done")


def add_model(bench: Bench, conditions: Result) -> None:
    """Makes the large model, and the rates if nobody has, and tells of them."""
    from benchmarks.gpu.conditions import model_of
    from benchmarks.gpu.roofline import rates_of

    made = model_of(bench)
    conditions |= {"model": made, "rates": rates_of(bench)}
    bench.say(f"the model is there: {made['parameters'] / 1e9:.4g} G parameters")


if __name__ == "__main__":
    sys.exit(main())
