"""Paired statistics: how much two runs differ on the same cases, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata, wilcoxon

Pair = tuple[float | None, float | None]

EXACT_PAIRS = 12
"""Up to here the permutation test tries all sign flips, 2^12 at most; above, DRAWS of them."""

DRAWS = 10_000
"""Random sign flips, and bootstrap resamples: the standard error of p = 0.05 is then 0.002."""

DECIMALS = 10
"""Differences are rounded so far, or floating-point noise would break ties and zeros."""

DETECTABLE = 1.96 + 0.84
"""Cohen's dz times sqrt(n) that a two-sided test at 5 % finds with 80 % power (normal approximation; Cohen, 1988)."""

MEDIUM = 0.5
"""A medium effect (Cohen, 1988): too few pairs to find one are too few to claim anything."""


@dataclass(frozen=True)
class Paired:
    """A second series against the first; None is undefined.

    Args:
        n: pairs with both values.
        undefined: pairs left out because a value is undefined.
        first: mean of the first series over the n pairs.
        mean: mean of the second over them.
        difference: mean - first.
        ci95_low: lower end of the 95 % percentile bootstrap interval of the difference over pairs (Efron, 1979).
        ci95_high: its upper end.
        p_wilcoxon: two-sided signed-rank test of the differences that are not 0: exact for up to 13 of them, and for up
            to 50 without ties, else the normal approximation.
        p_wilcoxon_holm: corrected for all tests of a table, those of both kinds.
        p_permutation: two-sided sign-flip test of the mean difference.
        p_permutation_holm: corrected likewise.
        rank_biserial: rank sum of the positive less that of the negative differences, over both (Kerby, 2014); -1..1.
        cohen_dz: mean difference over its sample SD; undefined where all differences are equal and not 0.
    """

    n: int
    undefined: int
    first: float | None = None
    mean: float | None = None
    difference: float | None = None
    ci95_low: float | None = None
    ci95_high: float | None = None
    p_wilcoxon: float | None = None
    p_wilcoxon_holm: float | None = None
    p_permutation: float | None = None
    p_permutation_holm: float | None = None
    rank_biserial: float | None = None
    cohen_dz: float | None = None


def smallest_p(n: int) -> float:
    """What n pairs can reach in an exact two-sided test: all differences of one sign."""
    return min(1.0, 2.0 ** (1 - n))


def detectable_effect(n: int) -> float:
    """The |dz| that n pairs find four times in five, uncorrected."""
    return DETECTABLE / math.sqrt(n)


def paired(pairs: Sequence[Pair], seed: int = 0) -> Paired:
    """Statistics of (first, second) values, not yet corrected for other tests.

    Args:
        seed: of the bootstrap and of sign flips that are drawn.
    """
    defined = [pair for pair in pairs if None not in pair]
    n, undefined = len(defined), len(pairs) - len(defined)
    if n == 0:
        return Paired(n, undefined)
    first, second = np.array(defined, np.float64).T
    differences = np.round(second - first, DECIMALS)
    changed = differences[differences != 0]
    ranks = rankdata(np.abs(changed))
    rng = np.random.default_rng(seed)
    low, high = _bootstrap_interval(differences, rng) if n > 1 else (None, None)
    return Paired(
        n,
        undefined,
        first=float(first.mean()),
        mean=float(second.mean()),
        difference=float(differences.mean()),
        ci95_low=low,
        ci95_high=high,
        p_wilcoxon=float(np.asarray(wilcoxon(changed))[1]) if len(changed) else 1.0,
        p_permutation=permutation_p(differences, rng),
        rank_biserial=float(np.sign(changed) @ ranks / ranks.sum()) if len(changed) else 0.0,
        cohen_dz=_cohen_dz(differences),
    )


def permutation_p(differences: Float[np.ndarray, " pairs"], rng: np.random.Generator) -> float:
    """Share of sign flips whose mean is as far from 0 as the observed one (Fisher, 1935).

    Flips that are drawn count the observed one as a further draw, so that p is never 0 (Phipson and Smyth, 2010).
    """
    n = len(differences)
    exact = n <= EXACT_PAIRS
    signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1) if exact else rng.choice((-1, 1), (DRAWS, n))
    far = int(np.count_nonzero(np.abs(signs @ differences) >= abs(differences.sum()) - 10**-DECIMALS))
    return far / len(signs) if exact else (far + 1) / (DRAWS + 1)


def corrected(results: Sequence[Paired]) -> list[Paired]:
    """The results with Holm's p values; both tests of all of them are one family, since a reader may pick either."""
    tests = [p for one in results for p in (one.p_wilcoxon, one.p_permutation) if p is not None]
    adjusted = iter(holm(tests))
    return [
        replace(one, p_wilcoxon_holm=next(adjusted), p_permutation_holm=next(adjusted)) if one.n else one
        for one in results
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Step-down corrected p values, in the order given (Holm, 1979)."""
    result, highest = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        result[i] = highest
    return result


def _bootstrap_interval(differences: np.ndarray, rng: np.random.Generator) -> list[float]:
    means = differences[rng.integers(len(differences), size=(DRAWS, len(differences)))].mean(axis=1)
    return np.percentile(means, (2.5, 97.5)).tolist()


def _cohen_dz(differences: np.ndarray) -> float | None:
    if not differences.any():
        return 0.0
    # Equal differences have an SD of 1e-17 rather than 0.
    if np.ptp(differences) == 0:
        return None
    return float(differences.mean() / np.std(differences, ddof=1))
