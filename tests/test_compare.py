"""Comparing runs: the statistics by hand and by brute force, and what the command says, writes and refuses."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from surm_seg import compare
from surm_seg.metrics import OrganScore
from surm_seg.report import Row, score_pair, write_scores
from surm_seg.statistics import DRAWS, corrected, holm, paired, permutation_p, smallest_p

Values = Mapping[str, Sequence[float | None]]

FIRST: Values = {"liver": [0.5, 0.6, 0.4, 0.9], "aorta": [0.8, 0.7, 0.6, 0.5]}
SECOND: Values = {"liver": [0.6, 0.8, 0.7, 0.5], "aorta": [0.9, 0.8, 0.7, 0.8]}


def write_run(folder: Path, organs: Values, *, cases: str = "abcdefghijklmnop", data: str = "h", seed: int = 0) -> Path:
    """A run folder whose scores hold these Dice (and NSD) of cases a, b, ..."""
    rows = []
    for organ, values in organs.items():
        for case, dice in zip(cases, values, strict=False):
            score = OrganScore(
                organ, "recommended", dice, dice, None, None, 1.0, 1.0, 0.0, False, False, (1.0, 1.0, 1.0)
            )
            rows.append(Row(case, score, data + case))
    write_scores(folder / "scores", rows, run="r", adapter="circulant", seed=seed)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> tuple[str, str]:
    return str(write_run(tmp_path / "one", FIRST)), str(write_run(tmp_path / "two", SECOND, seed=1))


def compared(output: Path, *words: str) -> dict[str, Any]:
    assert compare.main([*words, "--output", str(output)]) == 0
    return json.loads((output / "comparison.json").read_text())


def line(record: dict[str, Any], organ: str, run: str = "R2") -> dict[str, Any]:
    (found,) = [one for one in record["comparisons"] if (one["organ"], one["run"]) == (organ, run)]
    return found


def brute_force_p(differences: Sequence[float]) -> float:
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in product((-1, 1), repeat=len(differences))
    ]
    return sum(total >= abs(sum(differences)) - 1e-9 for total in sums) / len(sums)


def test_four_pairs_by_hand() -> None:
    """Differences 0.1, 0.2, 0.3, -0.4 have ranks 1 to 4 and sum to 0.2.

    7 of 16 rank sums are 4 or less, on either side; of the 16 sums only 1 + 4 - 2 - 3 and its negative are nearer to 0.
    """
    found = paired([(0.5, 0.6), (0.6, 0.8), (0.4, 0.7), (0.9, 0.5)])
    assert (found.n, found.undefined) == (4, 0)
    assert (found.first, found.mean, found.difference) == pytest.approx((0.6, 0.65, 0.05))
    assert found.rank_biserial == pytest.approx((1 + 2 + 3 - 4) / 10)
    assert found.cohen_dz == pytest.approx(0.05 / np.sqrt((0.05**2 + 0.15**2 + 0.25**2 + 0.45**2) / 3))
    assert found.p_wilcoxon == pytest.approx(14 / 16)
    assert found.p_permutation == pytest.approx(14 / 16)


def test_ties_and_zeros_survive_floating_point() -> None:
    """0.3 - 0.2 and 0.2 - 0.1 are one rank, 0.1 + 0.2 and 0.3 no difference."""
    found = paired([(0.2, 0.3), (0.1, 0.2), (0.5, 0.2), (0.3, 0.1 + 0.2)])
    assert found.rank_biserial == pytest.approx((1.5 + 1.5 - 3) / 6)
    assert (found.n, found.p_wilcoxon) == (4, 1.0)
    one_side = paired([(0.2, 0.3), (0.1, 0.2), (0.5, 0.8)])
    assert one_side.rank_biserial == 1 and one_side.p_wilcoxon == one_side.p_permutation == smallest_p(3) == 0.25


@pytest.mark.parametrize("n", [1, 2, 5, 9, 12])
def test_the_permutation_test_up_to_12_pairs_is_exact(n: int) -> None:
    rng = np.random.default_rng(n)
    for differences in (rng.normal(0.5, 1, n).round(1), rng.normal(size=n), np.ones(n), np.zeros(n)):
        assert permutation_p(differences, rng) == pytest.approx(brute_force_p(differences.tolist()))


def test_more_pairs_are_drawn_and_p_is_reproducible_and_never_0() -> None:
    differences = np.random.default_rng(1).normal(0.4, 1, 13)
    exact = brute_force_p(differences.tolist())
    drawn = permutation_p(differences, np.random.default_rng(0))
    assert abs(drawn - exact) < 5 * np.sqrt(exact * (1 - exact) / DRAWS)
    assert drawn == permutation_p(differences, np.random.default_rng(0))
    assert 1 / (DRAWS + 1) <= permutation_p(np.ones(40), np.random.default_rng(0)) < 2 / DRAWS


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1] and holm([]) == []


def test_both_tests_of_every_line_are_one_family() -> None:
    strong = paired([(0.0, value) for value in range(1, 13)])
    null, nothing = paired([(0.0, 1.0), (1.0, 0.0)]), paired([(None, 1.0)])
    first, second, third = corrected([strong, null, nothing])
    assert first.p_wilcoxon == first.p_permutation == 2**-11
    assert first.p_wilcoxon_holm == first.p_permutation_holm == pytest.approx(4 * 2**-11)
    assert second.p_wilcoxon_holm == 1 and third == nothing and third.p_wilcoxon_holm is None


def test_the_interval_is_over_pairs() -> None:
    constant = paired([(0.5, 0.75)] * 6)
    assert constant.ci95_low == constant.ci95_high == 0.25 and constant.cohen_dz is None
    differences = np.random.default_rng(0).normal(1, 2, 400)
    wide = paired([(0.0, value) for value in differences.tolist()], seed=3)
    half = 1.96 * differences.std(ddof=1) / 20
    assert (wide.ci95_low, wide.ci95_high) == pytest.approx(
        (differences.mean() - half, differences.mean() + half), abs=0.05 * half
    )
    assert wide == paired([(0.0, value) for value in differences.tolist()], seed=3)


def test_one_pair_has_no_spread_and_none_has_nothing() -> None:
    one = paired([(0.5, 0.7), (None, 0.3)])
    assert (one.n, one.undefined, one.p_wilcoxon, one.p_permutation) == (1, 1, 1, 1)
    assert one.ci95_low is None and one.cohen_dz is None
    assert paired([(None, None)]).difference is None


def test_each_organ_and_the_mean_per_case(runs: tuple[str, str], tmp_path: Path) -> None:
    record = compared(tmp_path / "out", *runs)
    assert [one["organ"] for one in record["comparisons"]] == ["liver", "aorta", "overall"]
    assert line(record, "liver")["difference"] == pytest.approx(0.05)
    assert line(record, "aorta")["p_permutation"] == pytest.approx(2 / 16)
    overall = line(record, "overall")
    assert (overall["first"], overall["mean"]) == pytest.approx((0.625, 0.725))
    assert overall["p_permutation"] == pytest.approx(brute_force_p([0.1, 0.15, 0.2, -0.05]))
    assert all(one["p_wilcoxon_holm"] == min(1, 6 * 0.125) for one in record["comparisons"] if one["organ"] == "aorta")
    assert record["runs"][1] == {
        "label": "R2", "path": str(tmp_path / "two/scores/cases.csv"), "run": "r", "adapter": "circulant", "seed": "1",
    }  # fmt: skip


def test_undefined_values_leave_pairs_out_and_are_counted(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", {"liver": [0.5, None, 0.4], "aorta": [0.8, 0.7, None]})
    two = write_run(tmp_path / "two", {"liver": [0.6, 0.8, None], "aorta": [0.9, 0.8, 0.7]})
    record = compared(tmp_path / "out", str(one), str(two))
    assert [(one["n"], one["undefined"]) for one in record["comparisons"]] == [(1, 2), (2, 1), (2, 1)]
    assert any(note.startswith("n = 1 (R2 liver) is too small to claim anything") for note in record["notes"])
    overall = line(record, "overall")  # case a: both organs; b: the aorta; c: no organ is defined in both
    assert (overall["first"], overall["mean"]) == pytest.approx((np.mean([0.65, 0.7]), np.mean([0.75, 0.8])))


def test_a_metric_that_is_nowhere_defined(runs: tuple[str, str], tmp_path: Path, capsys: Any) -> None:
    record = compared(tmp_path / "out", *runs, "--metric", "hd95_mm")
    assert all(one["n"] == 0 and one["p_wilcoxon_holm"] is None for one in record["comparisons"])
    assert "no case has a defined hd95_mm in both runs" in capsys.readouterr().out


def test_a_run_equals_itself(runs: tuple[str, str], tmp_path: Path) -> None:
    for one in compared(tmp_path / "out", runs[0], runs[0])["comparisons"]:
        assert one["difference"] == one["ci95_low"] == one["ci95_high"] == one["rank_biserial"] == one["cohen_dz"] == 0
        assert {one[name] for name in one if name.startswith("p_")} == {1}


def test_seeds_of_one_label_are_runs_like_others(runs: tuple[str, str], tmp_path: Path) -> None:
    third = write_run(tmp_path / "three", SECOND, seed=2)
    record = compared(tmp_path / "out", *runs, str(third))
    assert [run["seed"] for run in record["runs"]] == ["0", "1", "2"]
    assert [one["run"] for one in record["comparisons"]] == ["R2"] * 3 + ["R3"] * 3
    assert line(record, "liver") | {"run": "R3"} == line(record, "liver", "R3")


def test_a_run_its_scores_and_its_file_are_the_same(runs: tuple[str, str], tmp_path: Path) -> None:
    one, two = map(Path, runs)
    record = compared(tmp_path / "out", str(one / "scores"), "--metric=dice", str(two / "scores" / "cases.csv"))
    assert record == compared(tmp_path / "again", "--quiet", "--protocol", "recommended", *runs)
    assert record == compared(tmp_path / "third", runs[0], "--quiet", "true", runs[1])


def test_folders_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["1", "true", "é [x], \U0001f600", 'a "b" \\ c: d']
    for name in names:
        write_run(Path(name), FIRST)
    assert [run["path"] for run in compared(Path("out"), *names)["runs"]] == [
        f"{name}/scores/cases.csv" for name in names
    ]


def test_what_not_all_runs_have_is_listed_and_left_out(runs: tuple[str, str], tmp_path: Path, capsys: Any) -> None:
    less = write_run(tmp_path / "less", {"liver": [0.5, 0.5, 0.5], "aorta": [0.5, 0.5]})
    record = compared(tmp_path / "out", *runs, str(less))
    assert record["cases"] == ["a", "b", "c"]
    assert record["left_out"] == [
        "left out, because R3 lacks it: case d", "left out, because R3 lacks it: aorta of case c",
    ]  # fmt: skip
    assert (line(record, "liver")["n"], line(record, "aorta")["n"]) == (3, 2)
    assert record["left_out"][0] in capsys.readouterr().out


@pytest.mark.parametrize(("n", "small"), [(4, True), (12, True), (40, False)])
def test_it_says_when_n_is_too_small(n: int, small: bool, tmp_path: Path, capsys: Any) -> None:
    cases = [chr(ord("A") + k) for k in range(n)]
    first, second = np.random.default_rng(n).random((2, n)).tolist()
    one = write_run(tmp_path / "one", {"liver": first}, cases="".join(cases))
    two = write_run(tmp_path / "two", {"liver": second}, cases="".join(cases))
    compared(tmp_path / "out", str(one), str(two))
    out = capsys.readouterr().out
    assert (f"n = {n} (every line) is too small to claim anything" in out) == small
    assert f"the smallest p that {n} pairs can reach is {2 ** (1 - n):.2g}, after Holm {4 * 2 ** (1 - n):.2g}" in out
    assert "1-2 Dice points are within what seeds make" in out


def test_the_table_and_the_csv_show_the_same_numbers(runs: tuple[str, str], tmp_path: Path, capsys: Any) -> None:
    record = compared(tmp_path / "out", *runs)
    with open(tmp_path / "out" / "comparison.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [{name: str(value) for name, value in one.items()} for one in record["comparisons"]] == lines
    shown = capsys.readouterr().out.splitlines()
    (liver,) = [words for words in map(str.split, shown) if words[:2] == ["R2", "liver"]]
    assert liver[2:7] == ["4", "0", "0.6000", "0.6500", "+0.0500"] and "0.875" in liver and "+0.20" in liver


def test_real_label_maps_under_the_published_protocol(tmp_path: Path) -> None:
    reference = np.zeros((3, 4, 10), np.uint8)
    reference[1, 1, :6] = 1
    for name, sizes in {"one": (2, 3), "two": (6, 4)}.items():
        rows = []
        for case, size in zip("ab", sizes, strict=True):
            prediction = np.zeros_like(reference)
            prediction[1, 1, :size] = 1
            rows += score_pair(prediction, reference, ["liver"], (5.0, 1.0, 2.0), case)
        write_scores(tmp_path / name, rows)
    words = (str(tmp_path / "one"), str(tmp_path / "two"), "--protocol", "samed-2023")
    dice = line(compared(tmp_path / "out", *words), "liver")
    assert (dice["first"], dice["mean"]) == pytest.approx((np.mean([4 / 8, 6 / 9]), np.mean([1, 8 / 10])))
    distance = line(compared(tmp_path / "out", *words, "--metric", "hd95_vox"), "liver")
    assert distance["difference"] < 0 and distance["rank_biserial"] == -1


def test_a_dry_run_writes_nothing(runs: tuple[str, str], tmp_path: Path) -> None:
    assert compare.main([*runs, "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()


def test_the_default_output_is_comparison_here(
    runs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert compare.main(runs) == 0
    assert {path.name for path in (tmp_path / "comparison").iterdir()} == {"comparison.csv", "comparison.json"}


def test_a_write_that_fails_is_one_sentence_and_leaves_no_part(
    runs: tuple[str, str], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "out" / "comparison.json").mkdir(parents=True)
    assert compare.main([*runs, "--output", str(tmp_path / "out")]) == 3
    assert "error [output]" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"comparison.csv", "comparison.json"}


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--metric", "volume"], "metric"),
        (["--metric", "nsd", "--protocol", "samed-2023"], "metric"),
        (["--protocol", "mine"], "protocol"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_options_that_cannot_work(runs: tuple[str, str], options: list[str], code: str, capsys: Any) -> None:
    assert compare.main([*runs, *options]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"error [{code}]")


def test_one_run_is_not_enough(runs: tuple[str, str], capsys: Any) -> None:
    assert compare.main(runs[:1]) == compare.main([]) == 2
    assert "error [compare-runs]" in capsys.readouterr().err


def refused(capsys: Any, *words: object) -> str:
    assert compare.main([*map(str, words), "--dry-run"]) == 3
    (sentence,) = capsys.readouterr().err.splitlines()
    return sentence


def test_runs_that_cannot_be_compared(runs: tuple[str, str], tmp_path: Path, capsys: Any) -> None:
    one = runs[0]
    assert "error [no-scores]: There is no" in refused(capsys, one, tmp_path / "absent")
    assert "holds no scores" in refused(capsys, one, tmp_path)
    other_data = write_run(tmp_path / "other", SECOND, data="x")
    assert "error [data-differs]: Case a has another reference" in refused(capsys, one, other_data)
    others = write_run(tmp_path / "others", SECOND, cases="wxyz")
    assert "error [none-shared]" in refused(capsys, one, others)
    assert "error [scores-protocol]" in refused(capsys, one, one, "--protocol", "samed-2023")


@pytest.mark.parametrize(
    ("before", "after", "code"),
    [
        (",0.8,", ",much,", "scores-line"),
        (",0.8,", ",inf,", "scores-line"),
        (",b,liver,", ",a,liver,", "scores-twice"),
        (",hb\n", ",hx\n", "scores-twice"),
        (",hb\n", ",\n", "scores-line"),
        (",dice,", ",dizes,", "scores-columns"),
        (",recommended,0.5,0.5,", "", "scores-line"),
        ("liver", "\udcff", "scores-unreadable"),
    ],
)
def test_a_damaged_file(before: str, after: str, code: str, runs: tuple[str, str], capsys: Any) -> None:
    path = Path(runs[1]) / "scores" / "cases.csv"
    text = path.read_text()
    assert before in text
    cut = text[: text.index(before)] if not after else text.replace(before, after, 1)
    path.write_bytes(cut.encode(errors="surrogateescape"))
    assert f"error [{code}]: {path}" in refused(capsys, *runs)
