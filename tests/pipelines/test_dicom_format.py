"""DICOM cases: the series and its label map meet at the same millimetres, however the label file orders its axes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_dicom import header, stored, write

from pipelines import formats
from pipelines.formats import Options
from surm_seg.cases import Dataset
from surm_seg.cli import Reporter
from surm_seg.errors import BadInput
from surm_seg.prepare import PrepareConfig, prepare
from surm_seg.volume import read_image, write_dicom_seg

Write = Callable[..., Path]
SLICES = 4
LABELS = np.random.default_rng(3).integers(0, 3, (16, 12, SLICES)).astype(np.uint8)  # axes (i, j, k) of the series


@pytest.fixture
def source(tmp_path: Path, write_nifti: Write) -> Path:
    """Two cases; one label map lies as the series does, the other has its rows from posterior to anterior."""
    for name, flip in (("Doe", False), ("Roe", True)):
        folder = tmp_path / "in" / name
        folder.mkdir(parents=True)
        write(folder / "ct", [header(k) for k in range(SLICES)])
        affine = np.array(read_image(folder / "ct").grid.affine)
        labels = LABELS
        if flip:
            affine[:3, 3] += affine[:3, 1] * (LABELS.shape[1] - 1)
            affine[:3, 1] *= -1
            labels = LABELS[:, ::-1]
        write_nifti(folder / "labels.nii.gz", labels, affine)
    (tmp_path / "table.yaml").write_text("1: liver\n2: spleen\n")
    return tmp_path / "in"


def prepared(source: Path, tmp_path: Path, **options: str) -> Dataset:
    output, table = tmp_path / "out", str(tmp_path / "table.yaml")
    return prepare(
        PrepareConfig(source=str(source), labels=table, output=output, workers=1, **options), Reporter(quiet=True)
    )


def test_series_and_labels_meet_at_the_same_millimetres(source: Path, tmp_path: Path) -> None:
    dataset = prepared(source, tmp_path)
    assert (dataset.format, dataset.labels) == ("dicom", ("liver", "spleen"))
    assert [case.id for case in dataset.cases] == ["case001", "case002"]
    for case in dataset.cases:
        np.testing.assert_array_equal(case.label, LABELS.transpose(2, 1, 0))
        np.testing.assert_array_equal(case.image, np.stack([stored(k) - 1024 for k in range(SLICES)]))
        assert case.spacing == pytest.approx((2.5, 0.7, 0.8))
    assert "Doe" not in (dataset.folder / "dataset.json").read_text()


def test_a_single_case_is_a_source_too(source: Path, tmp_path: Path) -> None:
    (case,) = prepared(source / "Roe", tmp_path).cases
    np.testing.assert_array_equal(case.label, LABELS.transpose(2, 1, 0))


def test_the_slices_may_lie_beside_the_labels(source: Path, tmp_path: Path) -> None:
    for case in source.iterdir():
        for file in (case / "ct").iterdir():
            file.rename(case / file.name)
        (case / "ct").rmdir()
    dataset = prepared(source, tmp_path)
    np.testing.assert_array_equal(dataset.cases[0].label, dataset.cases[1].label)


def test_labels_may_be_a_dicom_segmentation(source: Path, tmp_path: Path) -> None:
    """Without --labels: the segments' own names say what they are."""
    for case in source.iterdir():
        (case / "labels.nii.gz").unlink()
        write_dicom_seg(case / "labels.dcm", LABELS, ["liver", "spleen"], case / "ct")
    dataset = prepare(
        PrepareConfig(source=str(source), output=tmp_path / "out", workers=1, format="dicom"), Reporter(quiet=True)
    )
    liver, spleen = (dataset.labels.index(organ) + 1 for organ in ("liver", "spleen"))
    for case in dataset.cases:
        np.testing.assert_array_equal(case.label, np.array([0, liver, spleen])[LABELS.transpose(2, 1, 0)])


