"""From ``cpu.json`` to ``cpu.md`` and its plot: the tables that the README quotes, with their conditions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.amounts import TOWER_KEEP

Result = dict[str, Any]

RATIOS = {
    "captioning_engine_over_peer": "captioning, engine with all features / peer, end to end",
    "captioning_generation_engine_over_peer": "the same, on prefill and decode alone",
    "questions_engine_over_peer": "questions, engine with all features / peer, end to end",
    "captioning_half_over_all": "captioning, half the features / all, end to end",
    "questions_half_over_all": "five questions an image, half the features / all, end to end",
    "questions_generation_half_over_all": "the same, on prefill and decode alone",
    "decode_half_over_all": "decode tokens a second, half the features / all, four tiles, one budget of KV bytes",
    "captioning_kv_peak_half_over_all": "peak cross KV held, half / all, captioning",
    "questions_kv_peak_half_over_all": "peak cross KV held, half / all, five questions an image",
    "captioning_tenth_over_all": "captioning, a tenth of the features, merged / all, end to end",
    "questions_tenth_over_all": "five questions an image, a tenth, merged / all, end to end",
    "questions_generation_tenth_over_all": "the same, on prefill and decode alone",
    "decode_tenth_over_all": "decode tokens a second, a tenth, merged / all, four tiles, one budget of KV bytes",
    "captioning_kv_peak_tenth_over_all": "peak cross KV held, a tenth / all, captioning",
    "questions_kv_peak_tenth_over_all": "peak cross KV held, a tenth / all, five questions an image",
    "captioning_pooled_over_all": "captioning, padding tiles pooled in the tower, all features / all rows, end to end",
    "captioning_whole_over_all": f"captioning, pooled, {TOWER_KEEP} of the tower, clusters of half of that / all, end to end",
    "questions_whole_over_all": "five questions an image, the same, end to end",
    "clustering_over_tower": "seconds of clustering and merging / the tower's",
    "selection_one_question": "prefill seconds, Trimmed-Llama / its features known beforehand, one question an image",
    "selection_five_questions": "the same, five questions an image",
}
RUNGS = {
    "peer": "peer",
    "linear": "+ oneDNN's linear layers",
    "static": "+ mask-free tower, no padding",
    "reuse": "+ image reuse",
    "continuous": "+ continuous batching",
    "trimmed": "+ trimming to half, one set an image",
    "merged": "in its place merging to a tenth",
}
BESIDE = {
    "by question": "trimmed to half, one set a question",
    "least": "one feature an image: what no trimming can exceed",
    "real": '`tower_tiles="real"` (approximate), all features',
    "pooled": '`tower_tiles="pooled"`, the default, all features',
    "tower": f"and {TOWER_KEEP} of the tower's rows × layers left",
    "whole": "and clusters of half of what the tower leaves",
}


WAYS = {
    "full": "all features",
    "by question": "half, one set a question",
    "by image": "half, one set an image",
    "merged": "a tenth, merged",
}
PLOT = "cpu-decode"


def markdown(result: Result) -> str:
    """The page."""
    parts = [_ratios(result), _ladder(result), _growth(result), _shares(result), _sweep(result), _notes(result)]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _ratios(result: Result) -> list[str]:
    lines = _head(["ratio", "goal", "predicted", "measured", "least – most of a round"])
    for name, title in RATIOS.items():
        at_least, at_most = (result["goals"][kind].get(name) for kind in ("at_least", "at_most"))
        goal = f"≥ {at_least:g}" if at_most is None else f"≤ {at_most:g}"
        # Selection and clustering are about percents.
        places = 3 if name.startswith(("selection", "clustering")) else 2
        cells = [_ends(result["predicted"].get(name), places), f"**{result['ratios'][name]:.{places}f}**"]
        lines.append(row([title, goal, *cells, _ends(result["spreads"][name], places)]))
    return [
        *lines,
        "",
        "*Predicted* by the cost model, from what the stages took with all features: first with prefill and decoding bound by "
        "their operations, then by whichever of operations and bytes shrinks more, which is the most that so many features "
        "can give at these stages' speeds: tower and image decoding stay as they are, and text rows make most of the rest. "
        "Of selection the last column has quartiles.",
    ]


def _ends(ends: Sequence[float] | None, places: int) -> str:
    return " – ".join(f"{end:.{places}f}" for end in ends or ())


def _ladder(result: Result) -> list[str]:
    """Both workloads, one rung a line: images a second, and what share of the peer's that is."""
    loads = [result["captioning"], result["questions"]]
    heads = ["", "captioning, images/s", "/ peer", "generation / peer", "questions, images/s", "/ peer", "generation / peer"]
    lines = _head(heads)
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
    return [f"{each['images_per_second']:.2f}", f"{_end_to_end(each, peer):.2f}", f"{_generation(each, generating):.2f}"]


