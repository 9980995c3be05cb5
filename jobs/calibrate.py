"""Find the smallest K that holds a quality target on a sample of the data, and write it as a configuration for the jobs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentError, ArgumentParser

from jobs import options
from pipeline.config import Job, RunConfig

if TYPE_CHECKING:
    from jobs.calibration.sample import Range
    from pipeline.storage import Storage
    from pipeline.units import Unit

NOTHING_HOLDS = 4
CONFIGURATION, RESULT, PAGE, CURVE = "config.yaml", "calibration.json", "calibration.md", "curve.svg"
SAMPLE = ".run/sample.json"
K_RATIOS = [0.5, 0.25, 0.15, 0.1, 0.05, 0.025]
NEEDS = ("sacrebleu", "rapidfuzz", "matplotlib")

# The calibration decides these by itself.
_POLICY = ("policy", "k_ratio", "keep", "mass", "likeness", "weighted", "key_channels")
_OWN = (*_POLICY, "limit", "unit_rows", "partition", "overwrite", "write_kept")


def parser() -> ArgumentParser:
    made = options.parser("calibrate", __doc__ or "", leave_out=_OWN, image_cache_gib=4.0)
    made.add_argument(
        "--target-agreement", type=float, default=0.99, help="share of agreement with all features that K must hold"
    )
    made.add_argument(
        "--measure",
        type=Literal["exact", "edit_similarity", "chrf"],
        default="exact",
        help="agreement: equal texts, token-level edit similarity, or chrF, which suit captions",
    )
    made.add_argument("--confidence", type=float, default=0.95, help="with which the bound, not the measured value, is to hold")
    made.add_argument(
        "--sample",
        type=int,
        default=500,
        help="rows to try, drawn from all over the input; with --kept-sets image about so many, of images with all their rows",
    )
    made.add_argument(
        "--k-ratios", type=list[float], default=K_RATIOS, help="values of K to try; with a tower policy also 1, all it leaves"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses, answers the sample, and reports; the exit code: 0 a K holds, 1 broke off (the same command continues), 2 refused,
    3 too many errors to choose by, 4 no K holds, or the sample is too small to show it."""
    made = parser()
    options.escape_unencodable()
    try:
        given = made.parse_args(arguments).as_dict()
        given.pop("config"), given.pop("print_config", None)
        dry_run = given.pop("dry_run")
        target, sample, k_ratios = _asked(given)
        config = _config(given)
    except (ArgumentError, ValueError, TypeError) as error:
        return options.refuse(made, error)

    from jobs.calibration import page, run
    from jobs.calibration.bound import effective_size
    from jobs.report import cause, count, heading, skipped

    say = partial(print, file=sys.stderr, flush=True)
    try:
        _check_installed()
        drawn = _drawn_before(config, sample)
        found = run.plans(config, k_ratios, sample, drawn, say)
    except KeyboardInterrupt:
        return options.INTERRUPTED
    except Exception as error:  # noqa: BLE001 - whatever a store or the Hub answers: nothing has been started or written
        return options.refuse(made, error)
    first = found[run.ALL]
    asked = run.Target(**target)
    small = page.too_small(asked, first.rows, effective_size([unit.rows for unit in first.units]))
    # What has been answered, for another target, can be looked at again.
    if small is not None and (dry_run or not all(plan.finished for plan in found.values())):
        print(f"{made.prog}: {small}", file=sys.stderr)
        return NOTHING_HOLDS
    said = "\n".join([f"{heading(first)}; and K = {', '.join(f'{k:g}' for k in k_ratios)}", *skipped(first)])
    if dry_run:
        print(said)
        return 0
    print(said, file=sys.stderr, flush=True)
    from pipeline import cluster, record

    try:
        if small is None:
            run.execute(found, asked, say, begin=partial(_note_sample, config, sample, first.units))
        calibration = run.read(found, k_ratios, asked)
        _write(config, calibration, first)
    except (cluster.TooSmallError, cluster.UnusableError, record.RefusalError) as error:
        return options.refuse(made, error)
    except (KeyboardInterrupt, cluster.Terminated) as stopped:
        print("stopped; the same command continues this calibration", file=sys.stderr)
        return options.INTERRUPTED if isinstance(stopped, KeyboardInterrupt) else options.TERMINATED
    except Exception as error:  # noqa: BLE001 - the program's boundary: one line and an exit code that tells the truth
        print(f"{made.prog}: the calibration broke off: {cause(error)}; the same command continues it", file=sys.stderr)
        return options.FAILED
    print(page.markdown(calibration, _conditions(config, first), CURVE))
    if calibration.errors > config.max_error_rate * calibration.rows:
        most = f"max_error_rate={config.max_error_rate:g}"
        print(f"{made.prog}: {count(calibration.errors, 'row')} of the sample have an error, over {most}", file=sys.stderr)
        return options.TOO_MANY_ERRORS
    if calibration.chosen is None:
        print(f"{made.prog}: {page.verdict(calibration)}", file=sys.stderr)
        return NOTHING_HOLDS
    return 0


