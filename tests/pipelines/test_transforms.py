"""What the backbone sees, and the way back."""

import numpy as np
import pytest
import torch

from pipelines.transforms import WINDOW, Input, augmentation, enlarged_logits, padded, predict_volume, zoom_to

PLAIN = Input(64, WINDOW, "neighbours", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def volume(depth: int = 5, rows: int = 20, columns: int = 30) -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, (depth, rows, columns), dtype=np.int16)


def test_neighbours_are_the_slices_below_at_and_above_and_edges_repeat() -> None:
    hu = volume()
    expected = np.clip((hu.astype(np.float32) + 125) / 400, 0, 1)
    for z, picked in ((2, [1, 2, 3]), (0, [0, 0, 1]), (4, [3, 4, 4])):
        found = PLAIN.slices(hu, z)
        np.testing.assert_allclose(found[:, :20], expected[picked], atol=1e-6)
        assert found.shape == (3, 30, 30) and not found[:, 20:].any()


def test_repeat_shows_one_slice_three_times() -> None:
    single = Input(64, WINDOW, "repeat", (0.0,) * 3, (1.0,) * 3).slices(volume(), 3)  # pyright: ignore
    assert np.array_equal(single[0], single[1]) and np.array_equal(single[0], PLAIN.slices(volume(), 3)[1])


def test_pixels_are_resized_and_normalised() -> None:
    own = Input(8, WINDOW, "repeat", (0.5, 0.25, 0.0), (0.5, 1.0, 2.0))
    pixels = own.pixels(torch.full((1, 3, 4, 4), 0.5))
    assert pixels.shape == (1, 3, 8, 8)
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([0.0, 0.25, 0.25]))


@pytest.mark.parametrize("order", [0, 3])
def test_equal_channels_are_zoomed_once_with_the_same_result(order: int) -> None:
    channel = np.random.default_rng(0).random((1, 24, 24)).astype(np.float32)
    different = np.concatenate([channel, channel, channel + 1])
    alike = zoom_to(np.repeat(channel, 3, 0), 40, order)
    assert np.array_equal(alike[1], zoom_to(different, 40, order)[0]) and alike.shape == (3, 40, 40)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (25, 25)])
def test_a_label_that_goes_in_comes_out(shape: tuple[int, int]) -> None:
    """Padding, resizing and cropping are inverse: no shift, no flip, no transpose."""
    label = np.zeros(shape, np.uint8)
    label[3:9, 11:18] = 1
    label[15:, :4] = 2
    square = torch.from_numpy(padded(label[None])[0]).long()
    logits = torch.nn.functional.one_hot(square, 3).permute(2, 0, 1)[None].float()
    enlarged = torch.nn.functional.interpolate(logits, scale_factor=3, mode="bilinear")
    assert np.array_equal(enlarged_logits(enlarged, *shape)[0].argmax(0).numpy(), label)


def test_a_volume_is_predicted_slice_by_slice_where_it_is() -> None:
    """A model that answers 1 where its input is bright: the mask must be the bright voxels themselves."""

    class Bright(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(1))

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.stack([0.5 - pixels[:, 1], pixels[:, 1] - 0.5], 1)

    hu = np.full((11, 24, 32), -200, np.int16)
    hu[4, 3:9, 20:30] = 300
    hu[10, 12:, :5] = 300
    same = Input(32, WINDOW, "neighbours", (0.0,) * 3, (1.0,) * 3)  # pyright: ignore
    assert np.array_equal(predict_volume(Bright(), hu, same), (hu > 0).astype(np.uint8))


@pytest.mark.parametrize("name", ["default", "samed"])
def test_augmentation_follows_its_seed_and_moves_image_and_label_together(name: str) -> None:
    image = np.zeros((3, 40, 40), np.float32)
    label = np.zeros((1, 40, 40), np.uint8)
    image[:, 10:26, 8:30] = 1
    label[:, 10:26, 8:30] = 1
    augment = augmentation(name)  # pyright: ignore

    def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
        augment.set_random_state(seed=seed)
        data = augment({"image": image, "label": label})
        return np.asarray(data["image"]), np.asarray(data["label"])  # pyright: ignore

    for seed in range(20):
        first, again = drawn(seed), drawn(seed)
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        bright, inside = first[0][0] > 0.5, first[1][0] > 0
        overlap = 2 * (bright & inside).sum() / (bright.sum() + inside.sum())
        assert overlap > 0.93 and set(np.unique(first[1])) <= {0, 1}
    assert not np.array_equal(drawn(0)[0], drawn(1)[0])


def test_samed_goes_by_way_of_its_224_grid() -> None:
    samed = Input(512, WINDOW, "repeat", (0.0,) * 3, (1.0,) * 3, slice_size=224)  # pyright: ignore
    small = samed.slices(volume(3, 64, 64), 1)
    assert small.shape == (3, 224, 224) and samed.enlarged(small, order=3).shape == (3, 512, 512)
    labels = samed.enlarged(samed.labels(np.eye(64, dtype=np.uint8) * 5), order=0)
    assert labels.shape == (1, 512, 512) and set(np.unique(labels)) <= {0, 5}
