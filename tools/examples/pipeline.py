"""An image pipeline of three services, each a process of its own, working on one numpy array in place.

pipeline.py [WIDTH] [HEIGHT] [FRAMES]        needs numpy

me ── lends the image ──▶ denoise ──▶ stretch ──▶ histogram      no copy of it is made anywhere
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy

import realmap


def denoise(call: realmap.Call, image: realmap.UserBuffer, width: int) -> None:
    """Each pixel becomes the mean of itself and its neighbours left and right."""
    with image.array("float32", (len(image) // 4 // width, width)) as pixels:
        pixels[:, 1:-1] = (pixels[:, :-2] + pixels[:, 1:-1] + pixels[:, 2:]) / 3


def stretch(call: realmap.Call, image: realmap.UserBuffer) -> list[float]:
    """To [0, 1]; what it was from and to."""
    with image.array("float32") as pixels:
        low, high = float(pixels.min()), float(pixels.max())
        pixels -= low
        pixels /= (high - low) or 1
    return [low, high]


def histogram(call: realmap.Call, image: realmap.UserBuffer, bins: int = 8) -> list[int]:
    """How many pixels there are in each of the bins. It may only look."""
    with image.array("float32", rights=realmap.k_r) as pixels:
        return [int(count) for count in numpy.histogram(pixels, bins, (0, 1))[0]]


def stage(me: realmap.Process, handler: Any) -> None:
    """A process of the pipeline."""
    with me.serve(handler, lazy_unmap=256 << 20) as service:
        service.wait()


def main(width: int = 1920, height: int = 1080, frames: int = 20) -> None:
    """Starts the stages, sends frames through them, and checks each against the same sums made here."""
    with realmap.boot() as kernel, kernel.connect() as me:
        for handler in (denoise, stretch, histogram):
            kernel.spawn(stage, handler, name=handler.__name__)
            me.session(handler.__name__, timeout=30).close()  # it serves from here on
        image = me.map(width * height * 4)
        pixels = image.array("float32", (height, width))
        rng = numpy.random.default_rng(7)
        took = []
        for _ in range(frames):
            pixels[:] = rng.normal(100, 20, pixels.shape)
            expected = pixels.copy()
            began = time.perf_counter()
            me.call("denoise", image, width)
            low, high = me.call("stretch", image)
            counts = me.call("histogram", image)
            took.append(time.perf_counter() - began)
            expected[:, 1:-1] = (expected[:, :-2] + expected[:, 1:-1] + expected[:, 2:]) / 3
            assert (low, high) == (float(expected.min()), float(expected.max()))
            expected -= low
            expected /= high - low
            assert (pixels == expected).all()
            assert sum(counts) == pixels.size
        print(f"{frames} frames of {width}x{height}, all right; {sorted(took)[frames // 2] * 1e3:.1f} ms each (median)")
        del pixels


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
