"""From ``gpu.json`` to ``gpu.md``: tables with their conditions, of whatever has been measured. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu.amounts import SECTIONS
from benchmarks.gpu.results import GOAL_BATCH, Result
from benchmarks.page import row

REHEARSAL = (
    "**This is a rehearsal on a tiny model: it shows that every section runs, and measures nothing.** No figure below says "
    "anything of a GPU."
)


def markdown(result: Result) -> str:
    """The page: how each section ended, the goals, then the sections' tables."""
    sections = result["sections"]
    parts = [["# The GPU kit"], [REHEARSAL] if result["rehearsal"] else [], _conditions(result["conditions"])]
    parts += [_ends(sections, result["conditions"]), _goals(result)]
    parts += [_table(name, part) for name, part in sections.items()]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


# ---- what ran ---------------------------------------------------------------------------------------------------------------


def _conditions(conditions: Result) -> list[str]:
    if not conditions:
        return []
    lines = [f"- **Machine**: {_machine(conditions)}; greedy; seed {conditions['seed']}."]
    if "model" in conditions:
        model = conditions["model"]
        lines += [
            f"- **Roofline**: {_rates(conditions['rates'])}, both measured in this run; operations and bytes by "
            "`trimming.costs`. Share: the time that the roofline allows over the time taken.",
            f"- **Model**: random {model['dtype']} weights, {model['parameters'] / 1e9:.3g} G parameters: hidden "
            f"{model['hidden']}, {len(model['cross_attention_layers'])} of {model['layers']} layers cross-attending, "
            f"vocabulary {model['vocabulary']:,}; tower of {model['tower_layers']} layers of {model['tower_hidden']}, tiles of "
            f"{model['tile']} pixels, {model['visual_tokens_per_tile']} visual tokens a tile.",
        ]
    return lines


def _rates(rates: Result) -> str:
    return (
        f"{rates['matmul_operations_per_second'] / 1e12:.4g} TFLOP/s (product of two random bf16 matrices of "
        f"{rates['matmul_side']} a side) and {rates['copy_bytes_per_second'] / 1e9:.4g} GB/s (device-to-device copy of "
        f"{rates['copied_bytes'] / 2**30:.2g} GiB, bytes read and written)"
    )


def _machine(at: Result) -> str:
    memory = at["memory_bytes"]
    return (
        f"{at['hardware']}{f', {memory / 2**30:.0f} GiB' if memory else ''}, {at['cores']} CPU cores; Python {at['python']}, "
        f"torch {at['torch']}, CUDA {at['cuda']}, triton {at['triton']}, transformers {at['transformers']}; "
        f"commit {at['commit']}"
    )


def _ends(sections: Result, conditions: Result) -> list[str]:
    """How each section ended, and where, if that was elsewhere."""
    lines = _head(["section", "ended", "seconds", ""])
    for name in SECTIONS:
        part = sections.get(name)
        if part is None:
            lines.append(row([name, "not reached", "", ""]))
            continue
        notes = [part["error"]] if "error" in part else []
        if _machine(part["conditions"]) != _machine(conditions):
            notes.append(f"on {_machine(part['conditions'])}")
        if "allocator" in part:
            one = part["allocator"]
            notes.append(f"allocator: {one['retries']} retries, {one['refusals']} refusals")
        took = f"{part['took']:.0f}" if "took" in part else ""
        lines.append(row([name, part["status"], took, "; ".join(notes).replace("\n", " ").replace("|", "\\|")]))
    traces = [
        line
        for name, part in sections.items()
        if "traceback" in part
        for line in ("", f"{name}:", "", "```", part["traceback"].rstrip()[-3000:], "```")
    ]
    return lines + traces


