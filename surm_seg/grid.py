"""Voxels and where they lie in the patient.

A `Volume` holds its voxels as the file does, axes (i, j, k), with a `Grid` that says where they lie in the patient.
Everything downstream works on the radiological view, axes (z, y, x) growing to Superior, Posterior and Left, so that
`view[z]` drawn row by row is the picture a radiologist expects. Between the two there are only flips and transposes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes

from surm_seg import nifti
from surm_seg.errors import BadInput

TOLERANCE_MM = 1e-3  # two grids are the same when no corner voxel is further apart

# Which way the indices of an LPS array grow, written in nibabel's RAS+ world: -x is Left, -y is Posterior, +z Superior.
_LPS_SIGNS = (-1, -1, 1)


class _Moves(NamedTuple):
    """Flips, then transpose: file axes (i, j, k) -> (z, y, x)."""

    flips: tuple[slice, slice, slice]
    axes: tuple[int, int, int]


@dataclass(frozen=True)
class Grid:
    """Where voxels lie in the patient, as the geometry fields of a NIfTI-1 header.

    The fields are kept instead of a matrix, because only they give a written file the *same* affine, bit for bit,
    whether the source stated it as a matrix (sform) or as a rotation (qform). All numbers are exact float32 values.

    Args:
        shape: voxels along (i, j, k).
        sform_code: 0 when `srow` is unused.
        qform_code: 0 when the quaternion is unused.
        srow: the 3 x 4 matrix from voxel index to RAS+ mm, row by row.
        quaternion: b, c, d.
        qoffset: mm.
        pixdim: qfac, then the voxel size along i, j, k as stated.
        xyzt_units: NIfTI units code.
    """

    shape: tuple[int, int, int]
    sform_code: int
    qform_code: int
    srow: tuple[float, ...]
    quaternion: tuple[float, ...]
    qoffset: tuple[float, ...]
    pixdim: tuple[float, ...]
    xyzt_units: int

    @classmethod
    def from_affine(cls, shape: tuple[int, int, int], affine: np.ndarray) -> Grid:
        """A grid with an sform, from a 4 x 4 matrix in RAS+ mm (rounded to float32, as NIfTI stores it)."""
        header = nib.Nifti1Header()
        header.set_data_shape(shape)
        header.set_zooms(voxel_sizes(affine))
        header.set_sform(affine, code=1)
        header.set_xyzt_units("mm")
        return cls.from_header(shape, header)

    @classmethod
    def from_header(cls, shape: tuple[int, int, int], header: nib.Nifti1Header) -> Grid:
        def floats(*names: str) -> tuple[float, ...]:
            # A field whose code is 0 may hold anything, also NaN, which neither JSON nor == can carry.
            with np.errstate(invalid="ignore"):  # a signalling NaN
                values = np.concatenate([np.atleast_1d(header[name]) for name in names]).astype(np.float64)
            return tuple(np.where(np.isfinite(values), values, 0.0).tolist())

        return cls(
            shape=shape,
            sform_code=int(header["sform_code"]),
            qform_code=int(header["qform_code"]),
            srow=floats("srow_x", "srow_y", "srow_z"),
            quaternion=floats("quatern_b", "quatern_c", "quatern_d"),
            qoffset=floats("qoffset_x", "qoffset_y", "qoffset_z"),
            pixdim=floats("pixdim")[:4],
            xyzt_units=int(header["xyzt_units"]),
        )

    def header(self) -> nib.Nifti1Header:
        """A little-endian uint8 header on this grid, every other field at its default."""
        header = nib.Nifti1Header(endianness="<")
        header.set_data_dtype(np.uint8)
        header.set_data_shape(self.shape)
        header["sform_code"], header["qform_code"] = self.sform_code, self.qform_code
        header["srow_x"], header["srow_y"], header["srow_z"] = np.reshape(self.srow, (3, 4))
        header["quatern_b"], header["quatern_c"], header["quatern_d"] = self.quaternion
        header["qoffset_x"], header["qoffset_y"], header["qoffset_z"] = self.qoffset
        header["pixdim"][:4] = self.pixdim
        header["xyzt_units"] = self.xyzt_units
        return header

    @cached_property
    def affine(self) -> np.ndarray:
        """4 x 4 float64, voxel index (i, j, k, 1) -> RAS+ mm; equal to nibabel's affine of the source, read-only."""
        affine = np.array(self.header().get_best_affine(), np.float64)
        affine.flags.writeable = False
        return affine

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size along (i, j, k) in mm."""
        i, j, k = voxel_sizes(self.affine).tolist()
        return i, j, k

    @property
    def axcodes(self) -> tuple[str, ...]:
        """Where i, j, k grow to, e.g. ('L', 'P', 'S')."""
        return nib.aff2axcodes(self.affine)

    @cached_property
    def _moves(self) -> _Moves:
        orientation = nib.io_orientation(self.affine)  # row = file axis: (world axis, direction)
        flips, axes = [slice(None)] * 3, [0, 0, 0]
        for axis, (world, direction) in enumerate(orientation):
            axes[2 - int(world)] = axis
            if direction != _LPS_SIGNS[int(world)]:
                flips[axis] = slice(None, None, -1)
        return _Moves((flips[0], flips[1], flips[2]), (axes[0], axes[1], axes[2]))

    @property
    def lps_shape(self) -> tuple[int, int, int]:
        """Voxels along (z, y, x)."""
        z, y, x = (self.shape[axis] for axis in self._moves.axes)
        return z, y, x

    @property
    def lps_spacing(self) -> tuple[float, float, float]:
        """Voxel size along (z, y, x) in mm."""
        z, y, x = (self.spacing[axis] for axis in self._moves.axes)
        return z, y, x

    def lps(self, voxels: np.ndarray) -> np.ndarray:
        """(i, j, k) -> view with axes (z, y, x), growing to Superior, Posterior, Left."""
        return voxels[self._moves.flips].transpose(self._moves.axes)

    def restore(self, voxels: np.ndarray) -> np.ndarray:
        """(z, y, x) -> view with axes (i, j, k): the exact inverse of `lps`."""
        return voxels.transpose(np.argsort(self._moves.axes))[self._moves.flips]

    def matches(self, other: Grid, tolerance_mm: float = TOLERANCE_MM) -> bool:
        """Whether the LPS views of the two have one shape, and no corner voxel lies further away than the tolerance.

        The order and the directions of the file axes may differ: compare voxels by `lps`.
        """
        if self.lps_shape != other.lps_shape:
            return False
        return bool(np.linalg.norm(self._corners() - other._corners(), axis=0).max() <= tolerance_mm)

    def _corners(self) -> np.ndarray:
        """Where the corner voxels of the LPS view lie: RAS+ mm, shape (3, 2, 2, 2), the last three z, y, x."""
        steps = np.indices((2, 2, 2)) * (np.array(self.shape) - 1)[:, None, None, None]
        places = np.tensordot(self.affine[:3, :3], steps, 1) + self.affine[:3, 3, None, None, None]
        return np.stack([self.lps(place) for place in places])

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers; `from_json` gives back an equal grid, also through a file."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Grid:
        """Raises KeyError or TypeError when fields are missing."""
        values: dict[str, Any] = {}
        for name in (field.name for field in fields(cls)):
            values[name] = tuple(data[name]) if isinstance(data[name], list) else data[name]
        return cls(**values)


@dataclass(frozen=True)
class Volume:
    """Voxels with a finite, invertible affine; made only by the readers.

    Args:
        voxels: axes (i, j, k) as in the file.
        grid: where they lie.
    """

    voxels: np.ndarray
    grid: Grid

    def lps(self) -> np.ndarray:
        """View with axes (z, y, x), growing to Superior, Posterior, Left."""
        return self.grid.lps(self.voxels)


@runtime_checkable
class Source(Protocol):
    """An opened file or series with checked headers; its voxels come slab by slab, at most once."""

    @property
    def path(self) -> Path: ...

    @property
    def header(self) -> nifti.Header: ...

    def slabs(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (range of k, values of shape (i, j, len)), scaling applied; use none before the iteration ends."""
        ...


