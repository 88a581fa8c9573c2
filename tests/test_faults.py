"""Training loses no work: every test does the damage for real, to processes, disks and files."""

from __future__ import annotations

import csv
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkProcess
from pathlib import Path

import kills
import pytest
import torch
import yaml
from test_engine import CONFIG, Line

from surm_seg import train
from surm_seg.checkpoint import checkpoints, load_checkpoint
from surm_seg.engine import EngineConfig, fit
from surm_seg.lock import held

KILLS = 20
WORDS = ["--task", "tasks.line", "--device", "cpu", "--precision", "float32", "--workers", "0", "--warmup", "0"]
ENDLESS = ["--steps", "100000", "--validate_every", "0", "--quiet"]
WORDS += ["--schedule", "constant", "--steps", "12", "--checkpoint_every", "4"]


def command(run: Path, *more: str) -> int:
    return train.main([*WORDS, "--output", str(run), *more])


def exited(words: list[str]) -> None:
    torch.set_num_threads(1)
    os._exit(train.main(words))


@pytest.fixture
def start() -> Iterator[Callable[..., ForkProcess]]:
    """Run the command in a process of its own."""
    running: list[ForkProcess] = []

    def started(run: Path, *more: str) -> ForkProcess:
        process = kills.FORK.Process(target=exited, args=([*WORDS, "--output", str(run), *more],))
        process.start()
        running.append(process)
        return process

    yield started
    for process in running:
        process.kill()
        process.join()


def until(process: ForkProcess, path: Path, lines: int = 0) -> None:
    """Wait until a file is there, with so many lines."""
    while not path.exists() or (lines and path.read_bytes().count(b"\n") < lines):
        assert process.is_alive(), f"it ended ({process.exitcode}) before {path.name} was there"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert command(run, "--quiet") == 0
    return run


def weights(run: Path) -> bytes:
    return (run / "weights").read_bytes()


def losses(run: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_kill_at_any_moment_of_saving_loses_no_saved_checkpoint(tmp_path: Path) -> None:
    lost, stages = kills.kill(kills.saving, tmp_path, 10**6, KILLS)
    assert lost <= 0, "a checkpoint that had been saved was not found again"
    assert stages["between saves"] < KILLS, "no kill struck a save"


def test_a_training_that_is_killed_again_and_again_comes_to_the_same_weights(tmp_path: Path) -> None:
    steps = 20 * KILLS  # more than are ever done between the kills
    lost, _ = kills.kill(kills.training, tmp_path / "killed", steps, KILLS)
    assert lost <= 0
    kills.training(tmp_path / "killed", steps, lambda step: None)
    fit(Line(), EngineConfig(**CONFIG, steps=steps, horizon=steps), tmp_path / "whole", seed=3, device="cpu")
    killed, whole = (load_checkpoint(checkpoints(tmp_path / name / "checkpoints")[-1]) for name in ("killed", "whole"))
    assert killed[1]["step"] == steps
    for name, tensors in whole[0].items():
        assert all(torch.equal(killed[0][name][key], value) for key, value in tensors.items())
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 140 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=140k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk; a limit on the size of files stands in for it")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_stops_a_run_that_goes_on_when_there_is_space(
    disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(disk / "run", *ENDLESS) == 3
    assert "No space left on device" in capsys.readouterr().err
    subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
    goes_on(disk / "run")


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_file_that_cannot_grow_does_not_either(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a user who may not mount a disk can test: a limit on the size of files fails their writing too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))
    try:
        assert command(tmp_path / "run", *ENDLESS) == 3
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in capsys.readouterr().err
    goes_on(tmp_path / "run")


def goes_on(run: Path) -> None:
    """From its newest checkpoint, to what an undisturbed run comes to."""
    reached = kills.newest(run)
    assert reached > 0
    few = [*ENDLESS, "--steps", str(reached + 4)]
    assert command(run, *few, "--resume", "--allow", "steps") == 0
    assert command(run.parent / "undisturbed", *few) == 0
    assert weights(run) == weights(run.parent / "undisturbed") and losses(run) == losses(run.parent / "undisturbed")


