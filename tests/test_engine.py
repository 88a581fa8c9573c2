"""The training loop on a task small enough to check by hand."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from surm_seg.engine import EngineConfig, fit
from surm_seg.errors import BadConfig, NoDevice, SurmError
from surm_seg.task import Batch, Record, Task


class Line(Task):
    """Fit y = 3 x with noise from the sample's own generator, dropout from torch's."""

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.2), nn.Linear(8, 1))
        self.bad, self.calls = bad, 0
        self.seen: list[float] = []

    def __len__(self) -> int:
        return 10

    def sample(self, index: int, rng: np.random.Generator) -> Batch:
        x = torch.tensor([index / 10 + float(rng.normal(0, 0.01))], dtype=torch.float32)
        return {"x": x, "y": 3 * x}

    def loss(self, batch: Batch) -> Tensor:
        self.calls += 1
        self.seen += batch["x"].flatten().tolist()
        error = (self.model(batch["x"]) - batch["y"]).square().mean()
        return error * (math.nan if self.calls in self.bad else 1.0)

    def validate(self) -> Record:
        x = torch.linspace(0, 1, 5)[:, None]
        return {"score": -float((self.model(x) - 3 * x).detach().square().mean())}


CONFIG = {
    "batch_size": 4,
    "learning_rate": 0.02,
    "warmup": 5,
    "precision": "float32",
    "workers": 0,
    "validate_every": 10,
}


def run(folder: Path, steps: int, total: int | None = None, **rest: object) -> tuple[Line, list[Record]]:
    """`steps` of a schedule of `total`; returns the task and the logged records without their times."""
    task = Line()
    records: list[Record] = []
    settings = CONFIG | {"steps": steps, "horizon": (total or steps) - 5, "checkpoint_every": 5} | rest
    resume = bool(settings.pop("resume", False))
    fit(task, EngineConfig(**settings), folder, seed=3, device="cpu", resume=resume, report=records.append)
    return task, [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def test_it_learns_and_keeps_the_best(tmp_path: Path) -> None:
    task, records = run(tmp_path, 200)
    assert records[-1]["loss"] < 0.3 * records[0]["loss"]
    scores = [r["score"] for r in records if "score" in r]
    task.model.eval()
    assert task.validate()["score"] == pytest.approx(max(scores), abs=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 201))
    assert any(path.name.startswith("events") for path in (tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize(("workers", "options"), [(0, {}), (1, {"accumulate": 3}), (2, {"patience": 1})])
def test_ten_and_ten_steps_equal_twenty_bit_for_bit(tmp_path: Path, workers: int, options: dict) -> None:
    whole, records = run(tmp_path / "whole", 20, **options)
    run(tmp_path / "parts", 10, 20, workers=workers, **options)
    rest, later = run(tmp_path / "parts", 20, workers=workers, resume=True, **options)
    assert later == records[10:]
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True))


def test_every_epoch_shows_every_sample_once(tmp_path: Path) -> None:
    task, _ = run(tmp_path, 5, batch_size=4)
    for epoch in (task.seen[:10], task.seen[10:20]):
        assert sorted(round(x * 10) for x in epoch) == list(range(10))


def test_a_bad_loss_is_skipped_and_three_in_a_row_stop(tmp_path: Path) -> None:
    task = Line(bad=(3,))
    records: list[Record] = []
    config = EngineConfig(**CONFIG, steps=6)
    fit(task, config, tmp_path / "a", seed=3, device="cpu", report=records.append)
    assert [r["step"] for r in records if "skipped" in r] == [3] and len(records) == 6
    assert all(bool(torch.isfinite(p).all()) for p in task.model.parameters())
    with pytest.raises(SurmError, match=r"3 times in a row at step 8; .*\. Last good checkpoint: .*step-00000005"):
        fit(
            Line(bad=(6, 7, 8)),
            EngineConfig(**CONFIG, steps=20, checkpoint_every=5),
            tmp_path / "b",
            seed=3,
            device="cpu",
        )


class Ratio(Line):
    """Loss Σ(wx - 3x)² / (Σ(wx)² + Σ(3x)²): no mean over samples. At w = 0 it is 1, and its slope -2/3."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.model.weight)

    def loss(self, batch: Batch) -> Tensor:
        return self.loss_of(self.sums(batch))

    def sums(self, batch: Batch) -> Tensor:
        found, wanted = self.model(batch["x"]), batch["y"]
        return torch.stack([(found - wanted).square().sum(), found.square().sum() + wanted.square().sum()])

    def loss_of(self, sums: Tensor) -> Tensor:
        return sums[0] / sums[1]


