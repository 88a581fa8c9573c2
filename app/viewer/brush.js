// Painting labels on axial slices, with a history. Hidden organs are never painted over: what is seen is what is changed.

import { decode, encode } from "./rle.js";

const HISTORY = 200; // strokes

export class Brush {
  /** @param changed called with z after every dab; @param finished with (z, before, after) in run lengths when a slice is settled. */
  constructor(changed, finished) {
    Object.assign(this, { changed, finished, stroke: null, past: [], future: [] });
  }

  /** Other labels came from Python: the history is of no use to them. */
  forget() {
    this.past = [];
    this.future = [];
    this.stroke = null;
  }

  /** A stroke begins; `labels` is the slice itself, `visible` says by label value what may be painted over. */
  begin(z, labels, width, visible, value, diameter, column, row) {
    this.stroke = { z, labels, width, visible, value, reach: diameter / 2, column, row, before: encode(labels) };
    this.dab(column, row);
    this.changed(z);
  }

  /** The stroke goes on to this voxel, without gaps. */
  move(column, row) {
    const { stroke } = this;
    const steps = Math.max(Math.abs(column - stroke.column), Math.abs(row - stroke.row));
    for (let k = 1; k <= steps; k++) {
      const part = k / steps;
      const x = stroke.column + Math.round((column - stroke.column) * part);
      const y = stroke.row + Math.round((row - stroke.row) * part);
      this.dab(x, y);
    }
    Object.assign(stroke, { column, row });
    if (steps) this.changed(stroke.z);
  }

  end() {
    const { z, labels, before } = this.stroke;
    this.stroke = null;
    this.settle(z, before, encode(labels));
  }

  /** The stroke never was. */
  cancel() {
    const { z, labels, before } = this.stroke;
    labels.set(decode(before, labels.length));
    this.stroke = null;
    this.changed(z);
  }

  /** Give one value to a mask's voxels, as one stroke. */
  stamp(z, labels, mask, value, visible) {
    const before = encode(labels);
    for (let i = 0; i < labels.length; i++) if (mask[i] && (!labels[i] || visible[labels[i]])) labels[i] = value;
    this.changed(z);
    this.settle(z, before, encode(labels));
  }

  settle(z, before, after) {
    if (before === after) return;
    this.past.push({ z, before, after });
    if (this.past.length > HISTORY) this.past.shift();
    this.future = [];
    this.finished(z, before, after);
  }

  /** Take back (or do again) the last stroke; `slice` gives the labels of a z. Returns the z, or null if there is none. */
  undo(slice) {
    return this.restore(this.past, this.future, "after", "before", slice);
  }

  redo(slice) {
    return this.restore(this.future, this.past, "before", "after", slice);
  }

  restore(from, to, old, which, slice) {
    const step = from.pop();
    if (!step) return null;
    to.push(step);
    const labels = slice(step.z);
    labels.set(decode(step[which], labels.length));
    this.changed(step.z);
    this.finished(step.z, step[old], step[which]);
    return step.z;
  }

  dab(column, row) {
    const { labels, width, visible, value, reach } = this.stroke;
    const height = labels.length / width;
    const far = Math.floor(reach);
    for (let dy = -far; dy <= far; dy++) {
      for (let dx = -far; dx <= far; dx++) {
        const x = column + dx, y = row + dy;
        if (dx * dx + dy * dy > reach * reach || x < 0 || y < 0 || x >= width || y >= height) continue;
        const at = y * width + x;
        if (!labels[at] || visible[labels[at]]) labels[at] = value;
      }
    }
  }
}
