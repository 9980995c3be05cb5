"""Each check of the GPU kit's section "correct" fails where the engine is wrong. That all pass where it is right, the kit's
rehearsal shows."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import correct
from benchmarks.gpu.amounts import TINY_GPU
from benchmarks.gpu.bench import Bench, Result, SectionError
from benchmarks.gpu.checks import captured, gpu_tests, memory, references
from benchmarks.gpu.checks.captured import Decoder, check_captured, plain, why_no_kernels
from benchmarks.gpu.checks.gpu_tests import GpuTests, missing_imports
from benchmarks.gpu.checks.memory import Scarce, check_out_of_memory
from benchmarks.gpu.checks.references import check_logits, check_masked, check_policies, check_tokens, policy_family
from benchmarks.gpu.checks.subject import DType, Subject, WrongError, demand, error_of
from benchmarks.gpu.correct import GPU_TESTS, measure_correct
from trimming import Policy, TrimmedLlama, VisualContext, policies
from trimming.engine import Engine
from trimming.engine.cuda import GraphDecode
from trimming.engine.decode import Decode
from trimming.engine.scheduler import out_of_memory
from trimming.engine.sequence import Sequence_
from trimming.policies.policy import KeepShare

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench() -> Bench:
    return Bench(device=torch.zeros(1).device, amounts=TINY_GPU, save=lambda: None, say=lambda line: None)


# ---- each check can fail ----------------------------------------------------------------------------------------------------


@dataclass
class Spoiled(Subject):
    """A subject whose engine under test is wrong. Its reference is right."""

    spoil: Callable[[Engine], object] = lambda engine: None

    def engine(self, policy: Policy, dtype: DType = "float32", **options: Any) -> Engine:
        engine = super().engine(policy, dtype, **options)
        self.spoil(engine)
        return engine


class Late:
    """Rotary tables one position late."""

    def __init__(self, rotary: Any) -> None:
        self.rotary = rotary

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.rotary.at(positions + 1)
        return found


def shift_positions(engine: Engine) -> None:
    engine.decode.rotary = Late(engine.decode.rotary)  # type: ignore[assignment]


def keep_the_next_features(engine: Engine) -> None:
    inner = engine.prefill._decide

    def decide(context: VisualContext) -> tuple[Tensor, Tensor | None]:
        kept, targets = inner(context)
        return kept.roll(1, -1), targets

    engine.prefill._decide = decide  # type: ignore[method-assign]


def after_prefill(change: Callable[[Engine, Sequence_], object]) -> Callable[[Engine], None]:
    def spoil(engine: Engine) -> None:
        inner = engine.prefill

        def prefill(sequences: Sequence[Sequence_]) -> Tensor:
            logits = inner(sequences)
            for sequence in sequences:
                if sequence.segment is not None:
                    change(engine, sequence)
            return logits

        engine.prefill = prefill  # type: ignore[assignment]

    return spoil


@after_prefill
def drop_a_row(engine: Engine, sequence: Sequence_) -> None:
    """Of one layer's kept features, that is: another one stands twice."""
    for stored in engine.memory.segment_layer(sequence.segment, 1):  # type: ignore[arg-type]
        stored[:, 0] = stored[:, -1]


@after_prefill
def forget_a_row(engine: Engine, sequence: Sequence_) -> None:
    for stored in engine.memory.segment_layer(sequence.segment, 1):  # type: ignore[arg-type]
        stored[:, 0] = torch.nan


def give_up_alone(engine: Engine) -> None:
    engine._make_room = lambda sequence: False  # type: ignore[method-assign]


def go_on_with_half_an_answer(engine: Engine) -> None:
    inner = engine._preempt

    def preempt(sequences: Sequence[Sequence_]) -> None:
        said = [list(sequence.said) for sequence in sequences]
        inner(sequences)
        for sequence, tokens in zip(sequences, said, strict=True):
            sequence.said = tokens

    engine._preempt = preempt  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def one_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "policy_family", lambda: [TrimmedLlama(0.25)])


@pytest.mark.parametrize(
    ("check", "spoil", "reads"),
    [
        (check_tokens, shift_positions, "full, fp32: .* of the rows have the CPU's tokens, under 98%"),
        (check_tokens, keep_the_next_features, "trimmed, fp32"),
        (check_logits, shift_positions, "fp32 logits are .* from transformers', over 3e-05"),
        (check_logits, drop_a_row, "fp32 logits are"),
        (check_logits, forget_a_row, "fp32 logits are inf from"),
        (check_masked, shift_positions, "logits are .* from the masked model's"),
        (check_masked, drop_a_row, "logits are .* from the masked model's"),
        (check_policies, keep_the_next_features, r"TrimmedLlama\(k_ratio=0.25\): .* of the kept positions are the CPU's"),
        (check_policies, shift_positions, "rows say other tokens than on the CPU"),
        (check_out_of_memory, give_up_alone, "a lone image beside cached ones: 1 of 1 requests failed with RuntimeError"),
        (check_out_of_memory, go_on_with_half_an_answer, "decode, several rows: other tokens"),
    ],
)
def test_a_wrong_engine_is_found_out(
    bench: Bench, check: Callable[[Subject], Result], spoil: Callable[[Engine], object], reads: str
) -> None:
    with pytest.raises(WrongError, match=reads) as found:
        check(Spoiled(bench, spoil=spoil))
    assert found.value.figures["faults"]


