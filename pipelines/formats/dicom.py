"""DICOM: one folder per case with the files of a CT series, or a folder of them at any depth, and a label map.

The label map is a volume file (NIfTI, NRRD, MetaImage) or, beside a folder with the series, a DICOM-SEG file. It lies
on the series' voxels; the order and the directions of its axes may differ.
"""

from __future__ import annotations

from pathlib import Path

from pipelines.formats import LabelFile, Options, Source, SourceCase
from pipelines.formats.totalsegmentator import multi_label
from surm_seg.errors import BadConfig, BadInput
from surm_seg.volume import ENDINGS, is_dicom, volumes_in

NAME = "dicom"
LAYOUT = "a folder per case, or one: a DICOM series in it or in a folder inside it, and a label map or --label FILE"


def detect(source: Path, options: Options) -> bool:
    return source.is_dir() and any(_series(folder) for folder in _folders(source, options))


def read(source: Path, options: Options) -> Source:
    """Cases by the names of their folders. What label values mean is read from --labels, --classes or the file."""
    if "*" in (options.image or ""):
        raise BadConfig("dicom", "--image is the name of the series' folder inside the folder of a case, without *.")
    cases, organs = [], ()
    for folder in _folders(source, options):
        labels = _labels(folder, options)
        organs = labels.map.names
        cases.append(SourceCase(folder.resolve().name, _one_series(folder, options), (labels,)))
    return Source(NAME, organs, tuple(cases))


def _folders(source: Path, options: Options) -> list[Path]:
    """The folder of each case: the source itself where a label map lies in it."""
    if _label_files(source, options):
        return [source]
    return sorted(folder for folder in source.glob("*/") if not folder.name.startswith(".") and _series(folder))


def _series(folder: Path) -> list[Path]:
    """The DICOM series in the folder of a case; a single DICOM file there is a segmentation."""
    if sum(map(is_dicom, folder.iterdir())) > 1:
        return [folder]
    return [series for below in sorted(folder.glob("*/")) for series in volumes_in(below) if series.is_dir()]


def _one_series(folder: Path, options: Options) -> Path:
    found = [folder / options.image] if options.image else _series(folder)
    if len(found) != 1:
        names = ", ".join(str(series.relative_to(folder)) for series in found[:5])
        sentence = f"{folder} holds {len(found)} series ({names}); name the one to use with --image."
        raise BadInput("several-series", sentence)
    return found[0]


def _label_files(folder: Path, options: Options) -> list[Path]:
    if options.label:
        return sorted(folder.glob(options.label))
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    segmentations = [path for path in files if is_dicom(path)]
    volumes = [path for path in files if path.name.lower().endswith(ENDINGS)]
    return volumes + (segmentations if len(segmentations) == 1 else [])


def _labels(folder: Path, options: Options) -> LabelFile:
    found = _label_files(folder, options)
    if len(found) != 1:
        sentence = f"{folder} holds {len(found)} label maps; name the one to use with --label."
        raise BadInput("ambiguous" if found else "unpaired", sentence)
    return multi_label(found[0], options)
