"""The evaluate command, as users meet it: real files in, scores and an exit status out."""

from __future__ import annotations

import csv
import json
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from surm_seg import evaluate
from surm_seg.labels import SYNAPSE
from surm_seg.report import score_pair, write_scores
from surm_seg.scored import score_case
from surm_seg.volume import read_labels

Write = Callable[..., Path]

AFFINE = np.diag([-1.5, -1.5, 4.0, 1.0])


def labels_ijk(seed: int = 0) -> np.ndarray:
    """Two organs with a ragged surface, axes (i, j, k)."""
    rng = np.random.default_rng(seed)
    voxels = np.zeros((16, 14, 8), np.uint8)
    voxels[2:9, 3:10, 2:6], voxels[11:14, 4:9, 1:7] = 5, 7
    return np.where(rng.random(voxels.shape) < 0.1, 0, voxels).astype(np.uint8)


def run(prediction: Path, reference: Path, *options: str) -> int:
    return evaluate.main(["--prediction", str(prediction), "--reference", str(reference), "--workers", "1", *options])


def csv_rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "cases.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder_is_scored_into_scores_beside_it(
    write_nifti: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        write_nifti(tmp_path / "run" / "predictions" / f"img000{number}.nii.gz", labels_ijk(number), AFFINE)
        write_nifti(tmp_path / "labels" / f"label000{number}.nii.gz", labels_ijk(9), AFFINE)
    assert run(tmp_path / "run" / "predictions", tmp_path / "labels") == 0
    out = capsys.readouterr().out
    assert "liver" in out and "mean" in out and "2 of 2 cases scored" in out
    summary = json.loads((tmp_path / "run" / "scores" / "summary.json").read_text())
    assert set(summary["protocols"]) == {"recommended", "samed-2023"}
    assert summary["organs"]["liver"]["dice"]["n"] == 2 and summary["organs"]["spleen"]["absent"] == 2
    assert {row["case"] for row in csv_rows(tmp_path / "run" / "scores")} == {"case0001", "case0002"}


def test_files_and_arrays_give_identical_rows(write_nifti: Write, tmp_path: Path) -> None:
    prediction = write_nifti(tmp_path / "p" / "a.nii.gz", labels_ijk(1), AFFINE)
    reference = write_nifti(tmp_path / "r.nii.gz", labels_ijk(2), AFFINE)
    assert run(prediction, reference, "--output", str(tmp_path / "files")) == 0
    ours, theirs = read_labels(prediction), read_labels(reference)
    scored = score_case(ours.lps(), theirs.lps(), SYNAPSE, theirs.grid.lps_spacing, "case001")
    write_scores(tmp_path / "arrays", scored.rows, scored.slices)
    for name in ("cases.csv", "slices.csv", "summary.json"):
        assert (tmp_path / "files" / name).read_bytes() == (tmp_path / "arrays" / name).read_bytes()


@pytest.mark.parametrize("threads", ["1", "4"])
def test_more_threads_change_nothing(write_nifti: Write, tmp_path: Path, threads: str) -> None:
    prediction = write_nifti(tmp_path / "p.nii.gz", labels_ijk(1))
    reference = write_nifti(tmp_path / "r.nii.gz", labels_ijk(2))
    assert run(prediction, reference, "--workers", threads, "--output", str(tmp_path / "s")) == 0
    expected = score_pair(
        read_labels(prediction).lps(), read_labels(reference).lps(), SYNAPSE, (2.0, 2.0, 2.0), "case001"
    )
    assert [float(row["dice"]) for row in csv_rows(tmp_path / "s") if row["dice"]] == [
        row.score.dice for row in expected if row.score.dice is not None
    ]


