"""`bench engine`: tiny real trainings by both loops, and that loops which differ are not timed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from surm_seg import bench
from surm_seg.bench import engine as engine_bench
from surm_seg.bench.engine import BARE, ENGINE, READY, TOLERANCE, check, spread
from surm_seg.errors import SurmError

RUN = ["engine", "--tasks", "minilm", "--steps", "3", "--repeats", "2", "--threads", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    monkeypatch.setattr(engine_bench, "MINILM", engine_bench.MINILM | size)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_both_loops_give_the_same_losses_and_are_shown(
    precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main([*RUN, "--precision", precision, "--output", str(tmp_path)]) == 0
    result: dict[str, Any] = json.loads((tmp_path / "engine.json").read_text())
    rows = result["rows"]
    assert [row["label"] for row in rows] == [BARE, READY, ENGINE]
    for row in rows:
        assert (row["task"], row["steps"], row["batch"], row["apart"]) == ("minilm", 3, 32, 0)
        assert len(row["wall_s"]) == len(row["cpu_s"]) == 2 and min(row["wall_s"]) > 0
        low, high = row["wall_quartiles"]
        assert low <= row["wall_ratio"] <= high
    assert rows[0]["wall_ratio"] == rows[0]["cpu_ratio"] == 1
    assert f"| minilm | 3 x 32        | {ENGINE}" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [tmp_path / "engine.json"]


def test_loops_that_differ_are_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dropout: the engine seeds every step, which a bare loop does not."""
    monkeypatch.setattr(engine_bench, "MINILM", engine_bench.MINILM | {"hidden_dropout_prob": 0.1})
    assert bench.main([*RUN, "--output", str(tmp_path / "bench")]) == 1
    assert "error [bench-differs]: The loss of step 1 is" in capsys.readouterr().err
    assert not (tmp_path / "bench").exists()


def test_the_check_allows_its_tolerance_and_no_more() -> None:
    assert check({BARE: [0.5, 2.0], ENGINE: [0.5, 2.0]}) == 0
    assert 0 < check({BARE: [0.5, 2.0], ENGINE: [0.5, 2.0 * (1 + 0.5 * TOLERANCE)]}) < TOLERANCE
    for wrong in (2.0 * (1 + 2 * TOLERANCE), float("nan")):
        with pytest.raises(SurmError, match=r"The loss of step 2 is .* by the engine, 2\.0 by a bare loop"):
            check({BARE: [0.5, 2.0], ENGINE: [0.5, wrong]})


def test_ratios_are_taken_within_a_round() -> None:
    base = {"wall_s": [1.0, 2.0, 4.0, 8.0, 16.0], "cpu_s": [1.0] * 5}
    found = spread({"wall_s": [2.0, 2.0, 12.0, 32.0, 80.0], "cpu_s": [3.0] * 5}, base)
    assert found == {"wall_ratio": 3, "wall_quartiles": (2, 4), "cpu_ratio": 3, "cpu_quartiles": (3, 3)}


@pytest.mark.parametrize("words", [["--tasks", "speech"], ["--repeats", "0"], ["--precision", "float16"]])
def test_usage_errors_exit_2(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["engine", *words]) == 2
    assert "error [bench-option]" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["engine", "--dry-run", "--device", "cpu", "--output", str(tmp_path / "bench")]) == 0
    assert "would train text, minilm, digits, segmentation" in capsys.readouterr().out
    assert not (tmp_path / "bench").exists()
