"""The GPU benchmark's demo-answers section, on a CPU: its file of questions, its comparison of answers, its parts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu import answer_inputs, answers
from benchmarks.gpu.amounts import TINY_GPU
from benchmarks.gpu.answer_inputs import FILE, POLICIES, CpuAnswer, Question
from benchmarks.gpu.answers import DTYPES, DemoAnswers, compare, faults, measure_answers
from benchmarks.gpu.bench import Bench, SectionError
from demo import MODEL, table
from demo.answerer import Answered, Answerer
from jobs.comparison.bootstrap import Clusters, score

ANEW = "`python -m benchmarks.gpu.answer_inputs` writes it anew (a minute)"
TABLE_LABELS = {"full": "full", "trimmed": "by-question 0.25"}
PARTS = [f"{name}, {d}, {policy}" for d in DTYPES for name in ("scenes-test", "easy-vqa-test") for policy in POLICIES]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """So small a model is no faster on several threads, and much slower where other programs keep them waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[Question]]:
    return answer_inputs.read()


@pytest.fixture
def bench() -> Bench:
    return Bench(device=torch.device("cpu"), amounts=TINY_GPU, save=lambda: None, say=lambda line: None)


# ---- the file ---------------------------------------------------------------------------------------------------------------


def test_the_shipped_rows_are_those_of_the_packages(shipped: dict[str, list[Question]]) -> None:
    rows = answer_inputs.demo_rows()
    assert {name: len(one) for name, one in rows.items()} == {"scenes-test": 1_500, "easy-vqa-test": 1_000}
    for name in rows:
        # Images byte for byte.
        assert [question.row for question in shipped[name]] == rows[name], f"{FILE.name} holds other rows: {ANEW}"
    assert list(shipped) == list(rows)
    # Each image is stored once.
    assert FILE.stat().st_size < 900_000


def test_the_shipped_answers_are_what_the_engine_says_now(shipped: dict[str, list[Question]]) -> None:
    assert answer_inputs.model_of() == table.sha256(MODEL / "model.safetensors"), f"{FILE.name} is of another model: {ANEW}"
    answerer = Answerer(MODEL)
    for name, questions in shipped.items():
        some = questions[:: len(questions) // 20][:20]
        now = answer_inputs.answered(answerer, [question.row for question in some])
        for question, again in zip(some, now, strict=True):
            for policy in POLICIES:
                assert again.cpu[policy].text == question.cpu[policy].text, f"{name}, {policy}, {question.row.id}: {ANEW}"
                # A visual token more or less: processors sum in different orders.
                assert again.cpu[policy].keep_fraction == pytest.approx(question.cpu[policy].keep_fraction, abs=0.02)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["scenes-test", "easy-vqa-test"])
def test_the_shipped_sample_stands_for_the_demo_table(shipped: dict[str, list[Question]], name: str, policy: str) -> None:
    """The section compares with the CPU's answers to these rows; here they are compared with the table over all rows."""
    sets = json.loads((table.ROOT / "demo/results/accuracy.json").read_text())["sets"]
    measured = sets[name]["results"][TABLE_LABELS[policy]]
    assert measured["policy"] == repr(POLICIES[policy])
    images = np.unique([question.row.path for question in shipped[name]], return_inverse=True)[1]
    right = np.array([question.cpu[policy].text == question.row.answer for question in shipped[name]], float)
    found = score(Clusters.of(images, right))
    assert found.low is not None
    assert found.high is not None
    assert found.low <= measured["accuracy"] <= found.high
    kept = np.mean([question.cpu[policy].keep_fraction for question in shipped[name]])
    assert kept == pytest.approx(measured["keep_fraction"], abs=0.01)


