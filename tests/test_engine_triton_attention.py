"""Ragged decode attention in Triton against plain softmax attention, through Triton's interpreter and on CUDA.

TRITON_INTERPRET works only if it is set before the first import of triton: run as a program, this file checks every case that
way and prints one JSON line each. The interpreter multiplies bfloat16 as bit patterns (triton issue 11584), so float16 stands
in for it there. What the interpreter is too lenient to notice, a compilation for Hopper does, which needs no device.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import traceback
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HALF = {"cpu": torch.float16, "cuda": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
MIXED = (1, 63, 64, 65, 150, 0)


@dataclass(frozen=True, slots=True)
class Case:
    lengths: tuple[int, ...] = MIXED
    heads: int = 4
    kv_heads: int = 2
    widths: tuple[int, int] = (64, 64)
    """Of keys and of values."""
    splits: int = 3
    spare: int = 0
    """Rows of every slot that do not count."""
    shared: bool = False
    """All sequences begin at the first one's rows."""
    half: bool = False
    biased: bool = False
    """Logits have something added, for each head its own."""


CASES = {
    "mixed lengths": Case(),
    "more splits than blocks": Case(splits=7),
    "long": Case(lengths=(700, 40), kv_heads=4, splits=5),
    "capacity beyond the length": Case(spare=9),
    "shared segments": Case(lengths=(130, 130, 70, 0), shared=True),
    "one split, narrow keys": Case(widths=(80, 128), splits=1),
    "crooked keys": Case(widths=(77, 128), spare=2, splits=2),
    "one split, narrow values": Case(widths=(64, 24), splits=1),
    "one head a group": Case(heads=4, kv_heads=4),
    "four heads a group": Case(heads=8, kv_heads=2),
    "eight heads a group": Case(heads=16, kv_heads=2),
    "more heads a group than a tile has rows": Case(lengths=(65, 0, 3), heads=20, kv_heads=1),
    "half precision": Case(widths=(64, 128), half=True),
    "half precision, crooked keys": Case(widths=(77, 64), spare=1, half=True),
    "all padding": Case(lengths=(0, 0)),
    "biased": Case(biased=True),
    "biased, more splits than blocks, half precision": Case(splits=7, half=True, biased=True),
    "biased, shared segments": Case(lengths=(130, 130, 70, 0), shared=True, biased=True),
}