@pytest.mark.parametrize("accumulate", [1, 2, 3, 7])
def test_a_loss_that_is_no_mean_is_the_whole_batchs_in_any_number_of_parts(tmp_path: Path, accumulate: int) -> None:
    records: list[Record] = []
    config = EngineConfig(**CONFIG | {"batch_size": 7}, steps=1, accumulate=accumulate)
    fit(Ratio(), config, tmp_path, seed=3, device="cpu", report=records.append)
    assert records[0]["loss"] == pytest.approx(1, rel=1e-6)
    assert records[0]["grad_norm"] == pytest.approx(2 / 3, rel=1e-6)


class Judged(Line):
    """Scores as given."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = scores

    def validate(self) -> Record:
        return {"score": self.scores.pop(0)}


def test_patience_ends_a_run_after_so_many_validations_without_a_better_score(tmp_path: Path) -> None:
    scores = [0.1, 0.5, 0.5, 0.4, 0.3, 0.9]
    config = EngineConfig(**CONFIG | {"validate_every": 2}, steps=40, checkpoint_every=3, patience=3)
    records: list[Record] = []
    done = fit(Judged(scores[:]), config, tmp_path / "a", seed=3, device="cpu", report=records.append)
    assert (done.steps, done.best_step, done.best_score) == (10, 4, 0.5)
    assert [r["step"] for r in records if "stopped_early" in r] == [10] and len(records) == 10
    again = fit(Judged([]), config, tmp_path / "a", seed=3, device="cpu", resume=True)
    assert (again.steps, again.best_step) == (10, 4), "a run that has ended stays so"
    interrupted = Judged(scores[:3])  # there is no fourth: it dies at step 8, after the checkpoint of step 6
    with pytest.raises(IndexError):
        fit(interrupted, config, tmp_path / "b", seed=3, device="cpu")
    rest: list[Record] = []
    on = fit(Judged(scores[3:]), config, tmp_path / "b", seed=3, device="cpu", resume=True, report=rest.append)
    assert (on.steps, on.best_step) == (10, 4)
    assert [r["loss"] for r in rest] == [r["loss"] for r in records[6:]]


class Large(Line):
    """A forward pass that has memory for so many samples."""

    def __init__(self, most: int, ask: Callable[[], object]) -> None:
        super().__init__()
        self.most, self.ask = most, ask

    def loss(self, batch: Batch) -> Tensor:
        if len(batch["x"]) > self.most:
            self.ask()
        return super().loss(batch)


def cuda_runs_out() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


SHORT = {"torch on the CPU": lambda: torch.empty(1 << 55), "numpy": lambda: np.empty(1 << 55), "CUDA": cuda_runs_out}


@pytest.mark.parametrize("kind", SHORT)
def test_a_step_without_memory_is_repeated_in_parts_which_stay(tmp_path: Path, kind: str) -> None:
    settings = CONFIG | {"steps": 10, "horizon": 5, "checkpoint_every": 4}
    records: list[Record] = []
    short = Large(2, SHORT[kind])
    done = fit(short, EngineConfig(**settings), tmp_path / "a", seed=3, device="cpu", report=records.append)
    assert [(r["step"], r["accumulate"]) for r in records if "accumulate" in r] == [(1, 2.0)] and done.accumulate == 2
    assert json.loads((tmp_path / "a" / "metrics.jsonl").read_text().split("\n")[0])["accumulate"] == 2
    _, asked = run(tmp_path / "b", 10, accumulate=2)
    assert [r["loss"] for r in records] == [r["loss"] for r in asked]
    (tmp_path / "a" / "checkpoints" / "step-00000010").rename(tmp_path / "newest")
    rest: list[Record] = []
    fit(Line(), EngineConfig(**settings), tmp_path / "a", seed=3, device="cpu", resume=True, report=rest.append)
    assert [r["loss"] for r in rest] == [r["loss"] for r in records[8:]], "resumed in the parts it was in"


def test_a_second_failure_stops_with_the_peak_and_advice(tmp_path: Path) -> None:
    with pytest.raises(
        NoDevice, match=r"Step 1 .* in 2 parts of its 4 samples \(peak \d+\.\d GB\); lower --batch_size"
    ):
        fit(Large(1, cuda_runs_out), EngineConfig(**CONFIG, steps=5), tmp_path, seed=3, device="cpu")


class Fatal(Line):
    """Whoever reads sample 7 is killed."""

    def name(self, index: int) -> str:
        return f"case{index:04d}"

    def sample(self, index: int, rng: np.random.Generator) -> Batch:
        if index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(index, rng)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_loader_that_is_killed_stops_the_run_with_the_case(tmp_path: Path, workers: int) -> None:
    with pytest.raises(SurmError, match=r"killed at sample case0007; .* go on with --resume"):
        fit(Fatal(), EngineConfig(**CONFIG | {"workers": workers}, steps=9), tmp_path, seed=3, device="cpu")


@pytest.mark.parametrize("accident", ['raise ValueError("no")', 'shutil.rmtree("run")'])
def test_an_error_ends_the_process_although_loaders_are_at_work(tmp_path: Path, accident: str) -> None:
    """Python's exit terminates daemons and waits for them; they must not ignore that as they ignore other signals."""
    code = f"""
import shutil, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_engine import CONFIG, EngineConfig, Line, fit
def report(record):
    if record["step"] == 7: {accident}
kept = []
try:
    config = EngineConfig(**CONFIG | {{"workers": 2}}, steps=30, horizon=15, checkpoint_every=10)
    fit(Line(), config, Path("run"), seed=3, device="cpu", report=report)
except Exception as error:
    kept.append(error)  # with its frames, and so the loaders, until the very end
    sys.exit(7)
"""
    env = os.environ | {"PYTHONPATH": str(Path.cwd())}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, timeout=240)
    assert done.returncode == 7


