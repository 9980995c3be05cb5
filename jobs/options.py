"""Command-line options from the fields of ``RunConfig``, and the one way in which a job starts, refuses and ends."""

from __future__ import annotations

import ast
import inspect
import io
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, fields
from functools import partial
from typing import Any, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from pipeline.config import Job, RunConfig

REFUSED = 2
FAILED = 1
TOO_MANY_ERRORS = 3
INTERRUPTED = 130
TERMINATED = 143


def parser(job: str, description: str, leave_out: Sequence[str], **defaults: Any) -> ArgumentParser:
    """Options of ``jobs.<job>`` for every field of ``RunConfig`` but ``job`` and those in ``leave_out``."""
    made = ArgumentParser(
        prog=f"python -m jobs.{job}",
        description=description,
        exit_on_error=False,
        print_config="--print-config",
        allow_abbrev=False,
    )
    made.add_argument("--config", action="config", help="YAML file with any of these options; what is typed goes before it")
    made.add_argument("--dry-run", action="store_true", help="show the plan and one prompt; start and write nothing")
    hints, said = get_type_hints(RunConfig), field_docs()
    for f in fields(RunConfig):
        if f.name == "job" or f.name in leave_out:
            continue
        default = defaults.get(f.name, f.default_factory() if f.default_factory is not MISSING else f.default)
        given = {"required": True} if default is MISSING else {"default": default}
        option = "--" + f.name.replace("_", "-")
        if hints[f.name] is bool:
            made.add_argument(option, action="store_true", help=said[f.name])
        else:
            made.add_argument(option, type=hints[f.name], help=said[f.name], **given)
    return made


def field_docs() -> dict[str, str]:
    """The docstring under each field of ``RunConfig``."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(RunConfig))).body
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for statement, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and isinstance(after, ast.Expr):
            docs[statement.target.id] = " ".join(str(ast.literal_eval(after.value)).split()).replace("``", "")
    return docs


def main(job: Job, made: ArgumentParser, arguments: Sequence[str] | None, **fixed: Any) -> int:
    """Parses, plans, runs and reports; returns the exit code: 0 done, 1 broke off, 2 refused with nothing written, 3 done with
    too many errors."""
    escape_unencodable()
    try:
        given = made.parse_args(arguments).as_dict()
        given.pop("config"), given.pop("print_config", None)
        dry_run = given.pop("dry_run")
        config = RunConfig(job=job, **fixed, **given)
    except (ArgumentError, ValueError, TypeError) as error:
        return refuse(made, error)

    from pipeline.plan import make_plan

    say = partial(print, file=sys.stderr, flush=True)
    try:
        plan = make_plan(config, say=say)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - whatever a store or the Hub answers: nothing has been started or written
        return refuse(made, error)

    from jobs import report

    if dry_run:
        print(report.dry_run(plan))
        return 0
    from pipeline import cluster, graph, record

    for line in (report.heading(plan), *report.advice(plan)):
        say(line)
    try:
        summary = graph.run(plan, say=say)
    except (cluster.TooSmallError, cluster.UnusableError, record.RefusalError) as error:
        # No wider: what Ray raises for a task's ValueError, in the middle of a run, is a ValueError too.
        return refuse(made, error)
    except (KeyboardInterrupt, cluster.Terminated) as stopped:
        print("stopped; the same command continues this run", file=sys.stderr)
        return INTERRUPTED if isinstance(stopped, KeyboardInterrupt) else TERMINATED
    except Exception as error:  # noqa: BLE001 - the program's boundary: one line and an exit code that tells the truth
        print(f"{made.prog}: the run broke off: {report.cause(error)}; the same command continues it", file=sys.stderr)
        return FAILED
    print(report.table(summary, plan.config.output))
    if summary["errors"] > config.max_error_rate * summary["rows"]:
        print(f"{made.prog}: {report.too_many_errors(summary, config.max_error_rate)}", file=sys.stderr)
        return TOO_MANY_ERRORS
    return 0


def escape_unencodable() -> None:
    """Lets stdout escape letters that the locale can't encode, in a folder's name or in our own words."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def refuse(made: ArgumentParser, error: Exception) -> int:
    """One line on stderr."""
    said = " ".join(str(error).split())
    if not said or not isinstance(error, ValueError | OSError | ArgumentError):
        said = f"{type(error).__name__}: {said}"
    print(f"{made.prog}: {said}", file=sys.stderr)
    return REFUSED
