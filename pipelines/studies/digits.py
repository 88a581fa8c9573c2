"""The digits, learnt from the tiny vision model by any method: what the studies of trained weights look into.

OUTPUT/cells    the runs of `surm-seg train`, which studies with one OUTPUT share; a finished one is not repeated
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipelines import tiny, vision
from pipelines.selection import Comparison, Selected, selected
from pipelines.studies.table import counts
from surm_seg import methods
from surm_seg.errors import BadInput
from surm_seg.lock import held
from surm_seg.peft_methods import shapes, whole_linears

ROLES = ("q", "v")
FULL = "full"
STEPS = 200
RATES = (4e-3, 1.6e-2, 6.4e-2, 2.56e-1)
SMALLER = 8.0
"""What the learning rates are divided by for full fine-tuning, which moves every weight."""

TRAINED = (
    "Digits: 1000 training, 297 validation and 500 test pictures of scikit-learn's, learnt by the tiny ViT that "
    "`surm-seg train` pretrains on made-up letters. Deltas are on q and v of every layer; every method trains a new "
    "head as well, which parameters leaves out, and full trains everything. The learning rate is chosen on the "
    f"validation set with seed 0, for full among {SMALLER:g} times smaller ones; (edge) is the lowest or highest that "
    "was tried. accuracy: of the test set, mean ± sample SD over seeds, each with a head and an order of its own."
)
"""What a reader of their tables must know."""


def options(parser: argparse.ArgumentParser) -> None:
    """What the trainings can be told."""
    shown = ",".join(f"{rate:g}" for rate in RATES)
    parser.add_argument("--model", default=tiny.NAME, help="folder of a ViT; default tiny, which is made on first use")
    parser.add_argument("--learning_rates", type=_rates, default=RATES, help=f"default {shown}")
    counts(parser, seeds=3, steps=STEPS, jobs=2)


def _rates(words: str) -> tuple[float, ...]:
    return tuple(sorted({float(word) for word in words.split(",")}))


def listed(parser: argparse.ArgumentParser, **defaults: Sequence[str]) -> None:
    """Options that are names joined by commas."""
    for name, default in defaults.items():
        shown = f"joined by commas; default {','.join(default)}"
        parser.add_argument(f"--{name}", type=lambda word: tuple(word.split(",")), default=tuple(default), help=shown)


def trained(asked: argparse.Namespace, arms: Mapping[str, Sequence[str]]) -> dict[str, Selected]:
    """Every arm at its best learning rate; raises BadInput where one failed, and the others stay finished.

    Args:
        arms: name -> its options of `surm-seg train`; FULL is full fine-tuning.
    """
    shared = (
        "--task", "vision", "--name", vision.DIGITS, "--model", asked.model, "--roles", str(list(ROLES)),
        "--steps", str(asked.steps), "--device", "cpu", "--precision", "float32",
    )  # fmt: skip
    cells = asked.output / "cells"
    groups = {1.0: {n: own for n, own in arms.items() if n != FULL}, SMALLER: {n: arms[n] for n in arms if n == FULL}}
    found: dict[str, Selected] = {}
    failed: dict[str, str] = {}
    with held(asked.output, "studied"):
        for smaller, group in groups.items():
            rates = tuple(rate / smaller for rate in asked.learning_rates)
            comparison = Comparison(group, rates, asked.seeds, asked.jobs, cells, shared)
            results, errors = selected(comparison, importlib.import_module("surm_seg.train").main)
            found |= results
            failed |= errors
    if failed:
        name, why = next(iter(failed.items()))
        sentence = f"{len(failed)} trainings failed, such as {name} {why}"
        raise BadInput("cell-failed", f"{sentence.rstrip('.')}; the same command goes on from those that are finished.")
    return found


def budget(asked: argparse.Namespace) -> str:
    """What every training was given, for the head of a table."""
    rates = ", ".join(f"{rate:g}" for rate in asked.learning_rates)
    return f"Every training: {asked.steps} steps, learning rates {rates}; {asked.seeds} seeds, float32."


def task(asked: argparse.Namespace, seed: int) -> vision.Vision:
    """The examples and the frozen model of the runs with this seed."""
    return vision.create(vision.Config(model=asked.model, method="linear_probe"), seed)


def width(model: nn.Module) -> int:
    """Side of the weights of q and v, which are square and of one size."""
    (size,) = set(shapes(model, ROLES, ()))
    return size[0]


def merged(of: vision.Vision, run: Path) -> nn.Module:
    """The model of a run with its deltas in its weights; in float64, so that no rounding is taken for a delta."""
    return methods.merged(methods.load(of.base.build(), run / "adapter").double()).eval()


def weights(model: nn.Module) -> dict[str, Float[Tensor, "out in"]]:
    """Of q and v in every layer, float64."""
    pattern = whole_linears(model, ROLES)
    return {
        name: module.weight.detach().double()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(pattern, name)
    }


def changes(before: nn.Module, after: nn.Module) -> dict[str, Float[Tensor, "out in"]]:
    """What fine-tuning added to q and v, whatever the method: merged weight minus frozen weight."""
    frozen = weights(before)
    return {name: weight - frozen[name] for name, weight in weights(after).items()}


@torch.inference_mode()
def hidden(of: vision.Vision, model: nn.Module) -> list[Float[Tensor, "tokens features"]]:
    """What a float64 model makes of the test pictures: all their tokens after the embedding and after every layer."""
    batch = of.collate([of.encode(example, None) for example in next(iter(of.splits.tests.values()))])
    found = model(pixel_values=batch["pixel_values"].double(), output_hidden_states=True).hidden_states
    return [layer.flatten(0, 1) for layer in found]
