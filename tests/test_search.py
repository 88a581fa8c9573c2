"""A search as its user meets it: what it finds can be trained, what is wrong is said, and a killed one goes on."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import psutil
import pytest
import yaml
from pipelines_small import bert
from test_sweep import words as sweep_words  # the fixture: options of a small CoLA and an untrained BERT
from test_train import FAST, data, source  # the fixtures: a small prepared data set

from pipelines.glue import Config, create
from surm_seg import cluster, search, structures, train, trials
from surm_seg.errors import BadInput
from surm_seg.lock import held
from surm_seg.surm_config import SurmConfig
from surm_seg.trials import Plan, Result, Trial, front

__all__ = ["data", "source", "sweep_words"]

PATIENCE = 600.0  # Ray runs its workers at nice 15: on a busy machine they wait long


@pytest.fixture
def words(sweep_words: list[str]) -> list[str]:
    """Without --output."""
    return sweep_words[:-2]


def run_json(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def test_what_is_found_by_gradient_trains_with_the_counted_parameters(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "search"
    assert search.main([*words, "--budget", "80", "--batches", "2", "--output", str(output)]) == 0
    assert "| mixture" in capsys.readouterr().out
    found = json.loads((output / "table.json").read_text())
    chosen = [place["chosen"] for place in found["places"]]
    counted = sum(one["parameters"] for one in chosen if one)
    assert len(chosen) == 4 and 0 < counted <= 80
    (mixture, *alike) = found["compared"]
    assert mixture["structure"] == "mixture" and mixture["parameters"] == counted
    assert all(one["captured"] <= mixture["captured"] + 1e-9 for one in alike if one["parameters"] <= counted)
    run = tmp_path / "run"
    assert train.main(["--config", str(output / "train.yaml"), "--output", str(run), "--quiet"]) == 0
    assert run_json(run)["parameters"]["method"] == counted
    config = SurmConfig.from_pretrained(str(output))
    model = create(Config(name="cola", data=str(tmp_path), model=str(tmp_path / "model")), 0).base.build()
    trained = peft.get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    assert sum(p.numel() for n, p in trained.named_parameters() if p.requires_grad and "surm_" in n) == counted


def test_segmentation_takes_what_was_found_too(data: Path, tmp_path: Path) -> None:
    """Slices of a fused projection, in MONAI's pipeline."""
    words = ["--data", str(data), "--validate_on", "none", "--device", "cpu", *FAST]
    output, run = tmp_path / "search", tmp_path / "run"
    budget = ["--budget", "700", "--batches", "1", "--structures", "circulant,toeplitz"]
    assert search.main([*words, *budget, "--output", str(output)]) == 0
    found = json.loads((output / "table.json").read_text())
    chosen = [place["chosen"] for place in found["places"]]
    assert {place["part"] for place in found["places"]} == {"q", "v"} and None in chosen
    steps = ["--steps", "1", "--warmup", "0", "--output", str(run)]
    assert train.main(["--config", str(output / "train.yaml"), *steps, "--quiet"]) == 0
    counted = sum(one["parameters"] for one in chosen if one)
    assert 0 < counted <= 700 and run_json(run)["parameters"]["encoder_adapter"] == counted


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (["--structures", "circulent"], "did you mean circulant"),
        (["--structures", "round"], "choose among circulant"),
        (["--structures", ""], "--structures must name one"),
        (["--method", "lora"], "--method is what surm-seg search sets itself"),
        (["--jobs", "0"], "--jobs be 1 or more"),
        (["--seed", "-1"], "--seed -1 must not be negative"),
        (["--sizes", "2"], "--sizes 2 is not LEAST,MOST"),
        (["--learning_rates", "1,0.1"], "must be positive and not fall"),
        (["--budget", "3"], "the smallest has 16"),
        (["--roles", '["nose"]'], "There is no role ['nose']"),
        (["--name", "colla"], "--name colla is no task of GLUE"),
        (["--data", "nowhere"], "nowhere"),
        (["--model", "nobody/nothing"], "nobody/nothing"),
        (["--task", "nonsense"], "there is no module pipelines.nonsense"),
    ],
)
def test_what_cannot_be_searched_is_said(
    asked: list[str], sentence: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "search"
    assert search.main([*words, *asked, "--batches", "1", "--output", str(output)]) in (2, 3)
    assert sentence in capsys.readouterr().err and not (output / "train.yaml").exists()


def test_a_task_without_overrides_cannot_be_searched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main(["--task", "tasks.line", "--output", str(tmp_path / "search")]) == 2
    assert "--task tasks.line has no --roles and --overrides" in capsys.readouterr().err


def test_a_dry_run_writes_nothing_and_what_gives_no_score_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the generated patients, which would be prepared on first use."""
    monkeypatch.chdir(tmp_path)
    for by in ("gradient", "training"):
        assert search.main(["--by", by, "--dry-run"]) == 0
        assert "to be generated" in capsys.readouterr().out and list(tmp_path.iterdir()) == []
    assert search.main(["--by", "training", "--recipe", "samed"]) == 2
    assert "--validate_on none leaves no score" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_an_address_without_a_cluster_is_said(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "REACH_S", 1)
    asked = ["--by", "training", "--ray_address", "127.0.0.1:1", "--output", str(tmp_path / "search")]
    assert search.main([*words, *asked]) == 3
    assert "No Ray cluster can be used at 127.0.0.1:1" in capsys.readouterr().err


def plan(tmp_path: Path) -> Plan:
    shapes = {"q": [(16, 16)] * 2, "mlp_in": [(32, 16)] * 2}
    return Plan(
        ("--task", "glue"), shapes, ("low_rank",), (0.5, 8), (1e-3, 1e-1), 4, 18, 2, 0, "cpu", tmp_path, tmp_path
    )


def test_a_drawn_size_is_met_by_the_nearest_member(tmp_path: Path) -> None:
    trial = plan(tmp_path).trial("low_rank", ("q", "mlp_in"), 2.9, 0.012345)
    assert trial == Trial("low_rank", {"rank": 3}, ("q", "mlp_in"), 0.0123, 3 * 2 * (32 + 48))
    assert plan(tmp_path).placements() == [("q",), ("mlp_in",), ("q", "mlp_in")]


def test_trials_of_one_class_differ_by_less_than_a_factor_of_4_in_parameters(tmp_path: Path) -> None:
    of_all = replace(plan(tmp_path), families=tuple(structures.names()), trials=300)
    classes: dict[int, list[int]] = {}
    for trial in of_all.drawn():
        classes.setdefault(trial.size_class, []).append(trial.parameters)
    assert len(classes) > 2 and all(max(sizes) < 4 * min(sizes) for sizes in classes.values())
    assert all(min(classes[n + 1]) > max(classes[n]) for n in classes if n + 1 in classes)


def test_no_trial_is_drawn_twice_and_more_of_them_begin_with_the_same(tmp_path: Path) -> None:
    """At one learning rate, where draws collide, and at one size too, where there are but three to draw."""
    one_rate = replace(plan(tmp_path), rates=(2e-3, 2e-3), trials=20)
    folders = [one_rate.folder(trial) for trial in one_rate.drawn()]
    assert len(set(folders)) == len(folders) == 20
    assert [one_rate.folder(trial) for trial in replace(one_rate, trials=9).drawn()] == folders[:9]
    assert len(replace(one_rate, sizes=(1, 1)).drawn()) == len(one_rate.placements()) == 3


def test_a_trial_that_another_process_trains_is_left_alone(tmp_path: Path) -> None:
    (trial, *_) = plan(tmp_path).drawn()
    folder = plan(tmp_path).folder(trial)
    with held(folder, "trained"):
        with pytest.raises(BadInput, match="is being trained by process"):
            trials.run(plan(tmp_path), trial, print)
        assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_precision_that_was_settled_stays(tmp_path: Path) -> None:
    """Ray, which would measure, is not there."""
    asha = importlib.import_module("surm_seg.asha")
    for known in ("float32", "bfloat16"):
        (tmp_path / "precision.json").write_text(json.dumps({"--task glue": known}))
        assert asha.with_precision(plan(tmp_path)).words == ("--task", "glue", "--precision", known)


def test_the_front_is_what_no_other_beats() -> None:
    points = [(10, 0.5), (20, 0.4), (20, 0.7), (30, 0.7), (40, 0.9), (5, None)]
    results = [Result(Trial("low_rank", {}, ("q",), 0.1, n), score, 1, "finished") for n, score in points]
    assert [(one.trial.parameters, one.score) for one in front(results)] == [(10, 0.5), (20, 0.7), (40, 0.9)]


def test_a_killed_search_goes_on_and_what_fails_stops_no_other(words: list[str], tmp_path: Path) -> None:
    """Learning rates up to 1e38: some trials overflow. Each training is its own folder, so that nothing is repeated."""
    output = tmp_path / "search"
    asked = ["--by", "training", "--trials", "8", "--learning_rates", "1e-3,1e38", "--jobs", "1", "--seed", "7"]
    asked += ["--structures", "circulant,low_rank", "--output", str(output)]
    command = [sys.executable, "-m", "surm_seg.search", *words, "--steps", "9", *asked]
    scratch = tempfile.mkdtemp(prefix="ray-")  # a short path, for Ray's sockets
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": scratch}
    killed = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + PATIENCE
    while len(list(output.glob("trials/*/outcome.json"))) < 3:
        assert time.monotonic() < end and killed.poll() is None, "too few trials ended before it did"
        time.sleep(0.02)
    children = [p for p in psutil.Process(killed.pid).children(recursive=True) if "Agent" not in p.name()]
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert children and psutil.wait_procs(children, timeout=60)[1] == [], "Ray, or a trial, outlived the search"

    left = list(Path(scratch).glob("ray-*"))

    def ended() -> dict[str, tuple[str, int]]:
        folders = [path.parent for path in output.glob("trials/*/outcome.json")]
        said = {folder.name: json.loads((folder / "outcome.json").read_text())["outcome"] for folder in folders}
        return {
            name: (what, (output / "trials" / name / "metrics.jsonl").stat().st_mtime_ns)
            for name, what in said.items()
            if what != "failed"
        }

    before = ended()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert again.returncode == 5, again.stderr
    assert ended().items() >= before.items()
    found = json.loads((output / "table.json").read_text())["trials"]
    outcomes = [one["outcome"] for one in found]
    assert len(found) == len(list((output / "trials").iterdir())) == 8 and set(outcomes) >= {"finished", "failed"}
    assert all(("loss-not-finite" in one["why"]) == (one["outcome"] == "failed") for one in found)
    assert again.stderr.count("failed [loss-not-finite]") == outcomes.count("failed")
    assert not list(output.glob(".tune*")), "Tune's own records are removed"
    assert left and not any(folder.exists() for folder in left), "and what Ray of the killed search left"
    scored = [one for one in found if one["score"] is not None]
    best = max(scored, key=lambda one: (one["score"], -one["trial"]["parameters"]))
    settings = yaml.safe_load((output / "train.yaml").read_text())
    assert settings["learning_rate"] == best["trial"]["rate"] and settings["roles"] == best["trial"]["roles"]
    assert (output / "picture.svg").read_text().count("<circle") == len(scored)
    assert "| yes " in (output / "table.md").read_text()
    shutil.rmtree(scratch)


def test_a_model_is_searched_without_a_network(tmp_path: Path) -> None:
    """A folder of one's own and generated data: `_no_network` of conftest is what fails otherwise."""
    model = bert(tmp_path / "model")
    small = ["--task", "glue", "--model", str(model), "--batch_size", "4", "--workers", "0", "--device", "cpu"]
    output = ["--batches", "1", "--output", str(tmp_path / "search"), "--quiet"]
    assert search.main([*small, *output, "--structures", "toeplitz"]) == 0


RANKED = [
    "--task", "tasks.ranked", "--by", "training", "--jobs", "1", "--trials", "6", "--steps", "9", "--sizes", "1,4",
    "--device", "cpu", "--batch_size", "2", "--workers", "0",
]  # fmt: skip
TWO = ["--structures", "circulant,low_rank", "--roles", '["q"]']


def searched(output: Path, *more: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit status of a search among circulant and low_rank of a known rank, and the trials of its table."""
    scratch = tempfile.mkdtemp(prefix="ray-")
    command = [sys.executable, "-m", "surm_seg.search", *RANKED, *TWO, *more, "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": scratch, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    shutil.rmtree(scratch)
    assert (output / "table.json").exists(), done.stderr
    return done.returncode, json.loads((output / "table.json").read_text())["trials"]


def by_structure(found: list[dict[str, Any]]) -> dict[str, set[tuple[str, float | None]]]:
    return {
        name: {(one["outcome"], one["score"]) for one in found if one["trial"]["structure"] == name}
        for name in ("circulant", "low_rank")
    }


def test_what_lags_behind_is_stopped(tmp_path: Path) -> None:
    """One at a time, so that what came before a trial, of like size, is what it is compared with."""
    status, found = searched(tmp_path / "search")
    assert status == 0 and len(found) == 6
    better: set[int] = set()
    for one in found:
        size_class = (one["trial"]["parameters"].bit_length() - 1) // 2
        lags = one["trial"]["structure"] == "low_rank" and size_class in better
        assert (one["outcome"], one["steps"]) == (("stopped", 1) if lags else ("finished", 9))
        if one["trial"]["structure"] == "circulant":
            better.add(size_class)
    assert {one["outcome"] for one in found} == {"stopped", "finished"}


@pytest.mark.parametrize(("others", "outcome"), [("nan", "finished"), ("none", "failed")])
def test_what_is_no_score_is_on_no_front(others: str, outcome: str, tmp_path: Path) -> None:
    status, found = searched(tmp_path / "search", "--others", others)
    assert status == (0 if outcome == "finished" else 5)
    assert by_structure(found) == {"circulant": {("finished", 1.0)}, "low_rank": {(outcome, None)}}
    assert all(one["trial"]["structure"] == "circulant" for one in found if one["front"])


def test_a_killed_trial_stops_no_other(tmp_path: Path) -> None:
    status, found = searched(tmp_path / "search", "--others", "killed")
    assert status == 5
    assert by_structure(found) == {"circulant": {("finished", 1.0)}, "low_rank": {("failed", None)}}
    assert all("[trial-killed]" in one["why"] for one in found if one["outcome"] == "failed")
