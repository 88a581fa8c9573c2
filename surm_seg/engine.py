"""One training loop for every task: steps, schedule, precision, validation, checkpoints, resume. Knows no task."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard.writer import SummaryWriter

from surm_seg.checkpoint import checkpoints
from surm_seg.errors import BadConfig, SurmError
from surm_seg.task import Order, Record, Samples, Task, collated
from surm_seg.training_state import TrainingState

MAX_BAD_STEPS = 3
"""Losses that are not finite, in a row, before training stops."""


@dataclass
class EngineConfig:
    """How to train, whatever the task.

    Args:
        steps: optimiser steps.
        batch_size: samples per step.
        learning_rate: peak of the schedule.
        weight_decay: of AdamW.
        warmup: steps of linear warm-up.
        schedule: poly is (1 - step / horizon) ** power; cosine and linear end at 0.
        power: of the poly schedule.
        horizon: steps from the end of the warm-up to the end of the schedule; 0 for all that remain.
        clip: largest gradient norm; 0 for none.
        precision: float32, bfloat16 (autocast), or auto: bfloat16 where its products are faster here.
        validate_every: steps between validations; 0 for only at the end.
        checkpoint_every: steps between checkpoints.
        workers: data loader processes; any number gives the same data.
    """

    steps: int = 300
    batch_size: int = 8
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup: int = 20
    schedule: Literal["poly", "cosine", "linear", "constant"] = "cosine"
    power: float = 0.9
    horizon: int = 0
    clip: float = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    validate_every: int = 100
    checkpoint_every: int = 100
    workers: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise BadConfig("engine-option", f"--{name} {getattr(self, name)} must be at least 1.")
        for name in ("weight_decay", "warmup", "power", "horizon", "clip", "validate_every", "workers"):
            if getattr(self, name) < 0:
                raise BadConfig("engine-option", f"--{name} {getattr(self, name)} must not be negative.")
        if self.learning_rate <= 0:
            raise BadConfig("engine-option", f"--learning_rate {self.learning_rate} must be positive.")

    def rate(self, step: int) -> float:
        """Factor of the learning rate at a step, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.horizon or self.steps - self.warmup))
        if self.schedule == "poly":
            return (1 - done) ** self.power
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1 - done if self.schedule == "linear" else 1.0


@dataclass(frozen=True)
class Fit:
    """What training came to; the model holds the weights of `best_step`."""

    best_step: int
    best_score: float | None
    seconds: float


def fast_precision(device: torch.device) -> Literal["float32", "bfloat16"]:
    """bfloat16 where this device multiplies it at least 1.5 times as fast as float32, measured in some 50 ms."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(1024, 1024, device=device, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            float((x @ x)[0, 0])
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return "bfloat16" if seconds[torch.float32] > 1.5 * seconds[torch.bfloat16] else "float32"


def fit(
    task: Task,
    config: EngineConfig,
    folder: Path,
    *,
    seed: int,
    device: str,
    resume: bool = False,
    report: Callable[[Record], None] = lambda record: None,
) -> Fit:
    """Train the task's model and leave it with the best weights by validation (the last, without a score).

    Writes FOLDER/metrics.jsonl, FOLDER/tensorboard and FOLDER/checkpoints. Steps counted before and after a resume are
    the same, bit for bit on a CPU. SIGTERM and Ctrl-C finish the step, save and raise KeyboardInterrupt.

    Raises:
        BadConfig: resume without a checkpoint.
        SurmError: the loss was not finite MAX_BAD_STEPS times in a row.
    """
    started = time.monotonic()
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=device == "cpu")
    place = torch.device(device)
    task.model.to(place)
    trained = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    state = TrainingState(folder, trained, optimizer)
    if resume:
        state.restore()
    amp = (fast_precision(place) if config.precision == "auto" else config.precision) == "bfloat16"
    loader = DataLoader(
        Samples(task, seed),
        batch_sampler=Order(task, config.batch_size, seed, state.step, config.steps),
        generator=torch.Generator().manual_seed(seed),  # else starting to load moves the global random state
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        worker_init_fn=_leave_signals_to_the_parent,
        collate_fn=collated,
    )
    task.model.train()
    with _log(folder, state.step) as log, _interruption() as interrupted:
        for batch in loader:
            if isinstance(batch, SurmError):
                raise batch
            factor = config.rate(state.step)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor
            moved = {name: value.to(place) for name, value in batch.items()}
            with torch.autocast(place.type, torch.bfloat16, enabled=amp):
                loss = task.loss(moved)
            record = _step(accelerator, loss, optimizer, trained, config, state)
            record |= {"lr": config.learning_rate * factor, "seconds": time.monotonic() - started}
            last = state.step == config.steps
            if last or (config.validate_every and state.step % config.validate_every == 0):
                record |= _validated(task, state, amp, place)
            report(log(record))
            if last or interrupted() or state.step % config.checkpoint_every == 0:
                state.save()
            if interrupted() and not last:
                raise KeyboardInterrupt
    state.take_best()
    return Fit(state.best_step, state.best_score, time.monotonic() - started)


def _step(
    accelerator: Accelerator,
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    trained: dict[str, nn.Parameter],
    config: EngineConfig,
    state: TrainingState,
) -> Record:
    """Backward and update; a loss that is not finite changes nothing and is counted."""
    value = float(loss.detach())
    state.step += 1
    optimizer.zero_grad(set_to_none=True)
    if not math.isfinite(value):
        state.bad_steps += 1
        if state.bad_steps >= MAX_BAD_STEPS:
            good = checkpoints(state.checkpoints)
            raise SurmError(
                "loss-not-finite",
                f"The loss was not finite {MAX_BAD_STEPS} times in a row at step {state.step}; "
                f"lower --learning_rate. Last good checkpoint: {good[-1] if good else 'none yet'}.",
            )
        return {"step": state.step, "skipped": 1.0}
    state.bad_steps = 0
    accelerator.backward(loss)
    record: Record = {"step": state.step, "loss": value}
    if config.clip:
        record["grad_norm"] = float(nn.utils.clip_grad_norm_(trained.values(), config.clip))
    optimizer.step()
    return record


def _validated(task: Task, state: TrainingState, amp: bool, place: torch.device) -> Record:
    task.model.eval()
    with torch.inference_mode(), torch.autocast(place.type, torch.bfloat16, enabled=amp):
        record = task.validate()
    task.model.train()
    state.remember(record.get("score"))
    return record


@contextmanager
def _log(folder: Path, start: int) -> Iterator[Callable[[Record], Record]]:
    """Append records to metrics.jsonl and TensorBoard; lines after step `start`, of a run that died, are dropped."""
    path = folder / "metrics.jsonl"
    kept = (
        [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= start] if path.exists() else []
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as out, SummaryWriter(folder / "tensorboard", purge_step=start + 1) as board:
        out.writelines(line + "\n" for line in kept if start)

        def log(record: Record) -> Record:
            out.write(json.dumps({k: round(v, 6) if k != "step" else v for k, v in record.items()}) + "\n")
            out.flush()
            for name, value in record.items():
                if name != "step":
                    board.add_scalar(name, value, int(record["step"]))
            return record

        yield log


@contextmanager
def _interruption() -> Iterator[Callable[[], bool]]:
    """SIGTERM and Ctrl-C set a flag, once; a second signal acts at once. Outside the main thread nothing is caught."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        signal.signal(number, signal.default_int_handler)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:
        yield lambda: False
        return
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_signals_to_the_parent(worker: int) -> None:
    """A signal to the whole process group must not kill the loaders before the step is finished and saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
