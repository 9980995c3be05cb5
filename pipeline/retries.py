"""Which of a store's errors pass, and waiting for it."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

T = TypeVar("T")

logger = logging.getLogger(__name__)

# What s3fs makes of 500 and 503.
_NUMBERS = {errno.EBUSY, getattr(errno, "EREMOTEIO", errno.EIO), errno.ECONNRESET, errno.ETIMEDOUT, errno.EPIPE}
_PACKAGES_OWN = {("botocore", "HTTPClientError"), ("botocore", "ConnectionError"), ("aiohttp", "ClientError")}
_CODES = {"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttling", "ThrottlingException"}


def patiently(call: Callable[[], T], seconds: float) -> T:
    """``call()``, tried again for up to ``seconds`` while it raises what is ``transient``."""
    attempts = Retrying(
        retry=retry_if_exception(transient),
        wait=wait_random_exponential(multiplier=0.5, max=20),
        stop=stop_after_delay(seconds),
        before_sleep=_warn,
        reraise=True,
    )
    result: T = attempts(call)
    return result


def transient(error: BaseException) -> bool:
    """Whether ``error`` is a store's that is overloaded, out of order or not to be reached, rather than an answer."""
    return any(map(_transient, _chain(error)))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _transient(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError):
        return error.errno in _NUMBERS
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or response.get("Error", {}).get("Code") in _CODES
    # Botocore's and aiohttp's own, which are not imported for a run on local files.
    return any((kind.__module__.split(".")[0], kind.__name__) in _PACKAGES_OWN for kind in type(error).__mro__)


def _warn(state: RetryCallState) -> None:
    assert state.outcome is not None
    logger.warning("%s; trying again in %.1f s", state.outcome.exception(), state.upcoming_sleep)
