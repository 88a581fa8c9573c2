"""The Synapse benchmark as SAMed (arXiv 2304.13785) set it: the arms, what is quoted, where data and weights are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.formats.synapse import BENCHMARK
from pipelines.phantom import on_grid, write
from surm_seg.backbones.sam import SIZES

BACKBONE = "sam_vit_b"
WEIGHTS_URL = str(SIZES[BACKBONE].url)
SIDE = 512  # pixels of a slice

WHERE_DATA = (
    'The benchmark is the challenge "Beyond the Cranial Vault", synapse.org/#!Synapse:syn3193805 (after '
    "registration): give --source the folder that holds img/img0001.nii.gz and label/label0001.nii.gz, or TransUNet's "
    "arrays of the same cases; --rehearse needs neither data nor weights."
)
WHERE_WEIGHTS = (
    f"SAM's ViT-B checkpoint, as segment-anything's README links it, is {WEIGHTS_URL}; give it as --weights."
)


@dataclass(frozen=True)
class Arm:
    """What is trained: deltas of this structure on q and v of every block, beside the whole decoder."""

    name: str
    structure: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)


ARMS = (
    Arm("lora-r4", "low_rank", {"rank": 4}),
    Arm("lora-r1", "low_rank", {"rank": 1}),
    Arm("circulant", "circulant"),
    Arm("skew-circulant", "skew_circulant"),
    Arm("toeplitz", "toeplitz"),
    Arm("kronecker", "kronecker"),
    Arm("displacement", "displacement", {"rank": 2}),
    Arm("monarch", "monarch", {"blocks": 4, "rank": 4}),
)
"""The first one is SAMed's own, and what the others are compared with."""

RECIPE = ("--recipe", "samed", "--precision", "float32")
"""SAMed's script computes in float32 throughout."""

REHEARSAL_SIDE = 64  # pixels of a generated slice
REHEARSAL_SLICES = (10, 14)
REHEARSAL_SEED = 700_000  # of the first patient: far from every data set's, below those of pre-training
REHEARSAL_JOBS = 2  # so small a model does not gain from a second processor
# fmt: off
REHEARSAL = (
    "--backbone", "sam_tiny", "--image_size", "128", "--slice_size", "64", "--steps", "40",
    "--warmup", "5", "--horizon", "50", "--batch_size", "8",
)
# fmt: on
"""The same recipe at a size that minutes are enough for."""


@dataclass(frozen=True)
class Quoted:
    """A published result on the 12 test cases, by the rules that `samed-2023` repeats.

    Args:
        dice: percent, mean over cases and organs.
        hd95: voxels.
        organs: Dice in percent.
        encoder: trained parameters beside a frozen encoder, as its rank and roles give them.
    """

    method: str
    source: str
    dice: float
    hd95: float
    organs: Mapping[str, float] = field(default_factory=dict, hash=False)
    encoder: int | None = None


def _organs(*dice: float) -> dict[str, float]:
    """In the order of the papers' tables."""
    names = ("aorta", "gallbladder", "left_kidney", "right_kidney", "liver", "pancreas", "spleen", "stomach")
    return dict(zip(names, dice, strict=True))


_LORA_B, _LORA_H = 12 * 2 * 2 * 4 * 768, 32 * 2 * 2 * 4 * 1280  # blocks, q and v, two factors, rank, width
_PAPER, _README = "arXiv 2304.13785", "arXiv 2304.13785 and README of hitachinsk/SAMed"
# fmt: off
QUOTED = (
    Quoted("SAMed", _README, 81.88, 20.64, _organs(87.77, 69.11, 80.45, 79.95, 94.80, 72.17, 88.72, 82.06), _LORA_B),
    Quoted("SAMed_s", _PAPER, 77.78, 31.72, encoder=_LORA_B),
    Quoted("SAMed_h, ViT-H", "README of hitachinsk/SAMed", 84.30, 16.02,
           _organs(87.81, 74.72, 85.76, 81.52, 95.76, 70.63, 90.46, 87.77), _LORA_H),
    Quoted("TransUNet", "arXiv 2102.04306", 77.48, 31.69,
           _organs(87.23, 63.13, 81.87, 77.02, 94.08, 55.86, 85.08, 75.62)),
    Quoted("Swin-Unet", "arXiv 2105.05537", 79.13, 21.55,
           _organs(85.47, 66.53, 83.28, 79.61, 94.29, 56.58, 90.66, 76.60)),
    Quoted("MISSFormer", "arXiv 2109.07162", 81.96, 18.20,
           _organs(86.99, 68.65, 85.21, 82.00, 94.41, 65.67, 91.92, 80.81)),
)
# fmt: on


def write_rehearsal(folder: Path, side: int = REHEARSAL_SIDE, slices: tuple[int, int] = REHEARSAL_SLICES) -> Path:
    """Generated patients under the benchmark's 30 numbers and in its layout; what is there is not made again."""
    world = on_grid(side, slices)
    for number in sorted(BENCHMARK):
        if not (folder / "label" / f"label{number:04d}.nii.gz").exists():
            write(folder, [REHEARSAL_SEED + number], world, first_id=number)
    return folder
