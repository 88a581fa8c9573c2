"""What methods of fine-tuning do to a model, against training all of it: representations, weights and spectra.

python -m pipelines.studies.analysis
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.selection import Selected
from pipelines.studies import digits
from pipelines.studies.approximation import nearest
from pipelines.studies.picture import curves, page
from pipelines.studies.similarity import Spectrum, cosine, linear_cka, spectrum
from pipelines.studies.table import Found, Row, counts, main, markdown, spread
from surm_seg.structures import make, names

METHODS = ("lora", "low_rank", "circulant", "toeplitz", "kronecker", "monarch", "displacement")
FROZEN, ANOTHER = "the frozen model", "full, another seed"
"""What else is compared with full fine-tuning: the least and the most that can be expected."""

BUDGET = 6144
"""Values on q and v of the tiny ViT: as many as rank 4 has."""

THOUSANDTHS = 1000.0

NOTES = (
    digits.TRAINED,
    "CKA: linear, of all tokens of the test pictures, with the fully fine-tuned model of the same seed; mean over the "
    "embedding and the layers, each of which is in the picture and in table.json. W: a frozen weight of q or v, D: "
    "what a method adds to it, merged minus frozen weight, whatever the method; full: the same of full fine-tuning, "
    "which changes all other weights too. 1 - cos in thousandths. cos(D, full D), at most: with the member of the "
    "method's family that is nearest to full D, which no other member exceeds (displacement: about). All are means "
    "over q and v of the layers, then mean ± sample SD over seeds.",
    f"{FROZEN}: before fine-tuning. {ANOTHER}: two full fine-tunings that differ in the seed of the head and of the "
    "order; what is closer than that is not told apart from full fine-tuning.",
    "Spectra of D. effective rank: exponential of the entropy of the singular values over their sum. numerical rank: "
    "of those above float32's epsilon times the side, of the largest; singular: share of the D whose numerical rank is "
    "less than their side. top k: share of the squared norm in the k largest. smallest: over the largest.",
    "SURM's and MoRe's appendices make analyses of this kind on models and sets of their own; none of their numbers "
    "stands here.",
)


@dataclass(frozen=True)
class Alike:
    """A run beside the fully fine-tuned model of its seed.

    Args:
        cka: of the embedding and of every layer.
        moved: 1 - cos(W + D, W), mean over the weights, as what follows.
        from_full: 1 - cos(W + D, W + full D).
        direction: cos(D, full D).
        at_most: cos(full D, nearest member of the method's family); None where it is no structure.
        length: |D| / |W|.
    """

    cka: list[float]
    moved: float
    from_full: float
    direction: float
    at_most: float | None
    length: float


Deltas = Mapping[str, Tensor]
"""Name of a weight of q or v -> what is added to it, or what it is."""


@dataclass(frozen=True)
class Examined:
    """A model.

    Args:
        deltas: what fine-tuning added.
        layers: representations of the test pictures' tokens after the embedding and after every layer.
    """

    deltas: Deltas
    layers: Sequence[Tensor]


def examined(asked: argparse.Namespace, seed: int, found: Mapping[str, Selected]) -> tuple[Deltas, dict[str, Examined]]:
    """The frozen weights, and the models of a seed by method, the frozen one among them."""
    of = digits.task(asked, seed)
    before = of.base.build()
    models = {FROZEN: of.base.build().double().eval()}
    models |= {method: digits.merged(of, result.runs[seed].folder) for method, result in found.items()}
    return digits.weights(before), {
        name: Examined(digits.changes(before, model), digits.hidden(of, model)) for name, model in models.items()
    }


def beside(frozen: Deltas, one: Examined, full: Examined, family: Deltas) -> Alike:
    """Compare a model with a fully fine-tuned one.

    Args:
        family: members of the method's family that are nearest to what full fine-tuning added; empty for none.
    """
    added, full_added = one.deltas, full.deltas
    return Alike(
        cka=[linear_cka(X, Y) for X, Y in zip(one.layers, full.layers, strict=True)],
        moved=fmean(1 - cosine(W + added[name], W) for name, W in frozen.items()),
        from_full=fmean(1 - cosine(W + added[name], W + full_added[name]) for name, W in frozen.items()),
        direction=fmean(cosine(added[name], full_added[name]) for name in frozen),
        at_most=fmean(cosine(family[name], full_added[name]) for name in frozen) if family else None,
        length=fmean(float(added[name].norm() / W.norm()) for name, W in frozen.items()),
    )


def nearest_members(method: str, options: Mapping[str, Any], deltas: Deltas) -> dict[str, Tensor]:
    """Members of a method's family nearest to these; none where it is no structure.

    Args:
        options: of the method.
    """
    if method == "lora":
        method, options = "low_rank", {"rank": options["r"]}
    if method not in names():
        return {}
    return {name: nearest(make(method, *delta.shape, **options), delta) for name, delta in deltas.items()}


def comparisons(
    found: Mapping[str, Selected], by_seed: Sequence[tuple[Deltas, Mapping[str, Examined]]]
) -> dict[str, list[Alike]]:
    """What is compared with full fine-tuning -> a comparison for every seed."""
    compared: dict[str, list[Alike]] = {}
    for place, (frozen, models) in enumerate(by_seed):
        others = {name: model for name, model in models.items() if name != digits.FULL}
        if place or len(by_seed) > 2:  # of two there is one pair only
            others[ANOTHER] = by_seed[place - 1][1][digits.FULL]
        for name, model in others.items():
            family = nearest_members(name, found[name].options, models[digits.FULL].deltas) if name in found else {}
            compared.setdefault(name, []).append(beside(frozen, model, models[digits.FULL], family))
    return compared


def study(asked: argparse.Namespace) -> Found:
    sized = {method: ("--method", method, "--budget", str(asked.budget)) for method in asked.methods}
    found = digits.trained(asked, {digits.FULL: ("--method", digits.FULL), **sized})
    by_seed = [examined(asked, seed, found) for seed in range(asked.seeds)]
    compared = comparisons(found, by_seed)
    spectra = {
        method: [[spectrum(delta) for delta in models[method].deltas.values()] for _, models in by_seed]
        for method in found
    }
    results = {
        "budget": asked.budget,
        "results": {method: one.figures() for method, one in found.items()},
        "compared": {method: [asdict(one) for one in seeds] for method, seeds in compared.items()},
        "spectra": {method: [[asdict(one) for one in run] for run in runs] for method, runs in spectra.items()},
    }
    paragraphs = [
        "**Beside full fine-tuning**",
        markdown(_compared_rows(found, compared)),
        "**What was added to q and v**",
        markdown(_spectrum_rows(spectra)),
    ]
    shown = f"{digits.budget(asked)} {asked.budget:,} values asked for; a method has the nearest number that it can."
    pictures = {"picture.svg": _picture(compared, spectra)}
    return Found(shown, paragraphs, results, NOTES, ("torch", "transformers", "peft"), pictures)


def _compared_rows(found: Mapping[str, Selected], compared: Mapping[str, Sequence[Alike]]) -> list[Row]:
    rows = []
    for method in (digits.FULL, ANOTHER, *(m for m in found if m != digits.FULL), FROZEN):
        result, seeds = found.get(method), compared.get(method, [])
        limits = [one.at_most for one in seeds if one.at_most is not None]
        rows.append({
            "method": method,
            "parameters": f"{result.parameters['method']:,}" if result else "–",
            "learning rate": result.shown_rate if result else "–",
            "accuracy": spread(result.scores) if result else "–",
            "CKA": _shown([float(np.mean(one.cka)) for one in seeds]),
            "CKA, last layer": _shown([one.cka[-1] for one in seeds]),
            "1 - cos(W + D, W)": _shown([THOUSANDTHS * one.moved for one in seeds]),
            "1 - cos(W + D, W + full D)": _shown([THOUSANDTHS * one.from_full for one in seeds]),
            "cos(D, full D)": _shown([one.direction for one in seeds]),
            "at most": _shown(limits),
            "|D| / |W|": _shown([one.length for one in seeds]),
        })  # fmt: skip
    return rows


def _shown(values: Sequence[float]) -> str:
    return spread(values) if values else "–"


def _spectrum_rows(spectra: Mapping[str, Sequence[Sequence[Spectrum]]]) -> list[Row]:
    rows = []
    for method, runs in spectra.items():
        leading = runs[0][0].top
        smallest = [one.values[-1] for run in runs for one in run]
        rows.append({
            "method": method,
            "effective rank": spread([float(np.mean([one.effective_rank for one in run])) for run in runs]),
            "numerical rank": f"{min(o.numerical_rank for r in runs for o in r)} to "
            f"{max(o.numerical_rank for r in runs for o in r)}",
            "side": str(len(runs[0][0].values)),
            "singular": f"{np.mean([one.singular for run in runs for one in run]):.0%}",
            **{f"top {k}": spread([float(np.mean([one.top[k] for one in run])) for run in runs]) for k in leading},
            "smallest": f"{np.median(smallest):.1e}",
        })  # fmt: skip
    return rows


def _picture(compared: Mapping[str, Sequence[Alike]], spectra: Mapping[str, Sequence[Sequence[Spectrum]]]) -> str:
    alignment = {
        method: list(enumerate(np.mean([one.cka for one in seeds], axis=0).tolist()))
        for method, seeds in compared.items()
    }
    floor = torch.finfo(torch.float32).eps  # below it there is only rounding
    values = {
        method: [
            (float(place), max(floor, float(value)))
            for place, value in enumerate(np.mean([one.values for run in runs for one in run], axis=0), 1)
        ]
        for method, runs in spectra.items()
    }
    row = [
        curves("CKA with full fine-tuning", "layer (0: embedding)", alignment),
        curves("singular values of D over the largest", "place", values, log_y=True),
    ]
    return page([row])


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m pipelines.studies.analysis",
        description="Compare what methods of fine-tuning do to representations and weights with full fine-tuning.",
    )
    digits.options(options)
    counts(options, budget=BUDGET)
    digits.listed(options, methods=METHODS)
    return options


if __name__ == "__main__":
    sys.exit(main(parser(), study))
