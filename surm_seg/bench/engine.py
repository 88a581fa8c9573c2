"""`surm-seg bench engine`: a training by the shared engine against a bare loop of torch, equal losses first."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from surm_seg import cli
from surm_seg.bench.comparison import Method, measured, save
from surm_seg.bench.data import prepared
from surm_seg.bench.meter import environment, threads
from surm_seg.bench.table import table
from surm_seg.distributed import ALONE
from surm_seg.engine import EngineConfig, fit
from surm_seg.errors import BadConfig, SurmError
from surm_seg.precision import fast_precision, store_frozen
from surm_seg.task import Batch, Order, Record, Task

BARE, READY, ENGINE = "bare loop", "bare loop, batches ready", "engine"
WHAT = {
    BARE: "samples, batch, loss, gradient, clipping, AdamW, schedule",
    READY: "the same without samples and batch",
    ENGINE: "`engine.fit`, with its log, TensorBoard and checkpoints",
}
TOLERANCE = 1e-5
"""How far a loss may be from the bare loop's, as a share of it; a batch of a power of two gives the same bits."""

MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536,
          "vocab_size": 30_522, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
"""Of all-MiniLM-L6-v2: 22 million values; without dropout, so that both loops compute the same."""


@dataclass(frozen=True)
class Training:
    """A training to be measured.

    Args:
        module: of the task, below `pipelines`.
        options: of its Config, made in a folder that is there while measuring.
        steps: that take some seconds.
    """

    module: str
    options: Callable[[Path, int], dict[str, Any]]
    steps: int


def _minilm(folder: Path, seed: int) -> dict[str, Any]:
    """The generated sentences, and an encoder of MiniLM's size with random weights."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    BertModel(BertConfig(**MINILM)).save_pretrained(folder / "minilm")
    importlib.import_module("pipelines.tiny.text").tokenizer().save_pretrained(folder / "minilm")
    return {"model": str(folder / "minilm")}


def _phantom(folder: Path, seed: int) -> dict[str, Any]:
    return {"data": prepared(None, folder, seed), "validate_on": "none"}


TRAININGS: dict[str, Training] = {
    "text": Training("glue", lambda folder, seed: {}, 150),
    "minilm": Training("glue", _minilm, 12),
    "digits": Training("vision", lambda folder, seed: {}, 150),
    "segmentation": Training("segmentation", _phantom, 4),
}


@dataclass
class Config(cli.Common):
    """Measure trainings by the engine against bare loops of torch; exit status 1 where their losses differ.

    Args:
        output: folder for engine.json, which has every raw figure; default `bench`.
        tasks: text and digits, with the small models that are trained here once; minilm, sentences and an encoder of
            22 million random values; segmentation, sam_tiny on generated patients. Each by its default recipe.
        steps: of each training; by default as many as take some seconds, with a checkpoint at their end.
        repeats: trainings by each loop.
        precision: float32, bfloat16 or auto, as `surm-seg train` has it.
        threads: of torch; one per processor by default.
    """

    tasks: list[str] = field(default_factory=lambda: list(TRAININGS))
    steps: int | None = None
    repeats: int = 7
    precision: str = "auto"
    threads: int | None = None


def run(config: Config) -> int:
    """Measure every task and print the table."""
    unknown = sorted(set(config.tasks) - set(TRAININGS))
    least = min(config.repeats, config.steps or 1, config.threads or 1)
    if unknown or least < 1 or config.precision not in ("auto", "float32", "bfloat16"):
        sentence = f"--tasks are {', '.join(TRAININGS)}; --precision is auto, float32 or bfloat16"
        raise BadConfig("bench-option", f"{sentence}; --steps, --repeats and --threads must be 1 or more.")
    device, reporter = cli.device_named(config.device), cli.Reporter(config.quiet)
    if config.dry_run:
        reporter.say(f"would train {', '.join(config.tasks)} by the engine and by a bare loop, on {device}")
        return 0
    rows: list[dict[str, Any]] = []
    with threads(config.threads):
        where = environment(device)
        if config.precision == "auto":  # once: a second answer could be another
            config = replace(config, precision=fast_precision(torch.device(device)))
        for name in config.tasks:
            with TemporaryDirectory() as folder:
                rows += _measured(name, config, device, Path(folder), reporter)
    results = {"benchmark": "engine", "options": asdict(config), "environment": where, "rows": rows}
    save(results, config.output or Path("bench"))
    reporter.say(markdown(results))
    return 0


def _measured(name: str, config: Config, device: str, folder: Path, reporter: cli.Reporter) -> list[dict[str, Any]]:
    """Rows of engine.json for a task."""
    training = TRAININGS[name]
    module = importlib.import_module(f"pipelines.{training.module}")
    recipe: dict[str, Any] = module.RECIPES["default"]
    engine = EngineConfig(**{f.name: recipe[f.name] for f in fields(EngineConfig) if f.name in recipe})
    steps = config.steps or training.steps
    engine = replace(engine, epochs=0.0, steps=steps, validate_every=0, workers=0, precision=config.precision)
    task = module.create(module.Config(**training.options(folder, config.seed)), config.seed)
    engine = engine.for_samples(len(task))
    loops = Loops(task, replace(engine, validate_every=0), config.seed, device, folder)
    computed: dict[str, Callable[[], list[float]]] = {
        BARE: partial(loops.bare, None), READY: partial(loops.bare, loops.batches()), ENGINE: loops.engine,
    }  # fmt: skip
    apart = check({label: compute() for label, compute in computed.items()})
    methods = [Method(label, WHAT[label], compute) for label, compute in computed.items()]
    rows = measured(methods, check, config.repeats, config.seed, reporter)
    facts = {"task": name, "steps": steps, "batch": engine.batch_size, "apart": apart}
    return [facts | row | spread(row, rows[0]) for row in rows]


class Loops:
    """The same training by two loops, each from the same weights."""

    def __init__(self, task: Task, config: EngineConfig, seed: int, device: str, folder: Path) -> None:
        self.task, self.config, self.seed, self.device, self.folder = task, config, seed, device, folder
        self.amp = config.precision == "bfloat16"
        task.validate = dict  # its cost is the task's
        task.model.to(device)
        if self.amp:
            store_frozen(task.model, torch.bfloat16)
        self.trained = [p for p in task.model.parameters() if p.requires_grad]
        self.start = [p.detach().clone() for p in self.trained]

    def batches(self) -> list[Batch]:
        return list(self._made())

    def _made(self) -> Iterator[Batch]:
        """The batches as the engine makes them: by the seed, the sample's place in the whole training, and no more."""
        for keys in Order(self.task, self.config.batch_size, self.seed, range(self.config.steps), ALONE):
            rngs = ((index, np.random.default_rng([self.seed, 1, position])) for index, position in keys)
            yield self.task.collate([self.task.sample(index, rng) for index, rng in rngs])

    def _restart(self) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.trained, self.start, strict=True):
                parameter.copy_(value)

    def bare(self, batches: Sequence[Batch] | None) -> list[float]:
        """The loss of every step of a loop as everybody writes it, on these batches or on such as it makes."""
        self._restart()
        config, place = self.config, torch.device(self.device)
        optimizer = torch.optim.AdamW(self.trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, config.rate)
        self.task.model.train()
        losses = []
        for batch in self._made() if batches is None else batches:
            moved = {name: value.to(place) for name, value in batch.items()}
            optimizer.zero_grad()
            with torch.autocast(place.type, torch.bfloat16, enabled=self.amp):
                loss = self.task.loss(moved)
            loss.backward()
            if config.clip:
                nn.utils.clip_grad_norm_(self.trained, config.clip)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        return losses

    def engine(self) -> list[float]:
        """The loss of every step by `engine.fit`."""
        self._restart()
        losses: list[float] = []

        def note(record: Record) -> None:
            losses.append(record["loss"])

        with TemporaryDirectory(dir=self.folder) as folder:
            fit(self.task, self.config, Path(folder), seed=self.seed, device=self.device, report=note)
        return losses


