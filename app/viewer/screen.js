// The whole viewer on its root element: one picture per animation frame, and what the parts ask for.

import { element } from "./dom.js";
import { helpSheet, keyboard } from "./keys.js";
import { Model } from "./model.js";
import { Organs } from "./organs.js";
import { Navigation } from "./navigation.js";
import { Outbox } from "./outbox.js";
import { Pane } from "./pane.js";
import { ERRORS, swatch } from "./pattern.js";
import { PLANES } from "./planes.js";
import { listen } from "./pointer.js";
import { greyTable } from "./render.js";
import { Strip } from "./strip.js";
import { Toolbar } from "./toolbar.js";
import { Tools } from "./tools.js";
import { Volume } from "./volume.js";

const LARGEST_BRUSH = 99;

export class Screen {
  constructor(root, scene, send) {
    Object.assign(this, { root, drawn: 0, last: null, frame: 0, table: null, trouble: null });
    this.closed = new AbortController();
    this.model = new Model(scene);
    this.go = new Navigation(this);
    this.outbox = new Outbox(scene.key, send, () => this.request());
    const told = (sentence) => {
      this.trouble = sentence;
      this.request();
    };
    this.volume = new Volume(scene.data, scene.shape, () => told(null), told);
    this.tools = new Tools(this);
    this.build();
    keyboard(this);
    window.addEventListener("beforeunload", (event) => this.outbox.edits().length && event.preventDefault(), { signal: this.closed.signal });
    this.volume.z = this.model.at[0];
    this.volume.setLayers(scene.layers ?? {});
    this.refresh();
    this.outbox.seen(scene.seen);
    this.outbox.again(); // what a viewer before this one could not send
  }

  build() {
    const { model, root } = this;
    this.panes = model.compares()
      ? model.scene.compare.map((layer) => new Pane(this, "axial", layer))
      : PLANES.map((plane) => new Pane(this, plane));
    this.toolbar = new Toolbar(this);
    this.organs = new Organs(this);
    this.strip = new Strip(this);
    this.sheet = helpSheet(this);
    this.grid = element("div.grid", { "data-layout": model.scene.layout },
      this.toolbar.element, ...this.panes.map((pane) => pane.element), this.strip.element, this.organs.element, this.sheet);
    root.replaceChildren(this.grid);
    this.unsaved = element("div.unsaved", { hidden: true, role: "status" });
    this.panes[0].element.append(this.toolbar.proposal, this.unsaved); // where the mask is, and where no row of buttons grows
    this.panes.forEach((pane) => listen(pane, this));
    this.enlarge(model.main);
    this.watch = new ResizeObserver(() => this.resize());
    [root, ...this.panes.map((pane) => pane.element), this.strip.canvas].forEach((one) => this.watch.observe(one));
    this.watchRatio();
  }

  resize() {
    this.panes.forEach((pane) => pane.resize());
    this.strip.resize();
    this.legend();
    this.draw(); // at once: a resized canvas is empty until it is drawn
  }

  /** Sharp again when the window came to another screen or was zoomed: no size changes then, and a query knows one ratio. */
  watchRatio() {
    const changed = () => {
      this.watchRatio();
      this.resize();
      this.organs.facts();
    };
    matchMedia(`(resolution: ${window.devicePixelRatio}dppx)`)
      .addEventListener("change", changed, { once: true, signal: this.closed.signal });
  }

  /** A new scene from Python about the same volume. */
  update(scene) {
    const before = this.model.scene;
    this.model.accept(scene);
    this.outbox.seen(scene.seen);
    this.outbox.again();
    const version = (facts) => facts.layers?.[scene.editable]?.version;
    if (version(before) !== version(scene)) this.tools.brush.forget();
    this.volume.setLayers(scene.layers ?? {});
    if (scene.jump && scene.jump.id !== before.jump?.id) this.jump(scene.jump);
    const { proposal } = scene;
    const answers = proposal && proposal.id !== before.proposal?.id && proposal.z === this.model.prompt?.z;
    if (answers) this.model.proposal = { ...proposal }; // to what is still asked
    this.refresh();
  }

  jump({ z, y, x }) {
    const [, row, column] = this.model.at;
    this.go.put([z, y ?? row, x ?? column]);
  }

  close() {
    cancelAnimationFrame(this.frame);
    this.closed.abort(); // the root stays for the next screen, and must not keep this one and its volume
    this.watch.disconnect();
    this.grid.remove();
    this.volume.close();
    this.outbox.close();
  }

