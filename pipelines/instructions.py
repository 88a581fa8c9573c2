"""Instructions and their answers: the published files of commonsense and math questions, and two generated sets.

The files are those of LLM-Adapters (arXiv 2304.01933): JSON lists, or JSON lines, of records with the fields
instruction, input, output and answer. DATA/train.json, or under its published name, is trained on; DATA/SET/test.json
is scored for every set that is there, or else DATA/test.json.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import arithmetic
from pipelines.supervised import Splits
from surm_seg.errors import BadInput

SOURCE = "https://github.com/AGI-Edgerunners/LLM-Adapters (ft-training_set and dataset)"

CHOICES = (
    ("true", "false"),
    ("solution1", "solution2"),
    ("answer1", "answer2", "answer3", "answer4", "answer5"),
    ("ending1", "ending2", "ending3", "ending4"),
    ("option1", "option2"),
)
"""Answers to questions of the published commonsense sets."""

UUID_BITS = 122
"""That are random in a UUID of version 4 (RFC 9562)."""


@dataclass(frozen=True)
class Instruction:
    """What is asked, and what should be said.

    Args:
        prompt: all that precedes the output.
        output: what is trained.
        answer: what is scored of it.
        options: the answers to choose from; none where the output is free.
    """

    prompt: str
    output: str
    answer: str
    options: tuple[str, ...] = ()

    @property
    def outputs(self) -> list[str]:
        """The output as it would be for every option."""
        before, _, after = self.output.rpartition(self.answer)
        return [before + option + after for option in self.options]


@dataclass(frozen=True)
class Published:
    """Files of a published benchmark.

    Args:
        train: published name of the training file.
        tests: folders of the test sets, the main one first.
        choices: whether the answers are of CHOICES.
    """

    train: str
    tests: tuple[str, ...]
    choices: bool


PUBLISHED = {
    "commonsense": Published(
        "commonsense_170k.json",
        ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"),
        True,
    ),
    "math": Published("math_10k.json", ("gsm8k", "AQuA", "SVAMP", "mawps", "AddSub", "MultiArith", "SingleEq"), False),
}


def read(name: str, data: str) -> Splits[Instruction]:
    """The examples of a published benchmark; raises BadInput for what is missing or damaged in DATA."""
    kind, folder = PUBLISHED[name], Path(data)
    if not data or not folder.is_dir():
        given = f"--data {data} is no folder" if data else f"--name {name} needs its files"
        raise BadInput("data", f"{given}; get {kind.train} and the test sets from {SOURCE}, and name their folder.")
    training = _found(folder / "train.json", folder / "train.jsonl", folder / kind.train)
    tests = {test: _found(folder / test / "test.json", folder / test / "test.jsonl") for test in kind.tests}
    if not any(tests.values()):
        tests = {"test": _found(folder / "test.json", folder / "test.jsonl")}
    here = {test: path for test, path in tests.items() if path}
    if training is None or not here:
        missing = f"train.json or {kind.train}" if training is None else f"test.json or {kind.tests[0]}/test.json"
        raise BadInput("data", f"{folder} holds no {missing}; get it from {SOURCE}.")
    train = list(_examples(training, kind.choices))
    scored = {test: list(_examples(path, kind.choices)) for test, path in here.items()}
    return Splits(train, [], scored, digest([train, *scored.values()]))


def generated_arithmetic() -> Splits[Instruction]:
    """Questions of `pipelines.arithmetic`."""
    parts = {
        name: [Instruction(f"{question}\n", answer, answer) for question, answer in arithmetic.examples(name)]
        for name in arithmetic.SIZES
    }
    return Splits(parts["train"], parts["validation"], {"test": parts["test"]}, digest(list(parts.values())))


def generated_uuids(count: int, seed: int) -> Splits[Instruction]:
    """Random pairs of UUIDs, a function of the seed; those trained on are scored, since this asks for memory."""
    rng = np.random.default_rng([seed, 4])
    drawn = [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(2 * count)]
    pairs = [Instruction(f"{a}\n", b, b) for a, b in zip(drawn[::2], drawn[1::2], strict=True)]
    return Splits(pairs, pairs, {"memory": pairs}, digest([pairs]))


def digest(parts: Sequence[Sequence[Instruction]]) -> str:
    """SHA-256 of all that is asked and answered."""
    texts = [[(one.prompt, one.output, one.answer, one.options) for one in part] for part in parts]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _found(*paths: Path) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _examples(path: Path, choices: bool) -> Iterator[Instruction]:
    for number, record in enumerate(_records(path), 1):
        where = f"{path}, record {number}"
        fields = record if isinstance(record, dict) else {}
        missing = [field for field in ("instruction", "answer") if not str(fields.get(field, "")).strip()]
        if missing:
            raise BadInput("fields", f"{where} has no {' and no '.join(missing)}; take the published file, or mend it.")
        if not isinstance(fields["instruction"], str):
            raise BadInput(
                "fields", f"{where} has an instruction that is no text; take the published file, or mend it."
            )
        answer = str(fields["answer"]).strip()
        output = str(fields.get("output") or "").strip() or answer
        options = _options(fields["instruction"], answer, where) if choices else ()
        if choices and answer not in output:
            raise BadInput("label", f"{where}: its output does not say its answer {answer!r}; mend it.")
        yield Instruction(_prompt(fields["instruction"], fields.get("input") or ""), output, answer, options)


def _records(path: Path) -> list[Any]:
    """Of a JSON list, or of JSON lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise BadInput("json", f"{path} is neither a JSON list nor JSON lines ({error}); get it again.") from error


def _options(instruction: str, answer: str, where: str) -> tuple[str, ...]:
    """Those that the instruction names: after "Answer format:", where it says that."""
    named = set(re.findall(r"[a-z]+\d?", instruction.lower().rpartition("answer format:")[2]))
    known = next((choices for choices in CHOICES if answer in choices), ())
    options = tuple(option for option in known if option in named) or known
    if answer not in options:
        wanted = ", ".join(options) or "; ".join(", ".join(choices) for choices in CHOICES)
        raise BadInput("label", f"{where}: the answer {answer!r} is none of the options ({wanted}); mend it.")
    return options


def _prompt(instruction: str, context: str) -> str:
    """The layout that these files were published with (Stanford Alpaca's)."""
    more = ", paired with an input that provides further context" if context else ""
    parts = [
        f"Below is an instruction that describes a task{more}. "
        "Write a response that appropriately completes the request.",
        f"### Instruction:\n{instruction}",
        *([f"### Input:\n{context}"] if context else []),
        "### Response:\n",
    ]
    return "\n\n".join(parts)
