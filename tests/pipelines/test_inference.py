"""What is done with a prediction before it is written."""

import numpy as np
import torch
from torch import nn

from pipelines.inference import largest_pieces, mirrored_classes
from pipelines.transforms import WINDOW, Input, predict_volume


def test_only_the_largest_piece_of_every_organ_is_kept() -> None:
    labels = np.zeros((4, 9, 9), np.uint8)
    labels[0:2, 0:3, 0:3] = 1
    labels[2, 3, 3] = 1  # touches the large piece at a corner: one piece
    labels[3, 8, 8] = 1
    labels[0, 6:8, 6:8] = 2
    labels[3, 0, 5] = 2
    kept = labels.copy()
    kept[3, 8, 8] = kept[3, 0, 5] = 0
    assert np.array_equal(largest_pieces(labels), kept)


def test_left_and_right_change_places_only_where_the_model_tells_them_by_side() -> None:
    labels = ("liver", "right_kidney", "left_kidney", "left_lung")
    assert mirrored_classes(labels, sides_keep=False) == (0, 1, 3, 2, 4)  # left_lung has no counterpart
    assert mirrored_classes(labels, sides_keep=True) == (0, 1, 2, 3, 4)


class Bright(nn.Module):
    """Answers class 1 for bright pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        bright = pixels[:, 1:2] * 10
        return torch.cat([torch.full_like(bright, 5.0), bright], 1)


class BySide(Bright):
    """Answers class 1 for the brighter pixels of the picture's left half, class 2 for those of its right half."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        bright = pixels[:, 1:2] * 10
        left = (torch.arange(pixels.shape[-1]) < pixels.shape[-1] // 2).float()
        return torch.cat([torch.full_like(bright, 5.0), bright * left, bright * (1 - left)], 1)


def test_flipping_changes_nothing_for_a_model_that_has_no_favourite_side() -> None:
    """The mirrored answer comes back to its place, under its own name, also where slices are not square."""
    volume = np.full((2, 16, 12), -1000, np.int16)
    volume[:, 4:7, 1:4] = volume[:, 9:12, 7:11] = 1000
    input = Input(16, WINDOW, "repeat", (0.0,) * 3, (1.0,) * 3)  # pyright: ignore[reportArgumentType]
    assert np.array_equal(predict_volume(Bright(), volume, input, mirrored=(0, 1)), volume > 0)
    square = np.pad(volume, ((0, 0), (0, 0), (2, 2)), constant_values=-1000)
    alone = predict_volume(BySide(), square, input)
    assert np.array_equal(predict_volume(BySide(), square, input, mirrored=(0, 2, 1)), alone)
    assert not np.array_equal(predict_volume(BySide(), square, input, mirrored=(0, 1, 2)), alone)
