"""The figures that goals are about, from the sections measured so far. Imports nothing heavy."""

from __future__ import annotations

from typing import Any

Result = dict[str, Any]

GOALS: Result = {"captioning_engine_over_peer": 3.0, "decode_roofline_share": 0.6, "tower_roofline_share": 0.6}
"""At least; in decode at batches of 32 and more."""
GOAL_BATCH = 32


def ratios(sections: Result) -> Result:
    """``captioning_engine_over_peer`` and, with ``_trimmed`` and ``_real``, the engine's other ways; the others by policy and
    batch, and by tiles and way. A section that was not reached is missing, and so are its ratios."""
    found: Result = {}
    captioning = sections.get("captioning", {})
    contenders = captioning.get("contenders", {})
    peer = contenders.get("peer", {})
    for name, contender in (("", "engine"), ("_trimmed", "engine, trimmed"), ("_real", "engine, real tiles")):
        engine = contenders.get(contender, {})
        if "seconds" in peer and "seconds" in engine:
            found[f"captioning_engine{name}_over_peer"] = peer["seconds"]["median"] / engine["seconds"]["median"]
    for stage in ("prefill", "decode"):
        for policy, part in sections.get(stage, {}).get("policies", {}).items():
            batches = part.get("batches", {})
            shares = {batch: one["roofline_share"] for batch, one in batches.items() if "roofline_share" in one}
            if shares:
                found.setdefault(f"{stage}_roofline_share", {})[policy] = shares
    for tiles, modes in sections.get("tower", {}).get("tiles", {}).items():
        shares = {mode: one["roofline_share"] for mode, one in modes.items()}
        found.setdefault("tower_roofline_share", {})[tiles] = shares
    return found
