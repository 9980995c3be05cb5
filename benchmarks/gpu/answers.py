"""The demo model's answers on the device, in fp32 and bf16, beside a CPU's answers to the same questions in fp32."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from benchmarks.gpu.answer_inputs import KEPT_SETS, POLICIES, Question, read
from benchmarks.gpu.bench import Bench, Result, SectionError, without_tf32
from demo import MODEL
from demo.answerer import Answered, Answerer
from jobs.comparison.bootstrap import Clusters, score
from pipeline.engine import Engine

DTYPES: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
LEAST_SAME_TEXT = 0.98
"""Share of the fp32 answers that must be the CPU's texts. Sums in another order may flip a near tie, no more."""
BF16_MARGIN = 0.01
TINY_ROWS = 30
"""Rows of each data set in a rehearsal."""
FIRST_SECONDS_PER_ROW = 0.01
"""The estimate before a part is measured; one CPU core takes about as long."""


def measure_answers(bench: Bench, out: Result) -> None:
    """Fills ``out`` and raises ``SectionError`` where the device's answers are not as good as the CPU's.

    A part is one data set in one dtype under one policy. ``out`` gets two entries:

    - ``sets``: ``out["sets"][set][dtype][policy]`` for ``scenes-test`` and ``easy-vqa-test``, ``float32`` and ``bfloat16``,
      ``full`` and ``trimmed``, each of them a flat dict:

      - ``rows``: questions asked.
      - ``accuracy``, ``accuracy_low``, ``accuracy_high``: share of right answers with its 95 % interval.
      - ``cpu_accuracy``: the CPU's share of right answers to the same questions.
      - ``difference``, ``difference_low``, ``difference_high``: ``accuracy`` less ``cpu_accuracy`` with its 95 % interval,
        which must hold 0, in bf16 something within 1 % of it.
      - ``same_text``: share of answers whose text is the CPU's; at least ``LEAST_SAME_TEXT`` in fp32.
      - ``keep_fraction``, ``cpu_keep_fraction``: mean share of the visual tokens kept.
      - ``seconds``: from image files to texts. A dtype's first policy on a data set includes the decoding and encoding of the
        images, which later ones find done; the first part of a dtype includes the capture of CUDA graphs.

    - ``not_reached``: the parts, as ``"set, dtype, policy"``, that the section had no time for.
    """
    sets = read()
    if bench.amounts.tiny:
        sets = {name: questions[:TINY_ROWS] for name, questions in sets.items()}
    answers = DemoAnswers(bench, out, sets)
    with without_tf32():
        for dtype in DTYPES:
            answers.measure(dtype)
            bench.release()
    if out["not_reached"]:
        bench.say(f"answers: no time for {'; '.join(out['not_reached'])}")
    bench.save()
    if answers.faults:
        raise SectionError("; ".join(answers.faults))


@dataclass
class DemoAnswers:
    """The parts measured so far."""

    bench: Bench
    out: Result
    sets: Mapping[str, Sequence[Question]]
    faults: list[str] = field(default_factory=list)
    seconds_per_row: float = FIRST_SECONDS_PER_ROW
    """Of the latest part."""

    def __post_init__(self) -> None:
        parts = [f"{name}, {dtype}, {policy}" for dtype in DTYPES for name in self.sets for policy in POLICIES]
        self.out.update(sets={}, not_reached=parts)

    def measure(self, dtype: Literal["float32", "bfloat16"]) -> None:
        """Measures the parts of one dtype, as many as there is time for. Both policies share the encoded images."""
        if not self._has_time_for(next(iter(self.sets.values()))):
            return
        answerer = Answerer(MODEL, self.bench.device, dtype)
        engines = {name: answerer.engine(policy, kept_sets=KEPT_SETS) for name, policy in POLICIES.items()}
        for name, questions in self.sets.items():
            for policy, engine in engines.items():
                if not self._has_time_for(questions):
                    return
                began = time.monotonic()
                answered = self._answer(answerer, engine, questions)
                if answered is None:
                    return
                seconds = time.monotonic() - began
                self.seconds_per_row = seconds / len(questions)
                self._keep(name, dtype, policy, compare(questions, answered, policy) | {"seconds": seconds})

    def _has_time_for(self, questions: Sequence[Question]) -> bool:
        return self.bench.has(self.seconds_per_row * len(questions))

    def _answer(self, answerer: Answerer, engine: Engine, questions: Sequence[Question]) -> list[Answered] | None:
        """None where the part takes longer than estimated and the section's time ends in the midst of it."""
        answered = []
        for each in answerer.answer(engine, [question.row for question in questions]):
            if not self.bench.has(0):
                return None
            answered.append(each)
        return answered

    def _keep(self, name: str, dtype: str, policy: str, part: Result) -> None:
        title = f"{name}, {dtype}, {policy}"
        self.out["sets"].setdefault(name, {}).setdefault(dtype, {})[policy] = part
        self.out["not_reached"].remove(title)
        self.faults += [f"{title}: {fault}" for fault in faults(part, dtype)]
        self.bench.say(
            f"answers: {title}: {part['accuracy']:.2%} right, {part['cpu_accuracy']:.2%} on a CPU, "
            f"{part['same_text']:.2%} the same text, {part['seconds']:.1f} s"
        )
        self.bench.save()


def compare(questions: Sequence[Question], answered: Sequence[Answered], policy: str) -> Result:
    """The device's answers beside the CPU's, question by question.

    Both intervals are bootstraps over images, as questions about one image are not independent. The paired difference is the
    sharper check: what makes a question hard is the same for both and cancels out, so its interval is a few answers wide, while
    the accuracy's own is as wide as the sample of questions makes it (±1.6 points on the scenes).
    """
    cpu = [question.cpu[policy] for question in questions]
    images = np.unique([question.row.path for question in questions], return_inverse=True)[1]
    right = np.array([each.right for each in answered], dtype=np.float64)
    cpu_right = np.array([said.text == question.row.answer for said, question in zip(cpu, questions, strict=True)], np.float64)
    accuracy, difference = (score(Clusters.of(images, values)) for values in (right, right - cpu_right))
    return {
        "rows": len(questions),
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "cpu_accuracy": float(cpu_right.mean()),
        "difference": difference.value,
        "difference_low": difference.low,
        "difference_high": difference.high,
        "same_text": float(np.mean([each.said.text == said.text for each, said in zip(answered, cpu, strict=True)])),
        "keep_fraction": float(np.mean([each.said.keep_fraction for each in answered])),
        "cpu_keep_fraction": float(np.mean([said.keep_fraction for said in cpu])),
    }


def faults(part: Result, dtype: str) -> Iterator[str]:
    """What is wrong with a part, one line each. bf16 may cost an answer in a hundred, as it rounds."""
    margin = BF16_MARGIN if dtype == "bfloat16" else 0.0
    if part["difference_low"] > margin or part["difference_high"] < -margin:
        yield (
            f"accuracy {part['accuracy']:.2%} differs from the CPU's {part['cpu_accuracy']:.2%} "
            f"(95 % interval of the difference: {100 * part['difference_low']:+.2f} to {100 * part['difference_high']:+.2f})"
        )
    if dtype == "float32" and part["same_text"] < LEAST_SAME_TEXT:
        yield f"only {part['same_text']:.2%} of the answers are the CPU's, {LEAST_SAME_TEXT:.0%} should be"
