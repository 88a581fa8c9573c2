"""A phantom patient is reproducible, anatomically in order, and readable by whoever reads BTCV."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.nifti1 import load
from nibabel.orientations import aff2axcodes
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion
from scipy.ndimage import label as components

from pipelines.phantom import LABELS, PHASES, PORTAL_HU, UPPER_ABDOMEN, VOLUME_ML, Patient, patient, write

SEEDS = (0, 1, 3)  # stored LAS, LPS and RAS; the second has no gallbladder
PORTAL_ONLY = replace(UPPER_ABDOMEN, phases={"portal-venous": PHASES["portal-venous"]})
SMALL = replace(UPPER_ABDOMEN, grid=(48, 48), spacing_mm=(6.5, 8), slice_mm=(10, 11), slices=(12, 20))


@pytest.fixture(scope="module")
def patients() -> list[Patient]:
    """Few: under the type-checking hook each costs about 0.3 s."""
    return [patient(seed, PORTAL_ONLY) for seed in SEEDS]


def volume_ml(scan: Patient, organ: str) -> float:
    voxel_mm3 = abs(np.linalg.det(scan.affine[:3, :3]))
    return float(np.count_nonzero(scan.label == LABELS[organ]) * voxel_mm3 / 1000)


def centroid_mm(scan: Patient, organ: str) -> NDArray[np.float64]:
    """World position (right, anterior, superior) of the organ's middle."""
    return apply_affine(scan.affine, np.argwhere(scan.label == LABELS[organ]).mean(0))


def core_hu(scan: Patient, organ: str) -> float:
    """Median inside the organ, away from its edge: partial volume and vessels do not count."""
    core = binary_erosion(scan.label == LABELS[organ])
    return float(np.median(scan.image[np.nonzero(core)]))


def assert_anatomy_in_order(scan: Patient) -> None:
    at = {organ: centroid_mm(scan, organ) for organ, raw in LABELS.items() if (scan.label == raw).any()}
    right, left, spine = at["liver"][0], at["spleen"][0], at["aorta"][0]
    assert left < spine < right, "RAS+: x grows to the patient's right"
    assert at["left_kidney"][0] < spine < at["vena_cava"][0] < at["right_kidney"][0]
    assert at["stomach"][0] < at["liver"][0]
    assert "gallbladder" not in at or at["gallbladder"][0] > spine
    assert at["pancreas"][1] > at["aorta"][1], "the pancreas crosses in front of the aorta"
    assert at["stomach"][1] > max(at["left_kidney"][1], at["spleen"][1])
    assert at["liver"][2] > at["right_kidney"][2]


def test_a_seed_is_a_patient() -> None:
    first, again, other = patient(3, SMALL), patient(3, SMALL), patient(4, SMALL)
    for name in ("image", "label", "affine"):
        assert getattr(first, name).tobytes() == getattr(again, name).tobytes()
    assert first.image.shape != other.image.shape or not np.array_equal(first.image, other.image)


def test_neither_reads_nor_moves_the_global_random_state() -> None:
    np.random.seed(1)
    before = patient(0, SMALL).image
    expected = np.random.RandomState(1).random()
    assert np.random.random() == expected
    assert np.array_equal(before, patient(0, SMALL).image)


def test_a_patient_is_an_abdominal_scan(patients: Sequence[Patient]) -> None:
    for scan in patients:
        i, j, k = scan.image.shape
        x, y, z = voxel_sizes(scan.affine)
        assert (scan.image.dtype, scan.label.dtype, scan.affine.dtype) == (np.int16, np.uint8, np.float64)
        assert scan.label.shape == (i, j, k) and (i, j) == UPPER_ABDOMEN.grid and 32 <= k <= 48
        assert 2.4 <= x <= 3.2 and 2.4 <= y <= 3.2 and 3.5 <= z <= 6
        assert 155 <= k * z <= 235
        assert set(np.unique(scan.label)) <= {0, *LABELS.values()}
        assert np.median(scan.image[:3, :3]) < -900, "air around the body"


@pytest.mark.parametrize("organ", VOLUME_ML)
def test_organs_have_the_volumes_of_the_world(patients: Sequence[Patient], organ: str) -> None:
    low, high = VOLUME_ML[organ]
    volumes = [volume_ml(scan, organ) for scan in patients]
    if organ == "gallbladder":
        volumes = [volume for volume in volumes if volume]
    assert all(0.97 * low <= volume <= 1.03 * high for volume in volumes)
    assert len(set(volumes)) == len(volumes)


def test_the_aorta_is_as_wide_as_the_world_says(patients: Sequence[Patient]) -> None:
    for scan in patients:
        (x, y, _), area = voxel_sizes(scan.affine), (scan.label == LABELS["aorta"]).sum((0, 1))
        diameter_mm = 2 * np.sqrt(np.median(area) * x * y / np.pi)
        assert 15 < diameter_mm < 30  # bent and cut obliquely, so wider limits than the 18-26 of the world
        assert (area > 0).all(), "it runs through every slice"


@pytest.mark.parametrize("organ", LABELS)
def test_an_organ_is_one_piece(patients: Sequence[Patient], organ: str) -> None:
    for scan in patients:
        mask = scan.label == LABELS[organ]
        pieces, _ = cast(tuple[NDArray[np.int32], int], components(mask))
        sizes = np.bincount(pieces.ravel())[1:]
        assert organ == "gallbladder" or sizes.size
        assert not sizes.size or sizes.max() >= 0.9 * sizes.sum()


