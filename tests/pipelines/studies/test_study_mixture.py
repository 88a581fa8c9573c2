"""The study of mixtures: which runs it compares, and what it makes of them."""

from __future__ import annotations

import json
from pathlib import Path

from pipelines_small import vit

from pipelines.studies import mixture
from pipelines.studies.mixture import MIXTURE, Arm, Study


def arm(name: str, captured: float, *test: float) -> Arm:
    validation = {rate: test[0] - rate for rate in mixture.RATES}
    return Arm("digits", name, "accuracy", 100, captured, mixture.RATES[0], validation, dict(enumerate(test)))


def test_differences_are_taken_seed_by_seed(tmp_path: Path) -> None:
    arms = [
        arm(MIXTURE, 0.9, 0.7, 0.9),
        arm("low_rank", 0.8, 0.6, 0.8),
        arm("toeplitz", 0.1, 0.8, 1.0),
        arm("monarch", 0.2, 0.1, 0.1),
    ]
    for seed in (0, 1):
        search = tmp_path / "searches" / f"digits-mixture-seed{seed}"
        search.mkdir(parents=True)
        places = [{"chosen": {"structure": "low_rank"}}, {"chosen": None}, {"chosen": {"structure": "low_rank"}}]
        (search / "table.json").write_text(json.dumps({"places": places}))
    made = mixture.found(Study(tmp_path, 2), arms, {"agreement mixture": "[x] why"})
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
    study = Study(tmp_path, 1, short)
    runs = {name: study.run("digits", name, 1e-3, 0) for name in (MIXTURE, "low_rank")}
    records = {name: json.loads((run / "run.json").read_bytes()) for name, run in runs.items()}
    found = json.loads((study.search("digits", 0) / "table.json").read_bytes())
    assert found["budget"] == records["low_rank"]["parameters"]["method"] == 4 * 32
    assert records[MIXTURE]["parameters"]["method"] == found["compared"][0]["parameters"] <= 4 * 32
    assert len({record["data_sha256"] for record in records.values()}) == 1
    before = (runs[MIXTURE] / "run.json").stat().st_mtime_ns
    assert study.run("digits", MIXTURE, 1e-3, 0) == runs[MIXTURE]
    assert (runs[MIXTURE] / "run.json").stat().st_mtime_ns == before
