"""TransUNet's preprocessed Synapse: training slices in `train_npz/`, test volumes in `test_vol_h5/`, and no geometry.

The arrays keep the CT window scaled to [0, 1] and say neither how they lie in the patient nor how large a voxel is. How
they lie is read from the organs (`orientation`), case by case. How large a voxel is cannot be known: the volumes are
written with voxels of 1 mm whose unit is declared unknown, and the prepared cases have no spacing: distances in mm and
volumes in mL are undefined for them, Dice and distances in voxels are not.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np

from pipelines.formats import LabelFile, Options, Source, SourceCase, label_map
from pipelines.formats.synapse import BENCHMARK, MAX_PUBLIC_DIGITS, TEST, VAL_CASES
from pipelines.organ_axes import TABLES, Orientation, orientation
from surm_seg.errors import BadConfig, BadInput
from surm_seg.nifti import MAX_VOXELS, UNITS_UNKNOWN
from surm_seg.volume import Grid, replacing, write_labels

NAME = "transunet"
LAYOUT = "train_npz/case0005_slice000.npz and test_vol_h5/case0001.npy.h5, or one of them"
SLICES, VOLUMES = "train_npz", "test_vol_h5"
LISTS = ("lists", "lists_Synapse")
LISTED = {SLICES: ("train.txt", ".npz"), VOLUMES: ("test_vol.txt", ".npy.h5")}

WINDOW_HU = (-125, 275)  # what 0 and 1 stand for
SLACK = 0.25  # distributed arrays reach from -0.15 to 1.20 (github.com/kenza-bouzid/TransUnet, issue 5)
SIDES = (224, 512)  # pixels
MAX_SLICE_BYTES = 2 * 8 * max(SIDES) ** 2 + 4096  # two arrays of doubles and their headers
VERSION = 1  # raised when the same files would be read otherwise

CLASSES = dict(enumerate(TABLES["transunet"], 1))  # of the files this module writes, whatever the source's table


@dataclass(frozen=True)
class Stored:
    """One case of the source: its slices in order, or its one volume."""

    number: int
    files: tuple[Path, ...]


def detect(source: Path, options: Options) -> bool:
    return (source / SLICES).is_dir() or (source / VOLUMES).is_dir()


def read(source: Path, options: Options) -> Source:
    """Cases `case0005`, ...; those of test_vol_h5 are test cases, the rest is split as the raw layout is.

    Missing slices are BadInput; so is what a list of the source names and the source lacks. The voxels are rewritten
    as NIfTI under OUTPUT/source when the data set is made; `notes/` there says how each case was understood.
    """
    if options.classes is not None and options.classes not in TABLES:
        raise BadConfig("class-table", f"--classes {options.classes} is unknown; choose {' or '.join(TABLES)}.")
    slices, volumes = _slices(source / SLICES), _volumes(source / VOLUMES)
    _check_lists(source)
    twice = sorted(slices.keys() & volumes.keys())
    if twice:
        raise BadInput("ambiguous", f"{source} holds {_name(twice[0])} in {SLICES} and in {VOLUMES}; keep one.")
    stored = slices | volumes
    benchmark = BENCHMARK.issuperset(stored)
    test = {*volumes, *(TEST if benchmark else ())}
    splits = dict.fromkeys(test, "test")
    if benchmark:
        train = sorted(set(stored) - test)
        val = random.Random(options.seed).sample(train, min(VAL_CASES, len(train) // 4))
        splits |= {n: "val" if n in val else "train" for n in train}
    raw = label_map(options.labels or "synapse", CLASSES, source)
    folder = options.output / "source"
    cases = []
    for n, case in sorted(stored.items()):
        image, label, note = _written(folder, n)
        inputs = _inputs(case, options.classes)
        fresh = image.exists() and label.exists() and _noted(note) == inputs
        generate = None if fresh else partial(_generate, case, folder, options.classes, inputs)
        cases.append(SourceCase(_name(n), image, (LabelFile(label, raw),), splits.get(n), generate))
    public = all(n in BENCHMARK or len(str(n)) <= MAX_PUBLIC_DIGITS for n in stored)
    held_out = frozenset(map(_name, test))
    return Source(NAME, raw.names, tuple(cases), public, spacing_known=False, benchmark_test=held_out)


def _slices(folder: Path) -> dict[int, Stored]:
    """Training cases by number, their slices from 0 up in order."""
    found: dict[int, dict[int, Path]] = {}
    for path, (case, number) in _named(folder, r"case(\d+)_slice(\d+)\.npz", "case0005_slice000.npz"):
        if number in found.setdefault(case, {}):
            other = found[case][number].name
            raise BadInput("ambiguous", f"{path} and {other} are both slice {number} of {_name(case)}; remove one.")
        found[case][number] = path
    for case, files in found.items():
        missing = sorted(set(range(max(files) + 1)) - files.keys())
        if missing:
            some = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            sentence = f"{folder} lacks {len(missing)} slices of {_name(case)} ({some}); copy it again."
            raise BadInput("missing-slice", sentence)
    return {case: Stored(case, tuple(files[n] for n in sorted(files))) for case, files in found.items()}


def _volumes(folder: Path) -> dict[int, Stored]:
    """Test cases by number."""
    found: dict[int, Stored] = {}
    for path, (case,) in _named(folder, r"case(\d+)(?:\.npy)?\.h5", "case0001.npy.h5"):
        if case in found:
            raise BadInput("ambiguous", f"{path} and {found[case].files[0].name} are both {_name(case)}; remove one.")
        found[case] = Stored(case, (path,))
    return found


def _named(folder: Path, pattern: str, example: str) -> Iterator[tuple[Path, tuple[int, ...]]]:
    """Files of a folder that may be absent, with the numbers in their names; raises BadInput for other names."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith("."):
            continue
        match = re.fullmatch(pattern, path.name, re.ASCII)
        if match is None:
            raise BadInput("layout", f"{folder} holds {path.name}, not {example}; rename or remove it.")
        yield path, tuple(map(int, match.groups()))


