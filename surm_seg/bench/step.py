"""`surm-seg bench step`: training step, forward and prediction against SAM's own modules fine-tuned as SAMed does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surm_seg import cli, structures
from surm_seg.backbones.sam import PATCH, SIZES
from surm_seg.bench.cell import Precision
from surm_seg.bench.comparison import save
from surm_seg.bench.contenders import MERGED, REFERENCE, Setting, memory_of_step
from surm_seg.bench.data import fresh_process, prepared
from surm_seg.bench.meter import Step, environment, interleaved, matrix_rate, no_collection, threads
from surm_seg.bench.table import NONE, table
from surm_seg.cases import Dataset
from surm_seg.errors import BadConfig, SurmError
from surm_seg.task import Batch

TOLERANCE = 1e-4  # of the range of the reference's logits, in float32
PLANE = 512  # voxels along the sides of a CT slice
TITLES = {"step": "Training step", "forward": "Forward", "predict": "Prediction of a volume"}

Key = tuple[str, Precision]
Row = dict[str, Any]


@dataclass
class Config(cli.Common):
    """Measure SAM as `surm-seg train` adapts it against SAM's own modules; exit status 1 where their logits differ.

    Args:
        output: folder for step.json, which has every raw figure; default `bench`.
        backbone: sam_vit_b, sam_vit_l, sam_vit_h or sam_tiny, with random weights.
        image_size: side of the input in pixels.
        batch: slices of a step and of a forward pass.
        repeats: measurements of each step and forward pass, after one that does not count.
        precisions: float32, and bfloat16 by autocast.
        structures: families of our deltas on q and v.
        slices: of the predicted volume; 0 leaves prediction out.
        volumes: how often each model predicts it.
        data: a prepared data set to take slices from; by default generated patients.
        threads: of torch; one per processor by default.
    """

    backbone: str = "sam_vit_b"
    image_size: int = 512
    batch: int = 1
    repeats: int = 7
    precisions: list[Precision] = field(default_factory=lambda: ["float32", "bfloat16"])
    structures: list[str] = field(default_factory=lambda: ["circulant", "low_rank"])
    slices: int = 40
    volumes: int = 2
    data: str | None = None
    threads: int | None = None


def run(config: Config) -> int:
    """Build all, compare the logits, measure, print the tables."""
    _check_options(config)
    device, reporter = cli.device_named(config.device), cli.Reporter(config.quiet)
    if config.dry_run:
        what = f"{config.backbone} at {config.image_size} pixels, batch {config.batch}, on {device}"
        reporter.say(f"would measure {what}: {', '.join(config.structures)} against the {REFERENCE}")
        return 0
    with TemporaryDirectory() as folder, threads(config.threads):
        data = prepared(config.data, Path(folder), config.seed)
        sizes = (config.backbone, config.image_size, config.batch, config.seed)
        setting = Setting(*sizes, device, data, Path(folder))
        setting.write_weights()
        rates = {precision: matrix_rate(device, getattr(torch, precision)) for precision in config.precisions}
        where = {**environment(device), "matrix_gflops": rates}
        rows = measured(setting, config, reporter)
    results = {"benchmark": "step", "options": asdict(config), "environment": where, "rows": rows}
    save(results, config.output or Path("bench"))
    reporter.say(markdown(results))
    return 0


def measured(setting: Setting, config: Config, reporter: cli.Reporter) -> list[Row]:
    """Rows of step.json: forward passes, predictions, and training steps with their memory.

    Raises:
        SurmError: our model does not compute what the reference does; timing it would be worthless.
    """
    task = setting.task(config.structures[0])
    batch = setting.samples(task)
    rows = _without_gradients(setting, config, task, batch)
    keys: list[Key] = list(product([REFERENCE, *config.structures], config.precisions))
    memory = {key: _memory(setting, key, batch) for key in reporter.track(keys, "memory", len(keys))}
    steps = {key: setting.training_step(*key, batch) for key in keys}
    losses = {key: step() for key, step in steps.items()}
    check("loss", {label: loss for (label, precision), loss in losses.items() if precision == "float32"})
    timed = _timed("step", steps, config.repeats, setting)
    return rows + [row | {"memory": memory[row["label"], row["precision"]]} for row in timed]


def check(what: str, found: Mapping[str, Tensor]) -> None:
    """Raises SurmError where one of the results in float32 is not the reference's."""
    for label, result in found.items():
        expected = found[REFERENCE]
        size = float(expected.max() - expected.min() if expected.ndim else expected.abs())
        apart = float((result - expected).abs().max())
        if not apart <= TOLERANCE * size:
            sentence = f"The {what} of {label} is {apart:.1e} away from the {REFERENCE}'s, of size {size:.1e}"
            raise SurmError("bench-differs", f"{sentence}; find out which is wrong before timing either.")


def markdown(results: Mapping[str, Any]) -> str:
    """A dated document: a table per action, everything relative to the reference."""
    where, options = results["environment"], results["options"]
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "peft", "monai"))
    lines = [
        f"Measured on {where['time'][:10]}: {where['processor']}, {where['threads']} threads of torch, {versions}; "
        f"{options['backbone']}, {options['image_size']} pixels, batch {options['batch']}.",
        "Matrix products of such a model, the roof above it: "
        + ", ".join(f"{rate:.0f} GFLOP/s in {precision}" for precision, rate in where["matrix_gflops"].items())
        + ".",
        "Ratios to the reference: wall time / processor time, in the same precision and as it ships, in float32.",
    ]
    for action, title in TITLES.items():
        rows = [row for row in results["rows"] if row["action"] == action]
        if rows:
            lines += [f"### {title}", _table(action, rows, options)]
    return "\n\n".join(lines)


