"""GLUE's files as they are handed out, its metrics, padding, and whole runs of `surm-seg train --task glue`."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from pipelines_small import bert

from pipelines import glue
from pipelines.glue import BENCHMARKS, Config, Glue, Sentences
from pipelines.supervised import Splits
from surm_seg import methods, train
from surm_seg.errors import BadConfig, BadInput

COLUMNS = {
    "sst2": ["sentence", "label"],
    "mrpc": ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
    "stsb": [
        "index",
        "genre",
        "filename",
        "year",
        "old_index",
        "source1",
        "source2",
        "sentence1",
        "sentence2",
        "score",
    ],
    "qqp": ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
    "mnli": ["index", "promptID", "pairID", "genre", "sentence1", "sentence2", "label1", "gold_label"],
    "qnli": ["index", "question", "sentence", "label"],
    "rte": ["index", "sentence1", "sentence2", "label"],
}
"""First lines of the files, as GLUE has them."""

TEXTS = ['the boy said " smiles', "the girls' dog, it waits"]
"""With what a reader of CSV would take for the begin of a quoted field."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(bert(tmp_path_factory.mktemp("bert")))


def lines(path: Path, rows: Sequence[Sequence[str]], start: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(start + "".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")


def answer(name: str, number: int) -> str:
    labels = BENCHMARKS[name].labels
    return labels[number % len(labels)] if labels else f"{number % 5}.25"


def standard(name: str, folder: Path, start: str = "") -> Path:
    """20 examples in every file of a task; example n has n in its first sentence."""
    kind = BENCHMARKS[name]
    for file in ("train.tsv", *kind.tests.values()):
        rows = [] if name == "cola" else [COLUMNS[name]]
        for number in range(20):
            values = {**dict(zip(kind.texts, TEXTS, strict=False)), kind.target: answer(name, number)}
            values[kind.texts[0]] += f" {number}"
            if name == "cola":
                rows.append(["gj04", values["label"], "", values["sentence"]])
            else:
                rows.append([values.get(column, "-") for column in COLUMNS[name]])
        lines(folder / kind.folder / file, rows, start)
    return folder


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_standard_files(name: str, start: str, model: str, tmp_path: Path) -> None:
    task = glue.create(Config(name=name, data=str(standard(name, tmp_path, start)), model=model), 0)
    kind, splits = BENCHMARKS[name], task.splits
    assert list(splits.tests) == list(kind.tests)
    for examples in ([*splits.train, *splits.validation], *splits.tests.values()):
        assert len(examples) == 20
        for example in examples:
            number = int(example.texts[0].rpartition(" ")[2])
            assert example.texts == (f"{TEXTS[0]} {number}", TEXTS[1])[: len(kind.texts)]
            wanted = answer(name, number)
            assert example.target == (kind.labels.index(wanted) if kind.labels else float(wanted))


def test_the_raw_files_of_cola_are_its_standard_ones(model: str, tmp_path: Path) -> None:
    rows = [["gj04", str(n % 2), "*" if n % 2 == 0 else "", f"the boy waits {n}"] for n in range(30)]
    lines(tmp_path / "raw" / "in_domain_train.tsv", rows[:20])
    lines(tmp_path / "raw" / "in_domain_dev.tsv", rows[20:25])
    lines(tmp_path / "raw" / "out_of_domain_dev.tsv", rows[25:])
    lines(tmp_path / "glue" / "train.tsv", rows[:20])
    lines(tmp_path / "glue" / "dev.tsv", rows[20:])
    raw, own = (glue.create(Config(name="cola", data=str(tmp_path / f), model=model), 0) for f in ("raw", "glue"))
    assert raw.splits == own.splits


def cut_last_column(path: Path) -> None:
    path.write_text("\n".join(line.rpartition("\t")[0] for line in path.read_text().splitlines()))


def wrong_label(path: Path) -> None:
    path.write_text(path.read_text().replace("not_entailment", "perhaps"))


def short_line(path: Path) -> None:
    path.write_text(path.read_text() + "20\tthe boy\n")


def no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (cut_last_column, "has no columns sentence1, sentence2, label"),
        (wrong_label, "train.tsv, line 3: 'perhaps' is no label of RTE"),
        (short_line, "train.tsv, line 22: 2 columns are too few"),
        (no_text, "cannot be read as tab-separated text"),
        (Path.unlink, "holds no train.tsv of RTE; get the files from https"),
    ],
)
def test_damaged_files(damage: Callable[[Path], None], sentence: str, model: str, tmp_path: Path) -> None:
    damage(standard("rte", tmp_path) / "RTE" / "train.tsv")
    with pytest.raises(BadInput) as error:
        glue.create(Config(name="rte", data=str(tmp_path), model=model), 0)
    assert sentence in str(error.value)