def _end_to_end(each: Result, other: Result) -> float:
    """Over the other's, end to end."""
    speed: float = each["images_per_second"] / other["images_per_second"]
    return speed


def _generation(each: Result, other: Result) -> float:
    """Over the other's, of prefill and decoding alone."""
    speed: float = other["generation_seconds"]["median"] / each["generation_seconds"]["median"]
    return speed


def _growth(result: Result) -> list[str]:
    """A line for each number of questions an image, a cell for each way of keeping."""
    growth = result["growth"]
    lines = _head(["questions an image", *(f"{title}: peak MB · MB s · prefill + decode s" for title in WAYS.values())])
    for per_image, each in growth.items():
        cells = []
        for name in WAYS:
            one = each[name]
            seconds = f"{one['prefill_seconds']:.2f} + {one['decode_seconds']:.2f}"
            held = [one[key] / 1e6 for key in ("peak_cross_kv_bytes", "cross_kv_byte_seconds")]
            cells.append(f"{held[0]:.1f} · {held[1]:.1f} · {seconds}")
        lines.append(row([per_image, *cells]))
    rows = next(iter(growth.values()))["rows"]
    return [
        *lines,
        "",
        f"How cost grows with the questions about an image: the same {rows} prompts and answers about ever fewer images of two "
        "tiles, which are encoded beforehand. Cross-attention KV bytes that the engine held, most at once and over time, and "
        "seconds of prefill and decode.",
    ]


def _shares(result: Result) -> list[str]:
    shares = result["shares"]
    lines = _head(["kept share", *(f"{float(share):.0%}" for share in shares)])
    figures = {
        "decode, s": [f"{one['decode_seconds']:.2f}" for one in shares.values()],
        "decode, tokens/s": [f"{_speed(one):.0f}" for one in shares.values()],
        "prefill, s": [f"{one['prefill_seconds']:.2f}" for one in shares.values()],
        "peak cross KV held, MB": [f"{one['peak_cross_kv_bytes'] / 1e6:.1f}" for one in shares.values()],
        "cross KV read by decoding, GB": [f"{one['cross_kv_bytes_read'] / 1e9:.2f}" for one in shares.values()],
    }
    lines += [row([title, *cells]) for title, cells in figures.items()]
    seconds = [one["decode_seconds"] for one in shares.values()]
    rising = [float(share) for share, less, more in zip(list(shares)[1:], seconds[1:], seconds, strict=False) if less >= more]
    falls = f"does not fall at {', '.join(f'{share:.0%}' for share in rising)}" if rising else "falls at every step"
    sequences = next(iter(shares.values()))["peak_sequences"]
    return [
        f"![Decode seconds against the kept share]({PLOT}.svg)",
        "",
        *lines,
        "",
        f"Decoding of {sequences:.0f} rows at once, each about a four-tile image of its own, of which an even grid keeps the "
        f"share: the time {falls}.",
    ]


def _speed(one: Result) -> float:
    """Decoded tokens a second."""
    return float(one["decode_tokens"] / one["decode_seconds"])


def plot(result: Result) -> str:
    """An SVG file: decode seconds against the kept share."""
    from jobs.comparison.drawing import COLOURS, Drawing, as_file, percent

    shares = {float(share): one["decode_seconds"] for share, one in result["shares"].items()}
    with Drawing(PLOT, 5.0, 3.2) as (_, axes, made):
        axes.plot(list(shares), list(shares.values()), color=COLOURS[0], marker="o")
        axes.set_xlim(0, 1.03)
        axes.set_ylim(0, 1.1 * max(shares.values()))
        axes.set_xlabel("kept share of the features, four tiles, a set of its own for each row")
        axes.set_ylabel("decoding, s")
        percent(axes.xaxis)
        axes.grid()
        said = ", ".join(f"{seconds:.2f} s at {share:.0%}" for share, seconds in shares.items())
        return as_file(made(PLOT, f"Seconds of decoding against the kept share of the features: {said}."))


