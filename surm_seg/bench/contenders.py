"""What `bench step` compares: SAM fine-tuned by `surm-seg train` and as the reference is, from the same weights."""

from __future__ import annotations

import gc
import importlib
import json
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import default_collate

from surm_seg import backbones
from surm_seg.backbones.sam import SIZES, Sam
from surm_seg.bench.cell import Precision
from surm_seg.bench.meter import threads
from surm_seg.bench.samed import DICE_WEIGHT, RANK, Samed, samed_loss
from surm_seg.cases import Dataset
from surm_seg.precision import store_frozen
from surm_seg.task import Batch

REFERENCE = "reference"
MERGED = "merged"
POSITION_STD = 0.1  # of random position tables, which are zero when SAM is built
RATE, CLIP = 1e-4, 1.0
WARM_STEPS = 2  # the optimiser's state exists after the first


@dataclass(frozen=True)
class Setting:
    """What the contenders share; small enough to be sent to another process.

    Args:
        data: a prepared data set with labelled cases.
        folder: for the weights and for run folders.
    """

    backbone: str
    image_size: int
    batch: int
    seed: int
    device: str
    data: str
    folder: Path

    @property
    def weights(self) -> Path:
        return self.folder / "weights.safetensors"

    @cached_property
    def labels(self) -> tuple[str, ...]:
        return Dataset.open(self.data).labels

    def write_weights(self) -> None:
        """Random weights under Meta's names; the class head is the one that a run of the same seed starts from."""
        torch.manual_seed(self.seed)
        state = Sam(SIZES[self.backbone], self.image_size, len(self.labels) + 1).state_dict()
        for name, value in state.items():
            if ".rel_pos_" in name or name.endswith("pos_embed"):
                value.normal_(std=POSITION_STD)
        save_file(state, self.weights)

    def config(self, structure: str) -> Any:
        """The options of `surm-seg train`."""
        return importlib.import_module("pipelines.recipes").Config(
            data=self.data,
            backbone=self.backbone,
            weights=str(self.weights),
            image_size=self.image_size,
            structure=structure,
            structure_options={"rank": RANK} if structure == "low_rank" else {},
            dice_weight=DICE_WEIGHT,
            balanced=False,
            validate_on="none",
        )

    def task(self, structure: str) -> Any:
        """The task as `surm-seg train` creates it, on the device."""
        task = importlib.import_module("pipelines.segmentation").create(self.config(structure), self.seed)
        task.model.to(self.device)
        return task

    def reference(self) -> Samed:
        model = Samed(SIZES[self.backbone], self.image_size, len(self.labels) + 1)
        model.load_state_dict(load_file(self.weights))
        return model.with_lora().to(self.device)

    def input(self) -> Any:
        """From slices to pixels, as the backbone wants them."""
        config = self.config("circulant")
        return importlib.import_module("pipelines.recipes").input_of(config, backbones.make(self.backbone))

    def samples(self, task: Any) -> Batch:
        """The first slices of the training cases, augmented, on the CPU."""
        rng = np.random.default_rng(self.seed)
        return default_collate([task.sample(index % len(task), rng) for index in range(self.batch)])

    def finished_run(self, task: Any, precision: Precision) -> Any:
        """A run folder as training leaves it, with the adapter as it is now, loaded as `surm-seg predict` does."""
        inference = importlib.import_module("pipelines.inference")
        run = self.folder / f"run-{precision}"
        run.mkdir()
        stored = json.loads(json.dumps({**asdict(task.config), "seed": self.seed, "precision": precision}))
        (run / "config.yaml").write_text(yaml.safe_dump(stored))
        (run / "run.json").write_text(json.dumps(task.facts(), default=str))
        task.model.save_pretrained(run / "adapter")
        inference.record_adapter(run)
        return inference.load_run(run, self.device)

    def training_step(self, label: str, precision: Precision, batch: Batch) -> Callable[[], Tensor]:
        """Builds the contender; every call of the result is one step of it and returns the loss before it."""
        moved = {name: value.to(self.device) for name, value in batch.items()}
        if label == REFERENCE:
            model, clip, pixels = self.reference(), 0.0, self.input().pixels

            def reference_loss(batch: Batch) -> Tensor:
                logits = model(pixels(batch["image"])).float()
                labels = nn.functional.interpolate(batch["label"], logits.shape[-2:], mode="nearest-exact")
                return samed_loss(logits, labels[:, 0].long())

            return _step(model, reference_loss, moved, precision, clip)
        task = self.task(label)
        if precision == "bfloat16":
            store_frozen(task.model, torch.bfloat16)
        return _step(task.model, task.loss, moved, precision, CLIP)

    def forward(self, model: nn.Module, precision: Precision, pixels: Tensor) -> Callable[[], Tensor]:
        """Logits without gradients."""
        kind = torch.device(self.device).type

        @torch.inference_mode()
        def logits() -> Tensor:
            with torch.autocast(kind, torch.bfloat16, enabled=precision == "bfloat16"):
                return model(pixels)

        return logits


def memory_of_step(setting: Setting, label: str, precision: Precision, batch: Batch, count: int) -> dict[str, int]:
    """Bytes of a contender's model and, with them, of its training step at most; to be called in a fresh process.

    On a CPU these are changes of the whole process's memory, on a GPU torch's own count.

    Args:
        count: threads of torch.
    """
    importlib.import_module("pipelines.segmentation")
    meter = _gpu_memory(setting.device) if setting.device.startswith("cuda") else _process_memory
    with threads(count):
        torch.ones(64, 64, device=setting.device).mm(torch.ones(64, 64, device=setting.device))  # wakes the libraries
        before, _ = meter()
        step = setting.training_step(label, precision, batch)
        gc.collect()
        loaded, _ = meter()
        for _ in range(WARM_STEPS):
            step()
        return {"model": loaded - before, "step": meter()[1] - before}


def _process_memory() -> tuple[int, int]:
    """Bytes in use now, and at most since the last call (where the system cannot forget, since the start)."""
    status = Path("/proc/self/status")
    if not status.exists():
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return most, most
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    now, most = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    return now, most


def _gpu_memory(device: str) -> Callable[[], tuple[int, int]]:
    def read() -> tuple[int, int]:
        torch.cuda.synchronize(device)
        result = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return result

    return read


def _step(
    model: nn.Module, loss: Callable[[Batch], Tensor], batch: Batch, precision: Precision, clip: float
) -> Callable[[], Tensor]:
    """What `engine.fit` does in a step."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)

    def step() -> Tensor:
        with torch.autocast(trained[0].device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            value = loss(batch)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        if clip:
            nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        return value.detach()

    return step