def _check_lists(source: Path) -> None:
    """Everything that the lists name is there; the reverse is not asked, for the published list lacks a slice."""
    for folder, (name, ending) in LISTED.items():
        for path in (source / lists / name for lists in LISTS):
            if not (source / folder).is_dir() or not path.is_file():
                continue
            try:
                names = path.read_text(encoding="utf-8").split()
            except UnicodeDecodeError as error:
                raise BadInput("layout", f"{path} is not a list of names in UTF-8; replace or remove it.") from error
            missing = [n for n in names if not (source / folder / f"{n.removesuffix(ending)}{ending}").is_file()]
            if missing:
                some = ", ".join(missing[:5])
                sentence = f"{source / folder} lacks {len(missing)} files that {path} names ({some}); copy them."
                raise BadInput("missing-slice", sentence)


def _generate(case: Stored, folder: Path, classes: str | None, inputs: str) -> None:
    """Write the case as NIfTI on a grid that says how it lies, then the note: files without it are not trusted."""
    image, label, note = _written(folder, case.number)
    for path in (image, label, note):
        path.parent.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)
    hu, values = _voxels(case)
    lies = orientation(values, f"{_name(case.number)} in {case.files[0].parent}", classes)
    own = np.array([0, *(TABLES["transunet"].index(organ) + 1 for organ in TABLES[lies.table])], np.uint8)
    grid = _grid((values.shape[1], values.shape[2], values.shape[0]), lies)
    header = grid.header()
    header.set_data_dtype(np.int16)
    header["descrip"] = b"spacing unknown, 1 mm assumed"
    voxels = nib.Nifti1Image(hu.transpose(1, 2, 0), None, header)
    with replacing(image) as file, gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed:
        packed.write(voxels.to_bytes())
    write_labels(label, own[values].transpose(1, 2, 0), grid)
    understood = {
        "inputs": inputs,
        "label_table": lies.table,
        "slices_rows_columns_grow_to": lies.axcodes,
        "orientation": lies.sure,
        "witnesses": lies.agreeing,
        "spacing": "not in the files; written as 1 mm",
    }
    with replacing(note) as file:
        file.write(json.dumps(understood, indent=1).encode() + b"\n")


def _grid(shape: tuple[int, int, int], lies: Orientation) -> Grid:
    """Axes (row, column, slice) as they lie, in voxels of 1 whose unit is declared unknown."""
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    slices, rows, columns = lies.axcodes
    for axis, code in enumerate((rows, columns, slices)):
        world = next(n for n, ends in enumerate(("LR", "PA", "IS")) if code in ends)
        affine[world, axis] = 1 if code in "RAS" else -1
    return replace(Grid.from_affine(shape, affine), xyzt_units=UNITS_UNKNOWN)


def _voxels(case: Stored) -> tuple[np.ndarray, np.ndarray]:
    """int16 HU and uint8 values as stored, axes (slice, row, column); raises BadInput naming the file."""
    images, labels = [], []
    for where, image, label in _h5(case.files[0]) if case.files[0].suffix == ".h5" else map(_npz, case.files):
        if images and image.shape != images[0].shape:
            sentence = f"{where} has {image.shape} pixels, the slices before it {images[0].shape}; make it anew."
            raise BadInput("shape", sentence)
        images.append(_hu(image, where))
        labels.append(_values(label, where))
    return np.stack(images), np.stack(labels)