def lay_out(case: Case, device: str) -> dict[str, Any]:
    """Arguments of the call but for workspace and out. What no sequence may read is NaN."""
    generator = torch.Generator().manual_seed(0)
    dtype = HALF[device] if case.half else torch.float32
    rows = [length + case.spare for length in case.lengths]
    segments, offsets, end = [], [], 0
    for capacity, length in zip(rows, case.lengths, strict=True):
        for width in case.widths:
            segment = torch.randn(case.kv_heads, capacity, width, generator=generator)
            segment[:, length:] = torch.nan
            room = (segment.numel() // 8 + 1) * 8
            segments.append(torch.cat([segment.flatten(), torch.full((room - segment.numel(),), torch.nan)]))
            offsets.append(end)
            end += room
    starts = torch.tensor(offsets).view(-1, 2)
    strides = torch.tensor(rows)[:, None] * torch.tensor(case.widths)
    if case.shared:
        starts, strides = starts[:1].expand_as(starts), strides[:1].expand_as(strides)
    # Padding entries come with whatever was there before.
    padding = torch.tensor(case.lengths) == 0
    starts, strides = (t.masked_fill(padding[:, None], -(2**40) + 1).to(device) for t in (starts, strides))
    bias = {}
    if case.biased:
        room = max(case.lengths) * case.kv_heads
        begins = torch.arange(len(rows)) * room
        bias = {
            "biases": (3 * torch.randn(len(rows) * room, generator=generator)).to(device),
            "bias_offset": begins.masked_fill(padding, -(2**40) + 1).to(device),
        }
    query = torch.randn(len(rows), case.heads + 3, case.widths[0] + 8, generator=generator).to(device, dtype)
    return {
        # A slice of a wider tensor, such as a fused projection's output, has strides of its own.
        "query": query[:, : case.heads, : case.widths[0]],
        "arena": torch.cat(segments).to(device, dtype),
        "key_offset": starts[:, 0].contiguous(),
        "value_offset": starts[:, 1].contiguous(),
        "key_head_stride": strides[:, 0].contiguous(),
        "value_head_stride": strides[:, 1].contiguous(),
        "length": torch.tensor(case.lengths, dtype=torch.int32, device=device),
        "kv_heads": case.kv_heads,
        "value_width": case.widths[1],
        "scaling": case.widths[0] ** -0.5,
        "splits": case.splits,
        **bias,
    }


def reference(arguments: dict[str, Any]) -> Tensor:
    """(B, H, Dv) float64, one sequence and one head after the other."""
    query, arena, kv_heads = arguments["query"], arguments["arena"], arguments["kv_heads"]
    batch, heads, key_width = query.shape
    out = torch.zeros(batch, heads, arguments["value_width"], dtype=torch.float64)
    for sequence, length in enumerate(arguments["length"].tolist()):
        for head in range(heads) if length else ():
            key, value = (
                arena.as_strided(
                    (length, width), (width, 1), int(offset[sequence] + head // (heads // kv_heads) * stride[sequence])
                )
                for width, offset, stride in (
                    (key_width, arguments["key_offset"], arguments["key_head_stride"]),
                    (arguments["value_width"], arguments["value_offset"], arguments["value_head_stride"]),
                )
            )
            logits = key.cpu().double() @ query[sequence, head].cpu().double() * arguments["scaling"]
            if arguments.get("biases") is not None:
                first = int(arguments["bias_offset"][sequence]) + head // (heads // kv_heads) * length
                logits += arguments["biases"][first : first + length].cpu().double()
            out[sequence, head] = logits.softmax(0) @ value.cpu().double()
    return out


def error_of(arguments: dict[str, Any], graph: bool = False) -> float:
    """Greatest error, relative above 1, over two calls with the same buffers and other lengths; inf where NaN comes out."""
    from trimming.engine.triton_attention import Workspace, ragged_decode_attention

    query, splits, width = arguments["query"], arguments["splits"], arguments["value_width"]
    batch, heads, _ = query.shape
    partial = Workspace.allocate(batch * splits, heads, width, query.device)
    for stale in (partial.output, partial.maximum, partial.total):
        stale.fill_(torch.nan)
    out = torch.full((batch, heads, width), torch.nan, dtype=query.dtype, device=query.device)

    def call() -> None:
        assert ragged_decode_attention(**arguments, partial=partial, out=out) is out

    def error() -> float:
        wanted = reference(arguments)
        return ((out.cpu().double() - wanted).abs() / wanted.abs().clamp(min=1)).nan_to_num(torch.inf).max().item()

    call()
    first = error()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        call = captured.replay
    arguments["length"] //= 2
    out.fill_(torch.nan)
    call()
    return max(first, error())


def far_arguments(arena: Tensor) -> dict[str, Any]:
    """One sequence whose second head lies 2**31 elements behind its first; ``arena`` has 2**31 + 2**16."""
    arguments = lay_out(Case(lengths=(70,), half=True), arena.device.type)
    arguments["arena"] = arena
    arguments["key_head_stride"].fill_(2**31)
    arguments["value_head_stride"].fill_(2**31)
    arguments["value_offset"].fill_(2**14)
    for start in (0, 2**14, 2**31, 2**31 + 2**14):
        arena[start : start + 70 * 64] = torch.randn(70 * 64, generator=torch.Generator().manual_seed(start % 97))
    return arguments


FAR = "beyond 2**31 elements"


def main() -> None:
    for name, case in CASES.items():
        report(name, lambda case=case: error_of(lay_out(case, "cpu")))
    # Four gigabytes of addresses, of which a few pages are ever touched.
    report(FAR, lambda: error_of(far_arguments(torch.empty(2**31 + 2**16, dtype=torch.float16))))


def report(name: str, run: Any) -> None:
    try:
        line = {"name": name, "error": run()}
    except Exception:  # noqa: BLE001 - each case reports for itself
        line = {"name": name, "failure": traceback.format_exc()}
    print(json.dumps(line), flush=True)


# ---- what pytest runs ---------------------------------------------------------------------------------------------------

if find_spec("triton") is None:
    pytest.skip("needs triton, which torch brings along only in its CUDA builds", allow_module_level=True)
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, Any]]:
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 4):
        pytest.skip("before triton 3.7 the interpreter's loops fail with NumPy 2.4 and newer")
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


def tolerance(name: str, device: str) -> float:
    return TOLERANCE[HALF[device] if name == FAR or CASES[name].half else torch.float32]


@pytest.mark.parametrize("name", [*CASES, FAR])
def test_interpreted(interpreted: dict[str, dict[str, Any]], name: str) -> None:
    line = interpreted[name]
    assert "failure" not in line, line["failure"]
    assert line["error"] <= tolerance(name, "cpu")


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("half", [False, True])
def test_captured_in_a_graph(name: str, half: bool) -> None:
    case = replace(CASES[name], half=half)
    bound = TOLERANCE[torch.bfloat16 if half else torch.float32]
    assert error_of(lay_out(case, "cuda"), graph=True) <= bound


