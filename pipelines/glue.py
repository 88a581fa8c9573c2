"""GLUE (arXiv 1804.07461), from its standard files or the hub, and one task that is generated: `--task glue`.

Scored on the published development sets, as the papers do, since the test sets' labels are not public; what is chosen
is chosen on a share of the training set, which the papers do not do.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines import agreement, hub, tiny
from pipelines.supervised import Base, Options, Splits, Supervised, over_seeds, refuse_data
from pipelines.tiny.text import text
from surm_seg.errors import BadConfig, BadInput
from surm_seg.task import Batch, Record

__all__ = ["RECIPES", "Config", "create", "over_seeds"]

RECIPES: dict[str, dict[str, Any]] = {
    "default": {
        "batch_size": 32,
        "epochs": 3.0,
        "warmup_share": 0.06,
        "schedule": "linear",
        "learning_rate": 5e-3,
        "validate_every": 0,
        "workers": 0,
    }
}
"""Published: AdamW, warm-up 0.06, linear decay, length 128; batch 64."""

AGREEMENT = "agreement"
KEPT = 100_000
"""Examples whose tokens are kept for the next epoch, some kilobytes each."""
GIVEN = "https://gluebenchmark.com/tasks (CoLA also from https://nyu-mll.github.io/CoLA)"


@dataclass
class Config(Options):
    """A task of GLUE.

    Args:
        name: cola, sst2, mrpc, stsb, qqp, mnli, qnli or rte; or agreement, which is generated.
        max_length: tokens of an example at most; batches are padded to their longest only.
    """

    name: str = AGREEMENT
    max_length: int = 128


@dataclass(frozen=True)
class Sentences:
    """An example: one sentence or two, and its label's number or its score."""

    texts: tuple[str, ...]
    target: float


@dataclass(frozen=True)
class Benchmark:
    """What the files of a task of GLUE look like, and how it is scored.

    Args:
        folder: its name in the standard download.
        texts: columns of its sentences, by the names of the files' first line.
        target: column of the label.
        labels: texts of the labels in the order of their numbers; () for a score.
        metrics: as published, the main one first.
        tests: files of the development sets.
        places: of texts and target in files without a first line of names.
        others: names of the same files elsewhere: standard name -> files that together are it.
        hub_texts: columns of the sentences where the hub names them otherwise.
        gaps: whether the published files have lines with too few columns, which all readers pass over.
    """

    folder: str
    texts: tuple[str, ...]
    target: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    tests: Mapping[str, str]
    places: tuple[int, ...] = ()
    others: Mapping[str, tuple[str, ...]] | None = None
    hub_texts: tuple[str, ...] = ()
    gaps: bool = False


_DEV = {"dev": "dev.tsv"}
_PAIR = ("sentence1", "sentence2")
_ENTAILED = ("entailment", "not_entailment")
_RAW_COLA = {"train.tsv": ("in_domain_train.tsv",), "dev.tsv": ("in_domain_dev.tsv", "out_of_domain_dev.tsv")}

BENCHMARKS: dict[str, Benchmark] = {
    "cola": Benchmark(
        "CoLA", ("sentence",), "label", ("0", "1"), ("matthews", "accuracy"), _DEV, (3, 1), _RAW_COLA
    ),
    "sst2": Benchmark("SST-2", ("sentence",), "label", ("0", "1"), ("accuracy",), _DEV),
    "mrpc": Benchmark(
        "MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1"), ("f1", "accuracy"), _DEV,
        hub_texts=_PAIR,
    ),
    "stsb": Benchmark("STS-B", _PAIR, "score", (), ("spearman", "pearson"), _DEV),
    "qqp": Benchmark(
        "QQP", ("question1", "question2"), "is_duplicate", ("0", "1"), ("f1", "accuracy"), _DEV, gaps=True
    ),
    "mnli": Benchmark(
        "MNLI", _PAIR, "gold_label", ("entailment", "neutral", "contradiction"), ("accuracy",),
        {"matched": "dev_matched.tsv", "mismatched": "dev_mismatched.tsv"}, hub_texts=("premise", "hypothesis"),
    ),
    "qnli": Benchmark("QNLI", ("question", "sentence"), "label", _ENTAILED, ("accuracy",), _DEV),
    "rte": Benchmark("RTE", _PAIR, "label", _ENTAILED, ("accuracy",), _DEV),
}  # fmt: skip

