"""Which learning rate an arm of a comparison gets, by runs that only say how good a rate is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import log, nan
from pathlib import Path

import pytest

from pipelines.selection import SEED, Comparison, selected
from surm_seg.errors import BadInput


def pretend(words: Sequence[str]) -> int:
    """A run whose score is best at the rate that --best names, fails at --worst, and is no number at --undefined."""
    given = dict(zip(words[::2], words[1::2], strict=False))
    rate, best = float(given["--learning_rate"]), float(given["--best"])
    if rate == float(given.get("--worst", "nan")):
        return 3
    run = Path(given["--output"])
    (run / "scores").mkdir(parents=True)
    score = {"skill": -abs(log(rate / best))}
    if rate == float(given.get("--undefined", "nan")):
        score = {"skill": nan}
    summary = {"score": "skill", "validation": score, "metrics": score}
    (run / "scores" / "summary.json").write_text(json.dumps(summary))
    record = {"parameters": {"method": 1}, "method_options": {"words": list(words)}}
    record |= {"data_sha256": given.get("--data", "d"), "base_sha256": "b"}
    (run / "run.json").write_text(json.dumps(record))
    return 0


def compared(folder: Path, *own: str, beyond: int = 3) -> Comparison:
    return Comparison({"arm": own}, (1e-3, 1e-2), 2, 1, folder, (), beyond)


@pytest.mark.parametrize(
    ("best", "tried", "chosen", "edge"),
    [
        (1e-2, {1e-3, 1e-2, 1e-1}, 1e-2, False),
        (1.0, {1e-3, 1e-2, 1e-1, 1.0, 10.0}, 1.0, False),
        (1e-4, {1e-3, 1e-2, 1e-4, 1e-5}, 1e-4, False),
        (1e9, {1e-3, 1e-2, 1e-1, 1.0, 10.0}, 10.0, True),
    ],
)
def test_the_best_rate_is_looked_for_beyond_the_edge(
    best: float, tried: set[float], chosen: float, edge: bool, tmp_path: Path
) -> None:
    found, failed = selected(compared(tmp_path, "--best", str(best)), pretend)
    arm = found["arm"]
    assert not failed and arm.validation.keys() == tried and (arm.rate, arm.at_the_edge) == (chosen, edge)
    assert list(arm.runs) == list(arm.metrics) == [0, 1]


def test_a_rate_that_fails_is_a_bound(tmp_path: Path) -> None:
    found, failed = selected(compared(tmp_path, "--best", "1", "--worst", "0.1"), pretend)
    assert (found["arm"].rate, found["arm"].at_the_edge, len(failed)) == (1e-2, False, 1)


@pytest.mark.parametrize("undefined", [1e-3, 1e-2])
def test_a_score_that_is_no_number_wins_no_rate(undefined: float, tmp_path: Path) -> None:
    words = ("--best", "1e-2", "--undefined", str(undefined))
    found, failed = selected(compared(tmp_path, *words, beyond=0), pretend)
    assert found["arm"].validation.keys() == {1e-3, 1e-2} - {undefined} == {found["arm"].rate}
    assert ["validation score is nan" in why for why in failed.values()] == [True]


def test_nothing_is_tried_beyond_where_that_is_not_wanted_or_there_is_one_rate(tmp_path: Path) -> None:
    assert compared(tmp_path, beyond=0).further([1e-3, 1e-2], 1e-2) is None
    assert Comparison({}, (1e-3,), 1, 1, tmp_path, ()).further([1e-3], 1e-3) is None


def test_an_arm_may_have_options_for_each_seed(tmp_path: Path) -> None:
    found, _ = selected(compared(tmp_path, "--best", "1e-2", "--config", f"seed-{SEED}.yaml"), pretend)
    words = [
        json.loads((run.folder / "run.json").read_bytes())["method_options"]["words"]
        for run in found["arm"].runs.values()
    ]
    assert ["seed-0.yaml" in words[0], "seed-1.yaml" in words[1]] == [True, True]


def test_runs_on_other_data_are_not_compared(tmp_path: Path) -> None:
    arms = {"one": ("--best", "1", "--data", "x"), "other": ("--best", "1", "--data", "y")}
    with pytest.raises(BadInput, match="runs whose data differ, such as one-"):
        selected(Comparison(arms, (1e-3,), 1, 1, tmp_path, (), 0), pretend)
