"""TransUNet's arrays: the same patient gives the same data set as its raw volumes, or a sentence that says why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest

from pipelines import formats, phantom
from pipelines.formats import Options, Source
from pipelines.organ_axes import TABLES, orientation
from surm_seg.cases import Dataset
from surm_seg.cli import Reporter
from surm_seg.errors import BadConfig, BadInput
from surm_seg.labels import SYNAPSE
from surm_seg.nifti import UNITS_UNKNOWN
from surm_seg.prepare import PrepareConfig, plan, prepare
from surm_seg.report import score_pair

WORLD = phantom.World(grid=(224, 224), spacing_mm=(1.4, 2.0), slices=(30, 36), no_gallbladder=0)
TRAIN, TEST = 5, 1  # case numbers of the benchmark
RAW = {"spleen": 1, "right_kidney": 2, "left_kidney": 3, "gallbladder": 4, "liver": 6, "stomach": 7, "aorta": 8} | {
    "pancreas": 11
}
View = Callable[[np.ndarray], np.ndarray]
# How scripts leave the slices: as a radiologist sees them, or as nibabel's arrays lie; arguments have axes (z, y, x).
AXES: dict[str, View] = {
    "rows to posterior": lambda view: view,
    "rows to left": lambda view: view.transpose(0, 2, 1),
    "rows to right, columns to anterior": lambda view: view.transpose(0, 2, 1)[:, ::-1, ::-1],
    "rows to anterior, slices to inferior": lambda view: view[::-1, ::-1],
}


def values(raw: np.ndarray, table: str) -> np.ndarray:
    """Raw BTCV labels as floats 0 to 8."""
    mapped = np.zeros(raw.shape, np.float32)
    for value, organ in enumerate(TABLES[table], 1):
        mapped[raw == RAW[organ]] = value
    return mapped


def write(folder: Path, number: int, image: np.ndarray, label: np.ndarray) -> None:
    """One case as TransUNet distributes it, slices first: the test case as HDF5, the others as slices."""
    if number == TEST:
        (folder / "test_vol_h5").mkdir(parents=True, exist_ok=True)
        with h5py.File(folder / "test_vol_h5" / f"case{number:04d}.npy.h5", "w") as file:
            file["image"], file["label"] = image, label
        return
    (folder / "train_npz").mkdir(parents=True, exist_ok=True)
    for k, (plane, organs) in enumerate(zip(image, label, strict=True)):
        np.savez(folder / "train_npz" / f"case{number:04d}_slice{k:03d}.npz", image=plane, label=organs)


def made(source: Path, output: Path, **options: object) -> Dataset:
    config = PrepareConfig(source=str(source), output=output, workers=1, **options)  # type: ignore[arg-type]
    return prepare(config, Reporter(quiet=True))


def listed(source: Path, **options: object) -> Source:
    return formats.read(source, "auto", Options(output=source / "out", **options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def btcv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("btcv")
    for number in (TRAIN, TEST):
        phantom.write(folder, [number], WORLD, first_id=number)
    return folder


@pytest.fixture(scope="module")
def raw(btcv: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The phantoms as the raw layout is prepared."""
    return made(btcv, tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def scans(btcv: Path) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Image scaled to [0, 1] and raw labels of each phantom, axes (z, y, x) growing to Superior, Posterior, Left."""

    def view(kind: str, number: int) -> np.ndarray:
        nifti = nib.as_closest_canonical(nib.load(btcv / kind / f"{kind}{number:04d}.nii.gz"))
        return np.asarray(nifti.dataobj).transpose(2, 1, 0)[:, ::-1, ::-1]

    def scaled(hu: np.ndarray) -> np.ndarray:
        return (np.clip(hu.astype(np.float32), -125, 275) + 125) / 400

    return {number: (scaled(view("img", number)), view("label", number)) for number in (TRAIN, TEST)}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A case of three black 224 slices without organs: enough for everything that is refused before orientation."""
    write(tmp_path, TRAIN, np.zeros((3, 224, 224), np.float32), np.zeros((3, 224, 224), np.float32))
    return tmp_path


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("table", TABLES)
def test_the_same_patients_are_prepared_as_from_the_raw_layout(
    axes: str, table: str, raw: Dataset, scans: dict, tmp_path: Path
) -> None:
    for number, (image, label) in scans.items():
        write(tmp_path / "in", number, AXES[axes](image), AXES[axes](values(label, table)))
    ours = made(tmp_path / "in", tmp_path / "out")
    assert ours.labels == raw.labels == SYNAPSE
    assert [(c.id, c.split) for c in ours.cases] == [("case0001", "test"), ("case0005", "train")]
    for theirs in raw.cases:
        case = ours.case(theirs.id)
        np.testing.assert_array_equal(case.label, theirs.label)
        np.testing.assert_array_equal(case.image, np.clip(theirs.image, -125, 275))
        note = json.loads((tmp_path / "out/source/notes" / f"{case.id}.json").read_text())
        assert note["label_table"] == table and note["orientation"].startswith("sure: at least 3 pairs")
        lies = np.asarray(case.grid.axcodes)
        assert [lies[2], lies[0], lies[1]] == note["slices_rows_columns_grow_to"]


def test_where_the_spacing_is_unknown_distances_in_mm_are_undefined(scans: dict, tmp_path: Path) -> None:
    image, label = scans[TEST]
    write(tmp_path / "in", TEST, image, values(label, "transunet"))
    dataset = made(tmp_path / "in", tmp_path / "out")
    case = dataset.cases[0]
    assert case.spacing is None and case.label is not None
    assert case.grid.xyzt_units == UNITS_UNKNOWN
    rows = score_pair(case.label, case.label, dataset.labels, case.spacing, case.id)
    assert {row.score.hd95_mm for row in rows} == {row.score.reference_ml for row in rows} == {None}
    assert {row.score.dice for row in rows if not row.score.absent} == {1.0}


def test_slices_of_512_pixels_are_read_too(scans: dict, tmp_path: Path) -> None:
    image, label = (np.pad(view, ((0, 0), (144, 144), (144, 144))) for view in scans[TRAIN])
    write(tmp_path / "in", TRAIN, image, values(label, "transunet"))
    case = made(tmp_path / "in", tmp_path / "out").cases[0]
    assert case.shape[1:] == (512, 512)
    assert case.label is not None and np.count_nonzero(case.label) == np.count_nonzero(values(label, "transunet"))


def test_cases_are_made_once_and_again_when_their_files_change(scans: dict, tmp_path: Path) -> None:
    image, label = scans[TEST]
    write(tmp_path / "in", TEST, image, values(label, "transunet"))
    first = made(tmp_path / "in", tmp_path / "out")

    def waiting(**options: object) -> bool:
        planned = plan(PrepareConfig(source=str(tmp_path / "in"), output=tmp_path / "out", **options))  # type: ignore[arg-type]
        return planned.source.cases[0].generate is not None

    assert not waiting() and waiting(classes="transunet")
    write(tmp_path / "in", TEST, image / 2, values(label, "transunet"))
    assert waiting()
    assert made(tmp_path / "in", tmp_path / "out").cases[0].image_sha256 != first.cases[0].image_sha256


@pytest.mark.parametrize(("flips", "swap"), product(product((1, -1), repeat=3), (False, True)))
def test_every_way_a_volume_can_lie_is_recognised(flips: tuple[int, ...], swap: bool, scans: dict) -> None:
    label = values(scans[TRAIN][1], "transunet").astype(np.uint8)
    label = label[tuple(slice(None, None, step) for step in flips)]
    codes = ["IS"[flips[0] > 0], "AP"[flips[1] > 0], "RL"[flips[2] > 0]]
    if swap:
        label, codes = label.transpose(0, 2, 1), [codes[0], codes[2], codes[1]]
    assert orientation(label, "it").axcodes == tuple(codes)


def test_the_rule_holds_in_many_patients(scans: dict) -> None:
    for seed in range(12):
        scan = phantom.patient(seed, phantom.World(orientations=("LPS",)))
        label = values(scan.label, "transunet").astype(np.uint8).transpose(2, 1, 0)
        assert orientation(label, f"patient {seed}").axcodes == ("S", "P", "L")


def test_the_rule_holds_in_a_real_patient(shared_data: Path) -> None:
    case = shared_data / "ct-case-a/labels_total_v1_104class.nii.gz"
    nifti = nib.as_closest_canonical(nib.load(case))
    total = np.asarray(nifti.dataobj).transpose(2, 1, 0)[:, ::-1, ::-1]
    ids = {"spleen": 1, "right_kidney": 2, "left_kidney": 3, "gallbladder": 4, "liver": 5, "stomach": 6} | {
        "aorta": 7,
        "pancreas": 10,
    }
    for table, organs in TABLES.items():
        label = np.zeros(total.shape, np.uint8)
        for value, organ in enumerate(organs, 1):
            label[total == ids[organ]] = value
        found = orientation(label, "case a")
        assert (found.table, found.axcodes) == (table, ("S", "P", "L"))


def test_organs_that_contradict_each_other_are_refused(scans: dict) -> None:
    label = values(scans[TRAIN][1], "transunet").astype(np.uint8)
    swapped = np.array([0, 1, 2, 4, 3, 5, 6, 7, 8], np.uint8)[label]  # left and right kidney
    with pytest.raises(BadInput, match=r"right_kidney - left_kidney.* against .*on where left is") as refused:
        orientation(swapped, "case0005", "transunet")
    assert refused.value.code == "orientation"
    with pytest.raises(BadInput, match="case0005 does not show how it lies"):
        orientation(np.where(label == 5, label, 0), "case0005")
    with pytest.raises(BadInput, match="on where"):
        orientation(label, "case0005", "samed")


def test_too_few_organs_to_tell_the_label_table_need_an_option(scans: dict) -> None:
    label = values(scans[TRAIN][1], "transunet").astype(np.uint8)
    few = np.where((label >= 2) & (label <= 5), label, 0)
    with pytest.raises(BadInput, match="give --classes transunet or samed") as refused:
        orientation(few, "case0005")
    assert refused.value.code == "class-table"
    found = orientation(few, "case0005", "transunet")
    assert found.axcodes == ("S", "P", "L") and found.sure.startswith("hardly sure")


def test_a_missing_slice_is_refused_by_number(small: Path) -> None:
    (small / "train_npz/case0005_slice001.npz").unlink()
    with pytest.raises(BadInput, match=r"lacks 1 slices of case0005 \(1\)") as refused:
        listed(small)
    assert refused.value.code == "missing-slice"


def test_a_slice_that_only_the_list_names_is_missing(small: Path) -> None:
    (small / "lists_Synapse").mkdir()
    (small / "lists_Synapse/train.txt").write_text("case0005_slice000\ncase0005_slice003\n")
    with pytest.raises(BadInput, match=r"\(case0005_slice003\)") as refused:
        listed(small)
    assert refused.value.code == "missing-slice"
    (small / "lists_Synapse/train.txt").write_text("case0005_slice000\ncase0005_slice002\n")
    assert [case.name for case in listed(small).cases] == ["case0005"]


def test_stray_and_doubled_files_and_unknown_tables_are_refused(small: Path) -> None:
    stray = small / "train_npz/case0005_slice1.npz"
    shutil.copy(small / "train_npz/case0005_slice001.npz", stray)
    with pytest.raises(BadInput, match="both slice 1 of case0005"):
        listed(small)
    stray.rename(small / "train_npz/case5.npz")
    with pytest.raises(BadInput, match=r"holds case5\.npz, not"):
        listed(small)
    (small / "train_npz/case5.npz").unlink()
    (small / "test_vol_h5").mkdir()
    (small / "test_vol_h5/case0005.npy.h5").touch()
    with pytest.raises(BadInput, match="case0005 in train_npz and in test_vol_h5"):
        listed(small)
    with pytest.raises(BadConfig, match="choose transunet or samed"):
        listed(small, classes="v1")


def test_benchmark_test_cases_stay_test_cases(small: Path) -> None:
    black = np.zeros((1, 224, 224), np.float32)
    for number in (1, 2, 6, 7, 9):
        write(small, number, black, black)
    source = listed(small)
    splits = {split: [c.name for c in source.cases if c.split == split] for split in ("train", "val", "test")}
    assert splits["test"] == ["case0001", "case0002"] and len(splits["val"]) == 1 and len(splits["train"]) == 3
    assert source.public and {"case0001", "case0002"} <= source.benchmark_test
    write(small, 77, black, black)
    assert [c.name for c in listed(small).cases if c.split == "test"] == ["case0001"]


@pytest.mark.parametrize(
    ("image", "label", "code"),
    [
        ({}, {5: 9}, "unknown-label"),
        ({}, {5: 1.5}, "unknown-label"),
        ({}, {5: -1}, "unknown-label"),
        ({}, {5: np.nan}, "non-finite-voxels"),
        ({5: np.nan}, {}, "non-finite-voxels"),
        ({5: np.inf}, {}, "non-finite-voxels"),
        ({5: 255}, {}, "value-range"),
        ({5: -1000}, {}, "value-range"),
    ],
)
@pytest.mark.parametrize("number", [TRAIN, TEST])
def test_impossible_values_are_refused(image: dict, label: dict, code: str, number: int, tmp_path: Path) -> None:
    arrays = [np.zeros((2, 224, 224), np.float32) for _ in range(2)]
    for array, changes in zip(arrays, (image, label), strict=True):
        for place, value in changes.items():
            array[1, place, place] = value
    write(tmp_path / "in", number, *arrays)
    where = "case0001.npy.h5, slice 1," if number == TEST else "case0005_slice001.npz"
    with pytest.raises(BadInput, match=where) as refused:
        made(tmp_path / "in", tmp_path / "out")
    assert refused.value.code == code
    assert not (tmp_path / "out/dataset.json").exists()


@pytest.mark.parametrize("number", [TRAIN, TEST])
@pytest.mark.parametrize("shape", [(224, 512), (128, 128), (224,), (3, 224, 224)])
def test_arrays_of_another_shape_are_refused(shape: tuple[int, ...], number: int, tmp_path: Path) -> None:
    write(tmp_path / "in", number, np.zeros((2, *shape), np.float32), np.zeros((2, *shape), np.float32))
    with pytest.raises(BadInput, match="both should be") as refused:
        made(tmp_path / "in", tmp_path / "out")
    assert refused.value.code == "shape"


def test_slices_of_two_sizes_in_one_case_are_refused(small: Path, tmp_path: Path) -> None:
    large = np.zeros((512, 512), np.float32)
    np.savez(small / "train_npz/case0005_slice002.npz", image=large, label=large)
    with pytest.raises(BadInput, match=r"slice002\.npz has \(512, 512\) pixels"):
        made(small, tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"not HDF5", b"\x89HDF\r\n\x1a\n cut"])