def _goals(result: Result) -> list[str]:
    """The worst of the figures that a goal is about."""
    ratios, goals = result["ratios"], result["goals"]
    lines = _head(["ratio", "goal", "measured"])
    if "captioning_engine_over_peer" in ratios:
        value, goal = ratios["captioning_engine_over_peer"], goals["captioning_engine_over_peer"]
        lines.append(row(["captioning, engine with all features / peer", f"≥ {goal:g}", f"**{value:.2f}**"]))
    for policy, shares in ratios.get("decode_roofline_share", {}).items():
        large = [share for batch, share in shares.items() if int(batch) >= GOAL_BATCH]
        if large:
            title = f"decode, share of the roofline, {policy}, least of batches from {GOAL_BATCH} on"
            lines.append(row([title, f"≥ {goals['decode_roofline_share']:g}", f"**{min(large):.2f}**"]))
    towers = [share["all"] for share in ratios.get("tower_roofline_share", {}).values() if "all" in share]
    if towers:
        title = "exact tower and projector, share of the roofline, least of all tile counts"
        lines.append(row([title, f"≥ {goals['tower_roofline_share']:g}", f"**{min(towers):.2f}**"]))
    return lines if len(lines) > 2 else []


def _table(name: str, part: Result) -> list[str]:
    try:
        return _TABLES[name](part)
    except Exception as error:  # noqa: BLE001 - a section that broke off may lack anything, and its page must not cost the rest
        return [f"The figures of {name} are in gpu.json: its table cannot be made of them ({error!r})."]


# ---- the sections -----------------------------------------------------------------------------------------------------------


def _correct(part: Result) -> list[str]:
    lines = ["## Correct", "", *_head(["check", "passed", "seconds", "figures"])]
    for name, check in part.get("checks", {}).items():
        hidden = ("passed", "seconds", "error", "traceback", "tail", "faults", "failing")
        told = {key: value for key, value in check.items() if key not in hidden and value != {}}
        figures = "; ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in told.items())
        passed = "skipped" if "skipped" in check else "yes" if check["passed"] else f"**no**: {check.get('error', '')}"
        lines.append(row([name, passed.replace("|", "\\|"), f"{check['seconds']:.1f}", figures.replace("|", "\\|")]))
    if part.get("not_reached"):
        lines += ["", f"No time for: {', '.join(part['not_reached'])}."]
    return lines


def _answers(part: Result) -> list[str]:
    heads = ["questions", "dtype", "policy", "rows", "right", "on a CPU", "difference, 95 %", "same text", "kept", "seconds"]
    lines = ["## The demo's answers", "", *_head(heads)]
    for name, dtypes in part.get("sets", {}).items():
        for dtype, policies in dtypes.items():
            for policy, one in policies.items():
                points = [100 * one[key] for key in ("difference", "difference_low", "difference_high")]
                spread = "{:+.2f} ({:+.2f} to {:+.2f})".format(*points)
                cells = [f"{one['rows']:,}", _percent(one["accuracy"]), _percent(one["cpu_accuracy"]), spread]
                cells += [_percent(one["same_text"]), _percent(one["keep_fraction"]), f"{one['seconds']:.1f}"]
                lines.append(row([name, dtype, policy, *cells]))
    if part.get("not_reached"):
        lines += ["", f"No time for: {'; '.join(part['not_reached'])}."]
    return lines


def _roofline(part: Result) -> list[str]:
    return ["## Roofline", "", f"{_rates(part)}."] if "matmul_side" in part else []


def _tower(part: Result) -> list[str]:
    if "images" not in part:
        return []
    lines = [
        "## Tower",
        "",
        f"Tower and projector on {part['images']} images at once, tiles on the device. *all*: exact; *pooled*: padding "
        "tiles in a few rows each; *real*: without them; *alike*: pooled, with half of rows × layers, each row weighed by its "
        "size or not.",
        "",
        *_head(["tiles", "runs on", "images/s", "ms", "TFLOP", "roofline ms", "share", "peak GB"]),
    ]
    for tiles, modes in part.get("tiles", {}).items():
        for mode, one in modes.items():
            times = [_ms(one["seconds"]), f"{one['operations'] / 1e12:.1f}", _ms(one["roofline_seconds"])]
            cells = [tiles, mode, f"{one['images_per_second']:.1f}", *times, f"**{one['roofline_share']:.2f}**"]
            lines.append(row([*cells, _gigabytes(one["peak_bytes"])]))
    if "sending_seconds" in part:
        lines += [
            "",
            f"The tiles of {part['images']} images of four tiles come from the host in {_ms(part['sending_seconds'])} ms.",
        ]
    lines += _profile(part, "the tower on images of four tiles")
    if "attention" in part:
        heads = ["attention", "tower layer ms", "its first call", "prompt of a new length ms", "of a known one"]
        lines += ["", *_head(heads)]
        for name, one in part["attention"].items():
            keys = ("tower", "tower_first", "prefill_new", "prefill_known")
            cells = [_ms(one[key]) if key in one else one.get("error", "") for key in keys]
            lines.append(row([name, *(cell.replace("|", "\\|") for cell in cells)]))
    return lines


