"""The study of mixtures: which runs it compares, and what it makes of them."""

from __future__ import annotations

import json
from pathlib import Path

from pipelines_small import vit

from pipelines.selection import Comparison, Selected, selected
from pipelines.studies import mixture
from pipelines.studies.mixture import MIXTURE, Study
from surm_seg import train
from surm_seg.cells import Done

RATE = mixture.RATES[0]


def arm(name: str, *test: float) -> Selected:
    validation = {rate: test[0] - rate for rate in mixture.RATES}
    metrics = {seed: {"accuracy": score} for seed, score in enumerate(test)}
    runs = {seed: Done(Path("run")) for seed in metrics}
    return Selected(name, RATE, True, validation, runs, "accuracy", metrics, {"method": 100}, {})


def test_differences_are_taken_seed_by_seed(tmp_path: Path) -> None:
    arms = [
        arm(MIXTURE, 0.7, 0.9),
        arm("low_rank", 0.6, 0.8),
        arm("toeplitz", 0.8, 1.0),
        arm("monarch", 0.1, 0.1),
    ]
    captured = {"low_rank": 0.8, "toeplitz": 0.1, "monarch": 0.2}
    for seed in (0, 1):
        search = tmp_path / "searches" / f"digits-mixture-seed{seed}"
        search.mkdir(parents=True)
        places = [{"chosen": {"structure": "low_rank"}}, {"chosen": None}, {"chosen": {"structure": "low_rank"}}]
        compared = [{"structure": name, "captured": share} for name, share in captured.items()]
        (search / "table.json").write_text(json.dumps({"places": places, "compared": compared}))
    made = mixture.found(
        Study(tmp_path, 2), {"digits": {one.arm: one for one in arms}}, {"agreement mixture": "[x] why"}
    )
    text = "\n".join(made.paragraphs)
    low_rank, toeplitz = (
        next(line for line in text.splitlines() if f"| {name}" in line) for name in ("low_rank", "toep")
    )
    assert "0.100 ± 0.000" in low_rank and "-0.100 ± 0.000" in toeplitz and "0.700 ± 0.141" in low_rank
    assert "above that of 2 of 3 uniform structures" in text and "Against toeplitz" in text
    assert "correlation of captured share and test score over the uniform structures: -0.50" in text
    assert "seed 1: low_rank 2 and none 1" in text and "Failed: agreement mixture [x] why" in text


def test_every_arm_trains_as_much_on_the_same_samples(tmp_path: Path) -> None:
    """A real search and real runs, of a ViT that knows nothing; a finished run is not repeated."""
    short = ("--model", str(vit(tmp_path / "model")), "--steps", "2", "--epochs", "0", "--batch_size", "4")
    study = Study(tmp_path, 1, 2, short)
    arms = {name: words for name, words in study.arms("digits").items() if name in (MIXTURE, "low_rank")}
    comparison = Comparison(arms, (RATE,), 1, 2, tmp_path / "cells", ())
    results, failed = selected(comparison, train.main)
    found = study.searched("digits", MIXTURE, 0)
    assert not failed and found["budget"] == results["low_rank"].parameters["method"] == 4 * 32
    assert results[MIXTURE].parameters["method"] == found["compared"][0]["parameters"] <= 4 * 32
    records = [json.loads((result.runs[0].folder / "run.json").read_bytes()) for result in results.values()]
    assert len({record["data_sha256"] for record in records}) == 1
    before = [record["finished"] for record in records]
    again, _ = selected(comparison, train.main)
    assert [json.loads((one.runs[0].folder / "run.json").read_bytes())["finished"] for one in again.values()] == before
