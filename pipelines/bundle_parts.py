"""What the configuration of an exported MONAI bundle names: its network, reader, inferer, writer and evaluator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from monai.data.dataset import Dataset
from monai.data.image_reader import ImageReader
from monai.data.image_writer import ImageWriter
from monai.inferers.inferer import Inferer
from monai.utils.enums import MetaKeys, SpaceKeys
from monai.utils.misc import ImageMetaKey
from safetensors.torch import load_file
from torch import Tensor, nn

from pipelines.inference import Trained
from pipelines.transforms import Input
from surm_seg import backbones
from surm_seg.volume import read_grid, read_image, write_labels


def network(weights: str, backbone: str, options: dict[str, Any], classes: int, image_size: int) -> nn.Module:
    """A merged model: normalised pixels (batch, 3, size, size) -> logits (batch, classes + 1, h, w).

    Args:
        weights: safetensors file with every tensor of the model.
        options: the backbone's.
        classes: organs.
    """
    model = backbones.make(backbone, **options).build(classes, image_size, "random")
    model.load_state_dict(load_file(weights))
    return model.eval()


class VolumeReader(ImageReader):
    """For LoadImage: a volume as int16 HU with its affine, read with the suspicion of `surm_seg.volume`."""

    def verify_suffix(self, filename: Any) -> bool:
        return True

    def read(self, data: Any, **kwargs: Any) -> Any:
        """The path itself: where `read` fails, LoadImage tries MONAI's readers, which accept damaged files."""
        return data

    def get_data(self, img: Sequence[str]) -> tuple[np.ndarray, dict[str, Any]]:
        """Voxels (i, j, k) and their geometry; raises BadInput."""
        volume = read_image(img[0])
        return volume.voxels, {
            MetaKeys.AFFINE: volume.grid.affine.copy(),
            MetaKeys.ORIGINAL_AFFINE: volume.grid.affine.copy(),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.SPATIAL_SHAPE: np.asarray(volume.grid.shape),
            MetaKeys.ORIGINAL_CHANNEL_DIM: "no_channel",
        }


class VolumeInferer(Inferer):
    """CT volumes in HU, axes growing to Left, Posterior, Superior -> label maps, by the path that `predict` takes.

    Args:
        labels: organs; label value = position + 1.
        precision: float32 or bfloat16.
        input: the fields of `pipelines.transforms.Input`.
    """

    def __init__(self, labels: Sequence[str], precision: str, input: Mapping[str, Any]) -> None:
        super().__init__()
        self.labels, self.precision = tuple(labels), precision
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in input.items()}
        self.input = Input(**values)

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """(batch, 1, x, y, z) -> the same shape, uint8."""
        model = Trained(network, self.input, self.labels, self.precision, {})
        found = torch.empty_like(inputs, dtype=torch.uint8, device="cpu")
        for volume, result in zip(inputs[:, 0], found[:, 0], strict=True):
            labels: UInt8[np.ndarray, "z y x"] = model(volume.numpy(force=True).astype(np.int16).T)
            result[:] = torch.from_numpy(labels.T)
        return found


class LabelWriter(ImageWriter):
    """For SaveImage: a label map on the grid of the volume that was loaded, its header bit for bit; atomic."""

    voxels: np.ndarray
    source: str

    def set_data_array(self, data_array: Any, **kwargs: Any) -> None:
        """Labels, (1, i, j, k)."""
        self.voxels = np.asarray(data_array[0]).astype(np.uint8)

    def set_metadata(self, meta_dict: Mapping[str, Any] | None, **options: Any) -> None:
        assert meta_dict is not None
        self.source = meta_dict[ImageMetaKey.FILENAME_OR_OBJ]

    def write(self, filename: str | PathLike[str], verbose: bool = False, **kwargs: Any) -> None:
        write_labels(str(filename), self.voxels, read_grid(self.source))


@dataclass(frozen=True)
class Evaluator:
    """Predict every case of a dataset, one after the other.

    Args:
        dataset: of {image: (1, x, y, z)}.
        postprocessing: takes {image, pred} and keeps the result.
    """

    dataset: Dataset
    network: nn.Module
    inferer: Inferer
    postprocessing: Callable[[Mapping[str, Any]], Any]

    def run(self) -> None:
        for number in range(len(self.dataset)):
            case: Any = self.dataset[number]
            found = self.inferer(case["image"][None], self.network)
            self.postprocessing({**case, "pred": found[0]})
