"""Training by several real processes, as torchrun, accelerate or a cluster's scheduler starts them, on loopback.

This file is also what they run: `python tests/test_distributed.py JOB FOLDER` trains and writes FOLDER/JOB.json.
"""

import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from test_engine import CONFIG, Line
from torch import Tensor, nn

from surm_seg import train
from surm_seg.distributed import ALONE, Ranks, join, own_device
from surm_seg.engine import EngineConfig, fit
from surm_seg.errors import BadConfig
from surm_seg.task import Batch, Record

TORCHRUN = ["torch.distributed.run", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", "--local_addr=127.0.0.1"]
SLICES = {"batch_size": 4, "horizon": 0, "learning_rate": 1e-3}
SLOWEST = 240
"""Seconds, on a busy machine, after which something hangs."""


class Exact(Line):
    """The line in float64, without dropout: a loss that two processes can have to the last digits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def sample(self, index: int, rng: np.random.Generator) -> Batch:
        return {name: value.double() for name, value in super().sample(index, rng).items()}

    def validate(self) -> Record:
        return {}


class Troubled(Exact):
    """On one process only: a loss that is not finite at step 3, no memory for more than one sample from step 5 on."""

    def __init__(self, here: bool) -> None:
        super().__init__()
        self.here = here

    def loss(self, batch: Batch) -> Tensor:
        if self.here and self.calls >= 4 and len(batch["x"]) > 1:
            torch.empty(1 << 55)
        loss = super().loss(batch)
        return loss * (math.nan if self.here and self.calls == 3 else 1.0)


def segmentation(folder: Path) -> Any:
    """The real task in float64: slices of generated patients, sam_tiny with dropout off."""
    from pipelines.segmentation import Config, create

    task = create(Config(data=str(folder / "data"), image_size=64, validate_on="none"), seed=0)
    task.model.double().register_forward_pre_hook(lambda module, inputs: tuple(x.double() for x in inputs))
    for name, module in task.model.named_modules():
        if name.endswith("pe_layer"):
            module.float()  # whose grid is float32 whatever the model is
    return task


def trained(task: Any, folder: Path, steps: int, ranks: Ranks, **rest: object) -> dict[str, Any]:
    """Records without times, and the weights."""
    records: list[Record] = []
    settings = CONFIG | {"batch_size": 5, "steps": steps, "horizon": 15, "checkpoint_every": 2} | rest
    resume = bool(settings.pop("resume", False))
    config = EngineConfig(**settings)
    fit(task, config, folder, seed=3, device="cpu", resume=resume, ranks=ranks, report=records.append)
    weights = torch.cat([p.detach().flatten() for p in task.model.parameters() if p.requires_grad]).tolist()
    return {"records": [{k: v for k, v in r.items() if k != "seconds"} for r in records], "weights": weights}


def exact(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """What any number of processes must agree on."""
    line = {f"line {n}": trained(Exact(), folder / f"line{n}", 8, ranks, accumulate=n, workers=n - 1) for n in (1, 2)}
    slices = {
        f"slices {n}": trained(segmentation(folder), folder / f"slices{n}", 3, ranks, accumulate=n, **SLICES)
        for n in (1, 2)
    }
    return line | slices


def troubled(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """What becomes of one process's trouble, and of dropout."""
    task = Troubled(ranks.index == 1)
    result = {"trouble": trained(task, folder / "trouble", 7, ranks, batch_size=4)}
    result["dropout"] = trained(Line(), folder / "dropout", 10, ranks)
    trained(Line(), folder / "again", 4, ranks)
    return result | {"again": trained(Line(), folder / "again", 10, ranks, resume=True)}


def endless(folder: Path, ranks: Ranks) -> dict[str, Any]:
    return trained(Exact(), folder / "endless", 10**6, ranks, workers=1, checkpoint_every=50)


def launched(launcher: list[str], job: str, folder: Path) -> dict[str, Any]:
    """Run a job by a launcher's processes; what the first of them wrote."""
    words = [sys.executable, "-m", *launcher, __file__, job, str(folder)]
    done = subprocess.run(words, env=environment(), timeout=SLOWEST, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / f"{job}.json").read_text())


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])} | more


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pipelines.phantom import UPPER_ABDOMEN, write
    from surm_seg import prepare

    folder = tmp_path_factory.mktemp("two")
    small = dataclasses.replace(
        UPPER_ABDOMEN, grid=(32, 32), spacing_mm=(11.0, 12.0), slices=(10, 11), slice_mm=(14, 18)
    )
    write(folder / "source", range(500, 506), small)
    (folder / "split.yaml").write_text(
        "{train: [case0005, case0006], val: [], test: [case0001, case0002, case0003, case0004]}"
    )
    words = ["--format", "synapse", "--split", str(folder / "split.yaml"), "--quiet"]
    assert prepare.main([str(folder / "source"), "--output", str(folder / "data"), *words]) == 0
    return folder


