"""What the pipeline's and the jobs' tests share: a tiny checkpoint, pictures, one Ray, one S3 server."""

from __future__ import annotations

import io
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before anything imports these: no call leaves the machine, and a token file of the user's does not lock local clusters.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# On models as tiny as the tests' a second thread costs a core and saves nothing.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of many slow tests come first: the worker that began one last would run on alone."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Mllama with random weights and its processor, saved as a user has them."""
    from demo.architecture import build_model, build_processor

    folder = tmp_path_factory.mktemp("model")
    processor = build_processor(["what is this", "how many", "describe this image."])
    build_model(processor, seed=3).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """Makes an image file: ``picture(width, height, seed=0, format="PNG")``, a smooth pattern unlike any other seed's."""

    def make(width: int = 100, height: int = 80, seed: int = 0, format: str = "PNG", **options: Any) -> bytes:
        import numpy as np
        from PIL import Image

        y, x = np.mgrid[0:height, 0:width]
        channels = [np.sin((x * (c + 1) + y * (seed + 1)) / (9 + 3 * c)) * 100 + 128 for c in range(3)]
        out = io.BytesIO()
        Image.fromarray(np.stack(channels, -1).astype(np.uint8)).save(out, format, **options)
        return out.getvalue()

    return make


@pytest.fixture(scope="session")
def config(checkpoint_folder: str) -> Callable[..., Any]:
    """Makes a ``RunConfig`` with the tiny checkpoint and short answers; keywords override."""

    def make(**fields: Any) -> Any:
        from pipeline.config import RunConfig

        defaults = {"job": "answer", "input": "in", "output": "out", "model": checkpoint_folder, "max_new_tokens": 4}
        return RunConfig(**{**defaults, **fields})

    return make


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """One local Ray of four logical CPUs for the whole session; its address."""
    import logging

    import ray

    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    context = ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    def find() -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return int(listener.getsockname()[1])

    return find


@pytest.fixture(scope="session")
def s3() -> Iterator[dict[str, Any]]:
    """Storage options of an S3 server, spoken to over HTTP, that holds a bucket named ``bucket``."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "a-secret-key"}
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys).create_bucket(Bucket="bucket")
    yield {"endpoint_url": endpoint, "key": "test", "secret": "a-secret-key"}
    server.stop()
