"""A run over whatever a crawl brings: each row is answered, or says why it is not."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import graph
from pipeline.plan import make_plan

SQUARE = Image.new("RGB", (80, 60), (200, 30, 30))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_of(width: int, height: int, rows: bytes = b"", *more: bytes) -> bytes:
    """A PNG that claims a size, whatever it holds."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), *((b"iCCP", m) for m in more), (b"IDAT", rows)]
    body = b"".join(
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in [*chunks, (b"IEND", b"")]
    )
    return b"\x89PNG\r\n\x1a\n" + body


def bomb(gigabytes: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 26)) for _ in range(16 * gigabytes)) + packer.flush()


def animated() -> bytes:
    frames = [Image.new("P", (90, 60), i) for i in range(3)]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(SQUARE, "JPEG", exif=exif)


HOSTILE: dict[str, tuple[Callable[[], bytes | None], str | None]] = {
    "truncated": (lambda: saved(SQUARE, "PNG")[:-30], "can't be decoded"),
    "empty": (lambda: b"", "0 bytes"),
    "text": (lambda: b"<html>404</html>", "not an image"),
    "zero size": (lambda: png_of(0, 10), "image"),
    "CMYK": (lambda: saved(SQUARE.convert("CMYK"), "JPEG"), None),
    "16 bits": (lambda: saved(Image.fromarray(np.full((60, 80), 40_000, np.uint16)), "PNG"), None),
    "palette": (lambda: saved(SQUARE.convert("P"), "PNG"), None),
    "animated": (animated, None),
    "rotated": (rotated, None),
    "a line": (lambda: png_of(20_000, 20), "over 100:1"),
    "a claimed bomb": (lambda: png_of(60_000, 60_000), "pixels"),
    "a bomb of pixels": (lambda: png_of(4000, 4000, bomb(1)), None),
    "a bomb of a profile": (lambda: png_of(80, 60, zlib.compress(bytes(81 * 60)), b"x\0\0" + bomb(4)), "can't be"),
    "large": (lambda: saved(Image.new("L", (4900, 4000)), "PNG"), None),
    "none": (lambda: None, None),
}


@pytest.mark.ray
@pytest.mark.slow
def test_every_row_is_answered_or_says_why(config: Any, tmp_path: Path, ray_cluster: str) -> None:
    cells = [make() for make, _ in HOSTILE.values()]
    table = pa.table({"image": pa.array(cells, pa.binary()), "question": ["how many"] * len(cells), "id": list(HOSTILE)})
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(table, folder / "images.parquet")
    pq.write_table(table.slice(0, 0), folder / "no rows.parquet")

    questions = [b"how many", None, b"", b"   ", b"how \xff many", b"how many " * 120_000]
    raw = pa.array(questions, pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers(), raw.null_count)
    ids = ["fine", "null", "nothing", "blank", "not UTF-8", "a megabyte"]
    pq.write_table(pa.table({"image": pa.nulls(6, pa.binary()), "question": text, "id": ids}), folder / "questions.parquet")

    # The name says PNG.
    (folder / "liar.png").write_bytes(saved(SQUARE, "JPEG"))
    paths = ["liar.png", "missing.png", "../../etc/passwd", "file:///etc/passwd", "http://169.254.169.254/latest", ""]
    asked = pa.table({"image": paths, "question": ["how many"] * len(paths), "id": [f"path {p}" for p in paths]})
    other = tmp_path / "paths"
    other.mkdir()
    pq.write_table(asked, other / "paths.parquet")
    (other / "liar.png").write_bytes(saved(SQUARE, "JPEG"))

    first = graph.run(make_plan(config(input=str(folder), output=str(tmp_path / "out"))))
    found = {row["id"]: row["error"] for row in pq.read_table(tmp_path / "out").to_pylist()}
    expected = {name: said for name, (_, said) in HOSTILE.items()}
    expected |= {"fine": None, "null": "no question", "nothing": "no question", "blank": "no question"}
    expected |= {"not UTF-8": "no question", "a megabyte": "room for"}
    assert found.keys() == expected.keys()
    for name, said in expected.items():
        assert (found[name] is None) if said is None else (said in (found[name] or "")), (name, found[name])
    assert first["peak_memory_bytes"] < 4 << 30

    graph.run(make_plan(config(input=str(other), output=str(tmp_path / "out paths"))))
    errors = [row["error"] for row in pq.read_table(tmp_path / "out paths").sort_by("id").to_pylist()]
    told = dict(zip(sorted(f"path {p}" for p in paths), errors, strict=True))
    assert told.pop("path liar.png") is None
    assert "no such file" in told.pop("path missing.png")
    assert "is empty" in told.pop("path ")
    assert all("outside the folders" in error for error in told.values())


def test_what_is_no_shard_is_refused_by_its_name(config: Any, tmp_path: Path) -> None:
    good = pa.table({"image": pa.nulls(1, pa.binary()), "question": ["a"]})
    for name, content in {"text": b"id,question\n1,a\n", "nothing": b"", "half": None}.items():
        folder = tmp_path / name
        folder.mkdir()
        pq.write_table(good, folder / "good.parquet")
        bad = folder / "bad.parquet"
        if content is None:
            pq.write_table(good, bad)
            content = bad.read_bytes()[:-8]
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.parquet is not a parquet file"):
            make_plan(config(input=str(folder), output=str(tmp_path / "out")))
    pq.write_table(good.drop_columns(["question"]), tmp_path / "half/bad.parquet")
    with pytest.raises(ValueError, match=r"question_column='question' is not a column of bad\.parquet"):
        make_plan(config(input=str(tmp_path / "half"), output=str(tmp_path / "out")))
