"""What Monarch's blocks and rank buy: MoRe's Fig. 2 and 3 (arXiv 2408.17383) on a small task, and the algebra of it.

python -m pipelines.studies.expressivity
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.selection import Selected
from pipelines.studies import digits
from pipelines.studies.approximation import nearest
from pipelines.studies.picture import curves, page, scatter
from pipelines.studies.table import Found, Row, main, markdown, spread
from surm_seg.structures import Structure, make, within

BLOCKS, RANKS = (1, 2, 4, 8, 16, 32), (1, 4)
FAMILIES = ("circulant", "toeplitz", "kronecker", "displacement")
"""Each as large as it may be with no more parameters than Monarch has at a rank."""

WITHOUT = ("linear_probe", digits.FULL)
"""No delta, and every one."""

TRAINED, TURNED, RANDOM = "trained change", "same spectrum, turned", "random"
"""The matrices that are approximated."""

QUOTED_RANK = 4
QUOTED = {2: 68.1, 4: 69.9, 8: 67.0, 16: 63.9, 32: 63.0}
"""MoRe, RoBERTa-large on CoLA: N -> Matthews correlation at r = 4."""

NOTES = (
    digits.TRAINED,
    "rank, share of entries: of a random member; Monarch's are min(N r, n) and min(1, r / N). All N of one r have as "
    "many parameters where N divides n, and N = 1 is LoRA of rank r. The other families are as large as they may be "
    "within Monarch's parameters at an r.",
    "error: of the nearest member, |M - nearest| / |M| in the Frobenius norm over q and v of all layers together. "
    f"{TRAINED}: what full fine-tuning added to them, a value for each seed. {TURNED}: matrices with the same singular "
    f"values between random directions. {RANDOM}: standard normal entries. Exact but for W(G, H) (displacement), where "
    "it is the end of alternating least squares, an upper bound.",
    "Quoted from the paper: Matthews correlation on CoLA with RoBERTa-large, deltas on q, k and v. Another model, set "
    "and measure; compare the order over N and not the values.",
)


def members(
    n: int, blocks: Sequence[int], ranks: Sequence[int], families: Sequence[str] = FAMILIES
) -> dict[str, Structure]:
    """The n x n structures that are compared, by the name of their runs."""
    found = [make("monarch", n, n, blocks=N, rank=r) for r in ranks for N in blocks]
    found += [within(family, n, n, 2 * n * r) for family in families for r in ranks]
    return {"-".join([one.name, *(f"{key}{value}" for key, value in one.options.items())]): one for one in found}


def arms(structures: Mapping[str, Structure]) -> dict[str, tuple[str, ...]]:
    """Their options of `surm-seg train`, and those of what they are compared with."""
    of_structures = {
        name: ("--method", one.name, "--method_options", json.dumps(one.options)) for name, one in structures.items()
    }
    return {**of_structures, **{name: ("--method", name) for name in WITHOUT}}


def bounds(structure: Structure) -> tuple[int, float]:
    """Largest rank of a member, and largest share of entries that are not zero: those of a random one have them."""
    rng = torch.Generator().manual_seed(0)
    member = structure.dense({key: _normal(rng, *shape) for key, shape in structure.generators.items()})
    return int(torch.linalg.matrix_rank(member)), float((member != 0).double().mean())


def turned(matrix: Float[Tensor, "n n"], rng: torch.Generator) -> Float[Tensor, "n n"]:
    """The same singular values between random directions."""
    left, right = (torch.linalg.qr(_normal(rng, *matrix.shape)).Q for _ in range(2))
    return left * torch.linalg.svdvals(matrix) @ right


def error(structure: Structure, matrices: Sequence[Float[Tensor, "n n"]]) -> float:
    """Relative error of the nearest members, over all matrices together."""
    missed = sum(float((matrix - nearest(structure, matrix)).square().sum()) for matrix in matrices)
    return (missed / sum(float(matrix.square().sum()) for matrix in matrices)) ** 0.5


def errors(
    structures: Mapping[str, Structure], by_seed: Sequence[Sequence[Float[Tensor, "n n"]]]
) -> dict[str, dict[str, list[float]]]:
    """Name -> kind of matrix -> error for every seed.

    Args:
        by_seed: trained changes of the layers.
    """
    rngs = [torch.Generator().manual_seed(seed) for seed in range(len(by_seed))]
    kinds: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
        TRAINED: lambda matrix, _: matrix,
        TURNED: turned,
        RANDOM: lambda matrix, rng: _normal(rng, *matrix.shape),
    }
    held = {
        kind: [[made(matrix, rng) for matrix in matrices] for matrices, rng in zip(by_seed, rngs, strict=True)]
        for kind, made in kinds.items()
    }
    return {
        name: {kind: [error(one, matrices) for matrices in held[kind]] for kind in kinds}
        for name, one in structures.items()
    }


def study(asked: argparse.Namespace) -> Found:
    before = digits.task(asked, 0)
    structures = members(digits.width(before.base.build()), asked.blocks, asked.ranks, asked.families)
    found = digits.trained(asked, arms(structures))
    full = [run.folder for run in found[digits.FULL].runs.values()]
    learnt = [
        list(digits.changes(before.base.build(), digits.merged(digits.task(asked, seed), folder)).values())
        for seed, folder in enumerate(full)
    ]
    missed = errors(structures, learnt)
    results = {
        "results": {name: one.figures() for name, one in found.items()},
        "structures": {
            name: {"family": one.name, "options": one.options, "bounds": bounds(one)}
            for name, one in structures.items()
        },
        "errors": missed,
    }
    paragraphs = [markdown(_rows(structures, found, missed)), _agreement(structures, found, missed)]
    pictures = {"picture.svg": _picture(structures, found, missed, asked.blocks, asked.ranks)}
    return Found(digits.budget(asked), paragraphs, results, NOTES, ("torch", "transformers", "peft"), pictures)


def _rows(
    structures: Mapping[str, Structure], found: Mapping[str, Selected], missed: Mapping[str, Mapping[str, Any]]
) -> list[Row]:
    rows = []
    for name, result in found.items():
        structure = structures.get(name)
        rank, density = bounds(structure) if structure else ("–", None)
        rows.append({
            "method": structure.name if structure else name,
            "options": _options(structure) if structure else "–",
            "parameters": f"{result.parameters['method']:,}",
            "rank": str(rank),
            "share of entries": "–" if density is None else f"{density:.3f}",
            "learning rate": result.shown_rate,
            "accuracy": spread(result.scores),
            **{f"error, {k}": spread(missed[name][k]) if structure else "–" for k in (TRAINED, TURNED, RANDOM)},
            "MoRe on CoLA (quoted)": _quoted(structure),
        })  # fmt: skip
    return rows


def _options(structure: Structure) -> str:
    letters = {"blocks": "N", "rank": "r", "block": "b"}
    return ", ".join(f"{letters.get(key, key)} = {value}" for key, value in structure.options.items()) or "–"


def _quoted(structure: Structure | None) -> str:
    if structure is None or structure.name != "monarch" or structure.options["rank"] != QUOTED_RANK:
        return "–"
    return str(QUOTED.get(structure.options["blocks"], "–"))


def _agreement(
    structures: Mapping[str, Structure], found: Mapping[str, Selected], missed: Mapping[str, Mapping[str, Any]]
) -> str:
    """How far the order by the error of the nearest member is that by the trained quality."""
    from scipy.stats import rankdata

    sentences = []
    for title, names in (("Monarch", [n for n in structures if structures[n].name == "monarch"]), ("all", structures)):
        accuracies = [float(np.mean(found[name].scores)) for name in names]
        rhos = {
            kind: np.corrcoef(rankdata([np.mean(missed[name][kind]) for name in names]), rankdata(accuracies))[0, 1]
            for kind in (TRAINED, RANDOM)
        }
        shown = ", ".join(f"{rho:+.2f} ({kind})" for kind, rho in rhos.items())
        sentences.append(f"{title}, {len(accuracies)} members: {shown}")
    return f"Rank correlation (Spearman) of the error with the accuracy: {'; '.join(sentences)}."


def _picture(
    structures: Mapping[str, Structure],
    found: Mapping[str, Selected],
    missed: Mapping[str, Mapping[str, Any]],
    blocks: Sequence[int],
    ranks: Sequence[int],
) -> str:
    def name(N: int, r: int) -> str:
        (wanted,) = (n for n, one in structures.items() if one.options == {"blocks": N, "rank": r})
        return wanted

    quality = {f"r = {r}": [(float(N), float(np.mean(found[name(N, r)].scores))) for N in blocks] for r in ranks}
    nearness = {
        f"r = {r}: {kind}": [(float(N), float(np.mean(missed[name(N, r)][kind]))) for N in blocks]
        for r in ranks
        for kind in (TRAINED, TURNED, RANDOM)
    }
    points = {
        name: (
            float(one.parameters["method"]),
            float(np.mean(one.scores)),
            float(np.std(one.scores, ddof=1)) if len(one.scores) > 1 else 0.0,
        )
        for name, one in found.items()
    }
    row = [
        curves("Monarch: test accuracy over N", "N blocks", quality, log_x=True),
        curves("Monarch: error of the nearest member", "N blocks", nearness, log_x=True),
    ]
    return page([row, [scatter("test accuracy", "trained parameters besides the head", points)]])


def _normal(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def _numbers(words: str) -> tuple[int, ...]:
    return tuple(sorted({int(word) for word in words.split(",")}))


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m pipelines.studies.expressivity",
        description="Train Monarch deltas of every number of blocks and rank, and approximate trained changes by them.",
    )
    digits.options(options)
    for name, default in (("blocks", BLOCKS), ("ranks", RANKS)):
        shown = ",".join(map(str, default))
        options.add_argument(f"--{name}", type=_numbers, default=default, help=f"default {shown}")
    digits.listed(options, families=FAMILIES)
    return options


if __name__ == "__main__":
    sys.exit(main(parser(), study))
