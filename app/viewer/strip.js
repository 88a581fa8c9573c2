// The strip under the picture: Dice of every slice above, error area below; a click jumps there.

import { element } from "./dom.js";

const DICE = "#6f8ca3", LOW = "#ff9a2e", AREA = "#b0602a", HERE = "#e8eef2", NONE = "#2a333b";
const POOR = 0.7; // Dice under which a slice's bar has the colour of an error
const PART = 0.64; // of the height, for Dice

export class Strip {
  constructor(screen) {
    Object.assign(this, { screen, model: screen.model });
    this.canvas = element("canvas", { role: "img", "aria-label": "All slices: Dice above, error area below" });
    this.caption = element("div.caption");
    this.tip = element("div.tip", { hidden: true });
    this.element = element("div.strip", {}, this.caption, element("div.bars", {}, this.canvas, this.tip));
    const at = (event) => {
      const box = this.canvas.getBoundingClientRect();
      const part = (event.clientX - box.left) / box.width;
      return Math.max(0, Math.min(this.model.shape[0] - 1, Math.floor(part * this.model.shape[0])));
    };
    const jump = (event) => this.screen.go.leapTo("axial", at(event));
    this.canvas.onpointerdown = (event) => {
      this.canvas.setPointerCapture(event.pointerId);
      jump(event);
    };
    this.canvas.onpointermove = (event) => {
      if (event.buttons) jump(event);
      this.point(at(event));
    };
    this.canvas.onpointerleave = () => (this.tip.hidden = true);
  }

  resize() {
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.max(1, Math.round(this.canvas.clientWidth * ratio));
    this.canvas.height = Math.max(1, Math.round(this.canvas.clientHeight * ratio));
  }

  point(z) {
    const slice = (this.model.scene.slices ?? []).find((one) => one.z === z);
    this.tip.textContent = slice ? this.words(slice) : `z ${z}`;
    this.tip.hidden = false;
    const part = (z + 0.5) / this.model.shape[0];
    this.tip.style.left = `${part * 100}%`;
    this.tip.style.transform = `translateX(${-part * 100}%)`;
  }

  words(slice) {
    const dice = this.model.sliceDice(slice);
    return `z ${slice.z}  ·  Dice ${dice == null ? "not defined" : dice.toFixed(3)}  ·  error ${slice.error_mm2.toFixed(0)} mm²`;
  }

  /** The facts changed. */
  facts() {
    const slices = this.model.scene.slices ?? [];
    const organ = this.model.organOf(this.model.organ)?.name;
    const perOrgan = slices.some((slice) => slice.dice && typeof slice.dice === "object");
    this.caption.textContent = slices.length ? `Dice${perOrgan && organ ? ` ${organ}` : ""} · error area` : "Slices";
    this.greatest = Math.max(1e-9, ...slices.map((slice) => slice.error_mm2));
    this.first = this.model.worst()[0]?.z;
  }

  draw() {
    const { canvas, model } = this;
    const pen = canvas.getContext("2d");
    const depth = model.shape[0], ratio = window.devicePixelRatio || 1;
    const wide = canvas.width / depth, middle = Math.round(canvas.height * PART);
    const gap = wide > 3 * ratio ? ratio : 0;
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.fillStyle = NONE;
    pen.fillRect(0, middle, canvas.width, Math.max(1, ratio));
    const bar = (z, top, bottom) => {
      const left = Math.round(z * wide);
      pen.fillRect(left, top, Math.max(1, Math.round((z + 1) * wide) - left - gap), bottom - top);
    };
    for (const slice of model.scene.slices ?? []) {
      const dice = model.sliceDice(slice);
      if (dice != null) {
        pen.fillStyle = dice < POOR ? LOW : DICE;
        bar(slice.z, middle - Math.max(ratio, dice * (middle - 3 * ratio)), middle);
      }
      pen.fillStyle = AREA;
      if (slice.error_mm2 > 0) {
        const deep = (slice.error_mm2 / this.greatest) * (canvas.height - middle - 2 * ratio);
        bar(slice.z, middle + ratio, middle + ratio + Math.max(ratio, deep));
      }
    }
    this.markers(pen, wide, ratio);
  }

  markers(pen, wide, ratio) {
    const { height } = this.canvas;
    const here = Math.round((this.model.at[0] + 0.5) * wide);
    pen.fillStyle = HERE;
    pen.fillRect(here - Math.round(ratio), 0, Math.max(2, Math.round(2 * ratio)), height);
    if (this.first === undefined) return;
    const x = (this.first + 0.5) * wide, size = 4.5 * ratio;
    pen.fillStyle = LOW;
    pen.beginPath();
    pen.moveTo(x - size, height);
    pen.lineTo(x + size, height);
    pen.lineTo(x, height - 1.6 * size);
    pen.fill();
  }
}
