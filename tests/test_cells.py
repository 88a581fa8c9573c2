"""Trainings by the dozen: the finished stay, what fails or is killed is an outcome, nothing outlives the whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from surm_seg import train
from surm_seg.cells import Cell, carried_out, quiet_failure
from surm_seg.checkpoint import checkpoints, load_checkpoint
from surm_seg.errors import SurmError

LINE = ("--task", "tasks.line", "--device", "cpu", "--precision", "float32", "--workers", "0", "--warmup", "0")
PATIENCE = 120.0


def cell(name: str, *words: str, steps: int = 3) -> Cell:
    return Cell(name, (*LINE, "--steps", str(steps), *words))


def killed_by_itself(words: Sequence[str]) -> int:
    """A training that the system ends for its memory."""
    if "--seed" in words:
        os.kill(os.getpid(), signal.SIGKILL)
    return train.main(words)


def test_all_are_tried_and_only_those_that_are_missing_are_run_again(tmp_path: Path) -> None:
    good, bad = cell("good"), cell("bad", "--batch_size", "-1")
    first = dict(carried_out([bad, good], tmp_path, train.main))
    assert first[good].error is None and first[good].seconds > 0 and first[good].peak_bytes > 1e8
    assert first[bad].error is not None and first[bad].error.code == "engine-option"
    assert "--batch_size -1" in str(first[bad].error)
    before = (tmp_path / "good" / "weights").stat()
    again = dict(carried_out([bad, good], tmp_path, train.main, jobs=2))
    assert again[good] == first[good] and (tmp_path / "good" / "weights").stat() == before
    assert again[bad].error is not None
    longer = cell("good", steps=4)
    (done,) = (done for _, done in carried_out([longer], tmp_path, train.main))
    assert done.error is None and (tmp_path / "good" / "weights").stat().st_mtime_ns != before.st_mtime_ns


def test_one_that_was_cut_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "config.yaml").write_text("steps: 100")
    ((_, done),) = carried_out([cell("good")], tmp_path, train.main)
    assert done.error is None and "steps: 3" in (tmp_path / "good" / "config.yaml").read_text()


def test_a_process_that_is_killed_takes_no_other_with_it(tmp_path: Path) -> None:
    cells = [cell("killed", "--seed", "1"), cell("other")]
    done = {one.name: each for one, each in carried_out(cells, tmp_path, killed_by_itself)}
    assert done["other"].error is None
    error = done["killed"].error
    assert error is not None and error.code == "cell-killed" and "exit status -9" in str(error)


def ended_while_training(slow: Cell, folder: Path, steps: int, by: signal.Signals = signal.SIGKILL) -> None:
    """Carry out a cell in another process, end that one after so many steps, and see that nothing outlives it."""
    script = (
        "from pathlib import Path; from surm_seg import cli, train; from surm_seg.cells import Cell, carried_out\n"
        f"cells = [Cell({slow.name!r}, {slow.words!r})]\n"
        f"run = lambda: len(list(carried_out(cells, Path({str(folder)!r}), train.main)))\n"
        "if __name__ == '__main__': cli.run(run)\n"
    )
    (folder / "script.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}"}
    whole = subprocess.Popen([sys.executable, str(folder / "script.py")], env=environment)
    metrics = folder / slow.name / "metrics.jsonl"
    end = time.monotonic() + PATIENCE
    while not (metrics.exists() and len(metrics.read_bytes().splitlines()) >= steps):
        assert time.monotonic() < end and whole.poll() is None, "it never trained"
        time.sleep(0.1)
    children = psutil.Process(whole.pid).children(recursive=True)
    assert children
    whole.send_signal(by)
    whole.wait(PATIENCE)
    assert psutil.wait_procs(children, timeout=PATIENCE)[1] == []


def test_no_training_outlives_what_started_it(tmp_path: Path) -> None:
    ended_while_training(cell("slow", "--pause", "0.05", steps=100_000), tmp_path, 1)


def test_an_interruption_of_the_whole_ends_the_one_that_trains_which_saves(tmp_path: Path) -> None:
    ended_while_training(cell("slow", "--pause", "0.05", steps=100_000), tmp_path, 1, signal.SIGTERM)
    (checkpoint,) = checkpoints(tmp_path / "slow" / "checkpoints")
    steps = (tmp_path / "slow" / "metrics.jsonl").read_text().splitlines()
    assert load_checkpoint(checkpoint)[1]["step"] == len(steps)


def test_one_that_was_cut_goes_on_from_its_checkpoint_where_it_is_asked_to(tmp_path: Path) -> None:
    slow = cell("slow", "--pause", "0.05", "--checkpoint_every", "2", steps=60)
    ended_while_training(slow, tmp_path, 5)
    metrics = tmp_path / "slow" / "metrics.jsonl"
    before = metrics.read_text().splitlines()[:4]
    ((_, done),) = carried_out([slow], tmp_path, train.main, resume=True)
    after = metrics.read_text().splitlines()
    assert done.error is None and after[:4] == before  # with their clock times: nobody computed them again
    assert [json.loads(line)["step"] for line in after] == [*range(1, 61)]


def test_a_command_in_this_process_says_what_it_failed_for() -> None:
    with pytest.raises(SurmError, match=r"there is no module pipelines\.nonsense") as caught:
        quiet_failure(train.main, ["--task", "nonsense"])
    assert caught.value.code == "task"
    with pytest.raises(SurmError) as caught:
        quiet_failure(train.main, [*LINE, "--no_such_option", "1"])
    assert caught.value.code == "option"
