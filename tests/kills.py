"""Kill a process at random moments of its saves, and see each time what the next start finds.

`python kills.py saving|training FOLDER KILLS` prints JSON: how many steps were lost at most, and where kills struck.
"""

from __future__ import annotations

import json
import os
import signal
import sys
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

Say = Callable[[int], object]


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


def child(work: Callable[[Path, int, Say], None], run: Path, steps: int) -> tuple[int, int]:
    """Start the work in a process of its own; returns its number, and the pipe it writes to what it says."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        status = 1
        try:
            with held(run, "trained"):
                work(run, steps, lambda step: os.write(writing, f"{step}\n".encode()))
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    return process, reading


def stage(run: Path) -> str:
    """How far the killed process was, told from what it left."""
    for partial in (run / "checkpoints").glob(".step-*.new.part"):
        files = [path for path in partial.iterdir() if not path.name.startswith(".")]
        return f"{len(files)} files written"
    return "deleting an old one" if list((run / "checkpoints").glob(".*.old.part")) else "between saves"


def main(work: Callable[[Path, int, Say], None], run: Path, kills: int) -> dict[str, object]:
    """Strike `kills` times, within two paces of a step after each start; then let a training come to its end."""
    rng = np.random.default_rng(0)
    steps, pace, lost = 4 * kills, 0.05, 0
    stages: Counter[str] = Counter()
    while stages.total() < kills:
        process, pipe = child(work, run, steps if work is training else sys.maxsize)
        said = os.read(pipe, 100)
        begun = time.monotonic()
        time.sleep(rng.uniform(0, 2 * pace))
        os.kill(process, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(process, 0)[1]), "it ended before the kill"
        said = [int(line) for line in (said + os.read(pipe, 10**6)).split()]
        os.close(pipe)
        pace = (pace + (time.monotonic() - begun) / len(said)) / 2
        stages[stage(run)] += 1
        lost = max(lost, said[-1] - newest(run))
        with held(run, "looked at"):
            assert not list(run.rglob(".*.part"))
    if work is training:
        assert os.waitpid(child(work, run, steps)[0], 0)[1] == 0
    return {"kills": kills, "lost": lost, "stages": stages}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main({"saving": saving, "training": training}[sys.argv[1]], Path(sys.argv[2]), int(sys.argv[3]))))
