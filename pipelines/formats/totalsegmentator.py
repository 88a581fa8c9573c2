"""TotalSegmentator: one folder per subject with ct.nii.gz and segmentations/*.nii.gz, or one multi-label file.

Version 1 and 2 of its class table give the same value to different organs, so the table is read from the file itself
or stated by the user, never guessed.
"""

from __future__ import annotations

import csv
from pathlib import Path

from pipelines.formats import LabelFile, Options, Source, SourceCase, label_map, volumes
from surm_seg.cases import SPLITS
from surm_seg.errors import BadConfig, BadInput
from surm_seg.labels import LabelMap, read_table
from surm_seg.volume import label_names

NAME = "totalsegmentator"
LAYOUT = "ct.nii.gz with segmentations/*.nii.gz or --label FILE, in SOURCE or in each of its folders"
IMAGE = "ct.nii.gz"

_SHARED = {1: "spleen", 2: "kidney_right", 3: "kidney_left", 4: "gallbladder", 5: "liver", 6: "stomach"}
# Class tables by version: number of classes, and the values of the benchmark's organs.
CLASSES = {
    "v1": (104, _SHARED | {7: "aorta", 10: "pancreas"}),
    "v2": (117, _SHARED | {7: "pancreas", 52: "aorta"}),
}


def detect(source: Path, options: Options) -> bool:
    return bool(_subjects(source, options.image or IMAGE))


def read(source: Path, options: Options) -> Source:
    """Subjects in order of their names; the split of meta.csv where there is one."""
    if "*" in (options.image or "") + (options.label or ""):
        raise BadConfig("totalsegmentator", "--image and --label are file names inside a subject's folder, without *.")
    splits = _meta_splits(source)
    cases, organs = [], ()
    for subject in _subjects(source, options.image or IMAGE):
        labels = (multi_label(subject / options.label, options),) if options.label else _binary_files(subject, options)
        organs = labels[0].map.names
        cases.append(SourceCase(subject.name, subject / (options.image or IMAGE), labels, splits.get(subject.name)))
    untold = [case.name for case in cases if splits and case.split is None]
    if untold:
        raise BadInput("split", f"{source / 'meta.csv'} has no split for {untold[:5]}; add it, or give --split.")
    return Source(NAME, organs, tuple(cases))


def _subjects(source: Path, image: str) -> list[Path]:
    if (source / image).is_file():
        return [source]
    return sorted(folder for folder in source.glob("*/") if (folder / image).is_file())


def multi_label(path: Path, options: Options) -> LabelFile:
    """A file with all organs: what its values mean is told by --classes, by itself, or by the table of --labels."""
    own = label_names(path)
    if options.classes is None:
        if own is None and options.labels not in (None, "synapse"):
            return LabelFile(path, read_table(Path(options.labels)))
        if own is None:
            raise BadInput(
                "class-table",
                f"{path} does not say what its values mean; give --labels TABLE.yaml, or for TotalSegmentator's "
                "classes --classes v1 (104 classes) or v2 (117 classes).",
            )
        known = own
    else:
        if options.classes not in CLASSES:
            raise BadConfig("class-table", f"--classes {options.classes} is unknown; choose {' or '.join(CLASSES)}.")
        count, organs = CLASSES[options.classes]
        known = {value: organs.get(value, f"class_{value}") for value in range(1, count + 1)}
        if own is not None and any(own.get(value) != name for value, name in organs.items()):
            raise BadInput(
                "class-table", f"{path} carries a class table that is not {options.classes}; omit --classes."
            )
    return LabelFile(path, label_map(options.labels or "synapse", known, path))


def _binary_files(subject: Path, options: Options) -> tuple[LabelFile, ...]:
    """One file per organ, 1 inside it."""
    files = volumes(subject / "segmentations")
    if not files:
        raise BadInput("layout", f"{subject} has no segmentations/*.nii.gz; or name its multi-label file with --label.")
    classes = dict(enumerate(files, 1))
    table = label_map(options.labels or "synapse", classes, subject)
    missing = set(table.names) - set(table.raw.values())
    if missing:
        raise BadInput("layout", f"{subject / 'segmentations'} lacks {', '.join(sorted(missing))}; add the files.")
    return tuple(
        LabelFile(files[name], LabelMap(table.names, {1: table.raw[value]}))
        for value, name in classes.items()
        if table.raw.get(value)
    )


def _meta_splits(source: Path) -> dict[str, str]:
    """Split by subject from meta.csv (separated by ; or ,), where it has such a column."""
    path = source / "meta.csv"
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        separator = ";" if ";" in file.readline() else ","
        file.seek(0)
        rows = list(csv.DictReader(file, delimiter=separator))
    splits = {row["image_id"]: row["split"] for row in rows if row.get("image_id") and row.get("split")}
    wrong = sorted(set(splits.values()) - set(SPLITS))
    if wrong:
        raise BadInput("split", f"{path} uses the split {wrong[0]!r}; it should be train, val or test.")
    return splits