def _prefill(part: Result) -> list[str]:
    lines = [
        "## Prefill",
        "",
        f"Prompts of {part.get('prompt')} tokens, each about an image of {part.get('tiles')} tiles whose keys and values are "
        "projected; their features are there.",
        "",
        *_head(["features", "prompts", "ms", "roofline ms", "share", "peak GB"]),
    ]
    for policy, one in part.get("policies", {}).items():
        for batch, each in one["batches"].items():
            cells = [_ms(each["seconds"]), _ms(each["roofline_seconds"]), f"**{each['roofline_share']:.2f}**"]
            lines.append(row([policy, batch, *cells, _gigabytes(each["peak_bytes"])]))
    lines += _profile(part, "the largest prefill with all features")
    if "farthest_points" in part:
        one = part["farthest_points"]
        lines += [
            "",
            f"Choosing {one['chosen']:,} of an image's {one['features']:,} features by distance (`farthest_points`) takes "
            f"{_ms(one['seconds'])} ms and {one['launches']:,} launches.",
        ]
    return lines


def _decode(part: Result) -> list[str]:
    if "policies" not in part:
        return []
    lines = [
        "## Decode",
        "",
        f"One step of as many sequences, each with a prompt of {part['prompt']} tokens, {part['said']} tokens said and an "
        f"image of {part['tiles']} tiles of its own. *Step*: `Engine.step`, the host's part included; *queued*: steps that the "
        "host does not wait for; *first*: with compiling and capturing.",
        "",
        *_head(
            [
                "features",
                "batch",
                "step ms",
                "queued ms",
                "roofline ms",
                "bound by",
                "share",
                "queued",
                "first s",
                "tokens/s",
                "KV GB",
            ]
        ),
    ]
    notes = []
    for policy, one in part["policies"].items():
        for batch, each in one["batches"].items():
            if "error" in each:
                lines.append(row([policy, batch, each["error"], *[""] * 8]))
                continue
            times = [_ms(each[key]) for key in ("seconds", "queued_seconds", "roofline_seconds")]
            shares = [
                f"**{each['roofline_share']:.2f}**",
                f"{each['queued_roofline_share']:.2f}",
                f"{each['first_seconds']:.2f}",
            ]
            cells = [policy, batch, *times, each["bound"], *shares, f"{each['tokens_per_second']:,.0f}"]
            lines.append(row([*cells, f"{each['kv_bytes'] / 1e9:.2f}"]))
        notes.append(
            f"- The largest that fits, {policy}: {one['largest']} sequences in {one['kv_room_bytes'] / 1e9:.1f} GB for keys "
            f"and values, with slots of {one['slot_tokens']} tokens and {one['kept']} visual tokens each."
        )
        graphs = [
            f"{batch} rows {each['graph_bytes'] / 1e6:.0f} MB"
            for batch, each in one["batches"].items()
            if "graph_bytes" in each
        ]
        if graphs:
            notes.append(f"- Device memory that the first step took, {policy}: {', '.join(graphs)}.")
    return [*lines, "", *notes, *_profile(part, "the largest step with a quarter of the features")]


