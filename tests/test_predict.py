"""Predicting files: on the input's own grid whatever it is, and a bad case never stops the others."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from test_dicom import CANARY, header, write

from pipelines.phantom import patient
from surm_seg import predict, prepare, train
from surm_seg.lock import held
from surm_seg.volume import Grid, read_image, read_labels, stem

TEST_WORDS = ["--image_size", "64", "--precision", "float32", "--workers", "0", "--batch_size", "2", "--quiet"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    data = folder / "data"
    assert prepare.main(["phantom", "--cases", "4", "--output", str(data), "--quiet"]) == 0
    words = ["--data", str(data), "--validate_on", "none", "--score_on", "train", "--steps", "12", *TEST_WORDS]
    assert train.main([*words, "--output", str(folder / "run")]) == 0
    return folder / "run"


@pytest.mark.parametrize("axcodes", ["LPS", "RAS", "SAR", "PIL"])
def test_the_mask_lies_where_the_organ_lies_in_every_orientation(
    run: Path, tmp_path: Path, axcodes: str, write_nifti: Callable[..., Path]
) -> None:
    """The same patient stored in another order gives the same millimetres, voxel for voxel."""
    made = patient(77)
    straight = write_nifti(tmp_path / "straight" / "a.nii.gz", made.image, made.affine)
    image = nib.load(straight)
    assert isinstance(image, nib.Nifti1Image)
    transform = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axcodes)
    )
    turned = image.as_reoriented(transform)
    write_nifti(tmp_path / "turned" / "a.nii.gz", np.asarray(turned.dataobj), turned.affine)
    found = {}
    for name in ("straight", "turned"):
        assert (
            predict.main(
                ["--run", str(run), "--input", str(tmp_path / name), "--output", str(tmp_path / f"{name}-out")]
            )
            == 0
        )
        label = nib.load(tmp_path / f"{name}-out" / "a.nii.gz")
        assert isinstance(label, nib.Nifti1Image)
        assert np.array_equal(label.affine, nib.load(tmp_path / name / "a.nii.gz").affine)  # pyright: ignore
        found[name] = Grid.from_header(label.shape, label.header).lps(np.asarray(label.dataobj))
    assert np.array_equal(found["straight"], found["turned"]) and found["straight"].any()


def test_a_bad_case_is_listed_and_the_others_are_done(
    run: Path, tmp_path: Path, write_nifti: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write_nifti(tmp_path / "in" / "good.nii.gz", patient(78).image[:, :, :3])
    (tmp_path / "in" / "bad.nii.gz").write_bytes(b"not a volume")
    words = ["--run", str(run), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--quiet"]
    assert predict.main(words) == 5
    assert "bad.nii.gz" in capsys.readouterr().err
    assert (tmp_path / "out" / "good.nii.gz").exists() and not (tmp_path / "out" / "bad.nii.gz").exists()
    cases = json.loads((tmp_path / "out" / "manifest.json").read_text())["cases"]
    assert [("error" in case, "volumes_ml" in case) for case in cases] == [(True, False), (False, True)]
    written = (tmp_path / "out" / "good.nii.gz").stat()
    assert predict.main(words) == 5  # the finished case is not computed again
    assert (tmp_path / "out" / "good.nii.gz").stat().st_mtime_ns == written.st_mtime_ns
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["cases"][1] == cases[1]
    (tmp_path / "in" / "good.nii.gz").unlink()
    assert predict.main(words) == 3


def test_what_cannot_be_predicted_writes_nothing(
    run: Path, tmp_path: Path, write_nifti: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    volume = write_nifti(tmp_path / "in" / "a.nii.gz", patient(78).image[:, :, :2])
    content = volume.read_bytes()
    cases = [
        ([], 2, "Give both --run"),
        (["--run", str(tmp_path), "--input", str(volume)], 3, "is not a run folder"),
        (["--run", str(run), "--input", str(tmp_path / "absent")], 3, "There is no"),
        (["--run", str(run), "--input", str(run)], 3, "holds no volume"),
        (["--run", str(run), "--input", str(volume), "--output", str(volume.parent)], 2, "where the inputs are"),
    ]
    for words, status, message in cases:
        assert predict.main(["--output", str(tmp_path / "out"), *words]) == status
        assert message in capsys.readouterr().err
    assert (
        predict.main(["--run", str(run), "--input", str(volume), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    )
    assert volume.read_bytes() == content and not (tmp_path / "out").exists()


def test_one_process_at_a_time_writes_into_a_folder(
    run: Path, tmp_path: Path, write_nifti: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    volume = write_nifti(tmp_path / "a.nii.gz", patient(78).image[:, :, :2])
    words = ["--run", str(run), "--input", str(volume), "--output", str(tmp_path / "out")]
    with held(tmp_path / "out", "written to"):
        assert predict.main(words) == 3
        assert f"is being written to by process {os.getpid()}" in capsys.readouterr().err
        (tmp_path / "out" / ".a.nii.gz.1.part").touch()
    assert predict.main(words) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.nii.gz", "manifest.json"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_adapter_is_never_used(
    run: Path, tmp_path: Path, write_nifti: Callable[..., Path], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    volume = write_nifti(tmp_path / "a.nii.gz", patient(78).image[:, :, :2])
    words = ["--run", str(copy), "--input", str(volume), "--output", str(tmp_path / "out")]
    assert predict.main([*words, "--dry-run"]) == 0
    content = bytearray((copy / "adapter" / name).read_bytes())
    content[-3] ^= 1
    (copy / "adapter" / name).write_bytes(content)
    assert predict.main(words) == 3
    assert "has changed since it was written" in capsys.readouterr().err
    (copy / "adapter" / name).unlink()
    assert predict.main(words) == 3 and not (tmp_path / "out").exists()


def test_a_run_whose_backbone_changed_is_refused(
    run: Path, tmp_path: Path, write_nifti: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("weights: auto", "weights: random"))
    volume = write_nifti(tmp_path / "a.nii.gz", patient(78).image[:, :, :2])
    assert predict.main(["--run", str(copy), "--input", str(volume), "--output", str(tmp_path / "out")]) == 3
    assert "are not those that" in capsys.readouterr().err


def test_a_dicom_series_comes_back_as_nifti_and_as_segmentation(run: Path, tmp_path: Path) -> None:
    """The manifest names nobody; the key, readable by its owner alone, knows which folder it was."""
    (tmp_path / "in" / "Doe").mkdir(parents=True)
    series = write(tmp_path / "in" / "Doe" / "ct", [header(k) for k in range(4)])
    words = ["--run", str(run), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--quiet"]
    assert predict.main(words) == 0
    (mask,) = (tmp_path / "out").glob("series-*.nii.gz")
    found, again = read_labels(mask), read_labels(mask.with_name(f"{stem(mask)}.dcm"))
    assert found.grid.matches(read_image(series).grid) and again.grid.matches(found.grid)
    np.testing.assert_array_equal(found.lps(), again.lps())
    manifest, key = ((tmp_path / "out" / name) for name in ("manifest.json", "case_key.json"))
    assert json.loads(key.read_text()) == {mask.name: str(series)} and key.stat().st_mode & 0o777 == 0o600
    assert "Doe" not in manifest.read_text() and CANARY not in manifest.read_text()
    written = mask.stat().st_mtime_ns
    assert predict.main(words) == 0 and mask.stat().st_mtime_ns == written
    mask.with_name(f"{stem(mask)}.dcm").unlink()
    assert predict.main(words) == 0 and mask.stat().st_mtime_ns > written


def test_other_file_formats_give_the_same_mask(
    run: Path, tmp_path: Path, write_nifti: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    made = patient(79)
    nifti = write_nifti(tmp_path / "a" / "x.nii.gz", made.image[:, :, :3], made.affine)
    (tmp_path / "b").mkdir()
    sitk.WriteImage(sitk.ReadImage(str(nifti)), str(tmp_path / "b" / "x.nrrd"))
    for name in "ab":
        words = ["--input", str(tmp_path / name), "--output", str(tmp_path / f"{name}-out"), "--quiet"]
        assert predict.main(["--run", str(run), *words]) == 0
    first, second = (read_labels(tmp_path / f"{name}-out" / "x.nii.gz") for name in "ab")
    assert first.grid.matches(second.grid)
    np.testing.assert_array_equal(first.lps(), second.lps())
    shutil.copy(nifti, tmp_path / "b")
    assert predict.main(["--run", str(run), "--input", str(tmp_path / "b"), "--output", str(tmp_path / "out")]) == 3
    assert "Several inputs would be written as x.nii.gz" in capsys.readouterr().err


def test_other_options_are_another_prediction(run: Path, tmp_path: Path, write_nifti: Callable[..., Path]) -> None:
    """A finished case is kept only where the same would be computed again."""
    volume = write_nifti(tmp_path / "x.nii.gz", patient(80).image[:, :, 20:23])
    words = ["--run", str(run), "--input", str(volume), "--output", str(tmp_path / "out"), "--quiet"]
    seen = []
    for options in ([], [], ["--tta", "flip", "--keep-largest"]):
        assert predict.main([*words, *options]) == 0
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        seen.append((manifest["options"], manifest["cases"][0]["seconds"]))
    assert seen[0] == seen[1]
    assert seen[2][0] == {"tta": "flip", "keep_largest": True}


def test_a_volume_unlike_the_training_cases_is_said_aloud(
    run: Path, tmp_path: Path, write_nifti: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    image = patient(81).image[:, :, 20:24]
    volume = write_nifti(tmp_path / "x.nii.gz", image, np.diag([-3.0, -3.0, 25.0, 1.0]))
    assert predict.main(["--run", str(run), "--input", str(volume), "--output", str(tmp_path / "out")]) == 0
    assert "25 mm" in capsys.readouterr().err
    (warning, *_) = json.loads((tmp_path / "out" / "manifest.json").read_text())["cases"][0]["warnings"]
    assert "25 mm" in warning


def test_a_folder_of_both_series_and_files_is_not_guessed_at(
    run: Path, tmp_path: Path, write_nifti: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The file beside a series may be its label map."""
    series = write(tmp_path / "ct", [header(k) for k in range(3)])
    write_nifti(tmp_path / "labels.nii.gz", np.zeros((4, 4, 4), np.uint8))
    assert predict.main(["--run", str(run), "--input", str(tmp_path), "--output", str(tmp_path / "out")]) == 3
    assert "name the one to segment" in capsys.readouterr().err
    assert predict.main(["--run", str(run), "--input", str(series), "--output", str(series)]) == 2
    assert "where the inputs are" in capsys.readouterr().err and len(list(series.iterdir())) == 3


def test_what_was_finished_stays_in_the_manifest_when_more_is_asked_for(
    run: Path, tmp_path: Path, write_nifti: Callable[..., Path]
) -> None:
    """Other inputs into the same folder, and a call that was stopped, forget nothing that is still there."""
    for name, seed in (("a", 82), ("b", 83)):
        write_nifti(tmp_path / name / f"{name}.nii.gz", patient(seed).image[:, :, 20:22])
        words = ["--run", str(run), "--input", str(tmp_path / name), "--output", str(tmp_path / "out"), "--quiet"]
        assert predict.main(words) == 0
    manifest = tmp_path / "out" / "manifest.json"
    cases = json.loads(manifest.read_text())["cases"]
    assert len({case["input"] for case in cases}) == 2
    (tmp_path / "out" / "a.nii.gz").unlink()
    assert predict.main(words) == 0
    assert [case["input"] for case in json.loads(manifest.read_text())["cases"]] == [cases[0]["input"]]