def assert_equal(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Losses and gradients to 1e-9; AdamW enlarges the last digits of weights whose gradient is nearly 0."""
    for name in ("loss", "grad_norm"):
        ours, theirs = ([record[name] for record in run["records"]] for run in (one, two))
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    np.testing.assert_allclose(one["weights"], two["weights"], rtol=0, atol=1e-7)


def test_two_processes_equal_one_at_the_same_batch(folder: Path) -> None:
    """Batches of 5 are shared as 2 + 3, and in micro-batches; Dice is of the whole. One may go on with the run."""
    two = launched([*TORCHRUN, "--nproc_per_node=2"], "exact", folder)
    line = trained(Exact(), folder / "one line", 8, ALONE)
    slices = trained(segmentation(folder), folder / "one slices", 3, ALONE, **SLICES)
    for accumulate in (1, 2):
        assert_equal(line, two[f"line {accumulate}"])
        assert_equal(slices, two[f"slices {accumulate}"])
    assert abs(slices["records"][0]["loss"] - slices["records"][-1]["loss"]) > 1e-3
    on = trained(Exact(), folder / "line1", 12, ALONE, resume=True)
    whole = trained(Exact(), folder / "whole", 12, ALONE)
    assert_equal({**whole, "records": whole["records"][8:]}, on)


def test_trouble_on_one_process_is_everyones_and_dropout_ties_a_run_to_their_number(tmp_path: Path) -> None:
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    launcher += ["--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={free_port()}"]
    found = launched(launcher, "troubled", tmp_path)
    records = found["trouble"]["records"]
    assert [r["step"] for r in records if "skipped" in r] == [3]
    assert [(r["step"], r["accumulate"]) for r in records if "accumulate" in r] == [(5, 2.0)]
    assert found["again"]["records"] == found["dropout"]["records"][4:]
    assert found["again"]["weights"] == found["dropout"]["weights"]
    with pytest.raises(BadConfig, match=r"written by 2 processes .*\(dropout\).*; resume with 2"):
        trained(Line(), tmp_path / "dropout", 12, ALONE, resume=True)


def test_a_process_that_is_killed_ends_the_others_and_loses_no_checkpoint(tmp_path: Path) -> None:
    """No launcher that would end them: they are started one by one, as a cluster's scheduler does."""
    port, words = str(free_port()), [sys.executable, __file__, "endless", str(tmp_path)]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    first, second = (
        subprocess.Popen(words, env=environment(RANK=rank, **common), stderr=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    )
    try:
        wait_for(lambda: any((tmp_path / "endless" / "checkpoints").glob("step-*")), first)
        second.kill()
        _, said = first.communicate(timeout=60)
    finally:
        first.kill()
        second.kill()
    assert first.returncode == 1 and "Another process of this run has ended" in said
    on = trained(Exact(), tmp_path / "endless", steps_kept(tmp_path) + 1, ALONE, resume=True)
    assert len(on["records"]) == 1


def test_sigterm_to_one_process_of_the_command_saves_and_one_process_goes_on(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [
        "-m", "surm_seg.train", "--data", str(folder / "data"), "--output", str(run), "--validate_on", "none",
        "--score_on", "train", "--image_size", "64", "--batch_size", "2", "--steps", "5000", "--device", "cpu",
        "--precision", "float32", "--checkpoint_every", "5000",
    ]  # fmt: skip
    launcher = [sys.executable, "-m", *TORCHRUN, "--nproc_per_node=2"]
    with (tmp_path / "said").open("w+") as said:
        started = subprocess.Popen([*launcher, *words], env=environment(), stdout=said, stderr=said)
        log = run / "metrics.jsonl"
        try:
            wait_for(lambda: log.exists() and log.read_text().count("\n") > 2, started)
            ranks = [c for c in psutil.Process(started.pid).children() if "surm_seg.train" in c.cmdline()]
            next(c for c in ranks if c.environ()["RANK"] == "1").send_signal(signal.SIGTERM)
            assert started.wait(SLOWEST) != 0
        finally:
            started.kill()
        assert not any(c.is_running() for c in ranks)
        said.seek(0)
        lines = said.read()
    assert lines.count("encoder adapter +") == 1, "only the first process speaks"
    last = json.loads(log.read_text().splitlines()[-1])["step"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{last:08d}"]
    more = ["--resume", "--allow", "steps", "--steps", str(last + 2)]
    assert train.main([*words[2:], *more, "--quiet"]) == 0
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, last + 3))


@pytest.mark.parametrize(
    ("device", "here", "gpus", "expected"),
    [("cpu", 4, 0, "cpu"), ("cuda", 2, 2, "cuda:1"), ("cuda", 2, 1, "at most 1"), ("cuda:0", 2, 2, "start one")],
)
def test_every_process_has_its_own_gpu(device: str, here: int, gpus: int, expected: str) -> None:
    if " " in expected:
        with pytest.raises(BadConfig, match=expected):
            own_device(device, 1, here, gpus)
    else:
        assert own_device(device, 1, here, gpus) == expected


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_for(done: Callable[[], bool], process: subprocess.Popen) -> None:
    for _ in range(SLOWEST * 10):
        if done():
            return
        assert process.poll() is None, "it ended too early"
        time.sleep(0.1)
    raise TimeoutError


def steps_kept(folder: Path) -> int:
    return max(int(path.name[5:]) for path in (folder / "endless" / "checkpoints").glob("step-*"))


if __name__ == "__main__":
    job, place = sys.argv[1], Path(sys.argv[2])
    together, _ = join("cpu")
    answer = {"exact": exact, "troubled": troubled, "endless": endless}[job](place, together)
    if together.first:
        (place / f"{job}.json").write_text(json.dumps(answer))
