// One picture: a canvas with the slice and its labels, a second one above it with what moves, and its marks.

import { element, icon } from "./dom.js";
import { Overlay } from "./overlay.js";
import { cut, geometry, placement, toPane, toVoxel } from "./planes.js";
import { paintGrey } from "./render.js";
import { drawAbove } from "./above.js";

const RULERS = [200, 100, 50, 20, 10, 5, 2]; // mm

export class Pane {
  /** @param layer name of the label map it shows, or null where the mode decides. */
  constructor(screen, plane, layer = null) {
    Object.assign(this, { screen, model: screen.model, plane, layer, key: "" });
    this.geometry = geometry(plane, this.model.shape, this.model.scene.spacing);
    this.overlay = new Overlay(this.geometry);
    const { width, height } = this.geometry;
    this.values = new Int16Array(width * height);
    this.labels = [new Uint8Array(width * height), new Uint8Array(width * height)];
    this.buffer = element("canvas", { width, height });
    this.bufferPen = this.buffer.getContext("2d", { alpha: false });
    this.picture = new ImageData(width, height);
    this.pixels = new Uint32Array(this.picture.data.buffer);
    this.build();
  }

  build() {
    const [above, below, left, right] = this.geometry.marks;
    this.base = element("canvas.base", { role: "img", "aria-label": `${this.plane} slice` });
    this.top = element("canvas.top", { "aria-hidden": "true" });
    this.pen = this.base.getContext("2d", { alpha: false });
    this.topPen = this.top.getContext("2d");
    this.title = element("div.title");
    this.readout = element("div.readout");
    this.ruler = element("div.ruler");
    this.waiting = element("div.waiting", { hidden: true });
    this.enlarge = element("button.enlarge", {
      title: `Enlarge the ${this.plane} plane`,
      onclick: () => this.screen.enlarge(this.plane),
    }, icon("enlarge"));
    this.element = element("div.pane", { "data-plane": this.plane, "data-layer": this.layer ?? "" },
      this.base, this.top,
      element("span.mark.above", {}, above), element("span.mark.below", {}, below),
      element("span.mark.left", {}, left), element("span.mark.right", {}, right),
      this.title, this.readout, this.ruler, element("div.convention", {}, this.model.scene.convention), this.waiting, this.enlarge);
  }

  resize() {
    this.ratio = window.devicePixelRatio || 1;
    for (const canvas of [this.base, this.top]) {
      canvas.width = Math.max(1, Math.round(this.element.clientWidth * this.ratio));
      canvas.height = Math.max(1, Math.round(this.element.clientHeight * this.ratio));
    }
    this.key = "";
  }

  index() {
    return this.model.at[this.geometry.along];
  }

  view() {
    return this.model.views[this.plane];
  }

  place() {
    return placement(this.geometry, this.view(), this.base.width, this.base.height);
  }

  /** The voxel under a point of the window, or null. */
  voxelAt(clientX, clientY) {
    const [x, y] = this.pixelAt(clientX, clientY);
    return toVoxel(this.geometry, this.place(), this.model.at, x, y);
  }

  /** Device pixels of this pane under a point of the window. */
  pixelAt(clientX, clientY) {
    const box = this.base.getBoundingClientRect();
    return [
      ((clientX - box.left) * this.base.width) / box.width,
      ((clientY - box.top) * this.base.height) / box.height,
    ];
  }

  /** Label maps that are drawn: [labels], or [prediction, reference] of the error map. */
  shownLayers() {
    const { mode } = this.model;
    const names = mode === "error" ? [this.layer ?? "prediction", "reference"] : [this.layer ?? mode];
    const parts = names.map((name) => this.screen.volume.layers.get(name));
    return parts.every(Boolean) ? parts : [];
  }

  draw() {
    const { volume } = this.screen;
    const { zoom, panX, panY } = this.view();
    const parts = [volume.image, ...this.shownLayers()];
    const stamp = this.plane === "axial"
      ? parts.map((part) => `${part.path}${part.version}:${part.changed[this.index()]}`).join()
      : volume.revision;
    const key = [this.index(), this.model.look, zoom, panX, panY, this.base.width, this.base.height, stamp].join();
    if (key !== this.key) {
      this.key = key;
      this.drawSlice();
    }
    drawAbove(this);
    this.write();
  }

  drawSlice() {
    const { model, pen, geometry, bufferPen } = this;
    const { volume } = this.screen;
    const place = this.place();
    pen.fillStyle = "#000";
    pen.fillRect(0, 0, this.base.width, this.base.height);
    this.complete = this.plane !== "axial" || volume.has(volume.image, this.index());
    if (!this.complete) return;
    paintGrey(cut(geometry, volume.image.data, model.shape, this.index(), this.values), this.screen.grey(), this.pixels);
    this.blankMissing(volume.image);
    bufferPen.putImageData(this.picture, 0, 0);
    pen.imageSmoothingEnabled = true;
    pen.imageSmoothingQuality = "low";
    pen.drawImage(this.buffer, place.left, place.top, geometry.width * place.columnPx, geometry.height * place.rowPx);
    if (model.overlay) this.drawLabels(place);
  }

  drawLabels(place) {
    const parts = this.shownLayers();
    if (!parts.length || (this.plane === "axial" && !this.whole())) return;
    const [first, second] = parts.map((part, i) =>
      cut(this.geometry, part.data, this.model.shape, this.index(), this.labels[i]));
    if (second) this.overlay.errors(this.pen, place, first, second, this.model, this.ratio);
    else this.overlay.labels(this.pen, place, first, this.model, this.ratio);
  }

  /** Whether all that is drawn here has come; labels that have not must not look like none. */
  whole() {
    const { volume } = this.screen;
    const parts = [volume.image, ...this.shownLayers()];
    if (this.plane === "axial") return parts.every((part) => volume.has(part, this.index()));
    return volume.loaded() === this.model.shape[0];
  }

  /** Rows of slices that are still on their way stay black: 0 HU would look like tissue. */
  blankMissing(image) {
    if (!this.geometry.flipped) return;
    const { width, height } = this.geometry;
    for (let z = 0; z < height; z++) {
      if (!this.screen.volume.has(image, z)) this.pixels.fill(0xff000000, (height - 1 - z) * width, (height - z) * width);
    }
  }

  write() {
    const { model, geometry } = this;
    const letter = "zyx"[geometry.along];
    const layer = this.layer ? `  ·  ${model.layers[this.layer]?.name ?? ""}` : "";
    const rest = this.whole() ? "" : "  ·  loading";
    set(this.title, `${geometry.plane}  ${letter} ${this.index()} / ${geometry.depth - 1}${layer}${rest}`);
    set(this.readout, this.screen.describe(this));
    this.waiting.hidden = this.complete;
    if (!this.complete) set(this.waiting, this.screen.trouble ?? `Slice ${this.index()} is on its way`);
    this.measure();
  }

  measure() {
    const known = this.model.scene.spacing !== null;
    const scale = this.place().scale / this.ratio;
    const length = RULERS.find((mm) => mm * scale < Math.min(150, this.element.clientWidth / 3)) ?? 1;
    set(this.ruler, known ? `${length} mm` : "spacing unknown");
    this.ruler.classList.toggle("unknown", !known);
    this.ruler.style.width = known ? `${length * scale}px` : "auto";
  }

  /** Middle of a voxel in device pixels. */
  at(voxel) {
    return toPane(this.geometry, this.place(), voxel);
  }
}

function set(node, text) {
  if (node.textContent !== text) node.textContent = text;
}
