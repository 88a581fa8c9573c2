"""Predictions in bfloat16 against float32: the study end to end at toy size."""

import json
from pathlib import Path

import pytest

from pipelines.studies import runs
from pipelines.studies.precision import STUDY

WORDS = ["--patients", "2", "--steps", "30", "--image_size", "64", "--batch_size", "4"]


@pytest.mark.parametrize("trained", ["float32", "bfloat16"])
def test_it_predicts_in_both_precisions_as_the_run_itself_does_in_its_own(trained: str, tmp_path: Path) -> None:
    words = ["--output", str(tmp_path), *WORDS, "--precision", trained]
    assert runs.main(STUDY, words) == 0
    table = json.loads((tmp_path / "precision/table.json").read_text())
    figures, (cell,) = table["figures"], table["cells"]
    mean = figures["mean"]
    assert cell["dice"] > 0.05, "with no organ found the comparison would mean nothing"
    assert mean[trained] == pytest.approx(cell["dice"], abs=1e-9)
    assert mean["difference"] == pytest.approx(mean["bfloat16"] - mean["float32"], abs=1e-12)
    assert 0 < mean["changed"] < 0.05 * mean["voxels"]
    organs = {name: value for name, value in figures.items() if name != "mean"}
    apart = {name: abs(value["difference"]) for name, value in organs.items()}
    assert apart[mean["worst_organ"]] == max(apart.values())
    assert all(value["changed"] <= value["voxels"] <= mean["voxels"] for value in organs.values())
    assert sum(value["changed"] for value in organs.values()) >= mean["changed"]
    assert [row["organ"] for row in table["rows"]] == [*organs, "mean"]
