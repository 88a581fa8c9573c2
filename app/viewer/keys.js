// The keyboard: one table that is both what the keys do and what the help says.

import { element } from "./dom.js";
import { PRESETS } from "./model.js";

const PAGE = 10; // slices

/** Rows of [keys, what the help says, action]. Up is towards the top of the patient in the axial plane. */
function table(screen) {
  const { model } = screen;
  const along = () => model.active;
  return [
    ["Slices", [
      [["ArrowUp", "ArrowRight"], "↑ →", "next slice", () => screen.go.scroll(along(), 1, { counted: true })],
      [["ArrowDown", "ArrowLeft"], "↓ ←", "previous slice", () => screen.go.scroll(along(), -1, { counted: true })],
      [["PageUp"], "Page ↑", `${PAGE} slices on`, () => screen.go.leap(along(), PAGE)],
      [["PageDown"], "Page ↓", `${PAGE} slices back`, () => screen.go.leap(along(), -PAGE)],
      [["Home", "End"], "Home  End", "first, last slice", (key) => screen.go.leap(along(), key === "Home" ? -1e6 : 1e6)],
      [["w"], "W", "worst slice by error area, again for the next", () => screen.go.worst()],
    ]],
    ["Picture", [
      ...PRESETS.map(({ name, window }, i) =>
        [[String(i + 1)], String(i + 1), `${name} ${window.join(" / ")}`, () => screen.setWindow(...window)]),
      [["+", "="], "+", "zoom in", () => screen.go.zoomActive(1.25)],
      [["-"], "−", "zoom out", () => screen.go.zoomActive(0.8)],
      [["f"], "F", "fit the picture", () => screen.go.fit()],
      [["h"], "H", "crosshair", () => screen.set({ crosshair: !model.crosshair })],
    ]],
    ["Organs", [
      [[" "], "Space", "hide and show them; held, only while held", () => screen.set({ overlay: !model.overlay })],
      [["o"], "O", "outline or fill", () => screen.set({ outline: !model.outline })],
      [["p"], "P", "prediction", () => screen.setMode("prediction")],
      [["r"], "R", "reference", () => screen.setMode("reference")],
      [["e"], "E", "error", () => screen.setMode("error")],
    ]],
    ["Correct", [
      [["v", "Escape"], "V  Esc", "crosshair tool; ends a prompt", () => screen.leave()],
      [["b"], "B", "brush", () => screen.setTool("brush")],
      [["x"], "X", "eraser", () => screen.setTool("erase")],
      [["[", "]"], "[  ]", "smaller, larger brush", (key) => screen.resizeBrush(key === "[" ? -2 : 2)],
      [["q"], "Q", "box prompt", () => screen.setTool("box")],
      [["a"], "A", "point inside", () => screen.setTool("plus")],
      [["s"], "S", "point outside", () => screen.setTool("minus")],
      [["Enter"], "Enter", "accept the proposed mask", () => screen.tools.accept()],
      [["Ctrl+z"], "Ctrl Z", "undo", () => screen.tools.step("undo")],
      [["Ctrl+y", "Ctrl+Z"], "Ctrl Y", "redo", () => screen.tools.step("redo")],
    ]],
    ["Help", [[["?"], "?", "this list", () => screen.help()]]],
  ];
}

const MOUSE = [
  ["Wheel", "slices"],
  ["Ctrl wheel", "zoom at the pointer"],
  ["Left", "the tool"],
  ["Right drag", "window: across width, down centre"],
  ["Middle drag", "pan; so does Shift with the left"],
  ["One finger", "slices"],
  ["Two fingers", "zoom and pan"],
];

const HELD = 350; // milliseconds after which a released space bar shows again what it hid

export function keyboard(screen) {
  const actions = new Map(table(screen).flatMap(([, rows]) => rows.flatMap(([keys, , , act]) => keys.map((key) => [key, act]))));
  const { signal } = screen.closed;
  let down = 0; // when the space bar went down; 0 while it is up
  screen.root.addEventListener("keydown", (event) => {
    const focused = event.composedPath()[0];
    if (focused.matches("input, select")) {
      event.stopPropagation(); // the page around has keys of its own
      if (event.key === "Enter" || event.key === "Escape") screen.root.focus(); // a number that was typed counts now
      return;
    }
    if (focused.matches("button") && [" ", "Enter"].includes(event.key)) return;
    const act = actions.get(named(event));
    if (!act) return;
    event.preventDefault();
    event.stopPropagation();
    if (event.key === " " && event.repeat) return;
    if (event.key === " ") down = event.timeStamp;
    act(event.key);
  }, { signal });
  screen.root.addEventListener("click", (event) => {
    // A button that was clicked, not one that was reached by Tab, gives the keys back to the picture.
    if (event.detail && event.target.closest("button")) screen.root.focus({ preventScroll: true });
  }, { signal });
  screen.root.addEventListener("keyup", (event) => {
    if (event.key !== " ") return;
    const held = down && event.timeStamp - down >= HELD;
    down = 0;
    if (held) actions.get(" ")();
  }, { signal });
}

/** A key as the table names it, whatever Caps Lock says; AltGr only writes characters, though it looks like Ctrl Alt. */
function named(event) {
  const writes = event.getModifierState("AltGraph"), letter = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (writes) return letter;
  if (event.altKey) return "";
  if (!event.ctrlKey && !event.metaKey) return letter;
  return `Ctrl+${event.shiftKey ? letter.toUpperCase() : letter}`;
}

export function helpSheet(screen) {
  const row = ([key, text]) => element("div.row", {}, element("kbd", {}, key), element("span", {}, text));
  const sections = table(screen).map(([name, rows]) =>
    element("section", {}, element("h3", {}, name), ...rows.map(([, shown, text]) => row([shown, text]))));
  sections.at(-1).append(element("h3", {}, "Mouse and fingers"), ...MOUSE.map(row));
  return element("div.help", { hidden: true, role: "dialog", "aria-label": "Keys", onclick: () => screen.help() }, ...sections);
}