def _check_options(config: Config) -> None:
    sizes = (config.batch, config.repeats, config.slices + 1, config.volumes, config.threads or 1)
    if min(sizes) < 1 or not config.precisions or not config.structures:
        sentence = "--batch, --repeats, --volumes and --threads must be 1 or more, --slices 0 or more"
        raise BadConfig("bench-option", f"{sentence}, and --precisions and --structures must name something.")
    if config.backbone not in SIZES or config.image_size < PATCH or config.image_size % PATCH:
        sentence = f"--backbone must be one of {', '.join(SIZES)}, and --image_size a multiple of {PATCH}"
        raise BadConfig("bench-option", f"{sentence}: there is a reference for SAM only.")
    unknown = sorted(set(config.structures) - set(structures.names()))
    if unknown:
        known = ", ".join(structures.names())
        raise BadConfig("bench-option", f"--structures: {', '.join(unknown)} is unknown; choose among {known}.")


def _without_gradients(setting: Setting, config: Config, task: Any, batch: Batch) -> list[Row]:
    """Compare the logits of all models while their deltas are zero; then measure forward passes and predictions."""
    pixels = task.input.pixels(batch["image"].to(setting.device))
    precisions: list[Precision] = ["float32", *(p for p in config.precisions if p != "float32")]
    ours: dict[Key, Any] = {(MERGED, p): setting.finished_run(task, p) for p in precisions}
    stock = {p: setting.reference().eval() for p in precisions}
    runs: dict[Key, Any] = {(REFERENCE, p): replace(ours[MERGED, p], model=stock[p]) for p in precisions}
    runs |= ours
    forwards = {key: setting.forward(run.model, key[1], pixels) for key, run in runs.items()}
    logits = {label: forward() for (label, precision), forward in forwards.items() if precision == "float32"}
    for structure in config.structures:
        model = setting.task(structure).model.eval()
        logits[structure] = setting.forward(model, "float32", pixels)()
    check("logits", logits)
    wanted = [key for key in runs if key[1] in config.precisions]
    rows = _timed("forward", {key: forwards[key] for key in wanted}, config.repeats, setting)
    if config.slices:
        volume = _volume(setting, config.slices)
        rows += _timed("predict", {key: partial(runs[key], volume) for key in wanted}, config.volumes, setting)
    return rows


def _volume(setting: Setting, slices: int) -> np.ndarray:
    """HU of a held-out patient, axes (z, y, x): its slices again and again, their pixels repeated up to PLANE."""
    patient = Dataset.open(setting.data).split("test")[0].image
    times = max(1, PLANE // max(patient.shape[1:]))
    return patient[np.arange(slices) % len(patient)].repeat(times, 1).repeat(times, 2)


def _memory(setting: Setting, key: Key, batch: Batch) -> dict[str, int]:
    with fresh_process() as process:
        return process.submit(memory_of_step, setting, *key, batch, torch.get_num_threads()).result()


def _timed(action: str, steps: Mapping[Key, Callable[[], object]], rounds: int, setting: Setting) -> list[Row]:
    """A row for each, after one round that does not count."""
    named: dict[str, Step] = {" ".join(key): step for key, step in steps.items()}
    with no_collection():
        interleaved(named, setting.device, 1, setting.seed)
        times = interleaved(named, setting.device, rounds, setting.seed)
    return [
        {
            "action": action,
            "label": label,
            "precision": precision,
            "wall_s": times[f"{label} {precision}"].wall,
            "cpu_s": times[f"{label} {precision}"].cpu,
        }
        for label, precision in steps
    ]


def _table(action: str, rows: Sequence[Row], options: Mapping[str, Any]) -> str:
    header = ["", "precision", "seconds (least to most)", "same precision", "as it ships"]
    lines = []
    for row in rows:
        reference = {other["precision"]: other for other in rows if other["label"] == REFERENCE}
        wall = row["wall_s"]
        lines.append([
            row["label"],
            row["precision"],
            f"{median(wall):.3g} ({min(wall):.3g} to {max(wall):.3g})",
            _ratios(row, reference[row["precision"]]),
            _ratios(row, reference.get("float32")),
        ])  # fmt: skip
        if action == "predict":
            lines[-1].append(f"{options['slices'] / median(wall):.2f}")
        if action == "step":
            held, theirs = row["memory"], reference[row["precision"]]["memory"]
            lines[-1] += [f"{held['model'] / 1e6:.0f} / {held['step'] / 1e6:.0f}"]
            lines[-1] += [f"{held[name] / theirs[name]:.2f}" for name in ("model", "step")]
    extra = {"predict": ["slices/s"], "step": ["MB of the model / of a step", "model", "step"]}
    return table([*header, *extra.get(action, [])], lines)


def _ratios(row: Row, reference: Row | None) -> str:
    if reference is None:
        return NONE
    return " / ".join(f"{median(row[name]) / median(reference[name]):.2f}" for name in ("wall_s", "cpu_s"))