def test_one_bad_case_never_stops_the_rest(
    write_nifti: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("good", "shifted", "cut"):
        write_nifti(tmp_path / "r" / f"{name}.nii.gz", labels_ijk(), AFFINE)
    write_nifti(tmp_path / "p" / "good.nii.gz", labels_ijk(), AFFINE)
    moved = AFFINE.copy()
    moved[0, 3] = 0.01
    write_nifti(tmp_path / "p" / "shifted.nii.gz", labels_ijk(), moved)
    cut = write_nifti(tmp_path / "p" / "cut.nii.gz", labels_ijk(), AFFINE)
    cut.write_bytes(cut.read_bytes()[:-40])
    assert run(tmp_path / "p", tmp_path / "r") == 5
    captured = capsys.readouterr()
    assert "error [grids-differ]: shifted" in captured.err and "error [truncated]: cut" in captured.err
    assert "1 of 3 cases scored" in captured.out
    assert {row["case"] for row in csv_rows(tmp_path / "scores")} == {"case002"}  # of cut, good, shifted


def test_only_bad_cases_are_an_error_and_write_nothing(
    write_nifti: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prediction = write_nifti(tmp_path / "p" / "a.nii", labels_ijk()[:-1], AFFINE)
    reference = write_nifti(tmp_path / "r.nii", labels_ijk(), AFFINE)
    assert run(prediction, reference) == 3
    assert "--resample" in capsys.readouterr().err
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize("record", ["p/manifest.json", "run.json"])
def test_predictions_know_what_they_number(write_nifti: Write, tmp_path: Path, record: str) -> None:
    """`predict` numbers organs 1, 2, ... in the run's order, whatever values the references have."""
    reference = labels_ijk()  # 5 and 7
    write_nifti(tmp_path / "p" / "a.nii.gz", np.array([0, 0, 0, 0, 0, 2, 0, 1], np.uint8)[reference], AFFINE)
    write_nifti(tmp_path / "r" / "a.nii.gz", reference, AFFINE)
    (tmp_path / "table.yaml").write_text("5: liver\n7: aorta\n")
    words = ["--labels", str(tmp_path / "table.yaml"), "--output", str(tmp_path / "s")]
    assert run(tmp_path / "p", tmp_path / "r", *words) == 3  # without the record: values that no table has
    (tmp_path / record).write_text(json.dumps({"labels": ["aorta", "liver"]}))
    assert run(tmp_path / "p", tmp_path / "r", *words) == 0
    organs = json.loads((tmp_path / "s" / "summary.json").read_text())["organs"]
    assert {organ: found["dice"]["mean"] for organ, found in organs.items()} == {"aorta": 1.0, "liver": 1.0}


def test_an_output_that_cannot_be_written_is_found_before_the_work(
    write_nifti: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_nifti(tmp_path / "a.nii.gz", labels_ijk(), AFFINE)
    (tmp_path / "file").touch()
    assert run(one, one, "--output", str(tmp_path / "file" / "s")) == 3
    said = capsys.readouterr()
    assert said.err.count("cannot be written") == 1 and "scoring" not in said.out


def test_resample_keeps_organs_at_the_edge(write_nifti: Write, tmp_path: Path) -> None:
    """Slices of 5 mm onto slices of 1 mm over the same box: an organ that fills it fills it still."""
    coarse, fine = np.diag([-2.0, -2.0, 5.0, 1.0]), np.diag([-2.0, -2.0, 1.0, 1.0])
    fine[2, 3] = -2.0
    prediction = write_nifti(tmp_path / "a.nii.gz", np.ones((6, 6, 4), np.uint8), coarse)
    reference = write_nifti(tmp_path / "b.nii.gz", np.ones((6, 6, 20), np.uint8), fine)
    assert run(prediction, reference, "--resample", "--output", str(tmp_path / "s")) == 0
    assert json.loads((tmp_path / "s" / "summary.json").read_text())["organs"]["spleen"]["dice"]["mean"] == 1.0


def test_resample_brings_a_finer_turned_prediction_back(write_nifti: Write, tmp_path: Path) -> None:
    voxels = labels_ijk()
    reference = write_nifti(tmp_path / "r.nii.gz", voxels, AFFINE)
    # Every voxel divided into 3 x 1 x 1, then axes i and k swapped and i reversed: the same tissue on another grid.
    fine = AFFINE @ np.diag([1 / 3, 1, 1, 1])
    fine[:3, 3] -= fine[:3, 0]  # the middle one of three keeps the centre
    turn = np.array([[0, 0, -1, 3 * 16 - 1], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    turned = voxels.repeat(3, axis=0)[::-1].transpose(2, 1, 0)
    prediction = write_nifti(tmp_path / "p" / "a.nii.gz", turned, fine @ turn)
    assert run(prediction, reference) == 3
    assert run(prediction, reference, "--resample") == 0
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert summary["overall"]["dice"]["mean"] == 1 and summary["overall"]["hd95_mm"]["mean"] == 0


def test_dry_run_checks_and_writes_nothing(
    write_nifti: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        write_nifti(tmp_path / "r" / f"{name}.nii.gz", labels_ijk(), AFFINE)
    write_nifti(tmp_path / "p" / "a.nii.gz", labels_ijk(), AFFINE)
    assert run(tmp_path / "p", tmp_path / "r", "--dry-run") == 0
    assert "1 of 1 cases can be scored" in capsys.readouterr().out
    write_nifti(tmp_path / "p" / "b.nii.gz", labels_ijk(), 2 * AFFINE)
    assert run(tmp_path / "p", tmp_path / "r", "--dry-run") == 5
    assert not (tmp_path / "scores").exists()


def patients(write_nifti: Write, folder: Path, *names: str) -> tuple[Path, Path]:
    for name in names:
        write_nifti(folder / "p" / f"{name}.nii.gz", labels_ijk(), AFFINE)
        write_nifti(folder / "r" / f"{name}_gt.nii.gz", labels_ijk(), AFFINE)
    return folder / "p", folder / "r"


def test_file_names_stand_in_a_private_key_only(write_nifti: Write, tmp_path: Path) -> None:
    sides = patients(write_nifti, tmp_path, "Roe_Rick", "Doe_Jane", "case002", "12345678")
    assert run(*sides) == 0
    scores = tmp_path / "scores"
    assert {row["case"] for row in csv_rows(scores)} == {"case001", "case002", "case003", "case004"}
    key = scores / "case_key.json"
    assert json.loads(key.read_text()) == {
        "case002": ["case002.nii.gz", "case002_gt.nii.gz"],  # a number of a data set stays
        "case001": ["12345678.nii.gz", "12345678_gt.nii.gz"],  # eight digits may be a patient's
        "case003": ["Doe_Jane.nii.gz", "Doe_Jane_gt.nii.gz"],
        "case004": ["Roe_Rick.nii.gz", "Roe_Rick_gt.nii.gz"],
    }
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    written = [path for path in scores.rglob("*") if path.is_file() and path != key]
    assert len(written) == 4 + 4  # cases.csv, slices.csv, summary.json, report.html and the record of each case
    assert not any(b"Doe_Jane" in path.read_bytes() or "Doe" in path.name for path in written)
    assert run(*sides, "--keep-names", "--output", str(tmp_path / "named")) == 0
    assert {row["case"] for row in csv_rows(tmp_path / "named")} == {"Roe_Rick", "Doe_Jane", "case002", "12345678"}
    assert not (tmp_path / "named" / "case_key.json").exists()


def test_a_runs_own_scores_are_never_overwritten(write_nifti: Write, tmp_path: Path) -> None:
    prediction, reference = patients(write_nifti, tmp_path, "case001")
    (tmp_path / "config.yaml").touch()
    assert run(prediction, reference) == 0
    assert (tmp_path / "evaluation" / "cases.csv").exists() and not (tmp_path / "scores").exists()


def test_scores_never_replace_the_key_of_a_data_set(write_nifti: Write, tmp_path: Path) -> None:
    prediction, reference = patients(write_nifti, tmp_path, "case001")
    (tmp_path / "dataset.json").touch()
    assert run(prediction, reference, "--output", str(tmp_path)) == 2
    assert not (tmp_path / "case_key.json").exists()


@pytest.mark.parametrize("trouble", [OSError(5, "Input/output error"), MemoryError()])
def test_a_case_that_cannot_be_read_never_stops_the_rest(
    trouble: Exception,
    write_nifti: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def troubled(path: Path) -> object:
        if "case001" in path.name:
            raise trouble
        return read_labels(path)

    monkeypatch.setattr(evaluate, "read_labels", troubled)
    assert run(*patients(write_nifti, tmp_path, "case001", "case002")) == 5
    assert "]: case001: it " in capsys.readouterr().err
    assert {row["case"] for row in csv_rows(tmp_path / "scores")} == {"case002"}


def test_an_output_that_cannot_be_written_is_bad_input(
    write_nifti: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scores").touch()
    assert run(*patients(write_nifti, tmp_path, "case001")) == 3
    assert "error [output]" in capsys.readouterr().err


def test_no_match_is_an_error_that_names_files(
    write_nifti: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_nifti(tmp_path / "p" / "a.nii.gz", labels_ijk())
    write_nifti(tmp_path / "r" / "b.nii.gz", labels_ijk())
    assert run(tmp_path / "p", tmp_path / "r") == 3
    first, second, last = capsys.readouterr().err.splitlines()
    assert "[unmatched]" in first and "a.nii.gz" in first and "b.nii.gz" in second
    assert "[none-matched]" in last and ".nii.gz" not in last
    assert run(tmp_path / "p", tmp_path / "nowhere") == 3


def test_a_label_table_names_the_values(write_nifti: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    voxels = np.where(labels_ijk() == 5, 300, labels_ijk().astype(np.int16))
    prediction, reference = (write_nifti(tmp_path / f"{name}.nii", voxels) for name in "pr")
    assert run(prediction, reference, "--output", str(tmp_path / "s")) == 3
    assert "unknown-label" in capsys.readouterr().err
    table = tmp_path / "table.yaml"
    table.write_text("300: tumour\n7:\n")
    assert run(prediction, reference, "--labels", str(table), "--output", str(tmp_path / "s")) == 0
    assert {row["organ"] for row in csv_rows(tmp_path / "s")} == {"tumour"}


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--protocols", "[dice]"], "protocol"),
        (["--nsd_tolerance", "-1"], "nsd-tolerance"),
        (["--workers", "0"], "workers"),
        (["--labels", "nowhere.yaml"], "label-table"),
    ],
)
def test_options_that_cannot_work(
    write_nifti: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: str
) -> None:
    prediction, reference = (write_nifti(tmp_path / f"{name}.nii", labels_ijk()) for name in "pr")
    assert run(prediction, reference, *options) == 2
    assert f"error [{code}]" in capsys.readouterr().err


def test_prediction_and_reference_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([]) == 2
    assert "--prediction" in capsys.readouterr().err


def test_the_report_draws_on_the_image_of_the_case_and_on_no_other(
    write_nifti: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = patients(write_nifti, tmp_path, "case001")
    grey = np.random.default_rng(0).integers(-100, 200, labels_ijk().shape).astype(np.int16)
    reports = {}
    for name, affine in {"bare": None, "own": AFFINE, "other": 2 * AFFINE}.items():
        image = [] if affine is None else ["--image", str(write_nifti(tmp_path / f"{name}.nii.gz", grey, affine))]
        assert run(*sides, *image, "--output", str(tmp_path / name)) == 0
        reports[name] = (tmp_path / name / "report.html").read_text()
        assert reports[name].count("data:image/png") == 3
    assert reports["own"] != reports["bare"] == reports["other"]
    assert "not drawn [grids-differ]: case001" in capsys.readouterr().err


def test_the_report_says_what_is_in_no_number(write_nifti: Write, tmp_path: Path) -> None:
    sides = patients(write_nifti, tmp_path, "case001", "case002")
    cut = tmp_path / "p" / "case002.nii.gz"
    cut.write_bytes(cut.read_bytes()[:-40])
    write_nifti(tmp_path / "r" / "case003.nii.gz", labels_ijk(), AFFINE)
    assert run(*sides) == 5
    report = (tmp_path / "scores" / "report.html").read_text()
    assert "case002 could not be scored (truncated)" in report and "match none or several: 1." in report


# Values of the benchmark's organs in TotalSegmentator's two class tables.
V1 = dict(spleen=1, right_kidney=2, left_kidney=3, gallbladder=4, liver=5, stomach=6, aorta=7, pancreas=10)
V2 = V1 | dict(pancreas=7, aorta=52)


def test_two_labellings_of_a_real_case(shared_data: Path, tmp_path: Path) -> None:
    """Two TotalSegmentator versions on one CT, in one command, agree as plain counting says, to 0.002."""
    for name, values in {"v1": V1, "v2": V2}.items():
        lines = [f"{value}: {organ}" for organ, value in values.items()]
        (tmp_path / name).write_text("\n".join([*lines, "other:"]))
    case, options = shared_data / "ct-case-a", ["--labels", str(tmp_path / "v2"), "--output", str(tmp_path / "scores")]
    options += ["--reference_labels", str(tmp_path / "v1"), "--image", str(case / "ct.nii.gz")]
    sides = case / "labels_total_v2_fast_117class.nii.gz", case / "labels_total_v1_104class.nii.gz"
    assert run(*sides, *options) == 0
    organs = json.loads((tmp_path / "scores" / "summary.json").read_text())["organs"]
    expected = dict(liver=0.985, spleen=0.980, stomach=0.946, gallbladder=0.944, aorta=0.941, pancreas=0.809)
    assert {organ: organs[organ]["dice"]["mean"] for organ in expected} == pytest.approx(expected, abs=0.002)
    report = (tmp_path / "scores" / "report.html").read_text()
    assert report.count("data:image/png") == 3 and "0.809" in report and "ct.nii" not in report
