// The three planes through a volume whose indices z, y, x grow to Superior, Posterior, Left; drawn as a radiologist
// expects them: the patient's right on the left of the picture, superior or anterior above.

export const PLANES = ["axial", "coronal", "sagittal"];

const AXES = {
  // along: the axis one scrolls through; rows, columns: the axes of the picture (0 z, 1 y, 2 x)
  axial: { along: 0, rows: 1, columns: 2, marks: ["A", "P", "R", "L"] },
  coronal: { along: 1, rows: 0, columns: 2, marks: ["S", "I", "R", "L"] },
  sagittal: { along: 2, rows: 0, columns: 1, marks: ["S", "I", "A", "P"] },
};

/** Axes, picture size in voxels, millimetres of a voxel, and the marks above, below, left and right. */
export function geometry(plane, shape, spacing) {
  const axes = AXES[plane];
  const mm = spacing ?? [1, 1, 1];
  return {
    ...axes,
    plane,
    height: shape[axes.rows],
    width: shape[axes.columns],
    depth: shape[axes.along],
    rowMm: mm[axes.rows],
    columnMm: mm[axes.columns],
    flipped: axes.rows === 0, // the first row is the top of the patient, which is the last z
  };
}

/** Where a picture lies in a pane of `width` x `height` pixels: it fits, is enlarged by `view.zoom`, moved by its pan. */
export function placement(geometry, view, width, height) {
  const fit = Math.min(width / (geometry.width * geometry.columnMm), height / (geometry.height * geometry.rowMm));
  const scale = fit * view.zoom;
  const columnPx = scale * geometry.columnMm;
  const rowPx = scale * geometry.rowMm;
  return {
    columnPx,
    rowPx,
    left: (width - columnPx * geometry.width) / 2 + view.panX * scale,
    top: (height - rowPx * geometry.height) / 2 + view.panY * scale,
    scale,
  };
}

/** Column and row (fractions of voxels) under a pixel of the pane. */
export function toPicture(place, x, y) {
  return [(x - place.left) / place.columnPx, (y - place.top) / place.rowPx];
}

/** The voxel [z, y, x] under a pixel of the pane, or null beside the picture. */
export function toVoxel(geometry, place, at, x, y) {
  const [column, row] = toPicture(place, x, y).map(Math.floor);
  if (column < 0 || row < 0 || column >= geometry.width || row >= geometry.height) return null;
  const voxel = [...at];
  voxel[geometry.columns] = column;
  voxel[geometry.rows] = geometry.flipped ? geometry.height - 1 - row : row;
  return voxel;
}

/** Middle of a voxel in pixels of the pane. */
export function toPane(geometry, place, voxel) {
  const row = geometry.flipped ? geometry.height - 1 - voxel[geometry.rows] : voxel[geometry.rows];
  return [place.left + (voxel[geometry.columns] + 0.5) * place.columnPx, place.top + (row + 0.5) * place.rowPx];
}

/** The values of one picture, row by row; of an axial slice they are the volume's own, else they are copied into `out`. */
export function cut(geometry, data, shape, index, out) {
  const [depth, height, width] = shape;
  const slice = height * width;
  if (geometry.along === 0) return data.subarray(index * slice, (index + 1) * slice);
  for (let z = 0, row = (depth - 1) * geometry.width; z < depth; z++, row -= geometry.width) {
    if (geometry.along === 1) {
      const start = z * slice + index * width;
      out.set(data.subarray(start, start + width), row);
    } else {
      for (let y = 0, at = z * slice + index; y < height; y++, at += width) out[row + y] = data[at];
    }
  }
  return out;
}
