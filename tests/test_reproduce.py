"""A reproduction as its user meets it: refused before any work, cut and gone on with, failing in part, foretold."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from pipelines.phantom import on_grid, write
from surm_seg import evaluate, reproduce, structures, train
from surm_seg.backbones.sam import TINY_WEIGHTS
from surm_seg.cells import Done
from surm_seg.reproduce.findings import Result, compared
from surm_seg.reproduce.synapse import ARMS, QUOTED, Arm, write_rehearsal

TOY = ("--rehearse", "--seeds", "1", "--steps", "2", "--batch_size", "2", "--image_size", "64", "--slice_size", "32",
       "--workers", "0", "--device", "cpu")  # fmt: skip
TRAINING, TEST = 5, 1  # numbers of the benchmark
PATIENCE = 240.0


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patient to train on and one to score, in the challenge's layout."""
    folder = tmp_path_factory.mktemp("btcv")
    for number in (TRAINING, TEST):
        write(folder, [number], on_grid(32, (6, 6)), first_id=number)
    return folder


def asked(source: Path, output: Path, *words: str) -> list[str]:
    return ["synapse", *TOY, "--source", str(source), "--output", str(output), *words]


def finished(output: Path) -> dict[str, int]:
    """Run -> when it was finished."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (output / "cells").glob("*/cell.json")}


def test_one_that_is_killed_goes_on_and_ends_in_a_table_beside_the_quoted_one(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = [sys.executable, "-m", "surm_seg.reproduce", *asked(source, output)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    end = time.monotonic() + PATIENCE
    while not finished(output):
        assert time.monotonic() < end and process.poll() is None, "no run was finished"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = finished(output)
    assert 0 < len(before) < len(ARMS)
    assert reproduce.main(asked(source, output)) == 0
    after = finished(output)
    assert len(after) == len(ARMS) and before.items() <= after.items()

    found = json.loads((output / "table.json").read_text())
    assert [one["name"] for one in found["methods"]] == [arm.name for arm in ARMS]
    assert [*found["compared"]] == [arm.name for arm in ARMS[1:]]
    assert found["rehearsal"] and not found["data_as_published"] and not found["failed"]
    for one in found["methods"]:
        (run,) = (output / "cells").glob(f"{one['name']}-seed0-*")
        summary = json.loads((run / "scores" / "summary.json").read_text())
        assert one["protocols"].keys() == summary["protocols"].keys() == {"recommended", "samed-2023"}
        for protocol, content in summary["protocols"].items():
            assert one["protocols"][protocol]["overall"]["dice"]["mean"] == content["overall"]["dice"]["mean"]
        assert one["parameters"] == json.loads((run / "run.json").read_text())["parameters"]
        assert (run / "scores" / "report.html").exists()
    table, picture = ((output / name).read_text() for name in ("table.md", "picture.svg"))
    assert "nothing here says anything about Synapse" in table and "Rehearsal" in picture
    for quoted in QUOTED:
        rows = [line for line in table.splitlines() if line.startswith(f"| {quoted.method} ")]
        assert rows and all("(quoted)" in row for row in rows) and f"{quoted.dice:.2f}" in rows[0]
    assert picture.count("(quoted)") == picture.count('fill="white" stroke') == sum(bool(q.encoder) for q in QUOTED)


def test_a_run_that_fails_is_recorded_and_stops_no_other(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = (Arm("impossible", "low_rank", {"rank": 100_000}), ARMS[1])
    monkeypatch.setattr(reproduce, "ARMS", (ARMS[1], arms[0]))
    assert reproduce.main(asked(source, tmp_path / "out")) == 5
    assert "impossible-seed0" in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [one["name"] for one in found["methods"]] == [ARMS[1].name]
    assert next(iter(found["failed"].values())).startswith("[structure-option]")
    assert "Failed: impossible-seed0" in (tmp_path / "out" / "table.md").read_text()


def test_runs_differ_in_nothing_but_structure_and_seed() -> None:
    asked = reproduce.Reproduction(
        Path("btcv"), False, 2, 1, Path("out"), ("--backbone", "sam_vit_b", "--device", "cpu")
    )
    cells = asked.cells("digest")
    assert len(cells) == 2 * len(ARMS) == len({cell.name for cell in cells})
    assert [seed for _, seed in cells.values()] == [0] * len(ARMS) + [1] * len(ARMS)
    resolved = set()
    for cell, (arm, seed) in cells.items():
        _, config, engine, options = train.parsed(cell.words)
        assert (config.seed, options.structure, options.structure_options) == (seed, arm.structure, dict(arm.options))
        rest = (
            asdict(replace(options, structure="", structure_options={})),
            asdict(engine),
            asdict(replace(config, seed=0)),
        )
        resolved.add(repr(rest))
    assert len(resolved) == 1
    _, _, recipe, samed = train.parsed(["--recipe", "samed", "--precision", "float32"])
    _, _, engine, options = train.parsed(asked.words_of(ARMS[0]))
    assert engine == recipe and options == replace(samed, backbone="sam_vit_b")


def test_the_first_arm_is_what_samed_trained() -> None:
    arm, blocks, roles = ARMS[0], 12, 2
    assert blocks * roles * structures.make(arm.structure, 768, 768, **arm.options).parameters == QUOTED[0].encoder
    for quoted in QUOTED:
        if quoted.organs:  # a slip of the pen would show: the papers' means are those of their organs
            assert np.mean(list(quoted.organs.values())) == pytest.approx(quoted.dice, abs=0.011)


def test_a_dry_run_says_the_hours_and_writes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce.main(asked(source, tmp_path / "out", "--dry-run")) == 0
    said = capsys.readouterr().out
    rows = {line.split()[1]: line for line in said.splitlines() if line.startswith("| ")}
    assert {*rows} >= {"all", *(arm.name for arm in ARMS)} and "training h" in rows["method"]
    assert "to 2 steps of 2 slices and 6 test slices in 1 cases (by the files' headers)" in said
    assert list(tmp_path.iterdir()) == []


REFUSED: dict[str, tuple[list[str], str]] = {
    "an option first": (["--device", "cpu"], "syn3193805"),
    "a name that is nearly known": (["synaps"], "did you mean synapse?"),
    "another benchmark": (["imagenet"], "There is no benchmark 'imagenet'"),
    "no source": (["synapse"], "syn3193805"),
    "a folder that is not there": (["synapse", "--source", "nowhere"], "There is no folder nowhere"),
    "no weights": (["synapse", "--source", "SOURCE"], "sam_vit_b_01ec64.pth"),
    "an incomplete copy": (["synapse", "--source", "SOURCE", "--weights", "x"], "lacks 28 of the benchmark's 30 cases"),
    "another layout": (["synapse", "--source", "EMPTY", "--weights", "x"], "syn3193805"),
    "weights that are not there": (["synapse", "--rehearse", "--weights", "no.pth"], "no weights file no.pth"),
    "weights of another model": (
        ["synapse", "--rehearse", "--backbone", "sam_vit_b", "--weights", str(TINY_WEIGHTS)],
        "is a checkpoint of sam_tiny, not of sam_vit_b",
    ),
    "what every run sets": (["synapse", "--rehearse", "--structure=circulant"], "--structure=circulant is what"),
    "no run": (["synapse", "--rehearse", "--seeds", "0"], "--seeds and --jobs must be 1 or more"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_reproduced_is_said_before_any_work(
    what: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, sentence = REFUSED[what]
    places = {"SOURCE": str(source), "EMPTY": str(tmp_path)}
    assert reproduce.main([*(places.get(word, word) for word in words), "--output", str(tmp_path / "out")]) in (2, 3)
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_case_that_is_not_of_the_benchmark_is_refused_since_the_published_split_does_not_know_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_rehearsal(tmp_path / "btcv", 32, (6, 6))
    write(source, [61], on_grid(32, (6, 6)), first_id=61)
    words = ["synapse", "--source", str(source), "--backbone", "sam_tiny", "--weights", "auto"]
    assert reproduce.main([*words, "--output", str(tmp_path / "out")]) == 3
    assert "also holds case0061, not of the benchmark" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_seeds_that_only_one_of_two_has_are_not_compared(source: Path, tmp_path: Path) -> None:
    """Predictions that are off by more voxels for one arm and one seed than for another."""
    (tmp_path / "labels.yaml").write_text("6: liver\nother:\n")
    runs: dict[Arm, dict[int, Done]] = {}
    for arm, seed, off in ((ARMS[0], 0, 1), (ARMS[0], 1, 3), (ARMS[1], 1, 2), (ARMS[2], 0, 2), (ARMS[2], 1, 5)):
        run = tmp_path / f"{arm.name}-{seed}"
        (run / "predictions").mkdir(parents=True)
        for path in sorted((source / "label").iterdir()):
            label: Any = nib.load(path)  # pyright: ignore[reportPrivateImportUsage]
            moved = nib.Nifti1Image(np.roll(np.asarray(label.dataobj), off, axis=0), label.affine)
            nib.save(moved, run / "predictions" / path.name)  # pyright: ignore[reportPrivateImportUsage]
        words = ["--prediction", str(run / "predictions"), "--reference", str(source / "label")]
        assert (
            evaluate.main(
                [*words, "--labels", str(tmp_path / "labels.yaml"), "--output", str(run / "scores"), "--quiet"]
            )
            == 0
        )
        runs.setdefault(arm, {})[seed] = Done(run)
    (_, one), (_, both) = compared([Result(arm, done) for arm, done in runs.items()])
    assert [*one.seeds] == [1] and one.cases.difference == pytest.approx(one.seeds[1]) and one.seeds[1] > 0
    assert [*both.seeds] == [0, 1] and both.cases.difference == pytest.approx(np.mean([*both.seeds.values()]))


def test_data_that_contradict_the_benchmark_are_trained_on_in_a_rehearsal_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["synapse", "--source", str(write_rehearsal(tmp_path / "btcv", 32, (6, 6))), "--backbone", "sam_tiny"]
    assert reproduce.main([*words, "--weights", "auto", "--output", str(tmp_path / "out")]) == 3
    said = capsys.readouterr()
    assert "pixels of a slice  differs" in said.out and "nothing was trained" in said.err
    assert not (tmp_path / "out" / "cells").exists()
