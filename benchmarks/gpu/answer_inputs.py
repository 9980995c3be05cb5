"""The questions of the demo-answers section, with a CPU's answers: ``python -m benchmarks.gpu.answer_inputs`` writes the file.

A lent GPU machine does not have the easy-VQA package, so the questions and their images travel in one parquet file. Beside each
question stand the demo model's answers on a CPU in fp32 with greedy decoding, one for each policy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from demo import MODEL, scenes, shards
from demo.answerer import Answerer
from demo.shards import Row
from demo.table import sha256
from trimming import KeepAll, Policy, TrimmedLlama
from trimming.engine import KeptSets

FILE = Path(__file__).with_name("answers.parquet")
POLICIES: Mapping[str, Policy] = {"full": KeepAll(), "trimmed": TrimmedLlama(k_ratio=0.25)}
KEPT_SETS: KeptSets = "question"
"""An answer must not depend on which questions are asked beside it: a rehearsal and the tests ask a few."""
SCENES = 250
EASY_VQA_QUESTIONS = 1_000
MODEL_KEY = b"model_sha256"
SCHEMA = pa.schema(
    [
        ("set", pa.string()),
        # Parquet's dictionary encoding stores an image once, however many questions ask about it.
        ("image", pa.binary()),
        *((name, pa.string()) for name in Row._fields if name != "image"),
        *((policy, pa.struct([("text", pa.string()), ("keep_fraction", pa.float64())])) for policy in POLICIES),
    ]
)


@dataclass(frozen=True, slots=True)
class CpuAnswer:
    """What the demo model answered on a CPU in fp32; ``keep_fraction`` is the share of the visual tokens kept for it."""

    text: str
    keep_fraction: float


@dataclass(frozen=True, slots=True)
class Question:
    """A row of the demo's data sets and the CPU's answers to it by the name of the policy."""

    row: Row
    cpu: Mapping[str, CpuAnswer]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FILE, help="file to write (default: %(default)s)")
    options = parser.parse_args(arguments)
    sets = demo_rows()
    answerer = Answerer(MODEL)
    questions = {name: answered(answerer, rows) for name, rows in sets.items()}
    write(options.output, questions, sha256(MODEL / "model.safetensors"))
    counts = ", ".join(f"{name} {len(rows):,} rows" for name, rows in sets.items())
    print(f"{options.output}: {counts}, {options.output.stat().st_size / 1e6:.2f} MB")
    return 0


def demo_rows() -> dict[str, list[Row]]:
    """The rows of each data set, from the packages: six questions on each scene, and easy-VQA's spread over its images."""
    return {
        "scenes-test": [row for image in shards.scene_rows("test", SCENES, scenes.KINDS) for row in image],
        "easy-vqa-test": [row for image in shards.easy_vqa_rows("test", EASY_VQA_QUESTIONS) for row in image],
    }


def answered(answerer: Answerer, rows: Sequence[Row]) -> list[Question]:
    """The rows with the answers of ``answerer`` under every policy."""
    cpu: list[dict[str, CpuAnswer]] = [{} for _ in rows]
    for name, policy in POLICIES.items():
        for answers, each in zip(cpu, answerer.answer(answerer.engine(policy, kept_sets=KEPT_SETS), rows), strict=True):
            assert each.said.keep_fraction is not None, f"{each.row.id} has no image"
            answers[name] = CpuAnswer(each.said.text, each.said.keep_fraction)
    return [Question(row, answers) for row, answers in zip(rows, cpu, strict=True)]


def write(file: Path, sets: Mapping[str, Sequence[Question]], model_sha256: str) -> None:
    """One row group of all data sets, one after the other; the file's metadata names the model's weights."""
    rows = [
        {
            "set": name,
            **question.row._asdict(),
            **{policy: {"text": said.text, "keep_fraction": said.keep_fraction} for policy, said in question.cpu.items()},
        }
        for name, questions in sets.items()
        for question in questions
    ]
    schema = SCHEMA.with_metadata({MODEL_KEY: model_sha256})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, compression="zstd")


def read(file: Path = FILE) -> dict[str, list[Question]]:
    """The questions by data set, in the file's order."""
    sets: dict[str, list[Question]] = {}
    for columns in pq.read_table(file).to_pylist():
        row = Row(**{name: columns[name] for name in Row._fields})
        cpu = {policy: CpuAnswer(**columns[policy]) for policy in POLICIES}
        sets.setdefault(columns["set"], []).append(Question(row, cpu))
    return sets


def model_of(file: Path = FILE) -> str:
    """SHA-256 of the weights that gave the CPU's answers."""
    return (pq.read_schema(file).metadata or {}).get(MODEL_KEY, b"").decode()


if __name__ == "__main__":
    sys.exit(main())
