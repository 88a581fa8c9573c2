"""`surm-seg compare`: paired differences of several runs to the first, case by case, and how little they may mean."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from surm_seg import cli
from surm_seg.errors import BadConfig, BadInput
from surm_seg.metrics import PROTOCOLS, RECOMMENDED
from surm_seg.output_folder import writing
from surm_seg.statistics import MEDIUM, Pair, Paired, corrected, detectable_effect, paired, smallest_p
from surm_seg.volume import replacing

SCHEMA = "surm-seg/comparison-1"
OVERALL = "overall"

SEEDS = "Differences of 1-2 Dice points are within what seeds make: train several seeds of each before claiming any."

HEADER = (
    "run", "organ", "n", "undefined", "R1", "run", "difference", "95 % CI", "p Wilcoxon", "Holm", "p permutation",
    "Holm", "r", "dz",
)  # fmt: skip

NEEDED = ("run", "adapter", "seed", "case", "organ", "protocol", "data_hash")


@dataclass
class CompareConfig(cli.Common):
    """Compare runs that were scored on the same cases with the first of them.

    Args:
        output: folder for comparison.csv and comparison.json; default `comparison` in the current folder.
        runs: the bare words of the command line: run folders (their scores/cases.csv), scores folders or cases.csv
            files, two or more.
        metric: dice, nsd, hd95_mm or hd95_vox, as far as the protocol has it.
        protocol: recommended or samed-2023.
    """

    runs: list[str] = field(default_factory=list)
    metric: str = "dice"
    protocol: str = RECOMMENDED


@dataclass
class Run:
    """The scores of one run.

    Args:
        label: R1, R2, ... in the order of the command line.
        origin: the columns run, adapter and seed, as far as they are filled.
        values: (case, organ) -> value, None where undefined.
        hashes: case -> fingerprint of its reference.
    """

    label: str
    path: Path
    origin: dict[str, str] = field(default_factory=dict)
    values: dict[tuple[str, str], float | None] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)

    def add(self, line: dict[str, str], metric: str, where: str) -> None:
        """Take over one line of cases.csv; raises BadInput for one that evaluate would not write."""
        key, cell, found = (line["case"], line["organ"]), line[metric], line["data_hash"]
        try:
            value = float(cell) if cell else None
        except ValueError:
            value = math.nan
        if cell is None or not (value is None or math.isfinite(value)) or not (all(key) and found):
            raise BadInput(
                "scores-line", f"{where} is damaged (case, organ, {metric} or data_hash); score the run again."
            )
        if key in self.values or self.hashes.setdefault(key[0], found) != found:
            sentence = f"{where} scores {key[1]} of case {key[0]} again or on other data; give one run per cases.csv."
            raise BadInput("scores-twice", sentence)
        self.values[key] = value
        self.origin = {name: line[name] for name in ("run", "adapter", "seed") if line[name]}


@dataclass(frozen=True)
class Comparison:
    """A run against the first, for one organ or OVERALL."""

    run: str
    organ: str
    result: Paired

    def cells(self) -> dict[str, Any]:
        return {"run": self.run, "organ": self.organ} | asdict(self.result)


def main(argv: Sequence[str] | None = None) -> int:
    config = cli.parse("compare", CompareConfig, _with_runs(sys.argv[1:] if argv is None else argv))
    return cli.run(lambda: compare(config), debug=config.debug)


def compare(config: CompareConfig) -> int:
    """Run a parsed command."""
    if len(config.runs) < 2:
        raise BadConfig("compare-runs", "Give two or more RUNs: run folders, scores folders or cases.csv files.")
    if config.protocol not in PROTOCOLS:
        raise BadConfig("protocol", f"--protocol {config.protocol} is unknown; choose among {', '.join(PROTOCOLS)}.")
    if config.metric not in PROTOCOLS[config.protocol]:
        known = ", ".join(PROTOCOLS[config.protocol])
        raise BadConfig("metric", f"--metric {config.metric} is not part of {config.protocol}; choose among {known}.")
    if config.seed < 0:
        raise BadConfig("seed", f"--seed {config.seed} must be 0 or more.")
    reporter, output = cli.Reporter(config.quiet), config.output or Path("comparison")
    runs = [read_run(f"R{n}", Path(name), config.metric, config.protocol) for n, name in enumerate(config.runs, 1)]
    keys, left_out = shared(runs)
    comparisons = compare_runs(runs, keys, config.seed)
    notes = remarks(comparisons, config.metric)
    for run in runs:
        reporter.say(" ".join([f"{run.label}: {run.path}", *(f"{name}={text}" for name, text in run.origin.items())]))
    for text in (*left_out, f"{config.metric} under {config.protocol}", comparison_table(comparisons), *notes):
        reporter.say(text)
    if config.dry_run:
        reporter.say("dry run: nothing written")
        return 0
    record = {
        "schema": SCHEMA,
        "metric": config.metric,
        "protocol": config.protocol,
        "seed": config.seed,
        "runs": [{"label": run.label, "path": str(run.path)} | run.origin for run in runs],
        "cases": list(dict.fromkeys(case for case, _ in keys)),
        "left_out": left_out,
        "comparisons": [one.cells() for one in comparisons],
        "notes": notes,
    }
    with writing(output):
        write(output, record)
    reporter.say(f"comparison.csv and comparison.json in {output}")
    return 0


def read_run(label: str, path: Path, metric: str, protocol: str) -> Run:
    """The scores in a run folder, a scores folder or a cases.csv; raises BadInput."""
    files = [path / "scores" / "cases.csv", path / "cases.csv"] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        what = f"{path} holds no scores" if path.is_dir() else f"There is no {path}"
        raise BadInput("no-scores", f"{what}; give a run folder, a scores folder or a cases.csv.")
    run = Run(label, file)
    try:
        with open(file, newline="", encoding="utf-8-sig") as text:
            reader = csv.DictReader(text)
            absent = [name for name in (*NEEDED, metric) if name not in (reader.fieldnames or ())]
            if absent:
                sentence = f"{file} lacks the columns {', '.join(absent)}; give a cases.csv of surm-seg evaluate."
                raise BadInput("scores-columns", sentence)
            for line in reader:
                if line["protocol"] in (protocol, None):  # None: the line is cut short
                    run.add(line, metric, f"{file}, line {reader.line_num},")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput("scores-unreadable", f"{file} cannot be read ({error}); give a cases.csv.") from error
    if not run.values:
        sentence = (
            f"{file} has no scores under {protocol}; score the run with --protocols, or choose another --protocol."
        )
        raise BadInput("scores-protocol", sentence)
    return run


def shared(runs: Sequence[Run]) -> tuple[list[tuple[str, str]], list[str]]:
    """The (case, organ) that all runs have, and sentences about the others; raises BadInput for different data."""
    first, *others = runs
    for run in others:
        for case, found in first.hashes.items():
            if run.hashes.get(case, found) != found:
                sentence = f"Case {case} has another reference in {run.path} than in {first.path}"
                raise BadInput("data-differs", f"{sentence}; score both runs against the same labels.")
    groups: dict[tuple[str, str], dict[str, None]] = {}
    for case, organ in dict.fromkeys(key for run in runs for key in run.values):
        no_case = [run.label for run in runs if case not in run.hashes]
        lacking = no_case or [run.label for run in runs if (case, organ) not in run.values]
        if lacking:
            what = "case" if no_case else f"{organ} of case"
            groups.setdefault((", ".join(lacking), what), {})[case] = None
    left_out = [f"left out, because {who} lacks it: {what} {', '.join(cases)}" for (who, what), cases in groups.items()]
    keys = [key for key in first.values if all(key in run.values for run in others)]
    if not keys:
        raise BadInput("none-shared", f"No organ of a case is in all of {', '.join(str(run.path) for run in runs)}; "
                       "score the runs on the same cases, under the same names.")  # fmt: skip
    return keys, left_out


def compare_runs(runs: Sequence[Run], keys: Sequence[tuple[str, str]], seed: int = 0) -> list[Comparison]:
    """Every run against the first: each organ, and per case the mean over the organs that both runs define."""
    first, *others = runs
    series: dict[tuple[str, str], list[Pair]] = {}
    for run in others:
        cases: dict[str, list[Pair]] = {}
        for case, organ in keys:
            pair = first.values[case, organ], run.values[case, organ]
            series.setdefault((run.label, organ), []).append(pair)
            cases.setdefault(case, []).append(pair)
        series[run.label, OVERALL] = [_mean_pair(pairs) for pairs in cases.values()]
    results = corrected([paired(pairs, seed) for pairs in series.values()])
    return [Comparison(*names, result) for names, result in zip(series, results, strict=True)]


def _mean_pair(pairs: Sequence[Pair]) -> Pair:
    defined = [pair for pair in pairs if None not in pair]
    first, second = np.mean(np.array(defined, np.float64), axis=0).tolist() if defined else (None, None)
    return first, second


def remarks(comparisons: Sequence[Comparison], metric: str) -> list[str]:
    """What the table can and cannot show, in sentences."""
    better = "lower" if metric.startswith("hd95") else "higher"
    tests = 2 * sum(one.result.n > 0 for one in comparisons)
    notes = [f"difference: run - R1, {better} {metric} is better; Holm over all {tests} tests of the table."]
    sizes = sorted({one.result.n for one in comparisons})
    for n in sizes:
        listed = ", ".join(f"{one.run} {one.organ}" for one in comparisons if one.result.n == n)
        which = listed if len(sizes) > 1 else "every line"
        if n == 0:
            notes.append(f"{which}: no case has a defined {metric} in both runs.")
            continue
        p, effect = smallest_p(n), detectable_effect(n)
        verdict = " is too small to claim anything" if effect > MEDIUM else ""
        notes.append(
            f"n = {n} ({which}){verdict}: the smallest p that {n} pairs can reach is {p:.2g}, after Holm "
            f"{min(1.0, tests * p):.2g}; before Holm, an effect is found 4 times in 5 only from |dz| = {effect:.2f} up."
        )
    if metric == "nsd":
        notes.append("cases.csv does not say the tolerance of NSD: see that all runs were scored with the same.")
    return [*notes, SEEDS]


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Comparisons as plain text; r is the rank-biserial correlation, a dash is undefined."""
    lines: list[list[str]] = [list(HEADER)]
    for one in comparisons:
        found = one.result
        low, high = _shown(found.ci95_low, "+.4f"), _shown(found.ci95_high, "+.4f")
        ps = (found.p_wilcoxon, found.p_wilcoxon_holm, found.p_permutation, found.p_permutation_holm)
        line = [one.run, one.organ, str(found.n), str(found.undefined)]
        line += [_shown(found.first, ".4f"), _shown(found.mean, ".4f"), _shown(found.difference, "+.4f")]
        line += [f"[{low}, {high}]", *(_shown(p, ".3g") for p in ps)]
        lines.append([*line, _shown(found.rank_biserial, "+.2f"), _shown(found.cohen_dz, "+.2f")])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([shown[0], "-" * len(shown[0]), *shown[1:]])


def write(folder: Path, record: dict[str, Any]) -> None:
    """Write comparison.csv, the comparisons as a table, and comparison.json; each appears complete or not at all."""
    table = io.StringIO()
    writer = csv.DictWriter(table, record["comparisons"][0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(record["comparisons"])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {
        "comparison.csv": table.getvalue(),
        "comparison.json": json.dumps(record, indent=2) + "\n",
    }.items():
        with replacing(folder / name) as file:
            file.write(text.encode())


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _with_runs(arguments: Sequence[str]) -> list[str]:
    """The arguments with their bare words, wherever they stand, as the option --runs."""
    flags = {one.name for one in fields(CompareConfig) if one.type in (bool, "bool")} | {"help", "print_config"}
    runs, rest = [], []
    for before, word in zip(("", *arguments), arguments, strict=False):
        name = before[2:].replace("-", "_") if before.startswith("--") and "=" not in before else None
        is_value = word in ("true", "false") if name in flags else name is not None
        (rest if is_value or word.startswith("--") or word == "-h" else runs).append(word)
    return [*rest, f"--runs={json.dumps(runs, ensure_ascii=False)}"] if runs else rest


if __name__ == "__main__":
    sys.exit(main())