def _npz(path: Path) -> tuple[str, np.ndarray, np.ndarray]:
    """One training slice with where it comes from."""
    image = label = np.empty(0)
    try:
        with zipfile.ZipFile(path) as packed:
            size = sum(member.file_size for member in packed.infolist())
        if size <= MAX_SLICE_BYTES:
            with np.load(path, allow_pickle=False) as arrays:
                image, label = arrays["image"], arrays["label"]
    except Exception as error:  # a damaged header makes numpy raise nearly anything, down to errors of its tokenizer
        sentence = f"{path} is no npz file with the arrays image and label; copy it again or make it anew."
        raise BadInput("not-npz", sentence) from error
    if size > MAX_SLICE_BYTES:
        raise BadInput("too-large", f"{path} unpacks to {size:,} bytes; a slice has at most 512 x 512 pixels.")
    _check_arrays(path, image, label, rank=2)
    return str(path), image, label


def _h5(path: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The slices of a test volume, each with where it comes from."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            # A link or external storage could lead out of the folder the user named.
            own = all(isinstance(file.get(key, getlink=True), h5py.HardLink) for key in ("image", "label"))
            image, label = (file[key] if own else None for key in ("image", "label"))
            if not isinstance(image, h5py.Dataset) or not isinstance(label, h5py.Dataset):
                raise KeyError("image, label")
            if any(data.is_virtual or data.external for data in (image, label)):
                raise BadInput("not-hdf5", f"{path} keeps its arrays in other files; store them in it.")
            _check_arrays(path, image, label, rank=3)
            if (voxels := prod(image.shape)) > MAX_VOXELS:
                raise BadInput("too-large", f"{path} announces {voxels:,} voxels, over {MAX_VOXELS:,}; crop it.")
            # Read at once: a compressed block spans many slices and would be unpacked for each of them.
            for k, planes in enumerate(zip(image[()], label[()], strict=True)):
                yield f"{path}, slice {k},", *planes
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:  # what h5py raises for damage
        sentence = f"{path} is no intact HDF5 file with the datasets image and label; copy it again or make it anew."
        raise BadInput("not-hdf5", sentence) from error


def _check_arrays(path: Path, image: np.ndarray | h5py.Dataset, label: np.ndarray | h5py.Dataset, rank: int) -> None:
    """Raises BadInput unless both are numbers on one grid of square slices, slices first, of a side in SIDES."""
    shape, other = image.shape or (), label.shape or ()
    if shape != other or len(shape) != rank or shape[-2:] not in [(side, side) for side in SIDES] or 0 in shape:
        expected = " or ".join(f"{'slices x ' * (rank - 2)}{side} x {side}" for side in SIDES)
        sentence = f"{path} has an image of shape {shape} and a label of shape {other}; both should be {expected}."
        raise BadInput("shape", sentence)
    pixels, values = image.dtype, label.dtype
    if pixels.kind not in "fiu" or values.kind not in "fiub":
        raise BadInput("array-type", f"{path} stores {pixels} and {values}; image and label should be real numbers.")


def _hu(image: np.ndarray, where: str) -> np.ndarray:
    """[0, 1] -> int16 HU of the window, rounded; overshoots are clipped as our own windowing would."""
    if not np.isfinite(image).all():
        raise BadInput("non-finite-voxels", f"{where} has an image with NaN or infinite values; make it anew.")
    low, high = float(image.min()), float(image.max())
    if low < -SLACK or high > 1 + SLACK:
        sentence = f"{where} has an image from {low:g} to {high:g}, not the window scaled to [0, 1]; scale it."
        raise BadInput("value-range", sentence)
    bottom, top = WINDOW_HU
    return np.rint(np.clip(image.astype(np.float64), 0, 1) * (top - bottom) + bottom).astype(np.int16)


def _values(label: np.ndarray, where: str) -> np.ndarray:
    """Label values as uint8; raises BadInput for anything but whole numbers from 0 to 8."""
    if not np.isfinite(label).all():
        raise BadInput("non-finite-voxels", f"{where} has a label with NaN or infinite values; make it anew.")
    whole = np.isin(label, np.arange(len(CLASSES) + 1))
    if not whole.all():
        wrong = ", ".join(f"{value:g}" for value in np.unique(label[~whole])[:8].astype(float))
        sentence = f"{where} has label values {wrong}; the eight organs are 1 to {len(CLASSES)}, map them so."
        raise BadInput("unknown-label", sentence)
    return label.astype(np.uint8)


def _name(number: int) -> str:
    return f"case{number:04d}"


def _written(folder: Path, number: int) -> tuple[Path, Path, Path]:
    """Image, label and note of a case under OUTPUT/source."""
    image, label = (folder / kind / f"{kind}{number:04d}.nii.gz" for kind in ("img", "label"))
    return image, label, folder / "notes" / f"{_name(number)}.json"


def _inputs(case: Stored, classes: str | None) -> str:
    """SHA-256 of what the written files depend on, the source's files by name, size and time of change."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in case.files]
    return hashlib.sha256(json.dumps([VERSION, classes, files]).encode()).hexdigest()


def _noted(note: Path) -> str | None:
    """The inputs that a note records; None where there is no note to trust."""
    try:
        return str(json.loads(note.read_bytes())["inputs"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