def test_every_case_numbers_the_organs_alike_whatever_order_its_segments_have(source: Path, tmp_path: Path) -> None:
    for case, names, values in (("Doe", ["liver", "spleen"], [0, 1, 2]), ("Roe", ["spleen", "liver"], [0, 2, 1])):
        (source / case / "labels.nii.gz").unlink()
        voxels = np.array(values, np.uint8)[LABELS]
        write_dicom_seg(source / case / "labels.dcm", voxels, names, source / case / "ct")
    (tmp_path / "table.yaml").write_text("liver: liver\nspleen: spleen\n")
    first, second = prepared(source, tmp_path).cases
    assert first.histogram == second.histogram
    np.testing.assert_array_equal(first.label, second.label)
    write_dicom_seg(source / "Roe" / "labels.dcm", voxels, ["spleen", "heart"], source / "Roe" / "ct")
    (tmp_path / "table.yaml").unlink()
    (tmp_path / "table.yaml").write_text("spleen: spleen\n")
    assert prepared(source, tmp_path).labels == ("spleen",)


def test_labels_elsewhere_in_the_patient_are_refused(source: Path, tmp_path: Path, write_nifti: Write) -> None:
    write_nifti(source / "Roe" / "labels.nii.gz", LABELS, np.diag([-0.8, -0.7, 2.5, 1.0]))
    with pytest.raises(BadInput, match="does not lie on the grid"):
        prepared(source, tmp_path)


def test_what_is_ambiguous_is_refused_and_can_be_named(source: Path, tmp_path: Path) -> None:
    write(source / "Roe" / "thick", [header(k, step=5) for k in range(2)])
    with pytest.raises(BadInput, match=r"holds 2 series \(ct, thick\); name the one to use with --image"):
        prepared(source, tmp_path)
    assert len(prepared(source, tmp_path, image="ct").cases) == 2
    labels = source / "Doe" / "labels.nii.gz"
    (source / "Doe" / "other.nii.gz").write_bytes(labels.read_bytes())
    with pytest.raises(BadInput, match="holds 2 label maps"):
        prepared(source, tmp_path, image="ct")
    assert len(prepared(source, tmp_path, image="ct", label="labels.nii.gz").cases) == 2
    labels.unlink()
    with pytest.raises(BadInput, match="holds 0 label maps"):
        prepared(source, tmp_path, image="ct", label="labels.nii.gz")


def test_other_layouts_are_not_taken_for_dicom(tmp_path: Path, write_nifti: Write) -> None:
    write_nifti(tmp_path / "img" / "img0001.nii.gz", np.zeros((4, 4, 4), np.int16))
    write_nifti(tmp_path / "label" / "label0001.nii.gz", np.zeros((4, 4, 4), np.uint8))
    found = [name for name, module in formats.formats().items() if module.detect(tmp_path, Options(tmp_path / "out"))]
    assert found == ["synapse"]


def test_a_real_series_with_a_flipped_label_map(shared_data: Path, tmp_path: Path) -> None:
    case = shared_data / "ct-case-b-dicom"
    if not case.is_dir():
        pytest.skip("no real DICOM case here: set SURM_SHARED to the folder that holds data/ct-case-b-dicom")
    config = PrepareConfig(source=str(case), classes="v2", output=tmp_path / "out", workers=1)
    (made,) = prepare(config, Reporter(quiet=True)).cases
    label = made.label
    assert label is not None and made.histogram is not None
    liver = list(made.histogram).index("liver") + 1
    columns = np.nonzero(label[10] == liver)[1]
    assert columns.mean() < label.shape[2] / 2  # the patient's right is on the left of the picture
    inside = made.image[label == liver]
    assert 50 < np.median(inside) < 250 and inside.std() < 60  # HU of contrast-enhanced liver, nothing else
    assert {organ for organ, voxels in made.histogram.items() if not voxels} >= {"left_kidney", "right_kidney"}
