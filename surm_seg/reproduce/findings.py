"""What a reproduction came to, beside what is quoted: the tables, every figure behind them, and the picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.studies.picture import page, scatter
from pipelines.studies.table import Found, Row, markdown
from surm_seg import seeds
from surm_seg.cells import Done
from surm_seg.compare import SEEDS, read_run
from surm_seg.labels import SYNAPSE
from surm_seg.metrics import RECOMMENDED, SAMED
from surm_seg.reproduce.synapse import ARMS, QUOTED, Arm, Quoted
from surm_seg.statistics import Pair, Paired, corrected, detectable_effect, paired, smallest_p

NONE = "–"
PERCENT = 100

NOTES = (
    "* samed-2023: the rules of the published tables, Dice in percent and HD95 in voxels; there a missed organ has "
    "HD95 0 and a false organ Dice 1. The other scores are by the recommended protocol, Dice and NSD in percent; "
    "missed counts organs of which a prediction has nothing, over all cases and seeds. Mean ± sample SD over the "
    "seeds of the mean over cases.",
    "encoder, decoder: trained values of the deltas and of the decoder; trained: both; model: all values. Every family "
    "has its own size, none is matched to another's.",
    "Quoted rows were not computed here; the encoder's parameters follow from rank and blocks. Sources: "
    + "; ".join(f"{one.method}: {one.source}" for one in QUOTED)
    + ".",
    SEEDS,
)
REHEARSAL_NOTE = (
    "**A rehearsal at toy size: nothing here says anything about Synapse, and the quoted rows are no match for the "
    "others.** It shows that every stage runs, from the source's files to this table."
)


@dataclass(frozen=True)
class Result:
    """The finished runs of an arm, by seed."""

    arm: Arm
    runs: Mapping[int, Done]

    @property
    def folders(self) -> dict[int, Path]:
        return {seed: done.folder for seed, done in self.runs.items()}

    @property
    def parameters(self) -> dict[str, int]:
        """Trained values of encoder_adapter and decoder, and all of the model."""
        record = next(iter(self.folders.values())) / "run.json"
        return json.loads(record.read_bytes())["parameters"]


@dataclass(frozen=True)
class Scores:
    """An arm's result, and its scores over seeds as `seeds.over_seeds` gives them, by protocol."""

    result: Result
    protocols: Mapping[str, Any]


def dice_of(run: Path) -> str:
    """Mean Dice of a finished run by both protocols, in words."""
    protocols = json.loads((run / "scores" / "summary.json").read_bytes())["protocols"]
    means = {name: content["overall"]["dice"]["mean"] for name, content in protocols.items()}
    return ", ".join(f"{NONE if mean is None else f'{PERCENT * mean:.2f}'} {name}" for name, mean in means.items())


def found(
    results: Sequence[Result],
    failed: Mapping[str, str],
    *,
    folder: Path,
    words: Sequence[str],
    rehearsal: bool,
    agrees: bool,
) -> Found:
    """Tables, figures and picture of the runs that finished.

    Args:
        failed: run -> error.
        folder: for what the seeds of each arm come to.
        words: options of `surm-seg train` that all runs shared.
        agrees: whether the data set is as published.
    """
    scored = [_scores(result, folder / result.arm.name) for result in results]
    paragraphs = [REHEARSAL_NOTE] if rehearsal else []
    if not agrees:
        paragraphs.append("The data contradict what is published about the benchmark.")
    paragraphs += [_table(scored), _organs(scored)]
    against = dict(compared(results))
    if against:
        paragraphs.append(_comparison(against))
    paragraphs += [f"Failed: {name} {why}" for name, why in failed.items()]
    figures = {
        "rehearsal": rehearsal,
        "data_as_published": agrees,
        "words": list(words),
        "methods": [_figures(one) for one in scored],
        "compared": {name: asdict(one) for name, one in against.items()},
        "failed": dict(failed),
        "quoted": [asdict(one) for one in QUOTED],
    }
    budget = f"Every run: surm-seg train {' '.join(words)}, the structure and the seed."
    pictures = {"picture.svg": _picture(scored, rehearsal)} if scored else {}
    return Found(budget, paragraphs, figures, NOTES, ("torch", "monai", "peft"), pictures)


