"""Data set layouts: one layout = one module of this package, found by scanning it.

A module states `NAME`, the layout it looks for in one line (`LAYOUT`), and two functions: `detect(source, options)`
says whether `source` looks like it, `read(source, options)` lists its cases without reading a voxel.
"""

from __future__ import annotations

import importlib
import pkgutil
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import yaml

from surm_seg.cases import SPLITS
from surm_seg.errors import BadConfig, BadInput
from surm_seg.labels import SYNAPSE, LabelMap, read_table
from surm_seg.volume import stem, volumes_in

TEST_SHARE, VAL_SHARE = 0.2, 0.1  # of the cases, where neither the layout nor the user gives a split

# The benchmark's organs under the names that other data sets use.
ALIASES = {"kidney_right": "right_kidney", "kidney_left": "left_kidney"}


@dataclass(frozen=True)
class Options:
    """What the user said about the source; each format uses its part.

    Args:
        output: folder of the prepared data set, for formats that generate their source.
        labels: `synapse`, a YAML file, or None for the format's own default.
        image: file name or glob of the images, relative to the source.
        label: file name or glob of the label maps, relative to the source.
        classes: version of the class table of a multi-label file.
        split: YAML file with lists of case names.
        cases: how many to generate.
    """

    output: Path
    labels: str | None = None
    image: str | None = None
    label: str | None = None
    classes: str | None = None
    split: Path | None = None
    cases: int = 16
    seed: int = 0


@dataclass(frozen=True)
class LabelFile:
    """One label map on disk and what its values mean."""

    path: Path
    map: LabelMap


@dataclass(frozen=True)
class SourceCase:
    """One volume of the source.

    Args:
        name: the source's own name of the case, maybe private.
        labels: painted over each other in this order; several where every organ has its own file.
        split: None where the layout does not say.
        generate: writes the files when they are still to be made; can be sent to another process.
    """

    name: str
    image: Path
    labels: tuple[LabelFile, ...]
    split: str | None = None
    generate: Callable[[], None] | None = None


@dataclass(frozen=True)
class Source:
    """A source data set, listed but not read.

    Args:
        organs: label value = position + 1.
        public: case names may be shown and stored.
        spacing_known: whether the voxel sizes of the files are the patients'.
        benchmark_test: cases that must not be used for training or selection.
    """

    format: str
    organs: tuple[str, ...]
    cases: tuple[SourceCase, ...]
    public: bool = False
    spacing_known: bool = True
    benchmark_test: frozenset[str] = frozenset()


@runtime_checkable
class Format(Protocol):
    """What a module of this package offers."""

    NAME: str
    LAYOUT: str

    def detect(self, source: Path, options: Options) -> bool: ...

    def read(self, source: Path, options: Options) -> Source: ...


