// Where one is in the volume and how near: slices, crosshair, zoom and pan.

import { geometry, toPicture } from "./planes.js";

const LEAST_ZOOM = 0.5, MOST_ZOOM = 40;

export class Navigation {
  constructor(screen) {
    Object.assign(this, { screen, model: screen.model, wanted: null });
  }

  axis(plane) {
    return geometry(plane, this.model.shape, null);
  }

  /** Every slice on the way is drawn, one a frame; a wheel that turns back is followed at once, keys are all counted. */
  scroll(plane, steps, { counted = false } = {}) {
    const { along, depth } = this.axis(plane);
    const at = this.model.at[along];
    const ongoing =
      this.wanted?.along === along && (counted || Math.sign(this.wanted.index - at) === Math.sign(steps));
    const index = Math.max(0, Math.min(depth - 1, (ongoing ? this.wanted.index : at) + steps));
    this.wanted = index === at ? null : { along, index };
    this.screen.request();
  }

  /** One slice nearer to where the wheel went; called before every frame. */
  step() {
    if (!this.wanted) return;
    const { along, index } = this.wanted;
    const at = [...this.model.at];
    at[along] += Math.sign(index - at[along]);
    if (at[along] === index) this.wanted = null;
    this.moveTo(at);
  }

  leap(plane, steps) {
    const { along, depth } = this.axis(plane);
    const from = this.wanted?.along === along ? this.wanted.index : this.model.at[along];
    this.leapTo(plane, Math.max(0, Math.min(depth - 1, from + steps)));
  }

  leapTo(plane, index) {
    const at = [...this.model.at];
    at[this.axis(plane).along] = index;
    this.put(at);
  }

  /** The crosshair stands on this voxel [z, y, x], and the planes go through it. */
  put(at) {
    this.wanted = null;
    this.moveTo(at);
  }

  moveTo(at) {
    const other = at[0] !== this.model.at[0];
    this.model.at = at;
    if (other) this.screen.volume.show(at[0]);
    this.screen.request();
  }

  /** The slice with the greatest error area; from there the next greatest. */
  worst() {
    const order = this.model.worst();
    const here = order.findIndex(({ z }) => z === this.model.at[0]);
    if (order.length) this.leapTo("axial", order[(here + 1) % order.length].z);
  }

  /** What is under the pointer stays there. */
  zoom(pane, factor, clientX, clientY) {
    const view = pane.view();
    const [x, y] = pane.pixelAt(clientX, clientY);
    const [column, row] = toPicture(pane.place(), x, y);
    view.zoom = Math.max(LEAST_ZOOM, Math.min(MOST_ZOOM, view.zoom * factor));
    const { left, top, columnPx, rowPx, scale } = pane.place();
    view.panX += (x - left - column * columnPx) / scale;
    view.panY += (y - top - row * rowPx) / scale;
    this.screen.request();
  }

  zoomActive(factor) {
    const pane = this.screen.panes.find(({ plane }) => plane === this.model.active);
    const box = pane.element.getBoundingClientRect();
    this.zoom(pane, factor, box.left + box.width / 2, box.top + box.height / 2);
  }

  pan(pane, dx, dy) {
    const { scale } = pane.place();
    const view = pane.view();
    view.panX += (dx * pane.ratio) / scale;
    view.panY += (dy * pane.ratio) / scale;
    this.screen.request();
  }

  fit() {
    for (const view of Object.values(this.model.views)) Object.assign(view, { zoom: 1, panX: 0, panY: 0 });
    this.screen.request();
  }
}
