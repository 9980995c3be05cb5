"""From ``gpu.json`` to ``gpu.md``: tables with their conditions, of whatever has been measured."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.gpu.bench import Result
from benchmarks.gpu.results import GOAL_BATCH
from benchmarks.page import row


def markdown(result: Result) -> str:
    """The page. Sections that were not reached are left out."""
    parts = [_conditions(result["conditions"]), _goals(result)]
    makers = {"captioning": _captioning, "decode": _decode, "tower": _tower}
    parts += [make(result[name]) for name, make in makers.items() if result.get(name)]
    failed = [f"- **{name} broke off**: {one['error']}" for name, one in result.items() if "error" in one]
    return "\n\n".join("\n".join(part) for part in [*parts, failed] if part) + "\n"


def _conditions(conditions: Result) -> list[str]:
    model, rates, memory = conditions["model"], conditions["rates"], conditions["memory_bytes"]
    return [
        f"- **Machine**: {conditions['hardware']}{f', {memory / 2**30:.0f} GiB' if memory else ''}, {conditions['cores']} CPU "
        f"cores; torch {conditions['torch']}, CUDA {conditions['cuda']}, transformers {conditions['transformers']}, "
        f"{conditions['dtype']}, greedy; commit {conditions['commit']}; seed {conditions['seed']}.",
        f"- **Roofline**: {rates['matmul_operations_per_second'] / 1e12:.4g} TFLOP/s (product of two random bf16 matrices of "
        f"{rates['matmul_side']} a side) and {rates['copy_bytes_per_second'] / 1e9:.4g} GB/s (device-to-device copy of "
        f"{rates['copied_bytes'] / 2**30:.2g} GiB, bytes read and written), both measured in this run; operations and bytes by "
        "`trimming.costs`. Share: the time that the roofline allows over the time taken.",
        f"- **Model**: random weights, {model['parameters'] / 1e9:.3g} G parameters: hidden {model['hidden']}, "
        f"{len(model['cross_attention_layers'])} of {model['layers']} layers cross-attending, vocabulary "
        f"{model['vocabulary']:,}; tower of {model['tower_layers']} layers of {model['tower_hidden']}, tiles of "
        f"{model['tile']} pixels, {model['visual_tokens_per_tile']} visual tokens a tile.",
    ]


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


def _captioning(part: Result) -> list[str]:
    if "images" not in part:
        return []
    tiles = ", ".join(f"{images} of {count}" for count, images in part["tiles"].items())
    lines = [
        f"Captioning: {part['images']} images (tiles: {tiles}), {part['output_tokens']:,} output tokens, prompts of "
        f"{part['prompt']} tokens. Seconds from tiles on the host to texts, median of the passes.",
        "",
        *_head(["", "images/s", "seconds", "tower", "prefill", "decode", "passes", "features kept", "peak GB"]),
    ]
    for name, one in part["contenders"].items():
        if "error" in one:
            lines.append(row([name, one["error"], *[""] * 7]))
            continue
        stages = [one["tower_seconds"], one.get("prefill_seconds"), one.get("decode_seconds")]
        cells = [name, f"{one['images_per_second']:.2f}", f"{one['seconds']['median']:.2f}", *map(_seconds, stages)]
        kept = one.get("keep_fraction", 1.0)
        lines.append(row([*cells, str(one["passes"]), f"{kept:.3f}", _gigabytes(one["peak_bytes"])]))
    swept = ", ".join(
        f"{size}: {one['rows'] / one['seconds']:.2f}" if "seconds" in one else f"{size}: {one['error']}"
        for size, one in part["sweep"].items()
    )
    lines += ["", f"- The peer by static batch, images/s over a part of the rows: {swept or 'no time'}."]
    sides = {side: part.get(f"{side}_preparing_seconds") for side in ("engine", "peer")}
    said = [f"{side} {seconds / part['images'] * 1e3:.0f} ms" for side, seconds in sides.items() if seconds]
    if said:
        lines.append(f"- Decoding, cutting and tokenizing on one thread before the clock starts, an image: {', '.join(said)}.")
    if "k_ratio" in part:
        lines.append(
            f"- Trimmed: K = {part['k_ratio']:g}, at which half of these images' features stay. Real tiles: approximate."
        )
    if "same" in part:
        same = part["same"]
        lines.append(
            f"- Engine and peer: {same['rows']:.1%} of the rows are the same, {same['first_tokens']:.1%} of the first tokens, "
            f"{same['tokens_before_a_difference']:.1%} of the tokens come before a row's first difference."
        )
    return lines


def _decode(part: Result) -> list[str]:
    if "conditions" not in part:
        return []
    at = part["conditions"]
    lines = [
        f"Decode: one step of as many sequences, each with a prompt of {at['prompt']} tokens, {at['said']} tokens said and an "
        f"image of {at['tiles']} tiles of its own. *Step*: `Engine.step`, the host's part included; *queued*: steps that the "
        "host does not wait for.",
        "",
        *_head(
            ["features", "batch", "step ms", "queued ms", "roofline ms", "bound by", "share", "queued", "tokens/s", "KV GB"]
        ),
    ]
    notes = []
    for policy in ("full", "half"):
        if policy not in part:
            continue
        for batch, one in part[policy]["batches"].items():
            if "error" in one:
                lines.append(row([policy, batch, one["error"], *[""] * 7]))
                continue
            times = [one["seconds"]["median"], one["queued_seconds"], one["roofline_seconds"]]
            shares = [f"**{one['roofline_share']:.2f}**", f"{one['queued_roofline_share']:.2f}"]
            cells = [policy, batch, *(f"{seconds * 1e3:.2f}" for seconds in times), one["bound"], *shares]
            lines.append(row([*cells, f"{one['tokens_per_second']:,.0f}", f"{one['kv_bytes'] / 1e9:.2f}"]))
        if "largest" in part[policy]:
            notes.append(
                f"- The largest that fits, {policy}: {part[policy]['largest']} sequences in "
                f"{part[policy]['kv_room_bytes'] / 1e9:.1f} GB for keys and values, with slots of "
                f"{part[policy]['slot_tokens']} tokens and {part[policy]['kept']} visual tokens each."
            )
    return [*lines, "", *notes]


def _tower(part: Result) -> list[str]:
    if "images" not in part:
        return []
    lines = [
        f"Tower and projector on {part['images']} images at once, tiles on the device. *all*: exact; *real*: without padding "
        "tiles, approximate.",
        "",
        *_head(["tiles", "runs on", "images/s", "ms", "TFLOP", "roofline ms", "share"]),
    ]
    for tiles, modes in part.items():
        for mode, one in modes.items() if isinstance(modes, dict) else ():
            times = [f"{one['seconds'] * 1e3:.1f}", f"{one['operations'] / 1e12:.1f}", f"{one['roofline_seconds'] * 1e3:.1f}"]
            lines.append(row([tiles, mode, f"{one['images_per_second']:.1f}", *times, f"**{one['roofline_share']:.2f}**"]))
    return lines


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _gigabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.1f}"


def _head(cells: Sequence[str]) -> list[str]:
    return [row(cells), row(["---", *["---:"] * (len(cells) - 1)])]
