"""Starting or joining Ray, and whether the run fits on what is there."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.config import RunConfig
from pipeline.errors import one_line
from pipeline.retries import transient

POLL = 2.0
"""Seconds between two looks at a cluster that is to grow, or to come up."""
JOINING = 90.0
"""Seconds within which a cluster that does not answer is tried again; a try takes Ray up to 41 of them."""

# Ray sends the command line on, as UTF-8.
UTF8 = "the command line has letters that the locale lacks: set PYTHONUTF8=1 or a UTF-8 locale, such as LC_ALL=C.UTF-8"


class TooSmallError(ValueError):
    """The run does not fit on the cluster; nothing has been written."""


class UnusableError(ValueError):
    """Ray can't be started here, or the cluster not joined; nothing has been written."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What one actor takes, once the cluster is known."""

    cpus: float
    gpus: float


class Terminated(BaseException):
    """SIGTERM: somebody wants the run to end, as ``ray job stop`` does."""


@contextlib.contextmanager
def connected(address: str | None, say: Callable[[str], object] = lambda line: None) -> Iterator[None]:
    """Ray, joined where an address is given or RAY_ADDRESS names one, else started here and stopped afterwards.

    A Ray that the caller has started is used and left alone. SIGTERM raises ``Terminated`` inside. ``say`` takes a line where
    a cluster is waited for. Raises ``UnusableError`` where none comes, and where Ray can't use what it is given.
    """
    # Ray warns of its next version's default otherwise; with 0 it leaves CUDA_VISIBLE_DEVICES alone for actors without GPUs.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A driver that was killed keeps its actors' resources reserved for this long; the default is 180 s.
    os.environ.setdefault("RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S", "30")
    # A task on a host that vanished without a word ends for the driver when its connection does, whatever Ray's health checks
    # have found: with Ray's own keepalive after 5 + 2 minutes. Servers refuse pings that come more often than once a minute.
    os.environ.setdefault("RAY_grpc_client_keepalive_time_ms", "65000")
    os.environ.setdefault("RAY_grpc_client_keepalive_timeout_ms", "30000")
    # Ray's core tells every driver with actors that their constructors' arguments lie in the object store.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    if ray.is_initialized():
        with _terminable():
            yield
        return
    named = "ray_address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        if address == "local":
            _start()
        else:
            _join(address, named, say)
    except SystemExit:
        # Ray's own handler of SIGTERM.
        raise Terminated from None
    try:
        # After ray.init, which sets a handler of its own.
        with _terminable():
            yield
    finally:
        ray.shutdown()


def _start() -> None:
    # Reads and writes take a CPU each beside the actor's: on one core Ray has to be told that there are two.
    cpus = max(2, os.cpu_count() or 1)
    try:
        _init("local", num_cpus=cpus, include_dashboard=False)
    except (OSError, UnicodeError) as error:
        # What else goes wrong there, as on a machine that is overloaded, may pass.
        if transient(error):
            raise
        folders = (
            "point HOME and TMPDIR (or RAY_TMPDIR, if it is set) to folders that can be written, with a short path and room"
        )
        remedy = UTF8 if isinstance(error, UnicodeError) else folders
        raise UnusableError(f"Ray can't start here: {one_line(error)}; {remedy}") from error


def _join(address: str, named: str, say: Callable[[str], object]) -> None:
    # Tries of Ray's own in one ray.init, each of them silent and 41 seconds long where nobody answers; the default is 20.
    os.environ["RAY_gcs_server_port_wait_time_s"] = "1"  # noqa: SIM112 - as Ray spells it
    deadline, told = time.monotonic() + JOINING, False
    while True:
        try:
            return _init(address)
        except ConnectionError as error:
            if time.monotonic() >= deadline:
                raise _unusable(address, named, error) from error
            if not told:
                say(f"waiting up to two minutes for the cluster of {named}={address!r}: {one_line(error)}")
                told = True
        except Exception as error:
            raise _unusable(address, named, error) from error
        time.sleep(POLL)


def _unusable(address: str, named: str, error: Exception) -> UnusableError:
    start = "start that cluster (or run on one of its machines), or "
    remedy = start + ("drop --ray-address" if named == "ray_address" else f"unset {named}")
    if isinstance(error, UnicodeError):
        remedy = UTF8
    return UnusableError(f"{named}={address!r} can't be joined: {one_line(error)}; {remedy}")


def _init(address: str, **options: Any) -> None:
    import ray

    try:
        with _no_native_stderr():
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **options)
    except BaseException:
        # Processes that had been started.
        ray.shutdown()
        raise


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _no_native_stderr() -> Iterator[None]:
    """Ray's core announces its own log level on stderr, past Python; what goes wrong in there comes as an exception."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def fitted(config: RunConfig, say: Callable[[str], object] = lambda line: None) -> Iterator[Resources]:
    """What each actor takes of the connected cluster, which is asked and given ``config.wait_minutes`` to grow to it.

    Raises ``TooSmallError``, with the arithmetic, where the actors don't fit.
    """
    deadline = time.monotonic() + 60 * config.wait_minutes
    asked = False
    try:
        while True:
            try:
                found = _fit(config)
                break
            except TooSmallError as error:
                if time.monotonic() >= deadline:
                    raise
                if not asked:
                    say(f"waiting up to {config.wait_minutes:g} minutes for the cluster to grow: {error}")
                    _ask(config, config.num_actors)
                    asked = True
            time.sleep(POLL)
        yield found
    finally:
        if asked:
            # Idle machines go once nobody asks for them.
            _ask(config, 0)


def _ask(config: RunConfig, actors: int) -> None:
    from ray.autoscaler.sdk import request_resources

    each = {"CPU": config.cpus_per_actor, "GPU": config.gpus_per_actor or 0.0}
    room = [{name: amount for name, amount in each.items() if amount}] * actors
    request_resources(bundles=[*room, {"CPU": 1}] if actors else [])


def _fit(config: RunConfig) -> Resources:
    import ray

    there = ray.cluster_resources()
    cpus, gpus = there.get("CPU", 0.0), there.get("GPU", 0.0)
    each = Resources(config.cpus_per_actor, (1.0 if gpus else 0.0) if config.gpus_per_actor is None else config.gpus_per_actor)
    if config.num_actors * each.gpus > gpus:
        raise TooSmallError(
            f"num_actors={config.num_actors} × gpus_per_actor={each.gpus:g} = {config.num_actors * each.gpus:g} GPUs, "
            f"and the cluster has {gpus:g}; lower one of them"
        )
    taken = config.num_actors * each.cpus
    if taken + 1 > cpus:
        raise TooSmallError(
            f"num_actors={config.num_actors} × cpus_per_actor={each.cpus:g} = {taken:g} CPUs, and one more to read and write, "
            f"but the cluster has {cpus:g}; lower one of them"
        )
    return each
