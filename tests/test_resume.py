"""A scored case is not scored again, unless anything that decides its scores has changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from surm_seg import evaluate
from surm_seg.scored import FOLDER, Scored, score_case

Write = Callable[..., Path]

NAMES = ("Doe_Jane", "Poe_Ann", "Roe_Rick")


def labels_ijk(seed: int) -> np.ndarray:
    voxels = np.zeros((10, 9, 6), np.uint8)
    voxels[2:7, 3:8, 1:5], voxels[7:9, 2:6, 1:5] = 5, 7
    return np.where(np.random.default_rng(seed).random(voxels.shape) < 0.2, 0, voxels).astype(np.uint8)


@pytest.fixture
def run(write_nifti: Write, tmp_path: Path) -> Callable[..., int]:
    for n, name in enumerate(NAMES):
        write_nifti(tmp_path / "p" / f"{name}.nii.gz", labels_ijk(n))
        write_nifti(tmp_path / "r" / f"{name}.nii.gz", labels_ijk(9))
    sides = ["--prediction", str(tmp_path / "p"), "--reference", str(tmp_path / "r"), "--workers", "1"]
    return lambda *options: evaluate.main([*sides, *options])


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cases that are really scored, in order."""
    seen: list[str] = []

    def watched(*arguments: object, **options: object) -> Scored:
        seen.append(str(arguments[4]))
        return score_case(*arguments, **options)

    monkeypatch.setattr(evaluate, "score_case", watched)
    return seen


def test_a_stopped_run_goes_on_with_the_next_case(
    run: Callable[..., int], scored: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: object, **options: object) -> Scored:
        if arguments[4] == "case002":
            raise KeyboardInterrupt
        return score_case(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "score_case", stopped)
        assert run() == 130
    assert not (tmp_path / "scores" / "cases.csv").exists()
    assert run() == 0
    assert "case001" not in scored and "case002" in scored
    assert run("--output", str(tmp_path / "afresh")) == 0
    for name in ("cases.csv", "slices.csv", "summary.json"):
        assert (tmp_path / "scores" / name).read_bytes() == (tmp_path / "afresh" / name).read_bytes()


def test_nothing_changed_nothing_scored(run: Callable[..., int], scored: list[str], tmp_path: Path) -> None:
    assert run() == run() == 0
    assert scored == ["case001", "case002", "case003"]
    names = [path.name for path in (tmp_path / "scores" / FOLDER).iterdir()]
    assert sorted(names) == ["case001.json", "case002.json", "case003.json"]


def test_what_changed_is_scored_again(
    run: Callable[..., int], scored: list[str], write_nifti: Write, tmp_path: Path
) -> None:
    assert run() == 0
    write_nifti(tmp_path / "p" / "Poe_Ann.nii.gz", labels_ijk(7))
    assert run() == 0 and scored[3:] == ["case002"]
    write_nifti(tmp_path / "r" / "Roe_Rick.nii.gz", labels_ijk(8))
    assert run() == 0 and scored[4:] == ["case003"]
    for options in (["--nsd_tolerance", "3"], ["--protocols", "[recommended]"]):
        del scored[:]
        assert run(*options) == 0 and len(scored) == 3
    (tmp_path / "table").write_text("5: liver\n7:\n")
    assert run("--protocols", "[recommended]", "--labels", str(tmp_path / "table")) == 0 and len(scored) == 6


def test_a_case_keeps_its_scores_under_another_name(run: Callable[..., int], scored: list[str], tmp_path: Path) -> None:
    assert run() == 0
    (tmp_path / "p" / "Doe_Jane.nii.gz").unlink()
    assert run() == 0  # case002 and case003 are now case001 and case002
    assert len(scored) == 3
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert summary["cases"] == 2
    assert sorted(path.name for path in (tmp_path / "scores" / FOLDER).iterdir()) == ["case001.json", "case002.json"]
    lines = (tmp_path / "scores" / "slices.csv").read_text().splitlines()[1:]
    assert {line.split(",")[0] for line in lines} == {"case001", "case002"}


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-9], lambda b: b.replace(b"0.8", b"0.9"), lambda b: b"[]", lambda b: b""]
)
def test_a_damaged_record_is_never_used(
    run: Callable[..., int], scored: list[str], tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    assert run() == 0
    before = (tmp_path / "scores" / "cases.csv").read_bytes()
    record = tmp_path / "scores" / FOLDER / "case002.json"
    content = record.read_bytes()
    assert damage(content) != content
    record.write_bytes(damage(content))
    assert run() == 0 and scored[3:] == ["case002"]
    assert (tmp_path / "scores" / "cases.csv").read_bytes() == before
    assert record.read_bytes() == content


def test_voxels_beside_their_header_are_always_read(scored: list[str], tmp_path: Path) -> None:
    for n, name in enumerate(("p", "r")):
        sitk.WriteImage(sitk.GetImageFromArray(labels_ijk(n)), tmp_path / f"{name}.mhd")
    sides = ["--prediction", str(tmp_path / "p.mhd"), "--reference", str(tmp_path / "r.mhd")]
    sides += ["--output", str(tmp_path / "scores")]
    assert evaluate.main(sides) == 0
    raw = tmp_path / "p.raw"
    raw.write_bytes(bytes(len(raw.read_bytes())))
    assert evaluate.main(sides) == 0 and len(scored) == 2
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert summary["overall"]["dice"]["mean"] == 0
