"""Kill a process at random moments of its saves, and see each time what the next start finds."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from test_engine import CONFIG, Line

from surm_seg.checkpoint import checkpoints, load_checkpoint, save_checkpoint, sweep
from surm_seg.engine import EngineConfig, fit
from surm_seg.lock import held

FORK = multiprocessing.get_context("fork")  # importing everything anew for every kill would take minutes

Say = Callable[[int], object]
Work = Callable[[Path, int, Say], None]


def newest(run: Path) -> int:
    """Step of the newest checkpoint, 0 without one; raises Corrupt where any checkpoint is not whole."""
    return max([load_checkpoint(path)[1]["step"] for path in checkpoints(run / "checkpoints")], default=0)


def saving(run: Path, steps: int, say: Say) -> None:
    """Save one checkpoint after the other, and say each when it is there."""
    for step in range(newest(run) + 1, steps + 1):
        content = {name: {"w": torch.full((200_000,), float(step))} for name in ("model", "optimizer", "best")}
        save_checkpoint(run / "checkpoints", step, content, {})
        say(step)
        sweep(run / "checkpoints", keep=2)


def training(run: Path, steps: int, say: Say) -> None:
    """Train, saving after every step; when a step is reported, the one before it has been saved."""
    config = EngineConfig(**CONFIG, steps=steps, horizon=steps, checkpoint_every=1)
    resume = bool(checkpoints(run / "checkpoints"))
    fit(Line(), config, run, seed=3, device="cpu", resume=resume, report=lambda record: say(int(record["step"]) - 1))


def alone(work: Work, run: Path, steps: int, pipe: int) -> None:
    """What the process does that is killed: it works, and writes to the pipe what it has to say."""
    torch.set_num_threads(1)
    with held(run, "trained"):
        work(run, steps, lambda step: os.write(pipe, f"{step}\n".encode()))


def stage(run: Path) -> str:
    """How far a killed process was, told from what it left."""
    for partial in (run / "checkpoints").glob(".step-*.new.part"):
        files = [path for path in partial.iterdir() if not path.name.startswith(".")]
        return f"{len(files)} files written"
    return "deleting an old one" if list((run / "checkpoints").glob(".*.old.part")) else "between saves"


def kill(work: Work, run: Path, steps: int, kills: int) -> tuple[int, Counter[str]]:
    """Start the work and kill it, within two paces of a step, so many times.

    Returns how many steps that had been saved were lost at most, and where the kills struck.
    """
    rng, pace, lost, stages = np.random.default_rng(0), 0.05, 0, Counter[str]()
    while stages.total() < kills:
        reading, writing = os.pipe()
        process = FORK.Process(target=alone, args=(work, run, steps, writing))
        process.start()
        os.close(writing)
        said = os.read(reading, 100)
        begun = time.monotonic()
        time.sleep(rng.uniform(0, 2 * pace))
        process.kill()
        process.join()
        assert process.exitcode == -9, f"it ended by itself after {stages.total()} kills"
        steps_said = [int(line) for line in (said + os.read(reading, 10**6)).split()]
        os.close(reading)
        pace = (pace + (time.monotonic() - begun) / len(steps_said)) / 2
        stages[stage(run)] += 1
        lost = max(lost, steps_said[-1] - newest(run))
        with held(run, "looked at"):
            assert not list(run.rglob(".*.part")), "what the kill left was not swept at the next start"
    return lost, stages