@pytest.mark.parametrize("score", ["much", "nan", "inf", "9.5", "-3", ""])
def test_a_score_that_is_none(score: str, model: str, tmp_path: Path) -> None:
    path = standard("stsb", tmp_path) / "STS-B" / "dev.tsv"
    path.write_text(path.read_text().replace("3.25", score))
    with pytest.raises(BadInput, match=rf"dev\.tsv, line 5: '{score}' is no score of 0 to 5"):
        glue.create(Config(name="stsb", data=str(tmp_path), model=model), 0)


def test_unknown_names_and_folders(model: str, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="do you mean cola"):
        glue.create(Config(name="colla", model=model), 0)
    with pytest.raises(BadInput, match="is no folder; get the files"):
        glue.create(Config(name="cola", data=str(tmp_path / "nowhere"), model=model), 0)
    with pytest.raises(BadConfig, match="is not read with --name agreement, whose examples are generated"):
        glue.create(Config(data=str(tmp_path), model=model), 0)
    with pytest.raises(BadConfig, match="knows no words but those of agreement"):
        glue.create(Config(name="cola", data=str(standard("cola", tmp_path))), 0)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_random_answers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found, true = rng.integers(0, 2, 50), rng.integers(0, 2, 50)
    tp, tn, fp, fn = (int(((found == a) & (true == b)).sum()) for a, b in ((1, 1), (0, 0), (1, 0), (0, 1)))
    matthews = (tp * tn - fp * fn) / np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    assert glue.measured("matthews", found, true) == pytest.approx(matthews)
    assert glue.measured("f1", found, true) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert glue.measured("accuracy", found, true) == pytest.approx((tp + tn) / 50)
    values, targets = rng.random(50), rng.random(50)
    ranks = [np.argsort(np.argsort(one)) for one in (values, targets)]
    assert glue.measured("pearson", values, targets) == pytest.approx(np.corrcoef(values, targets)[0, 1])
    assert glue.measured("spearman", values, targets) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    for metric in ("spearman", "pearson"):
        assert glue.measured(metric, np.ones(50), targets) == glue.measured(metric, values, np.ones(50)) == 0


@pytest.mark.parametrize("length", [-5, 0, 2, 7])
def test_a_length_that_leaves_no_words(length: int) -> None:
    with pytest.raises(BadConfig, match=f"max_length {length} must be 8 or more"):
        Config(max_length=length)


def test_examples_are_as_long_as_the_model_has_positions_for_at_most(model: str) -> None:
    longest = Sentences(("the boy " * 600,), 1.0)
    task = glue.create(Config(model=model, max_length=512), 0)
    assert task.encode(longest, None)["input_ids"].shape == (512,)
    task.answers(task.collate([task.encode(longest, None)]))
    for length in (513, 10**6):
        with pytest.raises(BadConfig, match=r"takes no 513 tokens .* give a smaller --max_length"):
            glue.create(Config(model=model, max_length=length), 0)


def task_of(model: str) -> Glue:
    return glue.create(Config(model=model), 0)


