"""What is written about scores: columns, statistics over cases, and the table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from surm_seg import slices as by_slice
from surm_seg.report import COLUMNS, Row, dice_table, score_pair, summarise, write_scores
from surm_seg.slices import slice_rows

LABELS = ["liver", "aorta"]
SPACING = (5.0, 1.0, 2.0)


def label_map(liver: int, aorta: int) -> np.ndarray:
    """A row of so many liver voxels and one of so many aorta voxels."""
    labels = np.zeros((3, 4, 10), np.uint8)
    labels[1, 1, :liver], labels[1, 3, :aorta] = 1, 2
    return labels


@pytest.fixture
def rows() -> list[Row]:
    """Liver Dice 1, 0.5 and 0 (missed); aorta Dice 0.8, undefined (absent) and 0 (false)."""
    cases = {
        "a": (label_map(6, 4), label_map(6, 6)),
        "b": (label_map(2, 0), label_map(6, 0)),
        "c": (label_map(0, 3), label_map(6, 0)),
    }
    return [row for name, (ours, theirs) in cases.items() for row in score_pair(ours, theirs, LABELS, SPACING, name)]


def test_cases_csv_is_long_form_with_empty_cells_for_undefined(rows: list[Row], tmp_path: Path) -> None:
    write_scores(tmp_path / "run" / "scores", rows, run="r1", adapter="circulant", seed=7)
    with open(tmp_path / "run" / "scores" / "cases.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS
    assert all(column == column.lower() for column in COLUMNS)
    assert len(lines) == 3 * len(LABELS) * 2
    found = {(line["case"], line["organ"], line["protocol"]): line for line in lines}
    perfect = found["a", "liver", "recommended"]
    assert {
        "run": "r1",
        "adapter": "circulant",
        "seed": "7",
        "dice": "1.0",
        "hd95_mm": "0.0",
    }.items() <= perfect.items()
    assert (perfect["spacing"], perfect["reference_ml"], perfect["hd95_vox"]) == ("5x1x2", "0.06", "")
    absent = found["b", "aorta", "recommended"]
    assert absent["dice"] == absent["nsd"] == absent["hd95_mm"] == "" and absent["volume_error_ml"] == "0.0"
    assert absent["reference_empty"] == absent["prediction_empty"] == "true"
    assert found["b", "aorta", "samed-2023"]["dice"] == "0.0"


def test_slices_csv_has_a_line_per_slice_and_organ_that_either_side_shows(tmp_path: Path) -> None:
    slices = slice_rows(label_map(3, 2), label_map(6, 0), LABELS, SPACING, "a")
    write_scores(tmp_path, [], slices)
    with open(tmp_path / "slices.csv", newline="") as file:
        liver, aorta = csv.DictReader(file)
    assert tuple(liver) == by_slice.COLUMNS
    assert (liver["case"], liver["organ"], liver["z"], float(liver["dice"])) == (
        "a",
        "liver",
        "1",
        pytest.approx(2 / 3),
    )
    assert (liver["reference_pixels"], liver["reference_mm2"], liver["predicted_mm2"]) == ("6", "12.0", "6.0")
    assert (aorta["organ"], aorta["dice"], aorta["reference_mm2"], aorta["predicted_pixels"]) == (
        "aorta",
        "0.0",
        "0.0",
        "2",
    )


def test_rows_of_one_reference_share_their_data_hash(rows: list[Row]) -> None:
    reference = label_map(6, 6)
    (again, *_) = score_pair(label_map(1, 1), reference.astype(np.int32), LABELS, SPACING, "a")
    assert {again.data_hash} == {row.data_hash for row in rows if row.case == "a"}
    assert again.data_hash not in {row.data_hash for row in rows if row.case == "b"}


def test_overall_is_the_mean_over_cases_of_the_mean_over_defined_organs(rows: list[Row]) -> None:
    summary = summarise(rows)
    overall = summary["overall"]["dice"]
    assert overall["mean"] == pytest.approx(np.mean([(1 + 0.8) / 2, 0.5, 0]))
    assert overall["median"] == 0.5 and overall["n"] == 3
    assert overall["sd"] == pytest.approx(np.std([0.9, 0.5, 0], ddof=1))
    assert overall["iqr"] == pytest.approx([0.25, 0.7])
    assert (summary["overall"]["missed"], summary["overall"]["absent"]) == (1, 2)
    assert summary["protocols"]["samed-2023"]["overall"]["dice"]["mean"] == pytest.approx(
        np.mean([(1 + 0.8) / 2, (0.5 + 0) / 2, (0 + 1) / 2])
    )


def test_organs_count_missed_and_absent_and_leave_undefined_out(rows: list[Row]) -> None:
    organs = summarise(rows)["organs"]
    assert (organs["liver"]["missed"], organs["liver"]["absent"], organs["liver"]["dice"]["n"]) == (1, 0, 3)
    assert (organs["aorta"]["missed"], organs["aorta"]["absent"], organs["aorta"]["dice"]["n"]) == (0, 2, 2)
    assert organs["aorta"]["dice"]["mean"] == pytest.approx(0.4)
    assert organs["liver"]["hd95_mm"]["mean"] > 0  # the diagonal of the missed case is in it


def test_undefined_is_null_with_a_reason(rows: list[Row]) -> None:
    absent = summarise([row for row in rows if row.case == "b"])["organs"]["aorta"]["dice"]
    nothing = dict.fromkeys(("mean", "sd", "median", "iqr", "ci95"))
    assert absent == {**nothing, "n": 0, "reason": "both empty"}
    single = summarise([row for row in rows if row.case == "a"])["organs"]["liver"]["dice"]
    assert single["mean"] == 1 and single["sd"] is single["ci95"] is None and single["reason"]
    unknown = summarise(score_pair(label_map(3, 3), label_map(3, 3), LABELS, None, "x"))
    assert unknown["overall"]["dice"]["mean"] == 1
    assert unknown["overall"]["nsd"] == {**nothing, "n": 0, "reason": "spacing unknown"}


def test_the_interval_is_reproducible_and_holds_the_mean(rows: list[Row]) -> None:
    low, high = summarise(rows)["overall"]["dice"]["ci95"]
    assert [low, high] == summarise(rows)["overall"]["dice"]["ci95"]
    assert 0 <= low < summarise(rows)["overall"]["dice"]["mean"] < high <= 0.9


def test_summary_json_is_what_write_scores_returns(rows: list[Row], tmp_path: Path) -> None:
    summary = write_scores(tmp_path, rows, nsd_tolerance=3.0)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (summary["schema"], summary["cases"], summary["nsd_tolerance_mm"]) == ("surm-seg/scores-1", 3, 3.0)
    assert summary["overall"] == summary["protocols"]["recommended"]["overall"]
    assert summary["organs"] == summary["protocols"]["recommended"]["organs"]
    assert "NaN" not in (tmp_path / "summary.json").read_text()


def test_a_write_that_fails_leaves_no_part_of_a_file(rows: list[Row], tmp_path: Path) -> None:
    (tmp_path / "summary.json").mkdir()
    with pytest.raises(OSError):
        write_scores(tmp_path, rows)
    assert {path.name for path in tmp_path.iterdir()} == {"cases.csv", "slices.csv", "summary.json"}


def test_the_table_names_organs_and_shows_both_protocols(rows: list[Row]) -> None:
    lines = dice_table(summarise(rows)).splitlines()
    assert lines[0].split() == ["organ", "n", "Dice", "HD95", "mm", "NSD", "missed", "Dice*", "HD95", "vox*"]
    shown = {line.split()[0]: line for line in lines}
    assert shown["liver"].split()[:5] == ["liver", "3", "0.500", "±", "0.500"]
    assert shown["aorta"].split()[1] == "2"
    assert shown["mean"].split()[2] == "0.467"
    assert "samed-2023" in lines[-1]
    assert len({len(line) for line in lines[:-1]}) == 1


def test_the_table_of_one_protocol_says_nothing_of_the_other(rows: list[Row]) -> None:
    only = dice_table(summarise([row for row in rows if row.score.protocol == "recommended"]))
    assert "*" not in only and "mean" in only
    parity = summarise([row for row in rows if row.score.protocol == "samed-2023"])
    assert "overall" not in parity and "NSD" not in dice_table(parity)
    assert dice_table(summarise([])) == "no scores"


def test_an_undefined_mean_is_a_dash(rows: list[Row]) -> None:
    table = dice_table(summarise([row for row in rows if row.case == "b" and row.score.protocol == "recommended"]))
    (aorta,) = [line for line in table.splitlines() if line.startswith("aorta")]
    assert aorta.split() == ["aorta", "0", "-", "-", "-", "0"]
