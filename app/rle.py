"""The labels of one slice as text: run lengths, small enough to travel with an event. `viewer/rle.js` is its twin."""

from __future__ import annotations

import base64
import binascii
from typing import NoReturn

import numpy as np
from jaxtyping import UInt8

from surm_seg.errors import BadInput

Labels = UInt8[np.ndarray, "rows columns"]


def encode(labels: Labels) -> str:
    """Base64 of little-endian uint32 pairs (value, run length), row by row."""
    flat = labels.ravel()
    starts = np.flatnonzero(np.concatenate(([True], flat[1:] != flat[:-1]))) if flat.size else np.empty(0, int)
    lengths = np.diff(starts, append=flat.size)
    pairs = np.stack((flat[starts], lengths), axis=1).astype("<u4")
    return base64.b64encode(pairs.tobytes()).decode("ascii")


def decode(text: str, shape: tuple[int, int]) -> Labels:
    """The slice that `encode` was given.

    Args:
        text: untrusted; it comes from a browser.
        shape: (rows, columns) of the slice; the run lengths must add up to it.

    Raises:
        BadInput: `slice-runs`, where the text is anything but the runs of such a slice.
    """
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        _refuse("is not base64")
    if len(raw) % 8:
        _refuse("ends in the middle of a run")
    values, lengths = np.frombuffer(raw, "<u4").reshape(-1, 2).astype(np.int64).T
    if values.size and values.max() > 255:
        _refuse("holds a label above 255")
    if int(lengths.sum()) != shape[0] * shape[1]:
        _refuse(f"does not fill its {shape[0]} rows of {shape[1]} voxels")
    return np.repeat(values.astype(np.uint8), lengths).reshape(shape)


def _refuse(reason: str) -> NoReturn:
    raise BadInput("slice-runs", f"The labels of a slice from the viewer {reason}: reload the page and draw again.")