GENERATED = Benchmark("", ("sentence",), "label", ("0", "1"), ("matthews", "accuracy"), {})


class Glue(Supervised[Sentences]):
    """Classification of one sentence or two, or, for STS-B, their score."""

    def __init__(self, config: Config, seed: int) -> None:
        self.kind = _benchmark(config.name)
        self.metrics = self.kind.metrics
        splits = _generated(config) if config.name == AGREEMENT else _read(config, self.kind)
        self.classes = len(self.kind.labels)
        self.tokenizer, base = _base(config, max(1, self.classes), seed)
        self.max_length = config.max_length
        self.encoded: dict[Sentences, Batch] = {}
        super().__init__(f"glue/{config.name}", config, seed, base, splits)

    def encode(self, example: Sentences, rng: np.random.Generator | None) -> Batch:
        if example in self.encoded:
            return self.encoded[example]
        tokens = self.tokenizer(*example.texts, truncation=True, max_length=self.max_length)
        batch = {name: torch.tensor(values) for name, values in tokens.items()}
        batch["target"] = torch.tensor(example.target, dtype=torch.long if self.classes else torch.float32)
        if len(self.encoded) < KEPT:
            self.encoded[example] = batch
        return batch

    def length(self, example: Sentences) -> int:
        """Characters, which tokens follow closely enough."""
        return sum(map(len, example.texts))

    def collate(self, samples: list[Batch]) -> Batch:
        """Padded to the longest of them."""
        values = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        side = self.tokenizer.padding_side
        padded = {
            name: nn.utils.rnn.pad_sequence([one[name] for one in samples], True, values.get(name, 0), side)
            for name in samples[0]
            if name != "target"
        }
        return {**padded, "target": torch.stack([one["target"] for one in samples])}

    def loss(self, batch: Batch) -> Tensor:
        logits = self._logits(batch)
        if self.classes:
            return nn.functional.cross_entropy(logits, batch["target"])
        return nn.functional.mse_loss(logits[:, 0], batch["target"])

    def answers(self, batch: Batch) -> Tensor:
        logits = self._logits(batch)
        return logits.argmax(1) if self.classes else logits[:, 0]

    def _logits(self, batch: Batch) -> Tensor:
        return self.model(**self.inputs(batch)).logits.float()

    def scored(self, answers: np.ndarray, examples: Sequence[Sentences]) -> Record:
        targets = np.array([example.target for example in examples])
        return {metric: measured(metric, answers, targets) for metric in self.metrics}

    def shown(self, answers: np.ndarray, examples: Sequence[Sentences]) -> Iterator[tuple[str, str]]:
        for answer, example in zip(answers, examples, strict=True):
            if self.classes:
                yield self.kind.labels[int(answer)], self.kind.labels[int(example.target)]
            else:
                yield f"{answer:.4f}", f"{example.target:.4f}"


