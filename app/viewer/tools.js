// What the left button, a pen or a finger does on a picture: place the crosshair, paint, ask for a mask.

import { Brush } from "./brush.js";
import { EDITS, PROMPTS } from "./model.js";

export class Tools {
  constructor(screen) {
    Object.assign(this, { screen, model: screen.model });
    this.brush = new Brush(
      (z) => this.painted(z),
      (z, before, after) => {
        const { version } = this.model.scene;
        screen.outbox.put({ kind: "edit", z, before, after, version, layer: this.editable().version });
      },
    );
  }

  /** The label map that may be changed, or undefined. */
  editable() {
    return this.screen.volume.layers.get(this.model.scene.editable);
  }

  /** The tool in a pane: corrections and prompts are axial, elsewhere the crosshair is placed. */
  on(pane) {
    const { tool } = this.model;
    if ([...EDITS, ...PROMPTS].includes(tool) && pane.plane !== "axial") return "place";
    if (EDITS.includes(tool) && pane.layer && pane.layer !== this.model.scene.editable) return "place";
    return tool;
  }

  begin(pane, kind, event) {
    const voxel = pane.voxelAt(event.clientX, event.clientY);
    if (!voxel) return;
    const [z, y, x] = voxel;
    if (kind === "place") this.screen.go.put(voxel);
    if (EDITS.includes(kind)) this.paint(kind, z, y, x);
    if (kind === "box") Object.assign(this, { corner: [x, y], former: this.model.prompt });
  }

  paint(kind, z, y, x) {
    const layer = this.editable(), { model, screen } = this;
    if (!layer || !screen.volume.has(layer, z) || (kind === "brush" && model.organ === null)) return;
    if (model.mode === "reference") screen.setMode("prediction");
    if (kind === "brush" && model.hidden.delete(model.organ)) screen.relook();
    if (!model.overlay) screen.set({ overlay: true });
    const value = kind === "brush" ? model.organ : 0;
    this.brush.begin(z, this.slice(z), model.shape[2], model.visible(), value, model.brush, x, y);
  }

  drag(pane, kind, event) {
    const voxel = this.within(pane, event);
    if (kind === "place") this.screen.go.put(voxel);
    if (EDITS.includes(kind) && this.brush.stroke) this.strokeTo(voxel);
    if (kind === "box" && this.corner) this.model.prompt = { ...this.asked(voxel[0]), box: this.boxTo(voxel) };
    this.screen.request();
  }

  /** A stroke ends where its slice is left, by the wheel or a key: nothing is painted that is not seen. */
  strokeTo([z, y, x]) {
    if (z === this.brush.stroke.z) this.brush.move(x, y);
    else this.brush.end();
  }

  end(pane, kind, event, still) {
    const voxel = pane.voxelAt(event.clientX, event.clientY);
    if (EDITS.includes(kind) && this.brush.stroke) this.brush.end();
    else if (kind === "box" && this.corner) {
      const box = this.boxTo(this.within(pane, event));
      this.unbox();
      if (!still) this.ask({ ...this.asked(this.model.at[0]), box });
    } else if (still && voxel && (kind === "place" || kind === "slices")) {
      this.screen.go.put(voxel);
      this.screen.outbox.put({ kind: "place", z: voxel[0], y: voxel[1], x: voxel[2] });
    } else if (still && voxel && (kind === "plus" || kind === "minus")) {
      const { points, ...rest } = this.asked(voxel[0]);
      this.ask({ ...rest, points: [...points, [voxel[2], voxel[1], kind === "plus" ? 1 : 0]] });
    }
    this.screen.request();
  }

  /** A second finger came down, or the system took the pointer: what had begun is not done. */
  cancel(kind) {
    if (EDITS.includes(kind) && this.brush.stroke) this.brush.cancel();
    this.unbox();
  }

  /** Forget the box that is being drawn. */
  unbox() {
    if (this.corner) this.model.prompt = this.former;
    this.corner = null;
  }

  /** The voxel under the pointer, held inside the picture. */
  within(pane, event) {
    const { geometry } = pane, place = pane.place();
    const [x, y] = pane.pixelAt(event.clientX, event.clientY);
    const inside = (value, start, step, length) => Math.max(0, Math.min(length - 1, Math.floor((value - start) / step)));
    const column = inside(x, place.left, place.columnPx, geometry.width);
    const row = inside(y, place.top, place.rowPx, geometry.height);
    const voxel = [...this.model.at];
    voxel[geometry.columns] = column;
    voxel[geometry.rows] = geometry.flipped ? geometry.height - 1 - row : row;
    return voxel;
  }

  boxTo([, y, x]) {
    const [fromX, fromY] = this.corner;
    return [Math.min(x, fromX), Math.min(y, fromY), Math.max(x, fromX), Math.max(y, fromY)];
  }

  /** What is asked for on this slice so far. */
  asked(z) {
    const { prompt } = this.model;
    return prompt?.z === z ? prompt : { z, points: [], box: null };
  }

  ask(prompt) {
    if (this.model.organ === null) return;
    this.model.prompt = prompt;
    this.screen.outbox.put({ kind: "prompt", z: prompt.z, value: this.model.organ, points: prompt.points, box: prompt.box });
  }

  /** A proposed mask becomes labels, by the user's word only. */
  accept() {
    const { proposal, at } = this.model;
    const layer = this.editable();
    if (!proposal || !layer) return;
    if (proposal.z !== at[0] || !proposal.mask) { // nobody accepts what is not on the screen
      this.screen.go.leapTo("axial", proposal.z);
      return;
    }
    this.model.hidden.delete(proposal.value);
    this.brush.stamp(proposal.z, this.slice(proposal.z), proposal.mask, proposal.value, this.model.visible());
    this.dismiss();
  }

  dismiss() {
    this.model.proposal = null;
    this.model.prompt = null;
    this.screen.refresh();
  }

  /** Take back a stroke, or do it again, and show its slice. */
  step(way) {
    const z = this.editable() && !this.brush.stroke ? this.brush[way]((at) => this.slice(at)) : null;
    if (z !== null) this.screen.go.leapTo("axial", z);
  }

  slice(z) {
    const { slice } = this.screen.volume;
    return this.editable().data.subarray(z * slice, (z + 1) * slice);
  }

  painted(z) {
    this.screen.volume.touch(this.editable(), z);
    this.screen.request();
  }
}
