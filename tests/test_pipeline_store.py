"""A run against an S3 server that is out of order now and then."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.core import url_to_fs

from pipeline import graph, record
from pipeline.plan import make_plan
from pipeline.storage import Storage

ROWS = 40


class Faulty:
    """An S3 server's WSGI application that breaks a share of its requests, each in its turn."""

    def __init__(self, inner: Callable[..., Iterable[bytes]]) -> None:
        self.inner = inner
        self.share = 0.0
        self.faults: Counter[str] = Counter()
        self._draw = random.Random(0)
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self._lock:
            kind = self._draw.choice(["500", "503", "slow"]) if self._draw.random() < self.share else ""
            self.faults[kind] += 1
        if kind == "slow":
            time.sleep(4)
        if kind in ("500", "503"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            code = {"500": "InternalError", "503": "ServiceUnavailable"}[kind]
            start_response(f"{kind} {code}", [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()]
        return self.inner(environ, start_response)


@pytest.fixture
def faulty() -> Iterator[tuple[Faulty, dict[str, Any]]]:
    """The server, and storage options for it that wait two seconds for an answer."""
    import boto3
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    app = Faulty(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "a-secret-key"}
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys).create_bucket(Bucket="faulty")
    # Botocore's own retries would hide most of it.
    client = {"read_timeout": 2, "connect_timeout": 2, "retries": {"total_max_attempts": 1}}
    yield app, {"endpoint_url": endpoint, "key": "test", "secret": "a-secret-key", "config_kwargs": client}
    server.shutdown()
    thread.join()


@pytest.mark.ray
@pytest.mark.slow
def test_no_row_is_lost_to_a_store_that_fails(
    config: Any, picture: Callable[..., bytes], faulty: tuple[Faulty, dict[str, Any]], ray_cluster: str
) -> None:
    app, options = faulty
    root = Storage("s3://faulty/in put", options)
    for i in range(ROWS):
        root.write(f"photos/{i:02d} ä+%.png", picture(seed=i), temporary="")
    names = [f"photos/{i:02d} ä+%.png" for i in range(ROWS)]
    table = pa.table({"image": names, "question": ["how many"] * ROWS, "id": [f"{i:02d}" for i in range(ROWS)]})
    out = pa.BufferOutputStream()
    pq.write_table(table, out, row_group_size=8)
    root.write("shard 1.parquet", out.getvalue().to_pybytes(), temporary="")

    plan = make_plan(config(input=root.url, output="s3://faulty/out put", storage_options=options, unit_rows=8))
    app.share = 0.15
    summary = graph.run(plan)
    app.share = 0.0
    assert (summary["rows"], summary["errors"]) == (ROWS, 0)
    assert min(app.faults[kind] for kind in ("500", "503", "slow")) > 0
    fs, path = url_to_fs("s3://faulty/out put", **options)
    read = pq.read_table(path, filesystem=fs)
    assert sorted(read["id"].to_pylist()) == table["id"].to_pylist()
    again = make_plan(config(input=root.url, output="s3://faulty/out put", storage_options=options, unit_rows=8))
    assert graph.run(again) == summary


def test_a_store_that_is_not_there_is_told_within_seconds(config: Any, free_port: Callable[[], int]) -> None:
    options = {"endpoint_url": f"http://127.0.0.1:{free_port()}", "key": "a", "secret": "b"}
    began = time.monotonic()
    with pytest.raises(Exception, match=r"127\.0\.0\.1"):
        make_plan(config(input="s3://bucket/in", output="s3://bucket/out", storage_options=options))
    assert time.monotonic() - began < 60


def test_a_thousand_small_shards_and_listings_in_pages(config: Any, s3: dict[str, Any]) -> None:
    """A listing has a thousand names a page; names need escaping."""
    count = 1010
    out = pa.BufferOutputStream()
    pq.write_table(pa.table({"image": pa.nulls(1, pa.binary()), "question": ["how many"]}), out)
    data = out.getvalue().to_pybytes()
    root, output = Storage("s3://bucket/many shards", s3), Storage("s3://bucket/many out", s3)
    names = [f"part {i % 7}/{i:04d} +ä&.parquet" for i in range(count)]
    fs, _ = root.open()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: fs.pipe_file(root.path(name), data), names))
    settings = {"input": root.url, "output": output.url, "storage_options": s3}
    plan = make_plan(config(**settings))
    assert (plan.rows, len(plan.shards), len(plan.units)) == (count, count, count)
    assert len({unit.name for unit in plan.units}) == count
    # Finished units are found, all pages of them.
    record.begin(output, plan.record())
    done = plan.units[: count - 3]
    with ThreadPoolExecutor(16) as pool:
        for name in ("{}.parquet", record.marker("{}")):
            list(pool.map(lambda unit, name=name: fs.pipe_file(output.path(name.format(unit.name)), b"{}"), done))
    again = make_plan(config(**settings))
    assert [unit.name for unit in again.remaining] == [unit.name for unit in plan.units[-3:]]
