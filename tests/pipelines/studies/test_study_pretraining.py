"""Pre-trained against random: the study as a user runs, cuts and repeats it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipelines import pretrain
from pipelines.studies import runs
from pipelines.studies.data import CT_BLOCKS, shifted_world
from pipelines.studies.pretraining import STUDY, rows
from pipelines.studies.runs import Cell, Run
from surm_seg.cases import Dataset

TOY = ["--patients", "2", "--steps", "1", "--image_size", "64", "--batch_size", "2"]
RANGES = ("body_scale", "deformation_mm", "texture_hu", "noise_hu", "spacing_mm", "slice_mm")


def finished(output: Path) -> dict[str, bytes]:
    """Name of each finished cell and its record, which tells when it was made."""
    records = {path.parent.name: path.read_bytes() for path in output.glob("cells/*/run.json")}
    return {name: record for name, record in records.items() if b'"finished"' in record}


def test_a_killed_study_repeats_no_finished_cell_and_a_failing_one_stops_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--output", str(tmp_path / "out"), "--ct", str(tmp_path / "absent"), *TOY, "--seeds", "2"]
    command = [sys.executable, "-m", "pipelines.studies.pretraining", *words]
    study = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    while not (before := finished(tmp_path / "out")):
        assert study.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    study.send_signal(signal.SIGKILL)
    assert study.wait() == -signal.SIGKILL and len(before) < 4

    assert runs.main(STUDY, words) == runs.SOME_FAILED
    after = finished(tmp_path / "out")
    assert len(after) == 4 and before.items() <= after.items()
    table = json.loads((tmp_path / "out/pretraining/table.json").read_text())
    assert [cell["error"] for cell in table["cells"] if cell["data"] == "ct-case-a"] == ["no-ct"] * 4
    assert [row["data"] for row in table["rows"]] == ["shifted"] and table["rows"][0]["seeds"] == "2"
    text = (tmp_path / "out/pretraining/table.md").read_text()
    said = capsys.readouterr()
    assert said.out.endswith(text) and table["command"] in text and "Failed: ct-case-a-random" in text
    assert str(tmp_path / "absent") in said.err and "failed [no-ct]" in said.err

    damaged = sorted(after)[0]
    (tmp_path / "out/cells" / damaged / "scores/cases.csv").unlink()
    assert runs.main(STUDY, words) == runs.SOME_FAILED
    last = finished(tmp_path / "out")
    assert {name for name in last if last[name] != after[name]} == {damaged}
    assert json.loads((tmp_path / "out/pretraining/table.json").read_text())["rows"] == table["rows"]


def test_slices_of_the_real_case_are_apart(shared_data: Path, tmp_path: Path) -> None:
    words = ["--output", str(tmp_path), "--ct", str(shared_data / "ct-case-a"), *TOY, "--seeds", "1"]
    assert runs.main(STUDY, words) == 0
    data = Dataset.open(tmp_path / "data/ct-case-a")
    train, test = data.split("train"), data.split("test")
    assert sorted(case.shape[0] for case in train) == [7, 32] and [case.shape[0] for case in test] == [11]
    for part in (train, test):
        assert all(sum((case.histogram or {})[organ] for case in part) for organ in data.labels)
    low, high = CT_BLOCKS["held-out"]
    assert all(stop + 3 <= low or high + 3 <= start for start, stop in (CT_BLOCKS["below"], CT_BLOCKS["above"]))
    table = json.loads((tmp_path / "pretraining/table.json").read_text())
    assert [row["held-out cases"] for row in table["rows"]] == ["1", "1"]
    assert {cell["weights"]: cell["parameters"]["encoder_adapter"] for cell in table["cells"]} == {
        "random": 2304,
        "auto": 2304,
    }


def test_pretraining_never_drew_from_the_shifted_world() -> None:
    shifted = shifted_world()
    for seed in range(50):
        wide = pretrain.wide_world(np.random.default_rng([pretrain.FIRST_SEED + seed, 1]))
        for name in RANGES:
            assert getattr(shifted, name)[0] > getattr(wide, name)[1], name
        assert wide.hu["fat"][1] < wide.hu["liver"][0] and shifted.hu["fat"][0] > shifted.hu["liver"][1]
    assert all(low <= high for low, high in shifted.hu.values())


def test_differences_are_of_pairs(tmp_path: Path) -> None:
    def run(*dice: float) -> Run:
        counts = {"encoder_adapter": 1, "decoder": 2, "model": 3}
        return Run(tmp_path, tmp_path, {f"case{n}": value for n, value in enumerate(dice)}, counts, {})

    table, figures = rows({
        Cell("shifted", 0, "random"): run(0.1, 0.3),
        Cell("shifted", 0, "auto"): run(0.5, 0.6),
        Cell("shifted", 1, "random"): run(0.2, 0.2),
        Cell("shifted", 1, "auto"): run(0.6, 0.7),
        Cell("shifted", 2, "random"): run(0.9, 0.9),  # its partner failed
    })  # fmt: skip
    assert len(table) == 1 and table[0]["seeds"] == "2" and table[0]["difference"] == "+0.400 (+0.350 to +0.450)"
    over_patients = figures["shifted"]["over_patients"]
    assert over_patients["n"] == 2 and over_patients["difference"] == pytest.approx(0.4)
    assert over_patients["first"] == pytest.approx(0.2)
