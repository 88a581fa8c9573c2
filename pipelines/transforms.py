"""From stored HU slices to what a backbone sees, and back from its logits to label maps.

Slices are (channels, rows, columns) with rows growing to posterior and columns to the patient's left. Slices that are
not square are padded at the end with the lower edge of the window, so that one scale holds for both axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from monai.transforms.compose import Compose
from monai.transforms.intensity.array import ScaleIntensityRange
from monai.transforms.intensity.dictionary import (
    RandAdjustContrastd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandShiftIntensityd,
)
from monai.transforms.spatial.dictionary import RandAffined
from monai.transforms.transform import MapTransform, RandomizableTransform
from scipy.ndimage import rotate, zoom
from torch import Tensor, nn

WINDOW = (-125.0, 275.0)
"""HU range of the Synapse benchmark's preprocessing."""


@dataclass(frozen=True)
class Input:
    """What a backbone's input is made of; training and inference share one.

    Args:
        image_size: side of the square the backbone sees, in pixels.
        window: HU mapped to 0 and 1; beyond it is clipped.
        channels: "repeat" shows one slice three times, "neighbours" the slices below, at and above.
        mean: per channel, of pixels in [0, 1].
        std: likewise.
        slice_size: side that slices are resampled to by cubic splines, to be augmented there and enlarged to image_size
            by splines again, as the published recipes do; 0 keeps slices as they are.
    """

    image_size: int
    window: tuple[float, float]
    channels: Literal["repeat", "neighbours"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    slice_size: int = 0

    def slices(self, volume: Int[np.ndarray, "z y x"], z: int) -> Float[np.ndarray, "3 side side"]:
        """The three channels of slice z in [0, 1], square."""
        above = 1 if self.channels == "neighbours" else 0
        picked = np.clip(np.arange(z - above, z + 1 + above), 0, volume.shape[0] - 1)
        scale = ScaleIntensityRange(*self.window, b_min=0.0, b_max=1.0, clip=True)
        pixels = np.asarray(scale(np.asarray(volume[picked], np.float32)))
        square = padded(pixels)
        if self.slice_size:
            square = zoom_to(square, self.slice_size, order=3)
        return square if above else np.repeat(square, 3, 0)

    def labels(self, labels: UInt8[np.ndarray, "y x"]) -> UInt8[np.ndarray, "1 side side"]:
        """A label slice on the same square as `slices`."""
        square = padded(np.asarray(labels)[None])
        return zoom_to(square, self.slice_size, order=0) if self.slice_size else square

    def enlarged(self, square: np.ndarray, order: int) -> np.ndarray:
        """What `slices` or `labels` gave, at image_size where slice_size asks for splines; otherwise unchanged."""
        return zoom_to(square, self.image_size, order) if self.slice_size else square

    def pixels(self, slices: Float[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch 3 size size"]:
        """Slices in [0, 1] -> normalised pixels at the backbone's size."""
        if slices.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            slices = torch.nn.functional.interpolate(
                slices, size, mode="bilinear", antialias=slices.shape[-1] > size[0]
            )
        mean, std = (slices.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (slices - mean) / std


def padded(slices: np.ndarray) -> np.ndarray:
    """(channels, h, w) -> (channels, side, side) with zeros at the end of the shorter axis."""
    side = max(slices.shape[1:])
    return np.pad(slices, ((0, 0), (0, side - slices.shape[1]), (0, side - slices.shape[2])))


def zoom_to(slices: np.ndarray, side: int, order: int) -> np.ndarray:
    """(channels, s, s) -> (channels, side, side) by splines of the given order (scipy.ndimage.zoom)."""
    if slices.shape[-1] == side:
        return slices
    if len(slices) > 1 and (slices[1:] == slices[0]).all():  # one slice shown three times: a spline takes milliseconds
        return np.repeat(zoom_to(slices[:1], side, order), len(slices), 0)
    factor = side / slices.shape[-1]
    return np.stack([np.asarray(zoom(channel, factor, order=order)) for channel in slices])


def enlarged_logits(
    logits: Float[Tensor, "batch classes h w"], rows: int, columns: int
) -> Float[Tensor, "batch classes rows columns"]:
    """Logits on a square -> logits of every pixel of the original slice."""
    side = max(rows, columns)
    full = torch.nn.functional.interpolate(logits.float(), (side, side), mode="bilinear", align_corners=False)
    return full[:, :, :rows, :columns]


BATCH = 8
"""Slices per forward pass; a constant, because products of other sizes may round differently."""


def predict_volume(
    model: nn.Module, volume: Int[np.ndarray, "z y x"], input: Input, mirrored: Sequence[int] | None = None
) -> UInt8[np.ndarray, "z y x"]:
    """Label of every voxel of a volume in HU, axes growing to Superior, Posterior, Left.

    Args:
        mirrored: also look at every slice with left and right exchanged, and average the probabilities; the class that
            stands for each class there. Takes twice the time.
    """
    result = np.empty(volume.shape, np.uint8)
    for start in range(0, volume.shape[0], BATCH):
        zs = range(start, min(start + BATCH, volume.shape[0]))
        scores = _logits(model, volume, input, zs)
        if mirrored is not None:
            there = _logits(model, volume[:, :, ::-1], input, zs).flip(-1)[:, list(mirrored)]
            scores = scores.softmax(1) + there.softmax(1)
        result[start : zs.stop] = scores.argmax(1).to(torch.uint8).cpu().numpy()
    return result


def _logits(
    model: nn.Module, volume: Int[np.ndarray, "z y x"], input: Input, zs: range
) -> Float[Tensor, "batch classes y x"]:
    """Logits of every pixel of the slices zs."""
    device = next(model.parameters()).device
    slices = np.stack([input.enlarged(input.slices(volume, z), order=3) for z in zs])
    return enlarged_logits(model(input.pixels(torch.from_numpy(slices).to(device))), *volume.shape[1:])


class SamedRotationd(RandomizableTransform, MapTransform):
    """SAMed's augmentation: p .5 quarter turns and a flip, else p .5 a turn by -20 to 19 degrees, all nearest."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, 1.0)

    def __call__(self, data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        turn, tilt = self.R.random() > 0.5, self.R.random() > 0.5
        quarters, axis, angle = self.R.randint(4), self.R.randint(2), self.R.randint(-20, 20)
        result = dict(data)
        for key in map(str, self.keys):
            if turn:
                result[key] = np.flip(np.rot90(result[key], quarters, (1, 2)), 1 + axis)
            elif tilt:
                result[key] = rotate(result[key], angle, axes=(2, 1), order=0, reshape=False)
        return result


def augmentation(name: Literal["none", "default", "samed"]) -> Compose:
    """Random transforms of {image: (3, s, s) in [0, 1], label: (1, s, s)}; only `samed` swaps sides."""
    both = ("image", "label")
    if name == "none":
        return Compose([])
    if name == "samed":
        return Compose([SamedRotationd(both)])
    return Compose(
        [
            RandAffined(
                both,
                prob=0.9,
                rotate_range=0.2,
                scale_range=0.15,
                shear_range=0.05,
                translate_range=8,
                mode=("bilinear", "nearest"),
                padding_mode="zeros",
            ),
            RandScaleIntensityd("image", factors=0.15, prob=0.5),
            RandShiftIntensityd("image", offsets=0.08, prob=0.5),
            RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5)),
            RandGaussianSmoothd("image", sigma_x=(0.3, 0.9), sigma_y=(0.3, 0.9), prob=0.2),
            RandGaussianNoised("image", prob=0.5, std=0.04),
        ]
    )