def test_what_does_not_fit_or_cannot_be_written_is_said_before_the_first_step(
    disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(disk / "run", "--width", "100000") == 3
    assert "GB are free; choose another --output" in capsys.readouterr().err
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert command(disk / "run") == 3
    assert "Read-only file system" in capsys.readouterr().err and not list(disk.iterdir())


def test_a_run_folder_that_vanishes_is_missed_and_not_made_anew(
    start: Callable[..., ForkProcess], whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(run, "--pause", "0.1")
    until(process, run / "checkpoints" / "step-00000004")
    run.rename(tmp_path / "elsewhere")
    process.join()
    assert process.exitcode == 3 and not run.exists()
    assert kills.newest(tmp_path / "elsewhere") == 4
    (tmp_path / "elsewhere").rename(run)
    assert command(run, "--resume", "--pause", "0", "--allow", "pause") == 0
    assert weights(run) == weights(whole) and losses(run) == losses(whole)


def test_a_run_has_one_process_and_a_killed_one_gives_it_free(
    start: Callable[..., ForkProcess], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    process = start(run, "--pause", "600", "--pause_at", "7", "--workers", "1")
    until(process, run / "metrics.jsonl", lines=6)
    other = ["--resume", "--pause_at", "7", "--allow", "pause"]
    assert command(run, *other) == 3
    said = capsys.readouterr().err
    assert f"process {process.pid} on {os.uname().nodename} since" in said and str(run) in said
    process.kill()
    process.join()
    assert command(run, *other) == 0
    assert weights(run) == weights(whole) and losses(run) == losses(whole)
    assert not (run / ".lock").exists()


def test_a_second_signal_does_not_wait_for_the_step(start: Callable[..., ForkProcess], tmp_path: Path) -> None:
    process = start(tmp_path / "run", "--pause", "600", "--pause_at", "7")
    until(process, tmp_path / "run" / "metrics.jsonl", lines=6)
    while process.is_alive():
        os.kill(process.pid or 0, signal.SIGTERM)
        process.join(0.2)
    assert process.exitcode == 130
    assert kills.newest(tmp_path / "run") == 4


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_it_taken(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    newest = checkpoints(run / "checkpoints")[-1]
    flip(newest / "model.safetensors")
    assert command(run, "--resume", "--quiet") == 0
    said = capsys.readouterr().err
    assert "damaged-step-00000012" in said and "going on from step-00000008" in said
    assert weights(run) == weights(whole) and losses(run) == losses(whole)
    assert (run / "checkpoints" / "damaged-step-00000012").exists()
    for path in checkpoints(run / "checkpoints"):
        flip(path / "model.safetensors")
    assert command(run, "--resume") == 3
    assert "step-00000012, step-00000008" in capsys.readouterr().err and len(checkpoints(run / "checkpoints")) == 2


def test_a_resumed_run_changes_only_what_is_allowed_by_name(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    changed = ["--resume", "--quiet", "--learning_rate", "0.001", "--steps", "16"]
    assert command(run, *changed, "--allow", "steps") == 2
    said = capsys.readouterr().err
    assert "learning_rate: 0.002 -> 0.001" in said and "steps: 12 -> 16" not in said
    assert command(run, *changed, "--allow", "steps,learningrate") == 2
    assert "--allow learningrate" in capsys.readouterr().err
    assert command(run, *changed, "--allow", "learning-rate,steps") == 0
    assert losses(run)[:12] == losses(whole) and [record["lr"] for record in losses(run)[12:]] == [0.001] * 4
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert (stored["steps"], stored["learning_rate"]) == (16, 0.001)
    facts = json.loads((run / "run.json").read_text())
    assert facts["changed"] == ["steps: 12 -> 16", "learning_rate: 0.002 -> 0.001"] and "finished" in facts


def test_several_seeds_are_killed_and_gone_on_with(
    start: Callable[..., ForkProcess], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    process = start(runs, "--seeds", "3", "--pause", "0.05")
    until(process, runs / "seed-1" / "checkpoints" / "step-00000004")
    process.kill()
    process.join()
    first = {path: path.stat().st_mtime_ns for path in (runs / "seed-0").rglob("*")}
    again = ["--seeds", "3", "--pause", "0.05"]
    assert command(runs, *again) == 2
    assert "use --resume" in capsys.readouterr().err
    assert command(runs, *again, "--resume") == 0
    said = capsys.readouterr().out
    assert "seed-0 is finished" in said and "mean and SD over the seeds 0, 1, 2" in said
    assert {path: path.stat().st_mtime_ns for path in (runs / "seed-0").rglob("*")} == first
    assert command(tmp_path / "alone", "--seed", "1", "--quiet") == 0
    assert weights(runs / "seed-1") == weights(tmp_path / "alone")
    found = [json.loads((runs / f"seed-{seed}/scores/summary.json").read_text()) for seed in range(3)]
    over = json.loads((runs / "seeds.json").read_text())["protocols"]["recommended"]
    for organ in ("liver", "spleen"):
        means = [one["organs"][organ]["dice"]["mean"] for one in found]
        assert over["organs"][organ]["dice"] == {
            "mean": pytest.approx(statistics.mean(means)), "sd": pytest.approx(statistics.stdev(means)), "n": 3
        }  # fmt: skip
    assert over["overall"]["dice"]["sd"] > 0
    with (runs / "seeds.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if (row["organ"], row["protocol"]) == ("overall", "recommended")]
    assert [float(row["dice"]) for row in rows] == [one["overall"]["dice"]["mean"] for one in found]


def test_a_forked_child_does_not_keep_its_parents_lock(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with held(tmp_path, "held"):
        child = kills.FORK.Process(target=os.read, args=(reading, 1))
        child.start()
    with held(tmp_path, "held"):
        assert child.is_alive()
    os.write(writing, b".")
    child.join()
