"""The only door for voxels: files in, `Volume` out, label maps back onto the input's own grid.

What a `Volume` is, and how its axes relate to the radiological view, stands in `surm_seg.grid`.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from surm_seg import dicom, dicom_seg, dicom_seg_writer, metaimage, nifti
from surm_seg.errors import BadInput
from surm_seg.grid import Grid, Source, Volume, grid_of, image_of, labels_of

MAX_VOXELS = nifti.MAX_VOXELS
ENDINGS = nifti.ENDINGS + metaimage.ENDINGS  # of the file names that stand for a volume, in any case

# What may differ between the names of an image, its reference and its prediction: img0001, label0001, case0001_seg.
_NAME = re.compile(r"(?:(?:img|label|case)[_-]?)?(.+?)(?:_(?:0000|gt|seg))*", re.IGNORECASE)


def stem(path: Path) -> str:
    """File name without the ending of a volume: .nii, .nii.gz, .nrrd, .nhdr, .mha, .mhd or .dcm."""
    return re.sub(r"\.(nii(\.gz)?|nrrd|nhdr|mha|mhd|dcm)$", "", path.name, flags=re.IGNORECASE)


def bare_name(path: Path) -> str:
    """What identifies the case: the stem without the prefixes img, label, case and the suffixes _0000, _gt, _seg."""
    match = _NAME.fullmatch(stem(path))
    return match[1] if match else stem(path)


def volumes_in(folder: Path) -> list[Path]:
    """The volumes of a folder in order: its NIfTI, NRRD and MetaImage files, and its DICOM series.

    A series is a folder: this one, or any below it that holds DICOM files itself. What is hidden is not data: macOS
    leaves `._case.nii.gz` on shared disks.
    """
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in entries if path.name.lower().endswith(ENDINGS)]
    if any(map(is_dicom, entries)):
        return [*files, folder]
    folders = (path for path in entries if path.is_dir() and not path.is_symlink() and path not in files)
    return [*files, *(series for path in folders for series in volumes_in(path) if series.is_dir())]


def is_dicom(path: Path) -> bool:
    """Whether a regular file starts as DICOM does; a link or a folder is none."""
    if not stat.S_ISREG(path.lstat().st_mode):
        return False
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def digest(path: Path) -> str:
    """SHA-256, in hexadecimal, of a volume's file, or of several where it has several: a series, detached voxels.

    The files of a series may be called anything. Raises BadInput where a header does not tell its voxels' file.
    """
    if path.is_dir():
        files = sorted(file_digest(file) for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    elif path.name.lower().endswith(metaimage.DETACHED):
        files = [file_digest(path), file_digest(metaimage.opened(path).data)]
    else:
        return file_digest(path)
    return hashlib.sha256("".join(files).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_grid(path: str | Path, *, max_voxels: int = MAX_VOXELS) -> Grid:
    """Shape and geometry from the headers alone; raises BadInput.

    Like `read_image` and `read_labels`, it takes NIfTI, NRRD, MetaImage, DICOM-SEG and folders of DICOM series.
    """
    with _opened(Path(path), max_voxels) as source:
        return grid_of(source)


def read_image(path: str | Path, *, max_voxels: int = MAX_VOXELS) -> Volume:
    """A CT as int16 HU, scaling applied, fractions rounded; raises BadInput for a damaged file or HU outside int16.

    Peak memory is the returned volume and a few 8 MB slabs; of NRRD and MetaImage, also the volume as stored.
    """
    with _opened(Path(path), max_voxels) as source:
        if isinstance(source, dicom_seg.Segmentation):
            raise BadInput("not-an-image", f"{path} is a DICOM segmentation; give the CT series as a folder.")
        return image_of(source)


def read_labels(path: str | Path, *, max_voxels: int = MAX_VOXELS) -> Volume:
    """A label map as integers; floats that hold whole numbers are accepted. Raises BadInput.

    The stored type is kept up to 16 bit; anything else becomes int32.
    """
    with _opened(Path(path), max_voxels) as source:
        return labels_of(source)


def label_names(path: str | Path) -> dict[int, str] | None:
    """The class table {label value: name} that the file itself carries, or None; raises BadInput for a broken one."""
    with _opened(Path(path), MAX_VOXELS) as source:
        if isinstance(source, dicom_seg.Segmentation):
            return source.names
        return nifti.label_table(source) if isinstance(source, nifti.NiftiFile) else None


def modality(path: str | Path) -> str | None:
    """CT, MR, ... as a DICOM series states it; None for other volumes. Raises BadInput."""
    with _opened(Path(path), MAX_VOXELS) as source:
        return source.modality if isinstance(source, dicom.Series) else None


@contextmanager
def _opened(path: Path, max_voxels: int) -> Iterator[Source]:
    """What a path stands for, its headers checked: a folder is a DICOM series, a file goes by its ending."""
    if path.is_dir() and not path.name.lower().endswith(ENDINGS):
        yield dicom.opened(path, max_voxels)
    elif path.name.lower().endswith(metaimage.ENDINGS):
        yield metaimage.opened(path, max_voxels)
    elif path.name.lower().endswith(dicom.ENDINGS):
        yield dicom_seg.opened(path, max_voxels)
    else:
        with nifti.opened(path, max_voxels) as file:
            yield file


def write_labels(path: str | Path, voxels: np.ndarray, grid: Grid) -> None:
    """Write labels 0..255 with axes (i, j, k) as uint8 NIfTI; the same content gives the same bytes.

    Atomic: the file appears complete or not at all. Raises OSError as the file system does.
    """
    path = Path(path)
    assert voxels.shape == grid.shape and voxels.dtype.kind in "iub", (voxels.shape, grid.shape, voxels.dtype)
    assert voxels.min() >= 0 and voxels.max() <= 255
    with replacing(path) as file:
        nifti.write(file, grid.header(), voxels, packed=path.name.lower().endswith(".gz"))


def write_dicom_seg(path: str | Path, voxels: np.ndarray, names: Sequence[str], series: str | Path) -> None:
    """Write labels 0..255 with axes (i, j, k) as a DICOM Segmentation of the series in a folder; atomic.

    Args:
        names: organs; label value = segment number = position + 1.

    Raises:
        BadInput: the series cannot be read, or its headers lack what a segmentation must refer to.
    """
    source = dicom.opened(Path(series))
    with replacing(Path(path)) as file:
        dicom_seg_writer.write(file, voxels, names, source)


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[io.BufferedWriter]:
    """A file that takes the place of `path` when the block succeeds, and leaves nothing behind when it fails.

    Args:
        mode: its access rights, further limited by the umask.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename inside this folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