def _scores(result: Result, folder: Path) -> Scores:
    folder.mkdir(parents=True, exist_ok=True)
    return Scores(result, seeds.over_seeds(folder, result.folders)["protocols"])


def _figures(one: Scores) -> dict[str, Any]:
    return {
        **asdict(one.result.arm),
        "parameters": one.result.parameters,
        "protocols": one.protocols,
        "runs": {
            seed: {"folder": done.folder.name, "seconds": done.seconds, "peak_bytes": done.peak_bytes}
            for seed, done in one.result.runs.items()
        },
    }


def _table(scored: Sequence[Scores]) -> str:
    rows: list[Row] = []
    for one in scored:
        samed, ours = (one.protocols[name]["overall"] for name in (SAMED, RECOMMENDED))
        parameters = one.result.parameters
        trained = parameters["encoder_adapter"], parameters["decoder"]
        rows.append({
            "method": one.result.arm.name,
            "options": " ".join(f"{name} {value}" for name, value in one.result.arm.options.items()) or NONE,
            "Dice*": _shown(samed["dice"], PERCENT),
            "HD95*": _shown(samed["hd95_vox"]),
            "Dice": _shown(ours["dice"], PERCENT),
            "HD95 mm": _shown(ours["hd95_mm"]),
            "NSD": _shown(ours["nsd"], PERCENT),
            "missed": str(ours["missed"]),
            "encoder": f"{trained[0]:,}",
            "decoder": f"{trained[1]:,}",
            "trained": f"{sum(trained):,}",
            "model": f"{parameters['model']:,}",
            "seeds": str(len(one.result.runs)),
        })  # fmt: skip
    for quoted in QUOTED:
        encoder = f"{quoted.encoder:,}" if quoted.encoder else NONE
        known = {"Dice*": f"{quoted.dice:.2f}", "HD95*": f"{quoted.hd95:.2f}", "encoder": encoder}
        columns = list(rows[0]) if rows else ["method", *known]
        rows.append(dict.fromkeys(columns, NONE) | {"method": _quoted(quoted)} | known)
    return markdown(rows)


def _organs(scored: Sequence[Scores]) -> str:
    """Dice by the rules of the published tables, organ by organ."""
    rows: list[Row] = []
    for one in scored:
        organs = one.protocols[SAMED]["organs"]
        dice = {
            _spaced(organ): _shown(organs[organ]["dice"], PERCENT) if organ in organs else NONE for organ in SYNAPSE
        }
        rows.append({"Dice*": one.result.arm.name, **dice})
    for quoted in QUOTED:
        if quoted.organs:
            dice = {_spaced(organ): f"{quoted.organs[organ]:.2f}" for organ in SYNAPSE}
            rows.append({"Dice*": _quoted(quoted), **dice})
    return markdown(rows)


@dataclass(frozen=True)
class Compared:
    """An arm against the first of ARMS, by Dice of the recommended protocol.

    Args:
        cases: paired by case, each the mean over the seeds that both have and then organs.
        seeds: seed -> difference of the mean over cases, where both have the seed.
    """

    cases: Paired
    seeds: Mapping[int, float]


def compared(results: Sequence[Result]) -> Iterator[tuple[str, Compared]]:
    runs = {result.arm.name: _dice(result) for result in results}
    reference = runs.pop(ARMS[0].name, {})
    common = {name: [seed for seed in theirs if seed in reference] for name, theirs in runs.items()}
    sides = {
        name: [_mean([side[seed] for seed in common[name]]) for side in (reference, theirs)]
        for name, theirs in runs.items()
        if common[name]
    }
    tests = corrected([paired(_pairs(first, second)) for first, second in sides.values()])
    for name, test in zip(sides, tests, strict=True):
        apart = {seed: paired(_pairs(reference[seed], runs[name][seed])).difference for seed in common[name]}
        yield name, Compared(test, {seed: value for seed, value in apart.items() if value is not None})