def measured(metric: str, answers: np.ndarray, targets: np.ndarray) -> float:
    """A metric of GLUE by scikit-learn or scipy; a correlation with answers that are all alike counts as 0."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if metric in ("spearman", "pearson"):
        if np.ptp(answers) == 0:
            return 0.0
        found: Any = (spearmanr if metric == "spearman" else pearsonr)(answers, targets)
        return float(found.statistic)
    by_name = {"matthews": matthews_corrcoef, "f1": f1_score, "accuracy": accuracy_score}
    return float(by_name[metric](targets.astype(int), answers.astype(int)))


def _benchmark(name: str) -> Benchmark:
    known = {AGREEMENT: GENERATED, **BENCHMARKS}
    if name not in known:
        near = get_close_matches(name, known, 1)
        meant = f"do you mean {near[0]}? There are" if near else "there are"
        raise BadConfig("benchmark", f"--name {name} is no task of GLUE; {meant} {', '.join(known)}.")
    return known[name]


def _base(config: Config, outputs: int, seed: int) -> tuple[Any, Base]:
    """The tokenizer, and the encoder with a new head of so many outputs."""
    if config.model == tiny.NAME:
        if config.name != AGREEMENT:
            raise BadConfig("tiny", f"--model tiny knows no words but those of {AGREEMENT}; give another --model.")
        folder = str(text())
    else:
        folder = config.model
    tokenizer = hub.tokenizer(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    options = {"num_labels": outputs, "pad_token_id": tokenizer.pad_token_id}

    def build() -> nn.Module:
        return hub.with_new_head("AutoModelForSequenceClassification", folder, **options)[0]

    build = hub.fresh(build, seed)
    with torch.random.fork_rng(devices=[]):
        model, head = hub.with_new_head("AutoModelForSequenceClassification", folder, **options)
    return tokenizer, Base(build, head, hub.digest(folder, model))


def _generated(config: Config) -> Splits[Sentences]:
    """Sentences of the generated grammar."""
    refuse_data(config, AGREEMENT)
    parts = {
        name: [Sentences((text,), float(label)) for text, label in agreement.examples(name)] for name in agreement.SIZES
    }
    return Splits(parts["train"], parts["validation"], {"test": parts["test"]}, _digest(list(parts.values())))


def _read(config: Config, kind: Benchmark) -> Splits[Sentences]:
    if not config.data:
        return _from_hub(config.name, kind)
    folder = next((f for f in (Path(config.data) / kind.folder, Path(config.data)) if f.is_dir()), None)
    if folder is None:
        raise BadInput("data", f"--data {config.data} is no folder; get the files from {GIVEN}.")
    train = _file(folder, "train.tsv", kind)
    tests = {name: _file(folder, file, kind) for name, file in kind.tests.items()}
    return Splits(train, [], tests, _digest([train, *tests.values()]))


def _file(folder: Path, standard: str, kind: Benchmark) -> list[Sentences]:
    """The examples of a file of the standard download, or of the files that together are it."""
    for names in ((standard,), (kind.others or {}).get(standard, ())):
        paths = [folder / name for name in names]
        if paths and all(path.exists() for path in paths):
            return [example for path in paths for example in _examples(path, kind)]
    raise BadInput("data", f"{folder} holds no {standard} of {kind.folder}; get the files from {GIVEN}.")


def _examples(path: Path, kind: Benchmark) -> Iterator[Sentences]:
    """What a TSV file holds; fields are never quoted in GLUE."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput("data", f"{path} cannot be read as tab-separated text ({error}); get it again.") from error
    first = lines[0] if lines else []
    columns = (*kind.texts, kind.target)
    named = all(column in first for column in columns)
    if not named and not kind.places:
        raise BadInput("columns", f"{path} has no columns {', '.join(columns)} in its first line; take GLUE's own.")
    places = tuple(first.index(column) for column in columns) if named else kind.places
    for number, fields in enumerate(lines[named:], 1 + named):
        if len(fields) <= max(places):
            if kind.gaps:
                continue
            raise BadInput("columns", f"{path}, line {number}: {len(fields)} columns are too few; mend the line.")
        *texts, target = (fields[place] for place in places)
        yield Sentences(tuple(texts), _target(target, kind, f"{path}, line {number}"))


def _target(text: str, kind: Benchmark, where: str) -> float:
    if kind.labels:
        if text in kind.labels:
            return float(kind.labels.index(text))
        raise BadInput("label", f"{where}: {text!r} is no label of {kind.folder} ({', '.join(kind.labels)}); mend it.")
    try:
        return float(text)
    except ValueError as error:
        raise BadInput("label", f"{where}: {text!r} is no score; mend the line.") from error


def _from_hub(name: str, kind: Benchmark) -> Splits[Sentences]:
    """From nyu-mll/glue, whose labels are numbers already."""
    texts, target = kind.hub_texts or kind.texts, "label"

    def examples(split: str) -> list[Sentences]:
        return [
            Sentences(tuple(row[t] for t in texts), float(row[target])) for row in hub.rows("nyu-mll/glue", name, split)
        ]

    tests = {test: examples("validation" if len(kind.tests) == 1 else f"validation_{test}") for test in kind.tests}
    train = examples("train")
    return Splits(train, [], tests, _digest([train, *tests.values()]))


def _digest(parts: Sequence[Sequence[Sentences]]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        for example in part:
            whole.update(repr((example.texts, example.target)).encode())
        whole.update(b"\0")
    return whole.hexdigest()


def create(config: Config, seed: int) -> Glue:
    """The task that `surm-seg train --task glue` runs."""
    return Glue(config, seed)
