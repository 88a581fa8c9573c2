"""A sweep as its user meets it: the table, the picture, what fails, and a second call that repeats nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from pipelines_small import bert

from pipelines.supervised import summary_of
from surm_seg import sweep

WORDS = ["--task", "glue", "--name", "cola", "--steps", "2", "--epochs", "0", "--batch_size", "4", "--device", "cpu",
         "--precision", "float32", "--workers", "0"]  # fmt: skip
ASKED = ["--methods", "circulant,bitfit", "--learning_rates", "1e-3,1e-2", "--seeds", "2", "--beyond", "0"]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "CoLA").mkdir()
    for name, count in (("train.tsv", 20), ("dev.tsv", 8)):
        lines = (f"gj04\t{n % 2}\t\tthe boy number {n} smiles\n" for n in range(count))
        (tmp_path / "CoLA" / name).write_text("".join(lines))
    model = bert(tmp_path / "model")
    return [*WORDS, "--data", str(tmp_path), "--model", str(model), "--output", str(tmp_path / "sweep")]


def test_each_method_at_its_best_rate_over_the_seeds(words: list[str], tmp_path: Path) -> None:
    assert sweep.main([*ASKED, *words]) == 0
    output = tmp_path / "sweep"
    found = json.loads((output / "table.json").read_text())
    cells = {path.name: path for path in (output / "cells").iterdir() if (path / "cell.json").exists()}
    assert len(cells) == 2 * (2 + 1) and not found["failed"]
    for result in found["results"]:
        rates = result["validation"]
        assert rates.keys() == {"0.001", "0.01"} and rates[f"{result['rate']:g}"] == max(rates.values())
        for rate, value in rates.items():
            (run,) = (path for name, path in cells.items() if name.startswith(f"{result['method']}-{rate}-seed0-"))
            assert summary_of(run)["validation"]["matthews"] == value
        assert result["test"].keys() == {"0", "1"} and min(result["seconds"].values()) > 0
        assert all(peak > 1e8 for peak in result["peak_bytes"].values())
        for seed, metrics in result["test"].items():
            start = f"{result['method']}-{result['rate']:g}-seed{seed}-"
            (run,) = (path for name, path in cells.items() if name.startswith(start))
            assert summary_of(run)["metrics"] == metrics
    table = (output / "table.md").read_text()
    assert "circulant" in table and "bitfit" in table and (output / "picture.svg").read_text().count("<circle") == 2
    before = {path: (path / "cell.json").stat().st_mtime_ns for path in cells.values()}
    assert sweep.main([*ASKED, *words]) == 0
    assert {path: (path / "cell.json").stat().st_mtime_ns for path in cells.values()} == before


def test_runs_on_other_data_or_options_are_not_taken_for_these(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The words are the same, what the files say is not."""
    options = tmp_path / "options.yaml"
    options.write_text("warmup: 0\n")
    words = ["--methods", "circulant", "--learning_rates", "1e-3", "--seeds", "1", *words, "--config", str(options)]
    assert sweep.main(words) == 0
    options.write_text("warmup: 1\n")
    assert sweep.main(words) == 0
    assert len(list((tmp_path / "sweep" / "cells").glob("*/cell.json"))) == 2
    train = tmp_path / "CoLA" / "train.tsv"
    train.write_text(train.read_text().replace("smiles", "frowns"))
    table = (tmp_path / "sweep" / "table.json").read_bytes()
    words[words.index("--seeds") + 1] = "2"
    assert sweep.main(words) == 3
    assert "runs whose data differ" in capsys.readouterr().err
    assert (tmp_path / "sweep" / "table.json").read_bytes() == table


def test_a_cell_that_fails_is_recorded_and_stops_no_other(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--methods", "circulant,linear_probe", "--learning_rates", "1e-3", "--seeds", "1"]
    assert sweep.main([*asked, *words, "--method_options", '{"block": 8}', "--debug"]) == 5
    assert "linear_probe-0.001-seed0" in capsys.readouterr().err
    found = json.loads((tmp_path / "sweep" / "table.json").read_text())
    assert [result["method"] for result in found["results"]] == ["circulant"]
    (why,) = found["failed"].values()
    assert why.startswith("[method-options]") or "block" in why


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (["--methods", "circulent"], "did you mean circulant"),
        (["--seed", "3"], "--seed is what surm-seg sweep sets itself"),
        (["--learning_rates", "fast"], "--learning_rates fast"),
        (["--methods", ""], "--methods must name one"),
        (["--beyond", "-1"], "--beyond not negative"),
        (["--name", "colla"], "--name colla is no task of GLUE"),
        (["--config", sys.executable], "cannot be read as YAML"),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_is_run(
    asked: list[str], sentence: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main([*words, *asked]) in (2, 3)
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "sweep" / "cells").exists()
