"""From ``cpu.json`` to ``cpu.md``: the tables that the README quotes, with their conditions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Result = dict[str, Any]

RATIOS = {
    "captioning_engine_over_peer": "captioning, engine with all features / peer, end to end",
    "captioning_generation_engine_over_peer": "the same, on prefill and decode alone",
    "questions_engine_over_peer": "questions, engine with all features / peer, end to end",
    "half_over_all": "decode tokens a second, half the features / all, four tiles, one budget of KV bytes",
    "kv_peak_half_over_all": "peak cross KV bytes, half / all, captioning, equal slots",
}
RUNGS = {
    "peer": "peer",
    "linear": "+ oneDNN's linear layers",
    "static": "+ mask-free tower, no padding",
    "reuse": "+ image reuse",
    "continuous": "+ continuous batching",
    "trimmed": "+ trimming to half",
}
BESIDE = {
    "random": "as many features, drawn at random",
    "real": '`tower_tiles="real"` (approximate), all features',
}


def markdown(result: Result) -> str:
    """The page."""
    lines = [*_ratios(result), "", *_ladder(result), "", *_sweep(result), "", *_notes(result)]
    return "\n".join(lines) + "\n"


def _ratios(result: Result) -> list[str]:
    lines = [row(["ratio", "goal", "measured", "least – most of a round"]), row(["---", "---:", "---:", "---:"])]
    for name, title in RATIOS.items():
        at_least, at_most = (result["goals"][kind].get(name) for kind in ("at_least", "at_most"))
        goal = f"≥ {at_least:g}" if at_most is None else f"≤ {at_most:g}"
        low, high = result["spreads"][name]
        lines.append(row([title, goal, f"**{result['ratios'][name]:.2f}**", f"{low:.2f} – {high:.2f}"]))
    return lines


def _ladder(result: Result) -> list[str]:
    """Both workloads, one rung a line: images a second, and what share of the peer's that is."""
    loads = [result["captioning"], result["questions"]]
    heads = ["", "captioning, images/s", "/ peer", "generation / peer", "questions, images/s", "/ peer", "generation / peer"]
    lines = [row(heads), row(["---", *["---:"] * (len(heads) - 1)])]
    for name, title in [*RUNGS.items(), *BESIDE.items()]:
        cells = [f"*beside:* {title}" if name in BESIDE else title]
        for load in loads:
            each = load["contenders"].get(load["peer"] if name == "peer" else name)
            cells += _cells(load, each) if each else ["", "", ""]
        lines.append(row(cells))
    return lines


def _cells(load: Result, each: Result) -> list[str]:
    peer, generating = load["contenders"][load["peer"]], load["contenders"][load["peer_generation"]]
    # The peer's line stands at its best batch size from end to end, which need not be its best at generating.
    generation = generating["generation_seconds"]["median"] / each["generation_seconds"]["median"]
    speed = each["images_per_second"]
    return [f"{speed:.2f}", f"{speed / peer['images_per_second']:.2f}", f"{generation:.2f}"]


def _sweep(result: Result) -> list[str]:
    sizes = list(result["captioning"]["sweep"])
    sizes += [size for size in result["questions"]["sweep"] if size not in sizes]
    lines = [row(["the peer's batch size", *sizes]), row(["---", *["---:"] * len(sizes)])]
    for name in ("captioning", "questions"):
        swept = result[name]["sweep"]
        cells = [f"{swept[size]['rows_per_second']:.2f}" if size in swept else "" for size in sizes]
        lines.append(row([f"{name}, rows/s", *cells]))
    return lines


def _notes(result: Result) -> list[str]:
    conditions, captioning, questions = result["conditions"], result["captioning"], result["questions"]
    model, four, selection = conditions["model"], result["four_tiles"], result["selection"]
    shares = conditions["captioning_operations"]
    kept = {name: four["contenders"][name] for name in ("full", "half")}
    tiles = ", ".join(f"{images} of {count}" for count, images in captioning["tiles"].items())
    cost = selection["cost"]
    lines = [
        f"- **Machine**: {conditions['hardware']}, {conditions['cores']} cores, {conditions['threads']} threads; torch "
        f"{conditions['torch']}, transformers {conditions['transformers']}, {conditions['dtype']}, {conditions['attention']}, "
        f"greedy; commit {conditions['commit']}. One process, all in turns: medians of {conditions['rounds']} rounds "
        f"for what has a goal (peer, continuous batching, trimming), one pass of the others; seed {conditions['seed']}.",
        f"- **Model**: random weights, {model['parameters'] / 1e6:.0f} M parameters: hidden {model['hidden']}, "
        f"{len(model['cross_attention_layers'])} of {model['layers']} layers cross-attending, "
        f"{model['visual_tokens_per_tile']} visual tokens a tile; the tower has {shares['tower_share']:.0%} of the mean "
        f"captioning image's operations ({shares['tower_share_without_padding_tiles']:.0%} if padding tiles are not counted).",
        f"- **Captioning**: {captioning['images']} images (tiles: {tiles}), one prompt each, {captioning['output_tokens']:,} "
        f"output tokens. **Questions**: {questions['images']} images, {questions['rows']} rows, "
        f"{questions['output_tokens']:,} output tokens. End to end is from JPEG files to texts.",
        f"- **Peer**: processor and `model.generate` on static batches of {captioning['peer'].split()[-1]} and "
        f"{questions['peer'].split()[-1]}, best of the sweep below, which took a part of the rows; at generating its best size "
        f"was {captioning['peer_generation'].split()[-1]} for captioning. Rows whose greedy tokens are the engine's: "
        f"{captioning['same_output_rows']:.1%} and {questions['same_output_rows']:.1%}.",
        f"- **Half the features**: captioning K = {captioning['k_ratio']:g} keeps "
        f"{captioning['contenders']['trimmed']['keep_fraction']:.3f}; four tiles K = {four['k_ratio']:g} keeps "
        f"{kept['half']['keep_fraction']:.3f}. In {four['kv_budget_bytes'] / 1e6:.0f} MB of KV, "
        f"{kept['full']['peak_sequences']:.0f} rows ran at once with all features, "
        f"{kept['half']['peak_sequences']:.0f} with half of them: "
        f"{kept['full']['decode_tokens_per_second']['median']:.0f} and "
        f"{kept['half']['decode_tokens_per_second']['median']:.0f} tokens a second.",
        f"- **Selection itself** costs {cost['median']:.1%} of prefill time ({cost['min']:.1%} to {cost['max']:.1%}), against "
        f"as many features drawn at random: {selection['turns']} × {selection['prefills']} prefills with either policy.",
    ]
    if result["ray_data"]:
        ray = result["ray_data"]
        peer, ours = ray["peer"], ray["engine"]
        lines.append(
            f"- **Through Ray Data**, one pass each, start of the actor and loading of the model included: {ray['images']} "
            f"captions of {ray['max_new_tokens']} tokens, peer (batches of {ray['batch_size']}) {peer['seconds']:.0f} s, "
            f"`python -m jobs.caption` with all features {ours['seconds']:.0f} s; "
            f"{ray['same_texts']:.1%} of the texts are the same."
        )
    return lines


def row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"