def test_right_is_right_and_left_is_left(patients: Sequence[Patient]) -> None:
    for scan in patients:
        assert_anatomy_in_order(scan)


@pytest.mark.parametrize("codes", ["LAS", "RPI", "PIR", "SLA"])
def test_the_affine_tells_the_orientation(codes: str) -> None:
    scan = patient(2, replace(SMALL, orientations=(codes,)))
    assert "".join(aff2axcodes(scan.affine)) == codes
    assert_anatomy_in_order(scan)


def test_orientation_changes_how_a_patient_is_stored_and_nothing_else() -> None:
    one, other = (patient(5, replace(SMALL, orientations=(codes,))) for codes in ("RAS", "PIL"))
    images = [nib.as_closest_canonical(nib.Nifti1Image(scan.image, scan.affine)) for scan in (one, other)]
    assert np.array_equal(images[0].get_fdata(), images[1].get_fdata())
    np.testing.assert_allclose(images[0].affine, images[1].affine, atol=1e-3)


@pytest.mark.parametrize("organ", ["liver", "spleen", "pancreas", "aorta", "gallbladder"])
def test_organs_have_the_density_of_the_world(patients: Sequence[Patient], organ: str) -> None:
    low, high = PORTAL_HU[organ]
    for scan in patients:
        if (scan.label == LABELS[organ]).any():
            assert low - 8 <= core_hu(scan, organ) <= high + 8


def test_contrast_orders_the_organs_as_in_the_portal_venous_phase(patients: Sequence[Patient]) -> None:
    for scan in patients:
        assert core_hu(scan, "right_kidney") > core_hu(scan, "liver") > PORTAL_HU["muscle"][1]
        assert core_hu(scan, "aorta") > core_hu(scan, "liver")


def test_the_phase_moves_the_aorta_more_than_the_liver(patients: Sequence[Patient]) -> None:
    native, arterial = (
        patient(SEEDS[0], replace(UPPER_ABDOMEN, phases={name: PHASES[name]})) for name in ("native", "arterial")
    )
    portal = patients[0]
    assert core_hu(native, "aorta") < core_hu(native, "liver") < core_hu(portal, "liver")
    assert core_hu(arterial, "aorta") > core_hu(portal, "aorta") + 100
    assert core_hu(arterial, "liver") < core_hu(portal, "liver")


def test_some_patients_have_no_gallbladder(patients: Sequence[Patient]) -> None:
    assert {volume_ml(scan, "gallbladder") > 0 for scan in patients} == {True, False}
    for seed, probability, present in ((1, 0.0, True), (0, 1.0, False)):  # both are otherwise the other way round
        scan = patient(seed, replace(SMALL, no_gallbladder=probability))
        assert (volume_ml(scan, "gallbladder") > 0) is present


@pytest.mark.parametrize("seed", range(2))
def test_a_wide_world_still_holds_patients(seed: int) -> None:
    wide = replace(
        UPPER_ABDOMEN,
        hu={name: (low - 60, high + 60) for name, (low, high) in PORTAL_HU.items()},
        volume_ml={name: (0.5 * low, 1.5 * high) for name, (low, high) in VOLUME_ML.items()},
        body_scale=(0.7, 1.25),
        fat_mm=(2, 45),
        shift_mm=8.0,
        deformation_mm=(0, 9),
        noise_hu=(0.5, 40),
        grid=(80, 72),
        spacing_mm=(3, 6),
        slice_mm=(4, 12),
        slices=(10, 60),
        orientations=("LAS", "RPI", "PIR", "SLA"),
    )
    scan = patient(seed, wide)
    assert scan.image.min() >= -1024 and scan.image.max() <= 3071
    assert {LABELS["liver"], LABELS["spleen"], LABELS["aorta"]} <= set(np.unique(scan.label))
    assert centroid_mm(scan, "liver")[0] > centroid_mm(scan, "spleen")[0]


def test_files_are_the_patients_and_are_written_alike_twice(tmp_path: Path) -> None:
    write(tmp_path / "one", [7, 8], SMALL, first_id=4)
    write(tmp_path / "two", [8], SMALL, first_id=5)
    names = ["img/img0004.nii.gz", "img/img0005.nii.gz", "label/label0004.nii.gz", "label/label0005.nii.gz"]
    found = sorted(path.relative_to(tmp_path / "one").as_posix() for path in tmp_path.glob("one/*/*"))
    assert found == names, "and no temporary file stays behind"
    for name in (names[1], names[3]):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    scan = patient(8, SMALL)
    for name, voxels in ((names[1], scan.image), (names[3], scan.label)):
        loaded = load(tmp_path / "one" / name)
        assert loaded.get_data_dtype() == voxels.dtype
        assert np.array_equal(np.asarray(loaded.dataobj), voxels)
        assert loaded.affine is not None and np.array_equal(loaded.affine, scan.affine)
        assert int(loaded.header["qform_code"]) > 0 and int(loaded.header["sform_code"]) > 0
        np.testing.assert_allclose(loaded.get_qform(), loaded.get_sform(), atol=1e-3)


def test_the_bytes_do_not_depend_on_the_number_of_threads() -> None:
    code = "import hashlib; from pipelines.phantom import patient; print(hashlib.sha256(patient(4).image).hexdigest())"
    digests = set()
    for threads in ("1", "2", "3"):
        environment = os.environ | {"OMP_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        digests.add(done.stdout)
    assert len(digests) == 1
