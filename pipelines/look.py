"""How a pretrained model wants its pictures: their size, their mean and SD, and what it must be told of their size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipelines import hub
from surm_seg.errors import BadConfig

PREPROCESSING = ("preprocessor_config.json", "processor_config.json")
"""Files that say how a model wants its pictures; CLIP's have only the second since transformers 5."""


@dataclass(frozen=True)
class Look:
    """How a model wants its pictures.

    Args:
        size: pixels of a side.
        mean: of red, green and blue, of 0 to 1.
        std: likewise.
        assumed: whether the model's files say nothing of mean and std.
    """

    size: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    assumed: bool = False

    def pixels(self, image: Image.Image) -> Tensor:
        """A picture as (3, size, size)."""
        resized = image.convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR)
        values = np.asarray(resized, np.float32) / 255
        normal = (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(normal.transpose(2, 0, 1)))


def look_of(model: str, found: nn.Module, image_size: int) -> Look:
    """As the model's own preprocessing says, where its files have one."""
    config: Any = found.config
    own = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", None)
    if Path(model).is_dir() and not any((Path(model) / name).exists() for name in PREPROCESSING):
        return Look(image_size or _side(own, model), assumed=True)
    processor = hub.pretrained("AutoImageProcessor", model)
    wanted = (getattr(processor, "crop_size", None) or {}).get("height") or (processor.size or {}).get("height") or own
    if not processor.do_normalize:
        return Look(image_size or _side(wanted, model), (0.0,) * 3, (1.0,) * 3)
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    return Look(image_size or _side(wanted, model), mean, std)


def _side(size: Any, model: str) -> int:
    if isinstance(size, int):
        return size
    raise BadConfig("image-size", f"--model {model} does not say how large its pictures are; give --image_size.")


def told_of_size(model: nn.Module, name: str, size: int) -> dict[str, bool]:
    """What the model must be told besides the pictures, to take them in this size.

    Raises:
        BadConfig: it takes none of this size.
    """
    errors = []
    for told in ({}, {"interpolate_pos_encoding": True}):
        try:
            with torch.inference_mode():
                model(pixel_values=torch.zeros(1, 3, size, size), **told)
            return told
        except (ValueError, RuntimeError, TypeError) as error:
            errors.append(error)
    why = hub.reason(errors[0])
    sentence = f"--model {name} takes no pictures of {size} x {size} pixels ({why}); give another --image_size."
    raise BadConfig("image-size", sentence) from errors[0]
