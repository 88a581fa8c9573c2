"""GLUE (arXiv 1804.07461), from its standard files or the hub, and one task that is generated: `--task glue`.

Scored on the published development sets, as the papers do, since the test sets' labels are not public; what is chosen
is chosen on a share of the training set, which the papers do not do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines import agreement, glue_files, hub, tiny
from pipelines.glue_files import BENCHMARKS, Benchmark, Sentences
from pipelines.supervised import Base, Options, Splits, Supervised, over_seeds, refuse_data
from pipelines.tiny.text import text
from surm_seg.errors import BadConfig
from surm_seg.task import Batch, Record

__all__ = ["RECIPES", "Config", "create", "over_seeds"]

RECIPES: dict[str, dict[str, Any]] = {
    "default": {
        "batch_size": 32,
        "epochs": 3.0,
        "warmup_share": 0.06,
        "schedule": "linear",
        "learning_rate": 1e-3,
        "validate_every": 0,
        "workers": 0,
    }
}
"""Published: AdamW, warm-up 0.06, linear decay, length 128; batch 64. The rate is one that encoders of usual width
learn at; structures in narrow ones, such as tiny, want more, and `surm-seg sweep` finds it."""

AGREEMENT = "agreement"
KEPT = 100_000
"""Examples whose tokens are kept for the next epoch, some kilobytes each."""
SHORTEST = 8
"""Tokens in which two sentences have some words besides the marks of begin and end."""


@dataclass
class Config(Options):
    """A task of GLUE.

    Args:
        name: cola, sst2, mrpc, stsb, qqp, mnli, qnli or rte; or agreement, which is generated.
        max_length: tokens of an example at most; batches are padded to their longest only.
    """

    name: str = AGREEMENT
    max_length: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < SHORTEST:
            raise BadConfig("max-length", f"--max_length {self.max_length} must be {SHORTEST} or more.")


GENERATED = Benchmark("", ("sentence",), "label", ("0", "1"), ("matthews", "accuracy"), {})


class Glue(Supervised[Sentences]):
    """Classification of one sentence or two, or, for STS-B, their score."""

    def __init__(self, config: Config, seed: int) -> None:
        self.kind = _benchmark(config.name)
        self.metrics = self.kind.metrics
        splits = _generated(config) if config.name == AGREEMENT else glue_files.read(config.name, config.data)
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
    """A metric of GLUE by scikit-learn or scipy; a correlation with what is all alike counts as 0."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if metric in ("spearman", "pearson"):
        if np.ptp(answers) == 0 or np.ptp(targets) == 0:
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
    _refuse_length(config, tokenizer, model)
    return tokenizer, Base(build, head, hub.digest(folder, model))


def _refuse_length(config: Config, tokenizer: Any, model: Any) -> None:
    """Raises BadConfig where the model has no positions for examples of max_length, by the first one too many."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if not positions:
        return
    length = min(config.max_length, positions + 1)
    tokens = tokenizer("a " * length, truncation=True, max_length=length, return_tensors="pt")
    try:
        with torch.inference_mode():
            model(**tokens)
    except (IndexError, RuntimeError, ValueError) as error:
        sentence = f"--model {config.model} takes no {length} tokens ({hub.reason(error)})"
        raise BadConfig("max-length", f"{sentence}; give a smaller --max_length.") from error


def _generated(config: Config) -> Splits[Sentences]:
    """Sentences of the generated grammar."""
    refuse_data(config, AGREEMENT)
    parts = {
        name: [Sentences((text,), float(label)) for text, label in agreement.examples(name)] for name in agreement.SIZES
    }
    return Splits(parts["train"], parts["validation"], {"test": parts["test"]}, glue_files.digest(list(parts.values())))


def create(config: Config, seed: int) -> Glue:
    """The task that `surm-seg train --task glue` runs."""
    return Glue(config, seed)
