"""What every export of a run has in common: how to use the model, and slices that show whether it is the same one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.inference import Trained
from pipelines.phantom import patient
from pipelines.transforms import Input
from surm_seg.provenance import provenance

SLICES = 3
"""Phantom slices, and as many of noise, that an export is compared on."""


def description(trained: Trained) -> dict[str, Any]:
    """How to use the model, and where it comes from: no path, no file name, nothing about a patient."""
    run = trained.facts
    return {
        "classes": ["background", *trained.labels],
        "input": {**asdict(trained.input), "axes": "batch, channels, rows to Posterior, columns to Left"},
        "steps": steps(trained.input),
        "trained_in": trained.precision,
        "sha256": {"base": run["base_sha256"], **run["adapter_sha256"]},
        **provenance(),
    }


def steps(input: Input) -> list[str]:
    """What happens between a CT and its label map, in words that can be followed in any language."""
    low, high = input.window
    resized = (
        f"Resample to {input.slice_size} pixels, then to {input.image_size}, by cubic splines (scipy.ndimage.zoom)."
        if input.slice_size
        else f"Resize to {input.image_size} pixels, bilinear, corners not aligned, antialiased where it shrinks."
    )
    neighbours = "Channels are slices z-1, z, z+1; beyond an end, the end slice again."
    return [
        "Bring the CT, in HU, to axes z, y, x growing to Superior, Posterior, Left.",
        f"Clip to [{low:g}, {high:g}] HU and map to [0, 1].",
        neighbours if input.channels == "neighbours" else "Channels are slice z three times.",
        "Pad the end of the shorter axis with 0 to a square.",
        resized,
        "Subtract mean and divide by std, channel by channel: the model's input. It answers with a logit per class.",
        "Resize the logits to the square, bilinear, corners not aligned; cut off the padding.",
        "The class with the largest logit is the label value of the pixel.",
    ]


@torch.inference_mode()
def slices(input: Input) -> Float[Tensor, "batch 3 size size"]:
    """Normalised pixels of a phantom patient's middle slices, then noise; always the same."""
    volume = patient(0).image.T
    middle = volume.shape[0] // 2
    found = [torch.from_numpy(input.enlarged(input.slices(volume, middle + z), order=3)) for z in range(SLICES)]
    pixels = input.pixels(torch.stack(found).float())
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    return torch.cat([pixels, noise])


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
