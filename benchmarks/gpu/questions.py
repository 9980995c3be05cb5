"""Five questions an image, with all features and with half of them, and the cross-attention KV bytes that were really held."""

from __future__ import annotations

import time

from benchmarks import workloads
from benchmarks.gpu.bench import Bench, Result
from benchmarks.gpu.passes import Passes, engine_pass, make_engine, prepare
from benchmarks.half import find_half
from benchmarks.ours import Ours
from benchmarks.workloads import ANSWER_LENGTHS, QUESTION_PROMPTS, QUESTIONS
from trimming import KeepAll, Policy
from trimming.engine import KeptSets

FULL, TRIMMED, BY_QUESTION = "engine", "engine, trimmed", "engine, trimmed by question"
ROUND_SECONDS = 20.0
"""That the first round is taken to need, the engine and its graphs included."""
HALF_IMAGES = 4


def measure_questions(bench: Bench, out: Result) -> None:
    """Fills ``out["contenders"]``: all features, half of them with one kept set an image, and with one a question.
    ``peak_cross_kv_bytes`` counts what lay in memory at once, once, and ``cross_kv_bytes_of_rows`` what the rows' own
    statistics add up to, over the whole pass."""
    amounts = bench.amounts
    rows = amounts.question_images * QUESTIONS
    longest = max(QUESTION_PROMPTS) + max(ANSWER_LENGTHS) + 32
    ours = Ours(bench.model, bench.processor, rows, rows * bench.costs.kv_bytes(longest, 2 * bench.costs.tokens))
    out |= {"images": amounts.question_images, "rows": rows, "contenders": {}}
    if not bench.has(ROUND_SECONDS):
        bench.say("questions: no time for a round")
        return
    load = workloads.questions(HALF_IMAGES, amounts.seed, bench.size)
    half, half_by_question = find_half(ours, load), find_half(ours, load, "question")
    out |= {"k_ratio": half.k_ratio, "k_ratio_by_question": half_by_question.k_ratio}
    engine = make_engine(bench, ours, KeepAll())
    passes, longest_round = Passes(bench, out), 0.0
    for number in range(amounts.rounds):
        if number and not bench.has(longest_round):
            bench.say(f"questions: no time for round {number + 1}")
            break
        began = time.monotonic()
        load = workloads.questions(amounts.question_images, amounts.seed + 1 + number, bench.size)
        requests = prepare(ours, load)
        ways: list[tuple[str, Policy, KeptSets]] = [
            (FULL, KeepAll(), "image"),
            (TRIMMED, half.policy, "image"),
            (BY_QUESTION, half_by_question.policy, "question"),
        ]
        for name, policy, kept_sets in ways[:: -1 if number % 2 else 1]:
            engine.use(policy)
            engine.kept_sets = kept_sets
            passes.add(name, engine_pass(bench, engine, requests), len(load.images))
        longest_round = max(longest_round, time.monotonic() - began)
