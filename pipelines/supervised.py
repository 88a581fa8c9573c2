"""Fine-tuning a pretrained model on labelled examples: what the tasks glue, vision and language share.

RUN/adapter                what was trained, by `surm_seg.methods`
   /scores/summary.json    every metric of the validation set and of every test set, and which one is the score
   /scores/predictions.csv the answer to every test example beside its target
"""

from __future__ import annotations

import csv
import io
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from surm_seg import methods
from surm_seg.errors import BadConfig, BadInput, Corrupt
from surm_seg.task import Batch, Record, Task, step_memory
from surm_seg.volume import replacing

SCHEMA = "surm-seg/benchmark-1"
PREDICTED_AT_ONCE = 64

Example = TypeVar("Example")


@dataclass
class Options:
    """What every benchmark can be told.

    Args:
        data: folder of the benchmark's files; empty takes them from the hub, or generates those that can be.
        model: folder of a model, its name on the hub, or tiny, which is trained here in a minute.
        method: of fine-tuning, one of `surm_seg.methods.names()`.
        method_options: its options.
        roles: where a method that adapts projections puts its deltas: q, k, v, out, mlp_in, mlp_out.
        overrides: role, or pattern of module names -> structure, options and scale that differ there from the method,
            which is a structure too.
        budget: choose the method's size so that it trains about so many values besides the head; 0 for its options.
        fraction: share of the training examples that is used at all, the same for every method with this seed.
        validation_share: share of these held back to choose the checkpoint and the learning rate by, where the
            benchmark has no validation set beside the one it is scored on; one that it has is used whole.
    """

    data: str = ""
    model: str = "tiny"
    method: str = "circulant"
    method_options: dict[str, Any] = field(default_factory=dict)
    roles: tuple[str, ...] = ("q", "v")
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    budget: int = 0
    fraction: float = 1.0
    validation_share: float = 0.1

    def __post_init__(self) -> None:
        self.roles = tuple(self.roles)
        if not 0 < self.fraction <= 1:
            raise BadConfig("fraction", f"--fraction {self.fraction} is not a share above 0 and up to 1.")
        if not 0 < self.validation_share < 1:
            raise BadConfig("validation-share", f"--validation_share {self.validation_share} is not between 0 and 1.")
        if self.budget < 0:
            raise BadConfig("budget", f"--budget {self.budget} must not be negative.")


def refuse_data(options: Options, name: str) -> None:
    """Raises BadConfig where files are given for examples that are generated."""
    if options.data:
        sentence = f"--data {options.data} is not read with --name {name}, whose examples are generated"
        raise BadConfig("data", f"{sentence}; give the --name of what the folder holds, or no --data.")


