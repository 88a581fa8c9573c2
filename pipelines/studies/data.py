"""What the studies train and score on, prepared on first use: phantom, shifted and ct-case-a.

phantom     the demonstration's patients
shifted     patients and scanners of a population that pre-training never drew from
ct-case-a   a real CT, its slices split into training and test with a gap between
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import yaml

from pipelines.anatomy import Range
from pipelines.phantom import UPPER_ABDOMEN, World, write
from surm_seg.errors import BadInput
from surm_seg.volume import read_image, read_labels

PHANTOM, SHIFTED, CT = "phantom", "shifted", "ct-case-a"

Prepare = Callable[[list[str]], None]
"""`surm-seg prepare` with these arguments; raises where it fails."""

MIRROR_HU = 150
"""HU and MIRROR_HU - HU are exchanged in the shifted world: 75 HU, the middle of the training window, stays."""

FIRST_SEED = 900_000  # of the shifted patients: far from every data set's, below those of pre-training
FIRST_ID = 101  # a number that is no case of the Synapse benchmark, whose layout they are written in

CT_LABELS = "labels_total_v1_104class.nii.gz"
CT_FILES = {"ct.nii.gz": read_image, CT_LABELS: read_labels}
CT_BLOCKS: Mapping[str, tuple[int, int]] = {"below": (56, 88), "held-out": (91, 102), "above": (105, 112)}
"""Slices of 3 mm [start, stop) from the lowest, 0: every organ in both parts, three slices (9 mm) between them."""

CT_NOTE = (
    "ct-case-a is one patient: slices 56-87 and 105-111 are trained on, 91-101 scored, the three between left out. "
    "Both are of one scan, so this shows how a few slices are carried on to their neighbours, not how other patients "
    "are segmented; one patient allows no test. Its reference is TotalSegmentator's prediction, not a human's."
)
SHIFTED_NOTE = (
    "shifted: patients outside all that pre-training drew from: contrast inverted (150 - HU), noise, texture, voxels, "
    "bodies and deformation beyond its ranges."
)


def shifted_world() -> World:
    """A population outside the one that `pipelines.pretrain.wide_world` draws from, in each of these respects."""
    hu: dict[str, Range] = {name: (MIRROR_HU - high, MIRROR_HU - low) for name, (low, high) in UPPER_ABDOMEN.hu.items()}
    low, high = UPPER_ABDOMEN.hu["cortex"]
    hu["cortex"] = (-high, -low)  # it comes on top of the kidney's
    return replace(
        UPPER_ABDOMEN,
        hu=hu,
        phases={"inverted": (1, {})},
        body_scale=(1.17, 1.25),
        shift_mm=7.5,
        relief_mm=3.0,
        deformation_mm=(8.5, 10),
        texture_hu=(14.5, 17),
        noise_hu=(37, 45),
        spacing_mm=(3.8, 4.2),
        slice_mm=(7.5, 9),
        slices=(16, 40),
    )


def prepared(name: str, folder: Path, patients: int, ct: Path, prepare: Prepare) -> Path:
    """The prepared data set of this name below FOLDER, made where it is missing; a quarter of its patients is held out.

    Args:
        patients: how many to generate.
        ct: folder of the real CT and its label map.

    Raises:
        BadInput: the real CT is not there, or damaged.
    """
    target = folder / (name if name == CT else f"{name}-{patients}")
    if (target / "dataset.json").exists():
        return target
    if name == PHANTOM:
        options = ["phantom", "--cases", str(patients)]
    else:
        options = _shifted(target / "source", patients) if name == SHIFTED else _ct(target / "source", ct)
    prepare([*options, "--output", str(target)])
    return target


def _shifted(source: Path, patients: int) -> list[str]:
    write(source, range(FIRST_SEED, FIRST_SEED + patients), shifted_world(), FIRST_ID)
    names = [f"case{FIRST_ID + n:04d}" for n in range(patients)]
    kept = patients - max(1, patients // 4)
    return [str(source), "--format", "synapse", *_split(source, {"train": names[:kept], "test": names[kept:]})]


def _ct(source: Path, ct: Path) -> list[str]:
    """Blocks of the scan as subjects of their own: a slice then sees no neighbour across the gap."""
    for name, read in CT_FILES.items():
        if not (ct / name).is_file():
            raise BadInput("no-ct", f"{ct} holds no {name}; name the folder of ct-case-a by --ct.")
        volume = read(ct / name)
        whole = nib.Nifti1Image(volume.voxels, volume.grid.affine)
        for block, (start, stop) in CT_BLOCKS.items():
            (source / block).mkdir(parents=True, exist_ok=True)
            whole.slicer[:, :, start:stop].to_filename(source / block / name)
    layout = ["--format", "totalsegmentator", "--label", CT_LABELS, "--classes", "v1"]
    return [str(source), *layout, *_split(source, {"train": ["above", "below"], "test": ["held-out"]})]


def _split(source: Path, splits: Mapping[str, list[str]]) -> list[str]:
    path = source / "split.yaml"
    path.write_text(yaml.safe_dump(dict(splits)))
    return ["--split", str(path)]
