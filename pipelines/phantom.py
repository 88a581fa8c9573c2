"""Believable upper-abdomen CT patients made of formulas: a demonstration data set that needs no hospital.

A patient is the body of `pipelines.anatomy` scaled and bent by a smooth random displacement, its organs
shifted and grown to volumes drawn from a `World`, then scanned: blurred, made noisy and stored as CT is.
"""

import argparse
import gzip
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from pipelines.anatomy import LABELS, Array, Number, Range, Scene, back, chest, organs, trunk

__all__ = ["LABELS", "PHASES", "PORTAL_HU", "UPPER_ABDOMEN", "VOLUME_ML", "Patient", "World", "patient", "write"]

# fmt: off
PORTAL_HU: Mapping[str, Range] = {  # an adult about 70 s after injection; "cortex" comes on top of "kidney"
    "gas": (-950, -880), "lung": (-870, -790), "fat": (-112, -92), "skin": (20, 45), "muscle": (50, 65),
    "cartilage": (90, 130), "disc": (75, 105), "canal": (25, 40), "marrow": (150, 230), "bone": (330, 480),
    "bowel": (65, 90), "stool": (5, 45), "oesophagus": (45, 65), "stomach": (10, 45), "gallbladder": (2, 18),
    "liver": (98, 124), "spleen": (108, 134), "kidney": (160, 205), "cortex": (5, 20), "pancreas": (80, 108),
    "aorta": (135, 170), "vein": (132, 165), "heart": (105, 130),
}
PHASES: Mapping[str, tuple[Number, Mapping[str, Number]]] = {  # odds, and HU added to the portal-venous values
    "portal-venous": (0.8, {}),
    "arterial": (0.12, {"aorta": 150, "heart": 80, "vein": -60, "kidney": -50, "cortex": 75, "liver": -35,
                        "spleen": 10, "pancreas": 15}),
    "native": (0.08, {"aorta": -108, "heart": -75, "vein": -106, "kidney": -150, "cortex": -12, "liver": -53,
                      "spleen": -72, "pancreas": -54}),
}
VOLUME_ML: Mapping[str, Range] = {
    "liver": (1200, 1800), "spleen": (120, 300), "right_kidney": (130, 200), "left_kidney": (130, 200),
    "gallbladder": (20, 50), "stomach": (150, 400), "pancreas": (60, 110),
}
# fmt: on


@dataclass(frozen=True)
class World:
    """A population of patients and scanners; every `Range` is (low, high) of a uniform draw."""

    hu: Mapping[str, Range] = field(default_factory=lambda: PORTAL_HU)
    phases: Mapping[str, tuple[Number, Mapping[str, Number]]] = field(default_factory=lambda: PHASES)
    volume_ml: Mapping[str, Range] = field(default_factory=lambda: VOLUME_ML)
    aorta_mm: Range = (18, 26)  # diameter
    no_gallbladder: Number = 0.2  # probability
    body_scale: Range = (0.93, 1.07)  # 1 is the reference adult, 282 x 190 mm inside the subcutaneous fat
    fat_mm: Range = (7, 24)  # subcutaneous
    shift_mm: Number = 2.5  # SD of an organ's position along each axis
    relief_mm: Number = 1.5  # SD of an organ's surface
    deformation_mm: Range = (2, 4)  # SD of the displacement along each axis
    texture_hu: Range = (2, 5)  # SD inside an organ
    noise_hu: Range = (8, 16)  # SD
    partial_volume: Range = (0.8, 1.3)  # width of an edge, in voxels
    grid: tuple[int, int] = (128, 128)
    spacing_mm: Range = (2.4, 3.2)  # in plane; fitted to the body within these bounds
    slice_mm: Range = (3.5, 6)
    slices: tuple[int, int] = (32, 48)
    extent_mm: Range = (175, 215)  # along z, before `body_scale`
    orientations: tuple[str, ...] = ("LAS", "RAS", "LPS")  # axis codes of the stored array


UPPER_ABDOMEN = World()


def on_grid(side: int, slices: tuple[int, int], world: World = UPPER_ABDOMEN) -> World:
    """The same population, scanned with side x side pixels and fewest to most slices over the same extent."""
    pixel = world.grid[0] / side
    low, high = world.spacing_mm
    depth = world.extent_mm[0] / slices[1], world.extent_mm[1] / slices[0]
    return replace(world, grid=(side, side), spacing_mm=(pixel * low, pixel * high), slices=slices, slice_mm=depth)


@dataclass(frozen=True)
class Patient:
    """One scan as stored: `image` in HU and `label` in BTCV ids, both [i, j, k]; `affine` to RAS+ mm."""

    image: NDArray[np.int16]
    label: NDArray[np.uint8]
    affine: NDArray[np.float64]


def smooth_field(rng: np.random.Generator, axes: Sequence[Array], knot_mm: Number) -> Array:
    """A Gaussian random field on a grid: mean 0, variance 1 everywhere, smooth over about `knot_mm`."""
    bases = []
    for axis in axes:
        knots = np.arange(axis[0] - knot_mm, axis[-1] + 2 * knot_mm, knot_mm)
        basis = np.exp(-0.5 * ((axis[:, None] - knots) / (0.7 * knot_mm)) ** 2)
        bases.append((basis / np.linalg.norm(basis, axis=1, keepdims=True)).astype(np.float32))
    values = rng.standard_normal([basis.shape[1] for basis in bases], dtype=np.float32)
    for basis in bases:  # each turn contracts the leading axis of knots and appends an axis of voxels
        # Not by BLAS, whose last bit depends on how it shares the work: the same seed must give the same bytes.
        values = np.einsum("k...,xk->...x", values, basis)
    return values