def _asked(given: dict[str, Any]) -> tuple[dict[str, Any], int, list[float]]:
    """Takes what is the calibration's own out of ``given``. Raises ``ValueError`` for what can't be asked."""
    agreement, measure, confidence = given.pop("target_agreement"), given.pop("measure"), given.pop("confidence")
    sample, k_ratios = given.pop("sample"), sorted(set(given.pop("k_ratios")), reverse=True)
    for name, value in (("target_agreement", agreement), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ValueError(f"{name}={value} must lie between 0 and 1; no sample proves 1")
    if sample < 1:
        raise ValueError(f"sample={sample} must be at least 1")
    if given["tower_policy"] is not None and k_ratios and k_ratios[0] < 1:
        # What the tower alone costs has to be known for what is behind it to be judged.
        k_ratios = [1.0, *k_ratios]
    if not k_ratios or not all(0 < k <= 1 for k in k_ratios):
        raise ValueError(f"k_ratios={k_ratios} must be shares above 0 and at most 1, one or more")
    return {"agreement": agreement, "measure": measure, "confidence": confidence}, sample, k_ratios


def _config(given: dict[str, Any]) -> RunConfig:
    """The run that keeps all features."""
    job: Job = "answer" if given["prompt"] is None else "caption"
    if job == "caption":
        given["question_column"] = None
    return RunConfig(job=job, policy="none", unit_rows=1, **given)


def _check_installed() -> None:
    from importlib.util import find_spec

    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise ValueError(f"a calibration needs {', '.join(missing)}; install the extra: pip install 'trimmed-mllama[report]'")


def _output(config: RunConfig) -> Storage:
    from pipeline.storage import Storage

    return Storage(config.output, config.storage_options)


def _drawn_before(config: RunConfig, sample: int) -> list[Range] | None:
    """The sample where an earlier start has drawn it. Raises ``ValueError`` where the output folder holds another one, or
    something else."""
    output = _output(config)
    try:
        there = json.loads(output.read(SAMPLE))
    except FileNotFoundError:
        if foreign := [name for name in output.names() if not name.startswith(".")]:
            raise ValueError(
                f"output={config.output!r} holds files of something else ({foreign[0]}); choose another folder"
            ) from None
        return None
    drawn = there.pop("drawn", None)
    if there != (here := {"sample": sample, "seed": config.seed}):
        raise ValueError(f"output={config.output!r} holds a calibration with {there}, not {here}; choose another folder")
    return None if drawn is None else [(shard, start, stop) for shard, start, stop in drawn]


def _note_sample(config: RunConfig, sample: int, units: Sequence[Unit]) -> None:
    from pipeline import record

    drawn = [(unit.shard, unit.start, unit.stop) for unit in units]
    said = json.dumps({"sample": sample, "seed": config.seed, "drawn": drawn}).encode()
    _output(config).write(SAMPLE, said, temporary=record.UNFINISHED.format(part=""))


def _conditions(config: RunConfig, plan: Any) -> dict[str, str]:
    whole = config.kept_sets == "image"
    images = f", of {len(plan.units):,} images with all their rows" if whole else ""
    tower = {}
    if config.tower_policy is not None:
        share = config.recorded()["tower_keep"]
        tower["Tower"] = (
            f"`{config.tower_policy}` leaves {share:g} of its rows × layers for every K, and all of them for all features"
        )
    return {
        "Sample": f"{plan.rows:,} rows of `{config.input}`{images}, drawn with seed {config.seed}",
        "Kept sets": "one for all questions about an image" if whole else "one for each question",
        **tower,
        "Model": f"`{config.model}` ({plan.checkpoint.identity})",
        "Answers": f"{config.prompt!r}" if config.prompt else f"the questions in `{config.question_column}`",
    }


def _write(config: RunConfig, calibration: Any, plan: Any) -> None:
    """The result's files; the configuration only where a K holds and errors are few."""
    from jobs.calibration import page
    from pipeline import record

    output = _output(config).patient()
    written = {
        CURVE: page.curve(calibration),
        PAGE: page.markdown(calibration, _conditions(config, plan), CURVE).encode(),
        RESULT: (json.dumps(calibration.as_dict(), indent=2) + "\n").encode(),
    }
    few = calibration.errors <= config.max_error_rate * calibration.rows
    if calibration.chosen is not None and few:
        written[CONFIGURATION] = page.configuration(calibration, _kept_options(config)).encode()
    else:
        # What an earlier look at this sample chose, for another target.
        output.remove(CONFIGURATION)
    for name, data in written.items():
        output.write(name, data, temporary=record.UNFINISHED.format(part=""))


def _kept_options(config: RunConfig) -> dict[str, Any]:
    """What decides the answers and was given, for the job that comes: all but its input and output."""
    leave = {"job", *_OWN, "question_column" if config.job == "caption" else "prompt"}
    defaults = {f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in fields(RunConfig)}
    decides = {"model": config.model, "revision": config.revision, **config.decides_output()}
    given = {name: value for name, value in decides.items() if name in defaults.keys() - leave}
    return {name: value for name, value in given.items() if getattr(config, name) != defaults[name]}


if __name__ == "__main__":
    sys.exit(main())
