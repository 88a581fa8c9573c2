"""Which files belong together: decided by name, said where it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from surm_seg.errors import BadInput
from surm_seg.matching import Pair, match, with_images


def test_names_are_matched_and_never_guessed(tmp_path: Path) -> None:
    names = {
        "p": [
            "img0001.nii.gz",
            "case0002_seg.nii",
            "liver_a_0000.nii.gz",
            "case0004.nii.gz",
            "0004_seg.nii.gz",
            "x.nii",
        ],
        "r": [
            "label0001.nii.gz",
            "0002_gt.nii.gz",
            "liver_a.nii.gz",
            "label0004.nii.gz",
            "y.nii",
            "._0002.nii",
            "y.txt",
        ],
    }
    for folder, files in names.items():
        (tmp_path / folder).mkdir()
        for name in files:
            (tmp_path / folder / name).touch()
    pairs, left_over = match(tmp_path / "p", tmp_path / "r")
    assert {(pair.case, pair.prediction.name, pair.reference.name) for pair in pairs} == {
        ("case0001", "img0001.nii.gz", "label0001.nii.gz"),
        ("case0002", "case0002_seg.nii", "0002_gt.nii.gz"),
        ("case001", "liver_a_0000.nii.gz", "liver_a.nii.gz"),
    }
    (ambiguous,) = [sentence for sentence in left_over if "ambiguous" in sentence]
    assert all(name in ambiguous for name in ("case0004.nii.gz", "0004_seg.nii.gz", "label0004.nii.gz"))
    assert sum("no counterpart" in sentence for sentence in left_over) == 2


def cases(folder: Path, *names: str) -> list[Pair]:
    return [Pair(f"case{n:03d}", folder / f"{name}.nii.gz", folder / "r.nii.gz") for n, name in enumerate(names, 1)]


def test_images_are_matched_like_label_maps(tmp_path: Path) -> None:
    for name in ("img0001.nii.gz", "b.nii.gz", "case_b.nii.gz", "other.mha"):
        (tmp_path / name).touch()
    found, left_over = with_images(cases(tmp_path, "0001_seg", "b", "c"), tmp_path)
    assert [pair.image and pair.image.name for pair in found] == ["img0001.nii.gz", None, None]
    assert [pair.case for pair in found] == ["case001", "case002", "case003"]
    ambiguous, absent, spare = left_over
    assert "ambiguous" in ambiguous and "case_b.nii.gz" in ambiguous
    assert "c.nii.gz" in absent and "without an image" in absent
    assert "other.mha" in spare and "belongs to no case" in spare


def test_a_single_image_belongs_to_the_single_case(tmp_path: Path) -> None:
    (tmp_path / "scan").mkdir()
    image = tmp_path / "scan" / "ct.nii.gz"
    image.touch()
    for given in (image, tmp_path / "scan"):
        ((pair,), left_over) = with_images(cases(tmp_path, "anything"), given)
        assert pair.image == image and not left_over
    with pytest.raises(BadInput, match="nowhere"):
        with_images(cases(tmp_path, "a"), tmp_path / "nowhere")


def test_a_bare_number_may_be_a_patients_and_is_not_shown(tmp_path: Path) -> None:
    for folder in "pr":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0815.nii.gz").touch()
        (tmp_path / folder / f"{'img' if folder == 'p' else 'label'}0007.nii.gz").touch()
    pairs, _ = match(tmp_path / "p", tmp_path / "r")
    assert {pair.case for pair in pairs} == {"case0007", "case001"}


def test_a_folder_of_dicom_segmentations_is_a_folder_of_label_maps(tmp_path: Path) -> None:
    for folder, ending in (("p", "nii.gz"), ("r", "dcm")):
        (tmp_path / folder).mkdir()
        for name in "ab":
            (tmp_path / folder / f"{name}.{ending}").write_bytes(bytes(128) + b"DICM")
    pairs, left_over = match(tmp_path / "p", tmp_path / "r")
    assert [pair.reference.name for pair in pairs] == ["a.dcm", "b.dcm"] and not left_over