def test_the_maker_writes_what_is_read(
    shipped: dict[str, list[Question]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = {name: questions[:3] for name, questions in shipped.items()}
    monkeypatch.setattr(answer_inputs, "demo_rows", lambda: {name: [q.row for q in one] for name, one in some.items()})
    file = tmp_path / "answers.parquet"
    assert answer_inputs.main(["--output", str(file)]) == 0
    assert answer_inputs.read(file) == some
    assert answer_inputs.model_of(file) == answer_inputs.model_of()


# ---- the comparison ---------------------------------------------------------------------------------------------------------


def answer(questions: Sequence[Question], texts: Sequence[str]) -> list[Answered]:
    """The questions as if the device had said ``texts``."""
    said: Any = [SimpleNamespace(text=text, keep_fraction=0.5) for text in texts]
    return [Answered(question.row, one, 1) for question, one in zip(questions, said, strict=True)]


def texts_of(questions: Sequence[Question]) -> list[str]:
    return [question.cpu["trimmed"].text for question in questions]


def test_the_cpus_own_answers_have_no_fault(shipped: dict[str, list[Question]]) -> None:
    questions = shipped["scenes-test"]
    part = compare(questions, answer(questions, texts_of(questions)), "trimmed")
    assert part["rows"] == 1_500
    assert part["same_text"] == 1
    assert part["accuracy"] == part["cpu_accuracy"] == pytest.approx(0.916, abs=0.01)
    assert part["accuracy_low"] < part["accuracy"] < part["accuracy_high"]
    assert part["difference_low"] == part["difference"] == part["difference_high"] == 0
    assert part["keep_fraction"] == 0.5
    assert part["cpu_keep_fraction"] == pytest.approx(0.6, abs=0.01)
    assert not list(faults(part, "float32"))


def test_one_near_tie_is_no_fault_and_one_answer_in_a_hundred_is_one_of_fp32(shipped: dict[str, list[Question]]) -> None:
    questions = shipped["scenes-test"]
    texts = texts_of(questions)
    right = [place for place, question in enumerate(questions) if texts[place] == question.row.answer]
    # bf16 rounds, and may cost one in a hundred.
    for places, dtypes in ((right[:1], []), (right[::100], ["float32"]), (right[::25], ["float32", "bfloat16"])):
        changed = ["wrong" if place in places else text for place, text in enumerate(texts)]
        part = compare(questions, answer(questions, changed), "trimmed")
        assert part["difference"] == pytest.approx(-len(places) / 1_500)
        assert [dtype for dtype in DTYPES if list(faults({**part, "same_text": 1.0}, dtype))] == dtypes
        # One in a hundred is far inside the accuracy's own interval: the paired difference is what tells.
        if len(places) < 20:
            assert part["accuracy_low"] < part["cpu_accuracy"] < part["accuracy_high"]


def test_other_wrong_words_are_a_fault_of_fp32_alone(shipped: dict[str, list[Question]]) -> None:
    questions = shipped["scenes-test"]
    pairs = zip(texts_of(questions), questions, strict=True)
    changed = [text if text == question.row.answer else "otherwise wrong" for text, question in pairs]
    part = compare(questions, answer(questions, changed), "trimmed")
    assert part["same_text"] == part["accuracy"] == part["cpu_accuracy"]
    assert not list(faults(part, "bfloat16"))
    (fault,) = faults(part, "float32")
    assert fault == "only 91.67% of the answers are the CPU's, 98% should be"


# ---- the section ------------------------------------------------------------------------------------------------------------


def test_a_rehearsal_measures_every_part(bench: Bench) -> None:
    out: dict[str, Any] = {}
    saved, said, tf32 = [], [], []
    bench.save = lambda: saved.append(json.dumps(out))
    bench.say = lambda line: (said.append(line), tf32.append(torch.backends.cudnn.allow_tf32))
    allowed = torch.backends.cudnn.allow_tf32
    measure_answers(bench, out)
    assert allowed
    assert torch.backends.cudnn.allow_tf32
    assert not any(tf32)
    assert out["not_reached"] == []
    assert [line.split(": ")[1] for line in said] == PARTS
    # After every part.
    assert [len(json.loads(text)["not_reached"]) for text in saved[: len(PARTS)]] == list(reversed(range(len(PARTS))))
    for title in PARTS:
        name, dtype, policy = title.split(", ")
        part = out["sets"][name][dtype][policy]
        assert part["rows"] == answers.TINY_ROWS
        assert part["accuracy"] == pytest.approx(part["cpu_accuracy"], abs=0.1)
        assert part["same_text"] >= (1 if dtype == "float32" else 0.9)
        assert part["keep_fraction"] == pytest.approx(part["cpu_keep_fraction"], abs=0.01)
        assert part["seconds"] > 0
    kept = out["sets"]["scenes-test"]["bfloat16"]
    assert kept["full"]["keep_fraction"] == 1 > kept["trimmed"]["keep_fraction"]


def test_without_time_nothing_begins_and_every_part_is_named(bench: Bench) -> None:
    said: list[str] = []
    bench.say, bench.deadline = said.append, 0.0
    out: dict[str, Any] = {}
    measure_answers(bench, out)
    assert out == {"sets": {}, "not_reached": PARTS}
    assert said == [f"answers: no time for {'; '.join(PARTS)}"]


def test_a_part_that_outlasts_the_section_is_given_up(bench: Bench, shipped: dict[str, list[Question]]) -> None:
    few = {name: questions[:18] for name, questions in shipped.items()}
    out: dict[str, Any] = {}

    def save() -> None:
        # From the second part on there is time by the estimate, and none in truth.
        bench.has = lambda seconds: seconds > 0  # type: ignore[method-assign]

    bench.save = save
    DemoAnswers(bench, out, few).measure("float32")
    assert list(out["sets"]["scenes-test"]["float32"]) == ["full"]
    assert out["not_reached"] == PARTS[1:]


def test_answers_unlike_the_cpus_fail_the_section_after_all_is_measured(
    bench: Bench, shipped: dict[str, list[Question]], monkeypatch: pytest.MonkeyPatch
) -> None:
    never = dict.fromkeys(POLICIES, CpuAnswer("never said", 1.0))
    easy = [replace(question, cpu=never) for question in shipped["easy-vqa-test"]]
    monkeypatch.setattr(answers, "read", lambda: {**shipped, "easy-vqa-test": easy})
    monkeypatch.setattr(answers, "TINY_ROWS", 12)
    out: dict[str, Any] = {}
    with pytest.raises(SectionError) as failed:
        measure_answers(bench, out)
    assert out["not_reached"] == []
    message = str(failed.value)
    assert "\n" not in message
    assert message.startswith("easy-vqa-test, float32, full: accuracy 100.00% differs from the CPU's 0.00% (95 % interval")
    assert "easy-vqa-test, float32, trimmed: only 0.00% of the answers are the CPU's" in message
    assert "easy-vqa-test, bfloat16, full: accuracy" in message
    assert "bfloat16, full: only" not in message
    assert "scenes-test" not in message


def test_the_answerers_model_has_the_device_and_dtype_that_are_asked_for() -> None:
    for device, dtype in (("cpu", "bfloat16"), ("meta", "float32")):
        model = Answerer(MODEL, device, dtype).model
        assert {(p.device.type, p.dtype) for p in model.parameters()} == {(device, getattr(torch, dtype))}
    default = Answerer(MODEL).model
    assert (default.device.type, default.dtype) == ("cpu", torch.float32)
