"""Decoding processes: the same pictures, and nothing that a file does to them outlives its row."""

from __future__ import annotations

import io
import os
import signal
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from pipeline import pictures
from pipeline.decoder import Decoder
from pipeline.pictures import ImageError


@pytest.fixture
def decode() -> Iterator[Decoder]:
    made = Decoder()
    yield made
    made.close()


def slow_jpeg(scans: int) -> bytes:
    """A progressive JPEG whose last scan is there over and over: valid, small, and as slow to load as one likes."""
    out = io.BytesIO()
    Image.new("L", (4000, 4000), 90).save(out, "JPEG", progressive=True)
    data = out.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + b"\xff\xd9"


def test_pictures_are_those_of_this_process(decode: Decoder, picture: Callable[..., bytes]) -> None:
    for size, kind in (((100, 80), "PNG"), ((3000, 2000), "JPEG"), ((1, 1), "GIF")):
        data = picture(*size, format=kind)
        assert np.array_equal(np.asarray(decode(data)), np.asarray(pictures.decode(data)))


def test_one_process_serves_many_files_errors_among_them(decode: Decoder, picture: Callable[..., bytes]) -> None:
    decode(picture())
    process = decode._process
    for data, said in ((b"", "not an image"), (picture()[:-40], "can't be decoded"), (b"x" * 3_000_000, "not an image")):
        with pytest.raises(ImageError, match=said):
            decode(data)
    assert decode(picture(50, 40)).size == (50, 40)
    assert decode._process is process


def test_what_hangs_is_ended(picture: Callable[..., bytes]) -> None:
    decode = Decoder(seconds=2.0)
    decode(picture())
    process = decode._process
    assert process is not None
    data = slow_jpeg(5000)
    began = time.monotonic()
    with pytest.raises(ImageError, match="can't be decoded in 2 s"):
        decode(data)
    assert time.monotonic() - began < 5
    assert process.poll() == -signal.SIGKILL
    assert decode(picture(50, 40)).size == (50, 40)
    decode.close()


def test_what_ends_the_process_is_an_error(decode: Decoder, picture: Callable[..., bytes]) -> None:
    decode(picture())
    process = decode._process
    assert process is not None
    # As an image does that crashes its codec.
    os.kill(process.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(decode, picture())
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGSEGV)
        os.kill(process.pid, signal.SIGCONT)
        with pytest.raises(ImageError, match=r"ended its process \(SIGSEGV\)"):
            future.result()
    assert decode(picture(50, 40)).size == (50, 40)


def test_memory_is_bounded(decode: Decoder, picture: Callable[..., bytes]) -> None:
    """A PNG whose colour profile unpacks to gigabytes: whatever Pillow does with it, this process lives on."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(bytes(1 << 24)) for _ in range(256)) + packer.flush()
    head, rest = (data := picture())[:33], data[33:]
    with suppress(ImageError):
        decode(head + chunk(b"iCCP", b"x\0\0" + bomb) + rest)
    assert decode(picture(50, 40)).size == (50, 40)


def test_a_decoder_that_is_let_go_ends_its_process(picture: Callable[..., bytes]) -> None:
    decode = Decoder()
    decode(picture())
    process = decode._process
    assert process is not None
    del decode
    assert process.poll() is not None
