"""A patient whose every direction is known: a body with one mark in each direction, all of another brightness and size.

No mark looks like another, so that any flip or exchange of axes moves a brightness to where it does not belong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

AIR, BODY = -1000, 40
MARKS = {"R": 900, "L": 700, "A": 500, "P": 300, "S": 1200, "I": 1500}
"""HU of the mark that lies in each direction of the patient."""

LIVER, SPLEEN, STRANGE = 1, 2, 3


@dataclass(frozen=True)
class Phantom:
    """Arrays (z, y, x) that grow to Superior, Posterior, Left: HU, what is true, and what was predicted."""

    image: np.ndarray
    reference: np.ndarray
    prediction: np.ndarray


def phantom(shape: tuple[int, int, int]) -> Phantom:
    """The patient on a grid of this shape; every length of it is 16 at least."""
    image = np.full(shape, AIR, np.int16)
    z, y, x = (np.linspace(-1, 1, length, dtype=np.float32) for length in shape)
    inside = (y[:, None] / 0.8) ** 2 + (x[None] / 0.92) ** 2 < 1
    image[:, inside] = BODY
    for slice_, height in zip(image, z, strict=True):  # something to see while scrolling: a bright ring that grows
        radius = np.hypot(y[:, None], x[None])
        slice_[inside & (np.abs(radius - 0.3 - 0.15 * height) < 0.015)] = 120
    for letter, where in boxes(shape).items():
        image[where] = MARKS[letter]
    reference, prediction = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    _ball(reference, LIVER, (0.0, -0.05, -0.4), 0.3)
    _ball(prediction, LIVER, (0.0, 0.0, -0.36), 0.3)
    _ball(reference, SPLEEN, (0.2, 0.15, 0.45), 0.2)
    _ball(prediction, SPLEEN, (0.3, 0.2, 0.5), 0.2)
    prediction[shape[0] * 3 // 8, shape[1] // 8 : shape[1] // 3, shape[2] // 2 : shape[2] * 2 // 3] = STRANGE
    return Phantom(image, reference, prediction)


def boxes(shape: tuple[int, int, int]) -> dict[str, tuple[slice, slice, slice]]:
    """A small box near the middle of each side of the volume."""

    def place(z: float, y: float, x: float) -> tuple[slice, slice, slice]:
        half = [max(1, length // 16) for length in shape]
        middle = [round(part * (length - 1)) for part, length in zip((z, y, x), shape, strict=True)]
        first, second, third = (slice(max(0, m - h), m + h + 1) for m, h in zip(middle, half, strict=True))
        return first, second, third

    return {
        "R": place(0.5, 0.5, 0.12),
        "L": place(0.5, 0.5, 0.88),
        "A": place(0.5, 0.14, 0.5),
        "P": place(0.5, 0.86, 0.5),
        "S": place(0.93, 0.5, 0.5),
        "I": place(0.07, 0.5, 0.5),
    }


def _ball(labels: np.ndarray, value: int, middle: tuple[float, float, float], radius: float) -> None:
    z, y, x = (np.linspace(-1, 1, length, dtype=np.float32) for length in labels.shape)
    flat = (y[:, None] - middle[1]) ** 2 + (x[None] - middle[2]) ** 2
    for slice_, height in zip(labels, z, strict=True):
        slice_[flat + (height - middle[0]) ** 2 < radius**2] = value