def test_a_file_that_is_not_hdf5_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "in/test_vol_h5").mkdir(parents=True)
    (tmp_path / "in/test_vol_h5/case0001.npy.h5").write_bytes(content)
    with pytest.raises(BadInput, match=r"case0001\.npy\.h5 is no intact HDF5 file") as refused:
        made(tmp_path / "in", tmp_path / "out")
    assert refused.value.code == "not-hdf5"


def test_hdf5_that_leads_elsewhere_or_lacks_an_array_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "in/test_vol_h5"
    folder.mkdir(parents=True)
    for link in (h5py.ExternalLink("other.h5", "/label"), None):
        with h5py.File(folder / "case0001.npy.h5", "w") as file:
            file["image"] = np.zeros((2, 224, 224), np.float32)
            if link is not None:
                file["label"] = link
        with pytest.raises(BadInput) as refused:
            made(tmp_path / "in", tmp_path / "out")
        assert refused.value.code == "not-hdf5"


@pytest.mark.parametrize("arrays", [None, ("image",), ("image", "pickled")])
def test_a_file_that_is_not_npz_is_refused(arrays: tuple[str, ...] | None, small: Path, tmp_path: Path) -> None:
    path = small / "train_npz/case0005_slice001.npz"
    if arrays is None:
        path.write_bytes(b"PK but no zip")
    else:
        label = {"label": np.array([{}], object)} if "pickled" in arrays else {}
        np.savez(path, image=np.zeros((224, 224)), **label)
    with pytest.raises(BadInput, match=r"slice001\.npz is no npz file") as refused:
        made(small, tmp_path / "out")
    assert refused.value.code == "not-npz"


def test_a_slice_that_unpacks_to_too_much_is_refused(small: Path, tmp_path: Path) -> None:
    path = small / "train_npz/case0005_slice001.npz"
    np.savez_compressed(path, image=np.zeros((2000, 2000)), label=np.zeros((224, 224)))
    with pytest.raises(BadInput, match=r"slice001\.npz unpacks to 32,") as refused:
        made(small, tmp_path / "out")
    assert refused.value.code == "too-large"


@pytest.mark.parametrize("position", [0, 30, 50, 100, 130, 160, -30])
def test_a_damaged_slice_is_refused_with_a_sentence(position: int, small: Path, tmp_path: Path) -> None:
    path = small / "train_npz/case0005_slice001.npz"
    content = bytearray(path.read_bytes())
    content[position] ^= 0xB0
    path.write_bytes(content)
    with pytest.raises(BadInput):
        made(small, tmp_path / "out")