@pytest.mark.gpu
@on_cuda
def test_beyond_2_31_elements_on_cuda() -> None:
    arena = torch.empty(2**31 + 2**16, dtype=torch.bfloat16, device="cuda")
    assert error_of(far_arguments(arena), graph=True) <= tolerance(FAR, "cuda")


# ---- without running a kernel ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("dtype", "widths"), [("bf16", (128, 128)), ("bf16", (80, 128)), ("bf16", (77, 128)), ("fp32", (64, 64))]
)
def test_compiles_for_hopper(
    dtype: str, widths: tuple[int, int], biased: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 turns the compiler off")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from trimming.engine import triton_attention as module

    pads = [module._padded(width) for width in widths]
    key, value = (
        {"KEY_WIDTH": widths[0], "KEY_PAD": pads[0]},
        {"VALUE_WIDTH": widths[1], "VALUE_PAD": pads[1], "BLOCK": module._BLOCK},
    )
    attend = compiled(
        module._attend_to_share,
        dtype,
        {"GROUP": 4, "ROWS": 16, "ALIGN": module.ALIGNMENT, "BIASED": biased, **key, **value},
        num_stages=module._STAGES[2 if dtype == "bf16" else 4],
    )
    compiled(module._combine_shares, dtype, {"SPLITS_PAD": 64, **value})
    if dtype == "bf16":
        # Two programs at least fit on an A100's multiprocessor; loads are of 16 bytes wherever the width lets them be.
        assert attend.metadata.shared <= 80 * 1024
        copies = set(re.findall(r"cp\.async\.\w+\.shared\.global[^;]*?, (0x\w+)", attend.asm["ptx"]))
        # Biases begin anywhere: four bytes a row, beside some hundred of keys and values.
        assert copies - ({"0x4"} if biased else set()) == {"0x10"}
        assert ("ld.global.b16" in attend.asm["ptx"]) == (widths[0] % 8 != 0)


def compiled(kernel: Any, dtype: str, constants: dict[str, int], **options: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {"query": dtype, "arena": dtype, "out": dtype, "output": "fp32", "maximum": "fp32", "total": "fp32"}
    pointers |= {
        "length": "i32",
        **dict.fromkeys(("key_offset", "value_offset", "key_head_stride", "value_head_stride", "bias_offset"), "i64"),
        "biases": "fp32",
    }
    plain = {"query_stride": "i32", "query_head_stride": "i32", "out_stride": "i32", "out_head_stride": "i32", "splits": "i32"}
    types = {**{name: f"*{kind}" for name, kind in pointers.items()}, **plain, "scaling": "fp32"}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in kernel.arg_names}
    # Torch's tensors begin at 16 bytes, and the launcher tells the compiler so.
    even = [[["tt.divisibility", 16]] if kind.startswith("*") or "stride" in name else [] for name, kind in signature.items()]
    attributes = {(place,): attribute for place, attribute in enumerate(even) if attribute}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def test_pick_splits() -> None:
    from trimming.engine.triton_attention import pick_splits

    hopper = 132
    assert pick_splits(1, 8, hopper, 6404) == 25  # bounded by the rows
    assert pick_splits(8, 8, hopper, 6404) == 8
    assert pick_splits(128, 8, hopper, 6404) == 1
    assert pick_splits(1, 8, hopper, 100) == 1
    assert pick_splits(1, 1, hopper, 1 << 20) == 64
    for batch in range(1, 67):
        assert 2 * hopper < batch * 8 * pick_splits(batch, 8, hopper, 1 << 20) <= 4 * hopper


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "kv_heads=3 does not divide the query's 4 heads"),
        ({"splits": 0}, "splits=0"),
        ({"splits": 4}, r"partial is too small: Workspace.allocate\(room=24, heads=4, value_width=64"),
        ({"value_width": 65}, "partial is too small"),
        ({"arena": torch.zeros(8, dtype=torch.float16)}, "give them one, bf16 say"),
        ({"query": torch.zeros(6, 64, 4).mT}, "dense along their last axis"),
        ({"biases": torch.zeros(6)}, "belong together"),
        ({"out": torch.zeros(6, 4, 32)}, r"out has shape \(6, 4, 32\): give it \(6, 4, 64\)"),
    ],
)
def test_what_does_not_fit_is_told(change: dict[str, Any], message: str) -> None:
    from trimming.engine.triton_attention import Workspace, ragged_decode_attention

    partial = Workspace.allocate(6 * 3, 4, 64, "cpu")
    with pytest.raises(ValueError, match=message):
        ragged_decode_attention(**{**lay_out(Case(), "cpu"), "partial": partial, **change})


if __name__ == "__main__":
    main()
