"""The tasks of GLUE as their standard files and the hub have them."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipelines import hub
from pipelines.supervised import Splits
from surm_seg.errors import BadInput

GIVEN = "https://gluebenchmark.com/tasks (CoLA also from https://nyu-mll.github.io/CoLA)"
HIGHEST_SCORE = 5
"""Of STS-B."""


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


def read(name: str, data: str) -> Splits[Sentences]:
    """A task of GLUE from its files below DATA, or from the hub; raises BadInput for what is missing or damaged."""
    kind = BENCHMARKS[name]
    if not data:
        return _from_hub(name, kind)
    folder = next((f for f in (Path(data) / kind.folder, Path(data)) if f.is_dir()), None)
    if folder is None:
        raise BadInput("data", f"--data {data} is no folder; get the files from {GIVEN}.")
    train = _file(folder, "train.tsv", kind)
    tests = {name: _file(folder, file, kind) for name, file in kind.tests.items()}
    return Splits(train, [], tests, digest([train, *tests.values()]))


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
    with suppress(ValueError):
        if 0 <= (score := float(text)) <= HIGHEST_SCORE:
            return score
    raise BadInput("label", f"{where}: {text!r} is no score of 0 to {HIGHEST_SCORE}; mend the line.")


def _from_hub(name: str, kind: Benchmark) -> Splits[Sentences]:
    """From nyu-mll/glue, whose labels are numbers already."""
    texts, target = kind.hub_texts or kind.texts, "label"

    def examples(split: str) -> list[Sentences]:
        return [
            Sentences(tuple(row[t] for t in texts), float(row[target])) for row in hub.rows("nyu-mll/glue", name, split)
        ]

    tests = {test: examples("validation" if len(kind.tests) == 1 else f"validation_{test}") for test in kind.tests}
    train = examples("train")
    return Splits(train, [], tests, digest([train, *tests.values()]))


def digest(parts: Sequence[Sequence[Sentences]]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        for example in part:
            whole.update(repr((example.texts, example.target)).encode())
        whole.update(b"\0")
    return whole.hexdigest()
