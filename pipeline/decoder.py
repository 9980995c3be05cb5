"""Images are decoded in processes of their own: what hangs, crashes or eats memory there is one row's error.

In a thread, a progressive JPEG of a thousand scans would sit for minutes inside of libjpeg. A file's bytes go in; status and
size, then RGB or an error's text, come out.
"""

from __future__ import annotations

import struct

from PIL import Image

from pipeline.pictures import ImageError, decode
from pipeline.process import EndedError, Process, serve

SECONDS = 30.0
"""An image that is not decoded by then never will be."""
MEMORY_BYTES = 2 << 30
"""Address space of a decoding process; 20 megapixels in any mode take half of it."""

# Status, then width and height.
_HEAD = struct.Struct("<BII")
_RGB, _ERROR = 0, 1


class Decoder(Process):
    """One decoding process, for one thread at a time."""

    def __init__(self, seconds: float = SECONDS) -> None:
        super().__init__("pipeline.decoder", seconds)

    def __call__(self, data: bytes) -> Image.Image:
        """``pictures.decode`` of ``data``. Raises ``ImageError``, also for what hangs or ends the process."""
        try:
            answer = self.ask(data)
        except TimeoutError:
            raise ImageError(f"the image can't be decoded in {self.seconds:g} s") from None
        except EndedError as error:
            raise ImageError(f"decoding the image ended its process ({error})") from None
        (status, width, height), rest = _HEAD.unpack_from(answer), answer[_HEAD.size :]
        if status == _ERROR:
            raise ImageError(str(rest, "utf-8"))
        return Image.frombytes("RGB", (width, height), rest)


def _answer(data: bytes) -> tuple[bytes, bytes]:
    try:
        image = decode(data)
        return _HEAD.pack(_RGB, *image.size), image.tobytes()
    except (ImageError, MemoryError) as error:
        said = str(error) or f"the image needs more than {MEMORY_BYTES >> 30} GiB to be decoded"
        return _HEAD.pack(_ERROR, 0, 0), said.encode(errors="replace")


def _limit_memory() -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


if __name__ == "__main__":
    _limit_memory()
    serve(_answer)