def _captioning(part: Result) -> list[str]:
    if "images" not in part:
        return []
    tiles = ", ".join(f"{images} of {count}" for count, images in part["tiles"].items())
    lines = [
        "## Captioning",
        "",
        f"{part['images']} images a pass, new ones in each round (tiles: {tiles}), {part['output_tokens']:,} output tokens, "
        f"prompts of {part['prompt']} tokens. Seconds from tiles on the host to texts, median of the passes, taken in turns.",
        "",
        *_contenders(part),
    ]
    swept = ", ".join(
        f"{size}: {one['rows'] / one['seconds']:.2f}" if "seconds" in one else f"{size}: {one['error']}"
        for size, one in part["sweep"].items()
    )
    chosen = f" The passes take {part['peer_batch']}." if part.get("peer_batch") else ""
    lines += ["", f"- The peer by static batch, images/s over a part of the rows: {swept or 'no time'}.{chosen}"]
    sides = {side: part.get(f"{side}_preparing_seconds") for side in ("engine", "peer")}
    said = [f"{side} {seconds / part['images'] * 1e3:.0f} ms" for side, seconds in sides.items() if seconds]
    if said:
        lines.append(f"- Decoding, cutting and tokenizing before the clock starts, an image: {', '.join(said)}.")
    if "k_ratio" in part:
        lines.append(
            f"- Trimmed: K = {part['k_ratio']:g}, at which half of these images' features stay. Real tiles: approximate."
        )
    if "trimmed_calls" in part.get("attention", {}):
        one = part["attention"]
        lines.append(
            f"- Calls to torch's attention by tower and prefill (on a CPU by decoding too) in a pass of {one['rows']} rows: "
            f"{one['full_calls']:,} of {one['full_shapes']} shapes with all features, {one['trimmed_calls']:,} of "
            f"{one['trimmed_shapes']} trimmed."
        )
    if "same" in part:
        same = part["same"]
        lines.append(
            f"- Engine and peer: {same['rows']:.1%} of the rows are the same, {same['first_tokens']:.1%} of the first tokens, "
            f"{same['tokens_before_a_difference']:.1%} of the tokens come before a row's first difference."
        )
    return lines


def _questions(part: Result) -> list[str]:
    return [
        "## Five questions an image",
        "",
        f"{part.get('images')} images a pass, {part.get('rows')} rows. *Held*: the most cross-attention KV bytes that lay in "
        "memory at once, shared ones counted once; *rows'*: what the rows' statistics add up to, over the pass. "
        "Trimmed: half of the features, with one kept set an image unless said otherwise.",
        "",
        *_contenders(part),
    ]


def _contenders(part: Result) -> list[str]:
    heads = [
        "",
        "images/s",
        "seconds",
        "least – most",
        "tower",
        "prefill",
        "decode",
        "passes",
        "kept",
        "held GB",
        "rows' GB",
        "peak GB",
    ]
    lines = _head(heads)
    for name, one in part.get("contenders", {}).items():
        if "error" in one:
            lines.append(row([name, one["error"], *[""] * (len(heads) - 2)]))
            continue
        seconds = one["seconds"]
        stages = [one["tower_seconds"], one.get("prefill_seconds"), one.get("decode_seconds")]
        cells = [
            name,
            f"{one['images_per_second']:.2f}",
            f"{seconds['median']:.2f}",
            f"{seconds['min']:.2f} – {seconds['max']:.2f}",
        ]
        kept, held, rows = (one.get(key) for key in ("keep_fraction", "peak_cross_kv_bytes", "cross_kv_bytes_of_rows"))
        cells += [*map(_seconds, stages), str(one["passes"]), "" if kept is None else f"{kept:.3f}"]
        lines.append(row([*cells, _gigabytes(held), _gigabytes(rows), _gigabytes(one["peak_bytes"])]))
    return lines


_TABLES: dict[str, Callable[[Result], list[str]]] = {
    "correct": _correct,
    "answers": _answers,
    "roofline": _roofline,
    "tower": _tower,
    "prefill": _prefill,
    "decode": _decode,
    "captioning": _captioning,
    "questions": _questions,
}


# ---- cells ------------------------------------------------------------------------------------------------------------------


def _profile(part: Result, what: str) -> list[str]:
    if "profile" not in part:
        return []
    one = part["profile"]
    lines = ["", f"Where the time goes, {what}: {one['kernels']:,} launches, the device busy for {_ms(one['seconds'])} ms.", ""]
    lines += _head(["kernel", "calls", "ms", "share"])
    for each in one["longest"]:
        name = each["name"].replace("|", "\\|")
        lines.append(row([f"`{name}`", f"{each['calls']:,}", _ms(each["seconds"]), f"{each['share']:.1%}"]))
    return lines


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _gigabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.3g}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_short, value)) or "none"
    if isinstance(value, dict):
        return f"({', '.join(f'{key} {_short(part)}' for key, part in value.items())})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _head(cells: Sequence[str]) -> list[str]:
    return [row(cells), row(["---", *["---:"] * (len(cells) - 1)])]