def _sweep(result: Result) -> list[str]:
    sizes = list(result["captioning"]["sweep"])
    sizes += [size for size in result["questions"]["sweep"] if size not in sizes]
    lines = _head(["the peer's batch size", *sizes])
    for name in ("captioning", "questions"):
        swept = result[name]["sweep"]
        cells = [f"{swept[size]['rows_per_second']:.2f}" if size in swept else "" for size in sizes]
        lines.append(row([f"{name}, rows/s", *cells]))
    return lines


def _notes(result: Result) -> list[str]:
    conditions, captioning, questions = result["conditions"], result["captioning"], result["questions"]
    model, four, selection = conditions["model"], result["four_tiles"], result["selection"]
    shares = conditions["captioning_operations"]
    kept = {name: four["contenders"][name] for name in ("full", "half", "merged")}
    trimmed = {
        "captioning": (captioning["k_ratio"], captioning["contenders"]["trimmed"]),
        "questions, one set an image,": (questions["k_ratio"], questions["contenders"]["trimmed"]),
        "questions, one set a question,": (questions["k_ratio_by_question"], questions["contenders"]["by question"]),
        "four tiles": (four["k_ratio"], kept["half"]),
    }
    halves = [f"{title} K = {k_ratio:g} keeps {each['keep_fraction']:.3f}" for title, (k_ratio, each) in trimmed.items()]
    speeds = [f"{one['decode_tokens_per_second']['median']:.0f}" for one in kept.values()]
    tiles = ", ".join(f"{images} of {count}" for count, images in captioning["tiles"].items())
    costs = {
        known: " and ".join(
            f"{one['median'] - 1:.1%} ({one['low'] - 1:.1%} to {one['high'] - 1:.1%})" for one in selection[known].values()
        )
        for known in ("over_known", "over_known_behind")
    }
    bounds = []
    for name, load in (("captions", captioning), ("questions", questions)):
        least, every = load["contenders"]["least"], load["contenders"]["continuous"]
        both = f"{_end_to_end(least, every):.2f} × end to end and {_generation(least, every):.2f} × at prefill and decode"
        bounds.append(f"{both} for {name}")
    lines = [
        f"- **Machine**: {conditions['hardware']}, {conditions['cores']} cores, {conditions['threads']} threads; torch "
        f"{conditions['torch']}, transformers {conditions['transformers']}, {conditions['dtype']}, {conditions['attention']}, "
        f"greedy; commit {conditions['commit']}. One process, all in turns: medians of {conditions['rounds']} rounds for what "
        f"has a goal (peer, continuous batching, trimming, merging), one pass of the others; seed {conditions['seed']}.",
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
        f"- **Half the features**: {'; '.join(halves)}. In {four['kv_budget_bytes'] / 1e6:.0f} MB of KV, "
        f"{kept['full']['peak_sequences']:.0f} rows ran at once with all features, "
        f"{kept['half']['peak_sequences']:.0f} with half of them and {kept['merged']['peak_sequences']:.0f} with a tenth, "
        f"merged: {', '.join(speeds)} tokens a second.",
        "- **One feature an image**, over all features: what fewer of them can give at most, whoever chooses, is "
        f"{', '.join(bounds)}. The rest is the tower's and the text's.",
        f"- **The tower at {TOWER_KEEP}**: these weights are random and have no answers to lose. Of the demo's models the "
        "second, with 257 rows a tile as here, is not shown to lose by it, and the first, with 65, is: "
        "demo/results/accuracy.md.",
        f"- **Selection**: over prefills that know beforehand what Trimmed-Llama keeps, its own take {costs['over_known']} "
        "longer, with one and five questions an image (median and quartiles): scoring, picking, and that its first "
        "cross-attention layer attends to all features. Over prefills that know it behind that layer: "
        f"{costs['over_known_behind']}. {selection['turns']} × {selection['prefills']} prompts each way, in turns, images "
        "encoded beforehand.",
    ]
    if result["ray_data"]:
        ray = result["ray_data"]
        peer, ours = ray["peer"], ray["engine"]
        lines.append(
            f"- **Through Ray Data**, one pass each, start of the actor and loading of the model included: {ray['images']} "
            f"captions of {ray['max_new_tokens']} tokens, peer (batches of {ray['batch_size']}) {peer['seconds']:.0f} s, "
            f"`python -m jobs.caption` with all features and all rows of the tower {ours['seconds']:.0f} s; "
            f"{ray['same_texts']:.1%} of the texts are the same."
        )
    return lines


def _head(cells: Sequence[str]) -> list[str]:
    return [row(cells), row(["---", *["---:"] * (len(cells) - 1)])]


def row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"
