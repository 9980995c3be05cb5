"""What a run would do, found out before anything is started or written: every refusal comes from here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline import record, units
from pipeline.config import RunConfig
from pipeline.convert import check_values
from pipeline.ids import check_ids
from pipeline.listing import list_input
from pipeline.model import Checkpoint, build_tower_policy, find_checkpoint, versions
from pipeline.schema import Columns, plan_columns
from pipeline.source import UnitReader
from pipeline.storage import Storage
from pipeline.unchanged import check_unchanged
from pipeline.units import Shard, Unit

GEOMETRY = ("image_size", "patch_size", "max_num_tiles")
LONG = 4 << 30
"""Bytes of weights whose reading is worth a word."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A run, resolved."""

    config: RunConfig
    checkpoint: Checkpoint
    input: Storage
    shards: list[Shard]
    columns: Columns
    units: list[Unit]
    output: Storage
    finished: list[str]
    """Units that an earlier start of this run has written."""
    begun: bool
    """Whether the output folder holds this run already."""
    removes: list[str]
    """Files of an earlier run that are deleted before this one begins, as ``overwrite`` asks."""
    skipped: dict[str, list[str]] = field(default_factory=dict)
    """What lies in the input and is not read; see ``Listing``."""

    @property
    def part(self) -> str:
        """See ``record.part``."""
        return record.part(*self.config.part)

    @property
    def image_roots(self) -> tuple[Storage, ...]:
        return tuple(Storage(url, self.config.storage_options, self.input.patience) for url in self.config.image_roots)

    @property
    def used(self) -> list[Shard]:
        """The shards that units are cut from."""
        names = units.rows_used(self.units)
        return [shard for shard in self.shards if shard.name in names]

    @property
    def rows(self) -> int:
        return sum(unit.rows for unit in self.units)

    @property
    def remaining(self) -> list[Unit]:
        done = set(self.finished)
        return [unit for unit in self.units if unit.name not in done]

    def check_rows(self, written: int) -> None:
        """Raises ``ValueError`` where all units together do not have the plan's rows, though each has what its reader had."""
        if written != self.rows:
            raise ValueError(
                f"output={self.config.output!r} has {written} rows instead of {self.rows}, "
                "as where a shard changes while it is read; choose another folder"
            )

    def decides(self) -> dict[str, Any]:
        """What two starts must share to be one run."""
        return {
            "format": record.FORMAT,
            "input": units.input_digest(self.shards),
            "model": self.checkpoint.files or self.checkpoint.identity,
            "schema": str(self.columns.output(self.config.write_kept)),
            **self.config.decides_output(),
        }

    def record(self) -> dict[str, Any]:
        """The contents of run.json."""
        vision = self.checkpoint.config.get("vision_config") or {}
        return {
            "config": self.config.recorded(),
            "checkpoint": {
                "source": self.checkpoint.source,
                "identity": self.checkpoint.identity,
                # Where a patch lies on its image: kept positions can be drawn without the checkpoint at hand.
                "vision_config": {name: vision[name] for name in GEOMETRY if name in vision},
            },
            "decides": self.decides(),
            "versions": versions(),
            "shards": len(self.shards),
            "skipped": {reason: len(entries) for reason, entries in self.skipped.items()},
            "units": len(self.units),
            "rows": self.rows,
            "columns": dict(self.columns.passed),
            "stamps": {shard.name: shard.stamp for shard in self.used},
        }


def make_plan(
    config: RunConfig,
    cut: Callable[[Sequence[Shard]], list[Unit]] | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Plan:
    """Looks at model, input and output. Raises ``ValueError`` or ``OSError``, in one line, for what can't run.

    ``cut`` makes units of the shards; default: the configuration's units, of all rows. ``say`` takes a line on what takes long.
    """
    checkpoint = find_checkpoint(config.model, config.revision)
    _check_tiles(config, checkpoint)
    _check_room(config, checkpoint)
    check_tower(config, checkpoint)
    if checkpoint.weight_bytes > LONG:
        say(f"reading {checkpoint.weight_bytes / 2**30:.0f} GiB of weights, to know this model again")
    output = Storage(config.output, config.storage_options)
    found = list_input(config.input, config.storage_options).without(output)
    if not found.names:
        raise ValueError(f"input={config.input!r} holds no parquet file outside the output folder")
    shards = units.read_footers(found.root, found.names)
    columns = plan_columns(
        [(shard.name, shard.schema) for shard in shards],
        image=config.image_column,
        question=config.question_column,
        id=config.id_column,
        answer=config.answer_column,
    )
    planned = units.plan_units(shards, config.unit_rows, config.limit) if cut is None else cut(shards)
    if not planned:
        raise ValueError(f"input={config.input!r} holds no rows")
    whole = len(planned)
    planned = units.part_of(planned, *config.part)
    if not planned:
        raise ValueError(f"partition={config.partition!r} of {whole} units is empty; make fewer partitions, or lower unit_rows")
    plan = look_again(Plan(config, checkpoint, found.root, shards, columns, planned, output, [], False, [], found.skipped))
    # The longest looks.
    if plan.begun:
        finished = set(plan.finished)
        done = [unit for unit in planned if unit.name in finished]
        reader = UnitReader(found.root, columns, plan.image_roots)
        check_unchanged(reader, output, plan.used, record.stamps(output, plan.part), done, say)
    else:
        check_values(found.root, shards, planned, columns, say)
        if columns.id:
            check_ids(found.root, planned, columns.id)
    return plan


def _check_tiles(config: RunConfig, checkpoint: Checkpoint) -> None:
    # Where a checkpoint does not say, it has what transformers takes for it.
    most = (checkpoint.config.get("vision_config") or {}).get("max_num_tiles", 4)
    if config.max_tiles is not None and config.max_tiles > most:
        raise ValueError(
            f"max_tiles={config.max_tiles} is over the {most} tiles that model={config.model!r} takes of an image; "
            f"lower it to 1 to {most}, or drop it"
        )


def _check_room(config: RunConfig, checkpoint: Checkpoint) -> None:
    # As transformers' for one that does not say.
    context = (checkpoint.config.get("text_config") or {}).get("max_position_embeddings", 131_072)
    if config.max_new_tokens >= context:
        raise ValueError(
            f"max_new_tokens={config.max_new_tokens} leaves a prompt no room in the {context} tokens that "
            f"model={config.model!r} takes, prompt and answer together; lower it"
        )


def check_tower(config: RunConfig, checkpoint: Checkpoint) -> None:
    """Raises ``ValueError`` for a share of the tower that the policy can't bring this model's to."""
    if config.tower_policy is None:
        return
    # These take seconds to import, which runs with the whole tower need not wait for.
    from transformers import MllamaConfig

    from trimming.costs import Costs

    try:
        costs, policy = Costs(MllamaConfig.from_dict(checkpoint.config)), build_tower_policy(config)
        for tiles in range(1, costs.vision.max_num_tiles + 1):
            costs.tower_rows(tiles, policy)
    except ValueError as error:
        raise ValueError(f"tower_keep is not to be reached in model={config.model!r}: {error}; raise it") from error


def look_again(plan: Plan) -> Plan:
    """``plan`` with what its output folder holds by now. Raises ``RefusalError`` where that is something else."""
    output, names = plan.output, [unit.name for unit in plan.units]
    if plan.config.overwrite and (removes := record.own_files(output)):
        return replace(plan, finished=[], begun=False, removes=removes)
    begun = record.check_output(output, plan.decides(), plan.config.recorded(), plan.part)
    return replace(plan, finished=record.finished(output, names) if begun else [], begun=begun, removes=[])
