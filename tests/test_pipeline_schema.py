from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from pipeline import schema
from pipeline.schema import Columns, plan_columns

IMAGE = pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
QUESTION = pa.field("question", pa.string())


def plan(*fields: pa.Field, **roles: Any) -> Columns:
    given: dict[str, Any] = {"image": "image", "question": "question", "id": None, "answer": None}
    return plan_columns([("a.parquet", pa.schema([IMAGE, QUESTION, *fields]))], **(given | roles))


def test_all_columns_but_the_image_pass_through_in_order() -> None:
    columns = plan(pa.field("n", pa.int64()), pa.field("answer", pa.string()))
    assert dict(columns.passed) == {"question": "question", "n": "n", "answer": "answer"}
    assert columns.output(write_kept=False).names == ["question", "n", "answer", *(f.name for f in schema.OUTPUT_FIELDS)]
    assert columns.output(write_kept=True).names[-3:] == ["kept", "merged_into", "tile_grid"]
    assert columns.answer == columns.answer_output == "answer"


def test_the_id_column_becomes_id() -> None:
    assert plan(pa.field("id", pa.int64())).id == "id"
    assert "input_id" not in plan(pa.field("id", pa.int64())).output(False).names
    named = plan(pa.field("key", pa.string()), id="key")
    assert named.id == "key"
    assert dict(named.passed)["key"] == "key"
    # An ``id`` that is not the id column is an input column like any other.
    other = plan(pa.field("key", pa.string()), pa.field("id", pa.int64()), id="key")
    assert dict(other.passed)["id"] == "input_id"
    # One that can't be an id is not taken for one.
    nested = plan(pa.field("id", pa.list_(pa.int64())))
    assert nested.id is None
    assert dict(nested.passed)["id"] == "input_id"


def test_columns_that_bear_an_outputs_name_are_renamed() -> None:
    fields = [pa.field(n, pa.string()) for n in ("text", "Error", "tiles", "input_tiles", "kept")]
    assert dict(plan(*fields).passed) == {
        "question": "question",
        "text": "input_text",
        "Error": "input_Error",
        "tiles": "input_input_tiles",
        "input_tiles": "input_tiles",
        "kept": "input_kept",
    }
    asked = plan(pa.field("text", pa.string()), question="text")
    assert asked.question == "text"
    assert dict(asked.passed)["text"] == "input_text"
    truth = plan(pa.field("images", pa.string()), answer="images")
    assert truth.answer_output == "input_images"


def test_output_names_are_unique_without_regard_to_case() -> None:
    fields = [pa.field(n, pa.string()) for n in ("ID", "Text", "TEXT", "input_text", "answer")]
    names = [n.lower() for n in plan(*fields).output(True).names]
    assert len(names) == len(set(names))


def test_shards_are_unified() -> None:
    first = pa.schema([IMAGE, QUESTION, pa.field("n", pa.int32()), pa.field("label", pa.dictionary(pa.int8(), pa.string()))])
    second = pa.schema([pa.field("image", pa.binary()), QUESTION, pa.field("n", pa.int64()), pa.field("extra", pa.null())])
    columns = plan_columns([("a", first), ("b", second)], image="image", question="question", id=None, answer=None)
    assert columns.types == pa.schema(
        [QUESTION, pa.field("n", pa.int64()), pa.field("label", pa.string()), pa.field("extra", pa.null())]
    )
    # Only in one of them: not the input's id.
    partial = [("a", first.append(pa.field("id", pa.string()))), ("b", second)]
    assert plan_columns(partial, image="image", question="question", id=None, answer=None).id is None


@pytest.mark.parametrize(
    ("fields", "roles", "said"),
    [
        ([], {"image": "img"}, r"image_column='img' is not a column of a\.parquet, which has image, question"),
        ([], {"question": "q"}, r"question_column='q' is not a column"),
        ([], {"id": "key"}, r"id_column='key' is not a column"),
        ([pa.field("key", pa.float64())], {"id": "key"}, r"id_column='key' is double"),
        ([], {"answer": "truth"}, r"answer_column='truth' is not a column of the input"),
        ([pa.field("n", pa.int64())], {"image": "n"}, r"image_column='n' is int64"),
        ([pa.field("n", pa.int64())], {"question": "n"}, r"question_column='n' is int64"),
        ([QUESTION], {}, r"two columns named 'question'"),
    ],
)
def test_refusals(fields: list[pa.Field], roles: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan(*fields, **roles)


def test_shards_that_disagree_are_refused() -> None:
    first = pa.schema([IMAGE, QUESTION, pa.field("n", pa.int32())])
    second = pa.schema([IMAGE, QUESTION, pa.field("n", pa.string())])
    with pytest.raises(ValueError, match=r"^b does not fit"):
        plan_columns([("a", first), ("b", second)], image="image", question="question", id=None, answer=None)
    with pytest.raises(ValueError, match=r"image_column='image' is not a column of b"):
        plan_columns([("a", first), ("b", pa.schema([QUESTION]))], image="image", question="question", id=None, answer=None)