def test_bf16_that_is_worse_than_transformers_is_found_out(bench: Bench) -> None:
    def round_off(engine: Engine) -> None:
        if engine.model.dtype == torch.bfloat16:
            after_prefill(lambda engine, sequence: engine.memory.flat.mul_(1.02))(engine)  # type: ignore[union-attr]

    with pytest.raises(WrongError, match=r"decode in bf16: .* from fp32, over 1.5 times transformers'"):
        check_logits(Spoiled(bench, spoil=round_off))


@pytest.mark.parametrize(("kind", "reads"), [("late", "is .* away, over 1e-05"), ("nan", "is inf away")])
def test_a_wrong_static_step_is_found_out(bench: Bench, kind: str, reads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain decoding stands in for the kernels, which the whole section runs."""

    def wrong(*parts: Any) -> Decode:
        decode = plain(*parts)
        inner = decode.step
        if kind == "late":
            decode.rotary = Late(decode.rotary)  # type: ignore[assignment]
        else:
            last = lambda: torch.arange(1, len(decode.running) + 1) == len(decode.running)  # noqa: E731
            decode.step = lambda: inner().masked_fill(last()[:, None], torch.nan)  # type: ignore[method-assign]
        return decode

    ways = {"tested": Decoder(wrong, 0.0), "right": Decoder(plain, 1e-5)}
    monkeypatch.setattr(captured, "why_no_kernels", lambda device: None)
    monkeypatch.setattr(captured, "decoders", lambda device, dtype: ways | {"tested": Decoder(plain, 0.0)})
    assert check_captured(Subject(bench))["policies"]["KeepAll()"]["right"]["difference"] == 0
    monkeypatch.setattr(captured, "decoders", lambda device, dtype: ways)
    with pytest.raises(WrongError, match=rf"KeepAll\(\): tested against right: .*{reads}"):
        check_captured(Subject(bench))


def test_other_batches_are_found_out() -> None:
    steps = [torch.ones(2, 3), torch.ones(1, 3)]
    assert captured._apart(steps, steps, 0.0)[1] == []
    assert captured._apart(steps, steps[::-1], 1.0)[1] == ["other batches decode"]
    assert captured._apart(steps, steps[:1], 1.0)[1] == ["other batches decode"]


def test_without_an_interpreter_it_is_said() -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1"
    said = why_no_kernels(torch.device("cpu"))
    assert said in ("triton is not installed", "triton was imported without TRITON_INTERPRET=1")


def test_on_cuda_a_graph_is_held_against_both_other_steps() -> None:
    device = torch.device("cuda", 0)
    assert list(captured.decoders(device, "float32")) == ["captured", "uncaptured", "plain"]
    # In bf16 other kernels round otherwise.
    assert list(captured.decoders(device, "bfloat16")) == ["captured", "uncaptured"]
    # What the check reads there.
    source = inspect.getsource(GraphDecode.__init__)
    assert "self.replays:" in source
    assert "self.uncaptured:" in source


def test_every_policy_is_in_the_family() -> None:
    kinds = {kind for kind in vars(policies).values() if isinstance(kind, type) and issubclass(kind, Policy)}
    assert {type(policy) for policy in policy_family()} == kinds - {Policy, KeepShare}


def test_memory_that_never_runs_out_checks_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CASES", {"decode": memory.CASES["decode, a lone row"]})
    monkeypatch.setattr(memory, "_make_scarce", lambda engine, stage, device: Scarce(lambda: None, torch.nn.Identity(), device))
    with pytest.raises(WrongError, match="memory never ran out"):
        check_out_of_memory(Subject(bench))


def test_a_scarce_call_fails_half_way_and_once(bench: Bench) -> None:
    reached, middle = [], torch.nn.Identity()

    def stage(number: int) -> int:
        reached.append(number)
        return int(middle(number)) + 1

    call = Scarce(stage, middle, bench.device)
    with pytest.raises(RuntimeError) as failure:
        call(1)
    assert out_of_memory(failure.value)
    assert reached == [1]
    assert call(1) == 2
    assert not middle._forward_pre_hooks


def test_nan_is_an_error_without_bounds() -> None:
    assert error_of(torch.tensor([1.0, torch.nan]), torch.ones(2)) == float("inf")
    assert error_of(torch.tensor([1.0, 1.0]), torch.ones(2)) == 0


# ---- how the section runs them ----------------------------------------------------------------------------------------------


class NoTests(GpuTests):
    def __enter__(self) -> NoTests:
        return self


@pytest.fixture
def run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs the section with these checks, and without the GPU tests; ``out`` has what it raised as well."""

    def measure(checks: dict[str, Callable[[Subject], Result]]) -> Result:
        monkeypatch.setattr(correct, "CHECKS", {name: (1, check) for name, check in checks.items()})
        monkeypatch.setattr(correct, "GpuTests", NoTests)
        out: Result = {}
        try:
            measure_correct(bench, out)
        except Exception as error:  # noqa: BLE001 - it is looked at
            out["raised"] = error
        return out

    return measure


def wrong(subject: Subject) -> Result:
    return demand(["two rows differ", "so do three"], {"rows": 8})


def broken(subject: Subject) -> Result:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")


def test_a_failed_check_costs_no_other(run: Callable[..., Result]) -> None:
    out = run({"first": wrong, "second": lambda subject: {"rows": 3}, "third": lambda subject: {"skipped": "there is no tea"}})
    assert isinstance(out["raised"], SectionError)
    assert str(out["raised"]) == "first: WrongError: two rows differ (and 1 more)"
    first, second, third, tests = (out["checks"][name] for name in ("first", "second", "third", GPU_TESTS))
    assert (first["passed"], first["rows"], len(first["faults"])) == (False, 8, 2)
    assert first["traceback"].startswith("Traceback")
    assert (second["passed"], second["rows"]) == (True, 3)
    assert "error" not in second
    assert (third["passed"], third["skipped"]) == (None, "there is no tea")
    assert tests["skipped"] == "pytest is not installed"
    assert out["not_reached"] == []


def test_a_broken_device_ends_the_section(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correct, "works", lambda device: False)
    out = run({"first": broken, "second": wrong})
    assert not isinstance(out["raised"], SectionError)
    assert str(out["raised"]).startswith("CUDA error: an illegal memory access")
    assert list(out["checks"]) == ["first"]
    assert out["checks"]["first"]["error"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert out["not_reached"] == ["second", GPU_TESTS]


def test_what_there_is_no_time_for_is_named(run: Callable[..., Result], bench: Bench) -> None:
    bench.deadline = 0.0
    out = run({"first": wrong})
    assert out == {"checks": {}, "not_reached": ["first", GPU_TESTS]}


def test_tf32_is_off_in_the_checks_alone(run: Callable[..., Result]) -> None:
    def allowed(subject: Subject | None = None) -> Result:
        return {"allowed": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]}

    before = allowed()
    assert run({"first": allowed})["checks"]["first"]["allowed"] == [False, False]
    assert allowed() == before


# ---- the tests that need a GPU ----------------------------------------------------------------------------------------------

TESTS = """
import os, time, warnings
import pytest

@pytest.mark.MARK
def test_passes():
    warnings.warn("`hidden_state` is deprecated", FutureWarning)
    assert "TRITON_INTERPRET" not in os.environ

@pytest.mark.MARK
def test_fails():
    assert os.environ.get("WRONG") is None
    time.sleep(float(os.environ.get("LONG", 0)))

@pytest.mark.MARK
@pytest.mark.skip(reason="")
def test_is_skipped(): ...

def test_is_of_another_kind():
    assert False
""".replace("MARK", "gpu")
"""Not written out, as files with such tests are found by the words."""


@pytest.fixture
def tests(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GpuTests:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    file = tmp_path / "test_it.py"
    file.write_text(TESTS)
    return GpuTests(bench, [file])


def test_gpu_tests_are_counted(tests: GpuTests) -> None:
    with tests:
        found = tests.results()
    assert (found["tests_passed"], found["tests_failed"], found["tests_skipped"]) == (2, 0, 1)
    assert "2 passed, 1 skipped, 1 deselected" in found["tail"]
    assert "skipped" not in found


def test_a_failed_gpu_test_is_named(tests: GpuTests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WRONG", "1")
    with tests, pytest.raises(WrongError, match=r"test_it::test_fails: AssertionError: assert '1' is None$") as found:
        tests.results()
    assert list(found.value.figures["failing"]) == ["test_it::test_fails"]
    assert (found.value.figures["tests_passed"], found.value.figures["tests_failed"]) == (1, 1)


def test_a_file_that_cannot_be_imported_is_named(tests: GpuTests) -> None:
    tests.files[0].write_text("import nothing_of_this_name")
    with tests, pytest.raises(WrongError, match="test_it: collection failure"):
        tests.results()


def test_gpu_tests_that_hang_are_ended(tests: GpuTests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONG", "600")
    monkeypatch.setattr(gpu_tests, "TESTS_SECONDS", 0.5)
    with tests:
        found = tests.results()
    # Their kernels compile anew on every machine: that some were not reached is told, and is no fault of the engine's.
    assert found["skipped"] == "the tests were not done in time"
    assert tests.process is not None
    assert tests.process.returncode


def test_imports_are_followed_through_this_repository(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text("import nothing_of_this_name.inside\nfrom helper import several\nimport torch, benchmarks.gpu.amounts\n")
    (tmp_path / "helper.py").write_text("import os\nfrom nor_of_this import that\nfrom benchmarks import model\n")
    assert missing_imports(file) == {"nothing_of_this_name", "nor_of_this"}
    assert missing_imports(ROOT / "tests" / "test_engine_cuda.py") == set()