  request() {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      this.go.step();
      this.draw();
    });
  }

  draw() {
    const { hover } = this.model;
    if (hover) hover.voxel = hover.pane.voxelAt(hover.x, hover.y); // slices and zoom change under a pointer that rests
    for (const pane of this.panes) pane.draw();
    this.strip.draw();
    this.toolbar.undo.disabled = !this.tools.brush.past.length;
    this.toolbar.redo.disabled = !this.tools.brush.future.length;
    this.warn();
    const { model, root, volume } = this;
    const [z, y, x] = model.at;
    if (z !== this.last && this.panes[0].complete) {
      this.last = z;
      this.drawn++;
    }
    const facts = {
      z, y, x, window: model.window.map(Math.round).join("/"), mode: model.mode, tool: model.tool, overlay: model.overlay,
      ready: this.panes[0].complete, drawn: this.drawn, loaded: volume.loaded(),
    };
    for (const [name, fact] of Object.entries(facts)) if (root.dataset[name] !== String(fact)) root.dataset[name] = fact;
  }

  /** Say on the picture what the app has not answered for. */
  warn() {
    const count = this.outbox.overdue(), strokes = count === 1 ? "1 stroke" : `${count} strokes`;
    const sentence = `${strokes} not saved yet: no answer from the app. Kept here, and sent again by itself.`;
    this.unsaved.hidden = !count;
    if (count && this.unsaved.textContent !== sentence) this.unsaved.textContent = sentence;
  }

  /** Change what is chosen, by name. */
  set(changes) {
    Object.assign(this.model, changes);
    this.relook();
  }

  relook() {
    this.model.look++;
    this.refresh();
  }

  refresh() {
    const focused = this.root.getRootNode().activeElement;
    this.toolbar.refresh();
    this.organs.facts();
    this.keepFocus(focused);
    this.strip.facts();
    this.legend();
    this.grid.dataset.tool = this.model.tool;
    this.request();
  }

  /** Who had the keyboard keeps it, also a button that was made anew. */
  keepFocus(focused) {
    if (!focused || focused.isConnected) return;
    const again = this.root.querySelector(`[data-focus="${focused.dataset.focus}"]`);
    (again ?? this.root).focus({ preventScroll: true });
  }

  legend() {
    const { legend } = this.organs;
    legend.hidden = this.model.mode !== "error";
    if (legend.hidden) return;
    legend.replaceChildren(...ERRORS.map((error) => element("span", { title: error.title }, swatch(error, 22, 14, 0.7), error.name)));
  }

  grey() {
    const key = this.model.window.join();
    if (this.table?.key !== key) this.table = { key, values: greyTable(...this.model.window, this.table?.values) };
    return this.table.values;
  }

  /** The organs in their own colours, or in those of 3D Slicer. */
  switchColours() {
    this.model.anatomical = !this.model.anatomical;
    this.model.dye();
    this.relook();
  }

  setWindow(width, centre) {
    if (!Number.isFinite(width) || !Number.isFinite(centre)) return this.refresh();
    this.set({ window: [Math.max(1, Math.min(10000, width)), Math.max(-5000, Math.min(10000, centre))] });
  }

  adjustWindow(wider, higher) {
    const [width, centre] = this.model.window;
    this.setWindow(width + wider, centre + higher);
  }

  setMode(mode) {
    if (this.model.modes().includes(mode)) this.set({ mode });
  }

  setTool(tool) {
    if (!this.model.offers(tool)) return;
    this.model.tool = tool;
    this.refresh();
  }

  resizeBrush(by) {
    this.model.brush = Math.max(1, Math.min(LARGEST_BRUSH, this.model.brush + by));
    this.refresh();
  }

  choose(organ) {
    this.model.organ = organ;
    this.refresh();
  }

  leave() {
    if (!this.sheet.hidden) return this.help();
    if (this.model.proposal || this.model.prompt) return this.tools.dismiss();
    this.setTool("place");
  }

  help() {
    this.sheet.hidden = !this.sheet.hidden;
    this.root.focus();
  }

  enlarge(plane) {
    this.model.main = plane;
    const places = ["main", "second", "third"];
    const order = [...this.panes].sort((a, b) => (b.plane === plane) - (a.plane === plane));
    order.forEach((pane, i) => (pane.element.dataset.place = places[i]));
  }

  /** The pane that the pointer went down in: keys act on its plane. */
  attend(pane) {
    this.model.active = pane.plane;
    this.root.focus({ preventScroll: true });
  }

  hover(pane, event) {
    this.model.hover = event && { pane, x: event.clientX, y: event.clientY, voxel: null };
    this.request();
  }

  /** Voxel, HU and organs under the pointer, or at the crosshair where the pointer is elsewhere. */
  describe(pane) {
    const { at, layers } = this.model, hover = this.model.hover?.voxel ? this.model.hover : null;
    if (pane !== (hover?.pane ?? this.panes[0])) return "";
    const [z, y, x] = hover?.voxel ?? at;
    const { volume } = this;
    if (!volume.has(volume.image, z)) return "";
    const index = z * volume.slice + y * this.model.shape[2] + x;
    const words = [`x ${x}  y ${y}  z ${z}   ${volume.image.data[index]} HU`];
    for (const [name, part] of volume.layers) {
      if (!volume.has(part, z)) continue;
      const value = part.data[index];
      words.push(`${layers[name].name}: ${value ? this.model.organOf(value)?.name ?? value : "none"}`);
    }
    return [...new Set(words)].join("\n"); // the reference may be there twice, as itself and as one side
  }
}