@dataclass(frozen=True)
class Splits(Generic[Example]):
    """The examples of a benchmark.

    Args:
        train: to be trained on.
        validation: to choose by; empty where the benchmark has none of its own.
        tests: to be scored, by name; the first is the benchmark's main one.
        digest: SHA-256 of all of them.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    tests: Mapping[str, Sequence[Example]]
    digest: str

    def held_back(self, validation_share: float, fraction: float, seed: int) -> Splits[Example]:
        """This fraction of what there is to train on, and a validation set, held back from it where there is none.

        Which examples are taken follows from the seed, and those of a smaller fraction are among those of a larger one.
        """
        order = np.random.default_rng([seed, 3]).permutation(len(self.train))
        order = order[: max(1, round(fraction * len(order)))]
        cut = 0 if self.validation else max(1, round(validation_share * len(order)))
        if cut >= len(order):
            sentence = f"{len(order)} of {len(self.train)} training examples are too few to hold {cut} back"
            raise BadInput("too-few-examples", f"{sentence}; give a larger --fraction or more of them.")
        for name, test in self.tests.items():
            if not test:
                raise BadInput("no-test-examples", f"The test set {name} is empty; get its files again.")
        validation = self.validation or [self.train[i] for i in order[:cut]]
        return Splits([self.train[i] for i in order[cut:]], validation, self.tests, self.digest)


@dataclass(frozen=True)
class Base:
    """A pretrained model before anything is adapted.

    Args:
        build: makes it, always alike.
        head: names of its modules that are new and are trained whole with every method.
        digest: what identifies its weights.
    """

    build: Callable[[], nn.Module]
    head: tuple[str, ...]
    digest: str


class Supervised(Task, Generic[Example]):
    """A model, its method, and the examples; subclasses say how an example is encoded, answered and scored.

    Args:
        name: of the benchmark, for the records.
        base: what is fine-tuned.
        splits: as the benchmark has them.
    """

    metrics: tuple[str, ...]
    """Names of what `scored` returns; the first is the score."""

    def __init__(self, name: str, options: Options, seed: int, base: Base, splits: Splits[Example]) -> None:
        self.benchmark, self.options, self.seed, self.base = name, options, seed, base
        self.splits = splits.held_back(options.validation_share, options.fraction, seed)
        torch.manual_seed(seed)
        model, chosen = base.build(), options.method_options
        if options.overrides:
            chosen = {**chosen, "overrides": options.overrides}
        if options.budget:
            sized, _ = methods.options_near(model, options.method, options.budget, roles=options.roles, head=base.head)
            chosen = {**chosen, **sized}
        self.model = methods.tuned(model, options.method, options=chosen, roles=options.roles, head=base.head)
        self.method_options = chosen
        self.parameters = methods.parameters(self.model, base.head)

    @abstractmethod
    def encode(self, example: Example, rng: np.random.Generator | None) -> Batch:
        """The tensors of an example; random choices of training come from rng, None stands for an example to answer."""

    def length(self, example: Example) -> int:
        """By which examples are answered together; alike where nothing is padded."""
        return 0

    @abstractmethod
    def answers(self, batch: Batch) -> Tensor:
        """What the model says to a batch, (batch, ...): classes, values or texts as numbers, that `scored` takes."""

    @abstractmethod
    def scored(self, answers: np.ndarray, examples: Sequence[Example]) -> Record:
        """Every metric, by name; higher is better."""

    @abstractmethod
    def shown(self, answers: np.ndarray, examples: Sequence[Example]) -> Iterator[tuple[str, str]]:
        """Answer and target of every example, as text for a table."""

    def __len__(self) -> int:
        return len(self.splits.train)

    def name(self, index: int) -> str:
        return f"training example {index}"

    def sample(self, index: int, rng: np.random.Generator) -> Batch:
        return self.encode(self.splits.train[index], rng)

    def answered(self, examples: Sequence[Example]) -> np.ndarray:
        """The model's answers, in the order of the examples; longer ones together, so that little is padded."""
        order = sorted(range(len(examples)), key=lambda place: self.length(examples[place]))
        device = next(self.model.parameters()).device
        found: dict[int, np.ndarray] = {}
        for start in range(0, len(order), PREDICTED_AT_ONCE):
            places = order[start : start + PREDICTED_AT_ONCE]
            batch = self.collate([self.encode(examples[i], None) for i in places])
            answers = self.answers({name: value.to(device) for name, value in batch.items()})
            found.update(zip(places, answers.float().cpu().numpy(), strict=True))
        return np.stack([found[i] for i in range(len(examples))])

    def validate(self) -> Record:
        record = self.scored(self.answered(self.splits.validation), self.splits.validation)
        return {"score": record[self.metrics[0]], **record}

    def describe(self) -> str:
        """What is about to be trained, in one line."""
        options, counts, splits = self.options, self.parameters, self.splits
        shown = {name: value for name, value in self.method_options.items() if name != "overrides"}
        chosen = f" {json.dumps(shown)}" if shown else ""
        chosen += f" and {len(options.overrides)} overrides" if options.overrides else ""
        return (
            f"{self.benchmark}: {options.model} with {options.method}{chosen}: {counts.method:,} + {counts.head:,} of "
            f"the head trained of {counts.model:,}; {len(splits.train)} training, {len(splits.validation)} validation, "
            f"{', '.join(str(len(test)) for test in splits.tests.values())} test examples"
        )

    def facts(self) -> dict[str, Any]:
        """What identifies the data and the model, for run.json."""
        return {
            "benchmark": self.benchmark,
            "data_sha256": self.splits.digest,
            "base_sha256": self.base.digest,
            "parameters": asdict(self.parameters),
            "method_options": self.method_options,
            "examples": {"train": len(self.splits.train), "validation": len(self.splits.validation)},
        }

    def memory_needed(self, batch_size: int, device: str) -> int:
        """Bytes of a training step, by the longest of some training examples."""
        some = [self.sample(i, np.random.default_rng(0)) for i in range(min(len(self), PREDICTED_AT_ONCE))]
        longest = max(some, key=lambda one: sum(value.numel() for value in one.values()))
        batch = {name: value.to(device) for name, value in self.collate([longest]).items()}
        return step_memory(self.model.to(device), self.inputs(batch), batch_size)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Of a batch, what the model takes."""
        return {name: value for name, value in batch.items() if name != "target"}

    def finish(self, run: Path, device: str, track: Callable[..., Iterator[Any]], say: Callable[[str], None]) -> int:
        """Save what was trained, load it again, and score that; prints the metrics."""
        methods.save(self.model, run / "adapter")
        precision = yaml.safe_load((run / "config.yaml").read_text())["precision"]
        del self.model  # two would not fit where one does
        self.model = methods.load(self.base.build(), run / "adapter").to(device).eval()
        metrics: Record = {}
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(("set", "example", "answer", "target"))
        with torch.inference_mode(), torch.autocast(torch.device(device).type, torch.bfloat16, precision == "bfloat16"):
            validation = self.scored(self.answered(self.splits.validation), self.splits.validation)
            sets = self.splits.tests
            for place, (name, examples) in enumerate(track(list(sets.items()), "scoring", len(sets))):
                answers = self.answered(examples)
                found = self.scored(answers, examples)
                metrics |= found if place == 0 else {f"{metric}_{name}": value for metric, value in found.items()}
                shown = enumerate(self.shown(answers, examples))
                writer.writerows((name, number, *texts) for number, texts in shown)
        summary = {
            "schema": SCHEMA,
            "benchmark": self.benchmark,
            "score": self.metrics[0],
            "validation": validation,
            "metrics": metrics,
            "n": {name: len(examples) for name, examples in self.splits.tests.items()},
        }
        (run / "scores").mkdir(exist_ok=True)
        for file_name, text in (("predictions.csv", table.getvalue()), ("summary.json", json.dumps(summary, indent=1))):
            with replacing(run / "scores" / file_name) as file:
                file.write(text.encode())
        say(", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        return 0


def summary_of(run: Path) -> dict[str, Any]:
    """The scores of a finished run; raises Corrupt."""
    path = run / "scores" / "summary.json"
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Corrupt("scores-unreadable", f"{path} is missing or damaged; train {run} again.") from error


def over_seeds(folder: Path, runs: Mapping[int, Path]) -> str:
    """Write seeds.csv, the metrics of every seed, and seeds.json, their mean and SD; returns them as lines."""
    found = {seed: summary_of(run)["metrics"] for seed, run in runs.items()}
    table = io.StringIO()
    writer = csv.DictWriter(table, ["seed", *next(iter(found.values()))], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"seed": seed, **metrics} for seed, metrics in found.items())
    together = {
        name: {
            "mean": float(np.mean(values)),
            "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "n": len(values),
        }
        for name in next(iter(found.values()))
        for values in ([metrics[name] for metrics in found.values()],)
    }
    result = {"schema": "surm-seg/benchmark-seeds-1", "seeds": list(runs), "metrics": together}
    for file_name, text in (("seeds.csv", table.getvalue()), ("seeds.json", json.dumps(result, indent=1) + "\n")):
        with replacing(folder / file_name) as file:
            file.write(text.encode())
    spread = {name: "" if one["sd"] is None else f" ± {one['sd']:.4f}" for name, one in together.items()}
    return "\n".join(f"{name} {one['mean']:.4f}{spread[name]}" for name, one in together.items())