def test_padding_changes_nothing(model: str) -> None:
    task = task_of(model)
    task.model.eval()
    examples = sorted(task.splits.validation, key=lambda one: len(one.texts[0]))[:: len(task.splits.validation) // 7]
    encoded = [task.encode(example, None) for example in examples]
    with torch.inference_mode():
        together = task.model(**task.inputs(task.collate(encoded))).logits
        for one, logits in zip(encoded, together, strict=True):
            alone = task.model(**task.inputs(task.collate([one]))).logits[0]
            torch.testing.assert_close(alone, logits, rtol=0, atol=1e-5)


def test_what_is_held_back_is_a_function_of_the_seed_and_trains_nothing() -> None:
    train_set = [Sentences((str(number),), 0.0) for number in range(100)]
    splits = Splits(train_set, [], {"test": train_set[:1]}, "")
    one, again, other = (splits.held_back(0.1, 0.5, seed) for seed in (1, 1, 2))
    assert one == again != other
    assert len(one.validation) == 5 and len(one.train) == 45
    assert not set(one.train) & set(one.validation)
    smaller = splits.held_back(0.1, 0.05, 1)
    assert len(smaller.validation) == 1 and len(smaller.train) == 4
    assert {*smaller.train, *smaller.validation} < {*one.train, *one.validation}
    with pytest.raises(BadInput, match="1 of 100 training examples are too few to hold 1 back"):
        splits.held_back(0.1, 0.01, 1)


def test_a_validation_set_of_its_own_stays_whole() -> None:
    examples = [Sentences((str(number),), 0.0) for number in range(100)]
    found = Splits(examples, examples[:30], {"test": examples[:1]}, "").held_back(0.1, 0.01, 1)
    assert found.validation == examples[:30] and len(found.train) == 1


def trained(run: Path, model: str, *options: str) -> int:
    few = ("--epochs", "0", "--batch_size", "4", "--fraction", "0.05", "--schedule", "constant")
    few = (*few, "--precision", "float32", "--quiet")
    return train.main(["--task", "glue", "--model", model, "--output", str(run), *few, *options])


def test_a_run_keeps_what_it_scored(model: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert trained(run, model, "--steps", "4") == 0
    summary = json.loads((run / "scores" / "summary.json").read_text())
    assert summary["n"] == {"test": 2000} and set(summary["metrics"]) == {"matthews", "accuracy"}
    record = json.loads((run / "run.json").read_text())
    assert record["benchmark"] == "glue/agreement" and record["steps"] == 4 and record["parameters"]["method"] > 0

    task = task_of(model)
    task.model = methods.load(task.base.build(), run / "adapter").eval()
    with torch.inference_mode():
        answers = task.answered(task.splits.tests["test"])
    with (run / "scores" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["answer"] for row in rows] == [str(int(answer)) for answer in answers]
    right = np.mean([row["answer"] == row["target"] for row in rows])
    assert summary["metrics"]["accuracy"] == pytest.approx(right)

    assert trained(run, model, "--steps", "4", "--resume") == 0
    assert json.loads((run / "scores" / "summary.json").read_text()) == summary


def test_seeds_are_put_together(model: str, tmp_path: Path) -> None:
    assert trained(tmp_path / "runs", model, "--steps", "2", "--seeds", "2") == 0
    together = json.loads((tmp_path / "runs" / "seeds.json").read_text())
    each = [json.loads((tmp_path / "runs" / f"seed-{n}" / "scores" / "summary.json").read_text()) for n in (0, 1)]
    values = [one["metrics"]["matthews"] for one in each]
    assert together["seeds"] == [0, 1]
    assert together["metrics"]["matthews"]["mean"] == pytest.approx(np.mean(values))
    assert together["metrics"]["matthews"]["sd"] == pytest.approx(np.std(values, ddof=1))


def test_three_steps_and_three_are_six(model: str, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    chosen = (
        "--validate_every",
        "3",
        "--warmup",
        "1",
        "--horizon",
        "9",
    )  # one schedule, and the best of the same steps
    assert trained(whole, model, "--steps", "6", *chosen) == 0
    assert trained(parts, model, "--steps", "3", *chosen) == 0
    assert trained(parts, model, "--steps", "6", *chosen, "--resume", "--allow", "steps") == 0
    files = sorted(path.name for path in (whole / "adapter").glob("*.safetensors"))
    assert files
    for name in files:
        assert (whole / "adapter" / name).read_bytes() == (parts / "adapter" / name).read_bytes()