def check(losses: Mapping[str, Sequence[float]]) -> float:
    """The largest difference of any step's loss from the bare loop's, as a share of it.

    Raises:
        SurmError: it is above TOLERANCE, so that not the same thing was computed.
    """
    expected = np.array(losses[BARE])
    worst = 0.0
    for label, found in losses.items():
        apart = np.abs(np.array(found) - expected) / np.abs(expected)
        wrong = np.flatnonzero(~(apart <= TOLERANCE))  # NaN, too
        if wrong.size:
            step = int(wrong[0])
            sentence = f"The loss of step {step + 1} is {found[step]} by the {label}, {expected[step]} by a {BARE}"
            raise SurmError("bench-differs", f"{sentence}; find out which is wrong before timing either.")
        worst = max(worst, float(apart.max()))
    return worst


def spread(row: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Median and quartiles of the ratios of each round, by the clock and by the processors' time."""
    found = {}
    for name in ("wall", "cpu"):
        ratios = [a / b for a, b in zip(row[f"{name}_s"], base[f"{name}_s"], strict=True)]
        quartiles = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        found[f"{name}_ratio"], found[f"{name}_quartiles"] = median(ratios), (quartiles[0], quartiles[2])
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """The rows as a dated table, relative to each task's bare loop."""
    where, options = results["environment"], results["options"]
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "transformers"))
    place = f"Measured on {where['time'][:10]}: {where['processor']}, {where['threads']} threads of torch, {versions}"
    header = ["task", "steps x batch", "loop", "ms per step", "wall time", "processor time"]
    rows = [
        [
            row["task"],
            f"{row['steps']} x {row['batch']}",
            row["label"],
            f"{1000 * median(row['wall_s']) / row['steps']:.1f}",
            *(_ratio(row, name) for name in ("wall", "cpu")),
        ]
        for row in results["rows"]
    ]
    apart = max(row["apart"] for row in results["rows"])
    lines = [
        f"{place}; {options['precision']}, {options['repeats']} trainings by each loop.",
        "Whole trainings, from making the optimiser to the last checkpoint, as ratios to the bare loop: median over "
        f"the rounds (quartiles). The largest difference of a step's loss: {apart:.1g} of it.",
        table(header, rows),
        "\n".join(f"{label}: {what}." for label, what in WHAT.items()),
    ]
    return "\n\n".join(lines)


def _ratio(row: Mapping[str, Any], name: str) -> str:
    low, high = row[f"{name}_quartiles"]
    return f"{row[f'{name}_ratio']:.3f} ({low:.3f} to {high:.3f})"
