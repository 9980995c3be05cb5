"""What Prometheus would read."""

from __future__ import annotations

import time
import urllib.request

import pytest
import ray

from pipeline import gauges


@ray.remote(num_cpus=0)
class Speaker:
    def __init__(self) -> None:
        # The session's other actors have said things by the usual names.
        gauges.PREFIX = "spoken"
        self.gauges = gauges.Gauges()

    def speak(self) -> None:
        kinds = {"no such file": {"rows": 2, "ids": ["a", "b"]}}
        stats = {"rows": 8, "output_tokens": 50, "images_encoded": 3, "image_hits": 0, "error_kinds": kinds}
        held = {"cross_kv_byte_seconds": 1.5, "cross_kv_bytes_read": 4000, "peak_cross_kv_bytes": 3000}
        self.gauges.unit({**stats, **held, "keep_fraction_sum": 3.0, "keep_fraction_rows": 6})
        self.gauges.running(4)


@pytest.mark.ray
@pytest.mark.slow
def test_rays_metrics_have_ours(ray_cluster: str) -> None:
    speaker = Speaker.remote()
    ray.get([speaker.speak.remote(), speaker.speak.remote()])
    port = ray.nodes()[0]["MetricsExportPort"]
    wanted = {
        "rows_total": "16.0",
        "errors_total": "4.0",
        "output_tokens_total": "100.0",
        "images_encoded_total": "6.0",
        "cross_kv_byte_seconds_total": "3.0",
        "cross_kv_bytes_read_total": "8000.0",
        "peak_cross_kv_bytes": "3000.0",
        "keep_fraction": "0.5",
        "sequences": "4.0",
    }
    said: list[str] = []
    # They are sent every ten seconds.
    for _ in range(60):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            said = [line for line in answer.read().decode().splitlines() if line.startswith("ray_spoken_")]
        if len(said) >= len(wanted):
            break
        time.sleep(1)
    found = {line.split("{")[0].removeprefix("ray_spoken_"): line.split()[-1] for line in said}
    assert found == wanted
    assert 'kind="no such file"' in "".join(said)
