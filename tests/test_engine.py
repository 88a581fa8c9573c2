"""The training loop on a task small enough to check by hand."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from surm_seg.engine import EngineConfig, fit
from surm_seg.errors import BadConfig, SurmError
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


@pytest.mark.parametrize("workers", [0, 2])
def test_ten_and_ten_steps_equal_twenty_bit_for_bit(tmp_path: Path, workers: int) -> None:
    whole, records = run(tmp_path / "whole", 20)
    run(tmp_path / "parts", 10, 20, workers=workers)
    rest, later = run(tmp_path / "parts", 20, workers=workers, resume=True)
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


@pytest.mark.parametrize("option", [{"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}])
def test_impossible_options_are_refused(option: dict) -> None:
    with pytest.raises(BadConfig):
        EngineConfig(**option)