def formats() -> dict[str, Format]:
    """Every format by its name."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return {module.NAME: cast(Format, module) for module in modules}


def read(source: Path, name: str, options: Options) -> Source:
    """List the cases of a source, each with its split; raises BadInput or BadConfig.

    Args:
        name: a format's name, or `auto` for the only one whose layout is there.
    """
    known = formats()
    if name == "auto":
        found = [key for key, module in known.items() if module.detect(source, options)]
        if len(found) != 1:
            what = "fits several formats" if found else "fits no known format"
            layouts = ", ".join(f"{key} ({known[key].LAYOUT})" for key in found or known)
            raise BadInput("format", f"{source} {what}; choose with --format among {layouts}.")
        name = found[0]
    if name not in known:
        raise BadConfig("format", f"There is no format {name!r}; choose auto or one of {', '.join(known)}.")
    result = known[name].read(source, options)
    if not result.cases:
        raise BadInput("no-cases", f"{source} holds no case of format {name}: {known[name].LAYOUT}.")
    result = replace(result, cases=tuple(_numbered_alike(case, result.organs) for case in result.cases))
    if options.split is not None:
        return replace(result, cases=_split_as_told(result, options.split))
    return replace(result, cases=_split_by_case(result.cases, options.seed))


def label_map(labels: str, known: Mapping[int, str] | None, source: Path) -> LabelMap:
    """The map from a source's raw values to organs.

    Args:
        labels: `synapse`, or a YAML file `value: organ` or, where `known` is given, `class name: organ`;
            an empty organ is background.
        known: class name by raw value, where the source tells.
    """
    if labels == "synapse":
        if known is None:
            raise BadInput("label-table", f"{source} names no label values; list them with --labels table.yaml.")
        return LabelMap(SYNAPSE, {value: _benchmark_organ(name) for value, name in known.items()})
    return read_table(Path(labels), known)


def volumes(folder: Path) -> dict[str, Path]:
    """NIfTI, NRRD and MetaImage files of a folder by their name without the ending, in order."""
    found: dict[str, Path] = {}
    for path in volumes_in(folder) if folder.is_dir() else ():
        if path.is_dir():
            continue
        if stem(path) in found:
            other = found[stem(path)].name
            raise BadInput("ambiguous", f"{folder} holds {path.name} and {other}, one case twice; keep one of them.")
        found[stem(path)] = path
    return found


def require_pairs(images: Sequence[str], labels: Sequence[str], source: Path) -> None:
    """Raises BadInput listing the cases that have an image or a label map only."""
    lonely = sorted(set(images) ^ set(labels))
    if lonely:
        some = ", ".join(f"{name} ({'no label' if name in images else 'no image'})" for name in lonely[:5])
        raise BadInput(
            "unpaired", f"{source} has {len(lonely)} cases that are incomplete: {some}; add or remove files."
        )


def _numbered_alike(case: SourceCase, organs: tuple[str, ...]) -> SourceCase:
    """The case with the organs in the order of the data set, whatever order its own label map names them in."""
    for file in case.labels:
        apart = sorted(set(file.map.names) ^ set(organs))
        if apart:
            sentence = f"{file.path} names other organs than the rest of the source ({apart[:5]}); give --labels."
            raise BadInput("label-table", sentence)
    labels = tuple(replace(file, map=replace(file.map, names=organs)) for file in case.labels)
    return replace(case, labels=labels)


def _benchmark_organ(name: str) -> str | None:
    name = name.strip().lower().replace(" ", "_").replace("-", "_")
    name = ALIASES.get(name, name)
    return name if name in SYNAPSE else None


def _split_as_told(source: Source, path: Path) -> tuple[SourceCase, ...]:
    """The user's own split; cases that it does not name are left out."""
    try:
        told = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        sentence = f"{path} cannot be read as YAML; it should hold lists of case names under train, val and test."
        raise BadConfig("yaml", sentence) from error
    if not isinstance(told, dict):
        raise BadConfig("yaml", f"{path} should hold lists of case names under train, val and test.")
    wrong = set(told) - set(SPLITS)
    if wrong or not all(isinstance(names, list) for names in told.values()):
        raise BadConfig("split", f"{path} should hold lists of case names under train, val and test, nothing else.")
    pairs = [(str(name), split) for split in SPLITS for name in told.get(split, [])]
    chosen = dict(pairs)
    if len(chosen) != len(pairs):
        raise BadConfig("split", f"{path} names a case twice; every case belongs to one split.")
    unknown = sorted(set(chosen) - {case.name for case in source.cases})
    if unknown:
        raise BadInput("split", f"{path} names cases that are not in the source: {unknown[:5]}.")
    leaked = sorted(name for name, split in chosen.items() if split != "test" and name in source.benchmark_test)
    if leaked:
        raise BadInput("test-leak", f"{path} uses test cases of the benchmark for {leaked[:5]}; leave them in test.")
    return tuple(replace(case, split=chosen[case.name]) for case in source.cases if case.name in chosen)


def _split_by_case(cases: Sequence[SourceCase], seed: int) -> tuple[SourceCase, ...]:
    """Give a split to the cases that have none: about 20 % test and 10 % validation, at least one of each from 3 up."""
    open_ids = sorted(case.name for case in cases if case.split is None)
    taken = {case.split for case in cases}
    random.Random(seed).shuffle(open_ids)
    count = len(open_ids)
    test = 0 if "test" in taken or count < 2 else max(1, round(TEST_SHARE * count))
    val = 0 if "val" in taken or count < 3 else max(1, round(VAL_SHARE * count))
    drawn = {name: "test" if n < test else "val" if n < test + val else "train" for n, name in enumerate(open_ids)}
    return tuple(replace(case, split=case.split or drawn[case.name]) for case in cases)
