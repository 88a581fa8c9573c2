"""Monarch's blocks and rank: bounds, errors of approximation, and the study end to end at toy size."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from pipelines_small import vit

from pipelines.studies import expressivity
from pipelines.studies.expressivity import RANDOM, TRAINED, TURNED, bounds, error, errors, members, turned
from pipelines.studies.table import main
from surm_seg.structures import make

SIDE = 24


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_all_monarch_members_of_a_rank_have_the_parameters_and_the_bounds_of_the_paper() -> None:
    for structure in members(SIDE, (1, 2, 4, 8), (1, 2, 4), ()).values():
        N, r = structure.options["blocks"], structure.options["rank"]
        assert structure.parameters == 2 * SIDE * r
        rank, density = bounds(structure)
        assert rank == min(N * r, SIDE) and density == pytest.approx(min(1, r / N))


def test_other_families_are_as_large_as_they_may_be_and_counted_once() -> None:
    held = members(SIDE, (1,), (1, 4))
    for structure in held.values():
        assert structure.parameters <= 2 * SIDE * 4
    assert [one.name for one in held.values()].count("toeplitz") == 1
    assert len(set(held.values())) == len(held)
    assert bounds(held["toeplitz"]) == (SIDE, 1.0)


@pytest.mark.parametrize("r", [1, 3])
def test_one_block_is_low_rank(r: int) -> None:
    M = normal(SIDE, SIDE)
    tail = np.linalg.svd(M.numpy(), compute_uv=False)[r:]
    expected = float(np.linalg.norm(tail)) / float(M.norm())
    assert error(make("monarch", SIDE, SIDE, blocks=1, rank=r), [M]) == pytest.approx(expected)


def test_the_error_is_over_all_matrices_together_and_zero_for_members() -> None:
    structure = make("monarch", SIDE, SIDE, blocks=4, rank=2)
    member = structure.dense({key: normal(*shape) for key, shape in structure.generators.items()})
    assert error(structure, [member, 3 * member]) < 1e-12
    missed, large = normal(SIDE, SIDE), 100 * member
    alone, together = error(structure, [missed]), error(structure, [missed, large])
    assert together == pytest.approx(alone * float(missed.norm() / torch.cat([missed, large]).norm()))


def test_turning_keeps_what_low_rank_sees_and_hides_blocks() -> None:
    blocky = make("monarch", SIDE, SIDE, blocks=4, rank=4)
    M = blocky.dense({key: normal(*shape) for key, shape in blocky.generators.items()})
    T = turned(M, torch.Generator().manual_seed(1))
    torch.testing.assert_close(torch.linalg.svdvals(T), torch.linalg.svdvals(M))
    low = make("low_rank", SIDE, SIDE, rank=4)
    assert error(low, [T]) == pytest.approx(error(low, [M]))
    assert error(blocky, [M]) < 1e-12 and error(blocky, [T]) > 0.3


def test_errors_fall_with_the_rank_for_every_kind_of_matrix() -> None:
    held = members(SIDE, (1, 4), (1, 4), ())
    found = errors(held, [[normal(SIDE, SIDE, seed=seed), normal(SIDE, SIDE, seed=seed + 9)] for seed in range(2)])
    for blocks in (1, 4):
        for kind in (TRAINED, TURNED, RANDOM):
            few, many = (found[f"monarch-blocks{blocks}-rank{rank}"][kind] for rank in (1, 4))
            assert len(few) == 2 and all(a > b for a, b in zip(few, many, strict=True))


def test_the_study_writes_what_it_prints_and_repeats_no_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        *("--output", str(tmp_path / "out"), "--model", str(vit(tmp_path / "vit")), "--steps", "2", "--seeds", "1"),
        *("--learning_rates", "1e-2", "--blocks", "1,2", "--ranks", "4", "--families", "circulant"),
    ]
    assert main(expressivity.parser(), expressivity.study, words) == 0
    folder = tmp_path / "out" / "expressivity"
    text, table = (folder / "table.md").read_text(), json.loads((folder / "table.json").read_text())
    assert capsys.readouterr().out.endswith(text)
    runs = {"monarch-blocks1-rank4", "monarch-blocks2-rank4", "circulant-block2", "linear_probe", "full"}
    assert set(table["results"]) == runs
    quoted = [line for line in text.splitlines() if "68.1" in line]
    assert len(quoted) == 1 and "N = 2, r = 4" in quoted[0]
    for name, one in table["results"].items():
        (score,) = (metrics["accuracy"] for metrics in one["test"].values())
        assert f"{score:.3f}" in text and (name in ("linear_probe", "full") or one["parameters"]["method"] > 0)
    assert {len(values) for by_kind in table["errors"].values() for values in by_kind.values()} == {1}
    picture = ElementTree.parse(folder / "picture.svg").getroot()
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}circle"))) == len(runs)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").glob("*/cell.json")}
    assert len(before) == len(runs) and main(expressivity.parser(), expressivity.study, words) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").glob("*/cell.json")}


def test_a_training_that_is_refused_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        *("--output", str(tmp_path / "out"), "--model", str(vit(tmp_path / "vit")), "--steps", "1", "--seeds", "1"),
        *("--learning_rates", "-1", "--blocks", "1", "--ranks", "1", "--families", "circulant"),
    ]
    assert main(expressivity.parser(), expressivity.study, words) == 3
    said = capsys.readouterr().err
    assert "error [cell-failed]: 4 trainings failed, such as " in said and "--learning_rate -1.0 must be" in said