def header_of(
    shape: tuple[int, int, int], affine: np.ndarray, dtype: np.dtype, max_voxels: int, refuse: nifti.Refuse
) -> nifti.Header:
    """The header of a source that is not NIfTI, under the same rules for size, spacing and shear.

    Args:
        affine: 4 x 4, voxel index (i, j, k, 1) -> RAS+ mm.
        dtype: of the values that its slabs yield.
    """
    nifti.check_size(shape, max_voxels, refuse)
    nifti.check_affine(affine, refuse)
    return nifti.Header(shape, dtype, 0, None, Grid.from_affine(shape, affine).header())


def grid_of(source: Source) -> Grid:
    """Where the voxels of a source lie."""
    return Grid.from_header(source.header.shape, source.header.fields)


def image_of(source: Source) -> Volume:
    """All voxels as int16 HU, fractions rounded; raises BadInput for HU outside int16."""
    grid = grid_of(source)
    voxels = np.empty(grid.shape, np.int16, order="F")
    for k, values in source.slabs():
        voxels[:, :, k] = _whole(np.rint(values) if values.dtype.kind == "f" else values, np.int16, source.path, "HU")
    return Volume(voxels, grid)


def labels_of(source: Source) -> Volume:
    """All voxels as integers, of the stored type up to 16 bit, else int32; raises BadInput for fractions."""
    grid, stored = grid_of(source), source.header.dtype
    small = stored.kind in "iu" and stored.itemsize <= 2 and source.header.scaling is None
    dtype = stored.newbyteorder("=") if small else np.dtype(np.int32)
    voxels = np.empty(grid.shape, dtype, order="F")
    for k, values in source.slabs():
        if values.dtype.kind == "f" and (values != np.rint(values)).any():
            raise BadInput("labels-not-integer", f"{source.path} holds fractions; give a label map of whole numbers.")
        voxels[:, :, k] = _whole(values, dtype, source.path, "label values")
    return Volume(voxels, grid)


def _whole(values: np.ndarray, dtype: Any, path: Path, what: str) -> np.ndarray:
    """The values as this integer type; raises BadInput for values outside it."""
    limits = np.iinfo(dtype)
    low, high = values.min(), values.max()
    if low < limits.min or high > limits.max:
        sentence = f"{path} holds {what} from {low:g} to {high:g}, outside {limits.dtype}; mend its scaling."
        raise BadInput("value-range", sentence)
    return values.astype(dtype)