def empty_scene(rng: np.random.Generator, world: World, tissue: Mapping[str, Number]) -> Scene:
    """A patient of a population before anything is painted: size, voxels, bending and textures; all is air."""
    fat_mm, build = rng.uniform(*world.fat_mm), rng.random()
    scale = world.body_scale[0] + build * (world.body_scale[1] - world.body_scale[0])
    fitted = 2 * scale * (141 + 1.25 * fat_mm) * rng.uniform(1.03, 1.25) / world.grid[0]
    plane, depth = float(np.clip(fitted, *world.spacing_mm)), rng.uniform(*world.slice_mm)
    count = int(np.clip(round(rng.uniform(*world.extent_mm) * scale / depth), *world.slices))
    shape, size_mm = (*world.grid, count), (plane, plane, depth)
    edge_mm = rng.uniform(*world.partial_volume) * sum(size_mm) / 3
    steps, middle = np.array(size_mm) / scale, rng.normal((0, 0, 13), 4)  # centred 13 mm above the kidneys
    axes = [(np.arange(n) - (n - 1) / 2) * d + m for n, d, m in zip(shape, steps, middle, strict=True)]
    straight = np.meshgrid(*(axis.astype(np.float32) for axis in axes), indexing="ij")
    strength = rng.uniform(*world.deformation_mm)
    x, y, z = (p + strength * smooth_field(rng, axes, 65) for p in straight)
    return Scene(
        rng=rng,
        tissue=tissue,
        volume_ml=world.volume_ml,
        aorta_mm=world.aorta_mm,
        no_gallbladder=world.no_gallbladder,
        fat_mm=fat_mm,
        build=build,
        shift_mm=world.shift_mm,
        size_mm=size_mm,
        edge_mm=edge_mm,
        axes=axes,
        points=(x, y, z),
        reach_mm=4.5 * world.deformation_mm[1],
        texture=rng.uniform(*world.texture_hu) * smooth_field(rng, axes, 7),
        relief=world.relief_mm * smooth_field(rng, axes, 22),
        hu=np.full(shape, -1000, dtype=np.float32),
        label=np.zeros(shape, dtype=np.uint8),
        free=np.zeros(shape, dtype=np.float32),
    )


def patient(seed: int, world: World = UPPER_ABDOMEN) -> Patient:
    """One patient of a population; equal seeds and worlds give equal bytes. Costs about 0.2 s on one core."""
    rng = np.random.default_rng(seed)
    odds = np.array([share for share, _ in world.phases.values()])
    _, added = list(world.phases.values())[rng.choice(len(odds), p=odds / odds.sum())]
    tissue = {name: rng.uniform(*bounds) + added.get(name, 0) for name, bounds in world.hu.items()}
    tissue["cortex"] += tissue["kidney"]
    scene = empty_scene(rng, world, tissue)
    for add in (trunk, chest, back, organs):
        add(scene)
    # The scanner: a point spread, and noise that is smooth in the plane because reconstruction filters it.
    noise = gaussian_filter(rng.standard_normal(scene.hu.shape, dtype=np.float32), (0.7, 0.7, 0.3))
    noise *= rng.uniform(*world.noise_hu) / noise.std()
    hu = gaussian_filter(scene.hu, (0.45, 0.45, 0.35)) + noise
    image = np.clip(np.rint(hu), -1024, 3071).astype(np.int16)

    affine = np.diag([*scene.size_mm, 1])
    affine[:3, 3] = -0.5 * np.array(image.shape) * scene.size_mm + rng.normal(0, (8, 8, 60))
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(str(rng.choice(world.orientations))))
    affine = (affine @ inv_ornt_aff(turn, image.shape)).astype(np.float32)  # all that a NIfTI header keeps
    turned = [np.ascontiguousarray(apply_orientation(voxels, turn)) for voxels in (image, scene.label)]
    return Patient(image=turned[0], label=turned[1], affine=affine.astype(np.float64))


def write(folder: Path, seeds: Sequence[int], world: World = UPPER_ABDOMEN, first_id: int = 1) -> None:
    """Write patients as BTCV does: `img/img0001.nii.gz` (int16, HU) and `label/label0001.nii.gz` (uint8).

    Each file appears whole or not at all, the label after the image; writing again gives the same bytes.
    """
    for number, seed in enumerate(seeds, start=first_id):
        scan = patient(seed, world)
        for kind, voxels in (("img", scan.image), ("label", scan.label)):
            nifti = nib.Nifti1Image(voxels, scan.affine)
            nifti.header.set_xyzt_units("mm")
            nifti.set_sform(scan.affine, code="scanner")
            nifti.set_qform(scan.affine, code="scanner")
            target = folder / kind / f"{kind}{number:04d}.nii.gz"
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{target.name}.{os.getpid()}.part")
            partial.write_bytes(gzip.compress(nifti.to_bytes(), compresslevel=6, mtime=0))
            os.replace(partial, target)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipelines.phantom", description="Write phantom CT patients.")
    parser.add_argument("--output", type=Path, required=True, help="folder that receives img/ and label/")
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others count up from it")
    options = parser.parse_args()
    write(options.output, range(options.seed, options.seed + options.cases))


if __name__ == "__main__":
    main()