Values = Mapping[tuple[str, str], float | None]
"""(case, organ) -> Dice, None where undefined."""


def _dice(result: Result) -> dict[int, Values]:
    """Seed -> Dice."""
    return {seed: read_run(str(seed), run, "dice", RECOMMENDED).values for seed, run in result.folders.items()}


def _mean(runs: Sequence[Values]) -> Values:
    """Mean over the runs that define it."""
    defined = {key: [dice for run in runs if (dice := run.get(key)) is not None] for key in runs[0]}
    return {key: float(np.mean(dice)) if dice else None for key, dice in defined.items()}


def _pairs(first: Values, second: Values) -> list[Pair]:
    cases: dict[str, list[tuple[float, float]]] = {}
    for key, value in first.items():
        other = second.get(key)
        if value is not None and other is not None:
            cases.setdefault(key[0], []).append((value, other))
    means = (np.mean(pairs, axis=0).tolist() for pairs in cases.values())
    return [(one, other) for one, other in means]


def _comparison(compared: Mapping[str, Compared]) -> str:
    reference, n = ARMS[0].name, max(one.cases.n for one in compared.values())
    rows: list[Row] = []
    for name, two in compared.items():
        one, by_seed = two.cases, two.seeds.values()
        interval = f"{_signed(one.ci95_low)} to {_signed(one.ci95_high)}" if one.ci95_low is not None else NONE
        rows.append({
            f"against {reference}": name,
            "cases": str(one.n),
            "Dice": _signed(one.difference),
            "by seed": f"{_signed(min(by_seed))} to {_signed(max(by_seed))}" if by_seed else NONE,
            "95 % over cases": interval,
            "p Wilcoxon, Holm": _p(one.p_wilcoxon_holm),
            "p permutation, Holm": _p(one.p_permutation_holm),
            "dz": NONE if one.cohen_dz is None else f"{one.cohen_dz:+.2f}",
        })  # fmt: skip
    tests = 2 * len(compared)
    power = "" if n < 1 else (
        f" The smallest p that {n} cases can reach is {min(1.0, tests * smallest_p(n)):.2g} after Holm; before it, an "
        f"effect is found 4 times in 5 only from |dz| = {detectable_effect(n):.2f} up."
    )  # fmt: skip
    what = (
        "Differences of Dice in percentage points, recommended protocol, mean over seeds, paired by case; by seed: the "
        "least and the most of any seed. Intervals and tests are over cases, with these very runs: they do not know "
        "what other seeds would give, so a small p beside seeds of both signs claims nothing."
    )
    return f"{markdown(rows)}\n\n{what} Holm over the {tests} tests of the table.{power}"


def _picture(scored: Sequence[Scores], rehearsal: bool) -> str:
    points: dict[str, tuple[float, float, float]] = {}
    for one in scored:
        dice = one.protocols[SAMED]["overall"]["dice"]
        mean, sd = PERCENT * dice["mean"], PERCENT * (dice["sd"] or 0.0)
        points[one.result.arm.name] = one.result.parameters["encoder_adapter"], mean, sd
    rings = {_quoted(quoted): (quoted.encoder, quoted.dice, 0.0) for quoted in QUOTED if quoted.encoder}
    title = f"{'Rehearsal, no result: ' if rehearsal else ''}Dice by the published rules, %"
    return page([[scatter(title, "trained parameters of the encoder", {**points, **rings}, hollow=rings)]])


def _quoted(quoted: Quoted) -> str:
    return f"{quoted.method} (quoted)"


def _spaced(organ: str) -> str:
    return organ.replace("_", " ")


def _shown(statistics: Mapping[str, Any], factor: float = 1.0) -> str:
    if statistics["mean"] is None:
        return NONE
    spread = "" if statistics["sd"] is None else f" ± {factor * statistics['sd']:.2f}"
    return f"{factor * statistics['mean']:.2f}{spread}"


def _signed(value: float | None) -> str:
    return NONE if value is None else f"{PERCENT * value:+.2f}"


def _p(value: float | None) -> str:
    return NONE if value is None else f"{value:.2g}"