def test_nothing_to_resume_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="no checkpoint in"):
        run(tmp_path, 5, resume=True)


def test_sigterm_finishes_the_step_saves_and_resumes_exactly(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_engine import CONFIG, EngineConfig, Line, fit
def stop(record):
    if record["step"] == 7: os.kill(os.getpid(), signal.SIGTERM)
try:
    config = EngineConfig(**CONFIG, steps=20, horizon=15, checkpoint_every=100)
    fit(Line(), config, Path("run"), seed=3, device="cpu", report=stop)
except KeyboardInterrupt:
    sys.exit(130)
"""
    env = os.environ | {"PYTHONPATH": str(Path.cwd())}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env)
    assert done.returncode == 130
    _, records = run(tmp_path / "whole", 20, checkpoint_every=100)
    _, later = run(tmp_path / "run", 20, checkpoint_every=100, resume=True)
    assert later == records[-len(later) :] and len(later) in (12, 13)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.5]),
        ("cosine", [0.5, 1, 1, 0.5]),
        ("poly", [0.5, 1, 1, 0.5**0.9]),
    ],
)
def test_schedules(schedule: str, expected: list[float]) -> None:
    config = EngineConfig(steps=6, warmup=2, schedule=schedule)  # pyright: ignore
    assert [config.rate(step) for step in (0, 1, 2, 4)] == pytest.approx(expected)


@pytest.mark.parametrize(
    "option", [{"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"patience": 2, "validate_every": 0}]
)
def test_impossible_options_are_refused(option: dict) -> None:
    with pytest.raises(BadConfig):
        EngineConfig(**option)
