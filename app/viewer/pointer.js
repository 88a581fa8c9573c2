// Mouse, pen and fingers on a picture. Left: the tool. Middle: pan. Right: window. Wheel: slices, with Ctrl zoom.
// One finger: the tool, or slices where the tool is to place; two fingers: zoom and pan.

const NOTCH = 100; // pixels of a wheel's notch, about
const PAD = 40; // pixels on a touch pad, which sends many small ones, for one slice
const LINE = 33; // pixels of a wheel that counts in lines
const FINGER = 9; // pixels of a finger's way for one slice
const STILL = 4; // pixels a click may move
const WINDOW_STEP = 2; // HU a pixel of a drag

export function listen(pane, screen) {
  const { element } = pane;
  const pointers = new Map();
  let drag = null;
  let travelled = 0;

  element.addEventListener("wheel", (event) => {
    event.preventDefault();
    if (event.ctrlKey || event.metaKey) {
      screen.go.zoom(pane, Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.002)), event.clientX, event.clientY);
      return;
    }
    const pixels = (event.deltaY || event.deltaX) * (event.deltaMode ? LINE : 1);
    const whole = Math.abs(pixels) >= NOTCH / 2; // a wheel with notches, whatever the system says a notch is
    if (Math.sign(pixels) !== Math.sign(travelled)) travelled = 0;
    travelled = whole ? 0 : travelled + pixels;
    const notches = Math.sign(pixels) * Math.max(1, Math.floor(Math.abs(pixels) / NOTCH));
    const steps = whole ? notches : Math.trunc(travelled / PAD);
    if (!whole) travelled -= steps * PAD;
    if (steps) screen.go.scroll(pane.plane, -steps);
  }, { passive: false });

  element.addEventListener("contextmenu", (event) => event.preventDefault());

  element.addEventListener("pointerdown", (event) => {
    if (event.target.closest("button")) return;
    event.preventDefault();
    screen.attend(pane);
    element.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, event);
    if (pointers.size === 2) {
      screen.tools.cancel(drag?.kind);
      drag = { kind: "pinch", ...spread(pointers) };
    } else if (pointers.size === 1) {
      drag = { kind: kindOf(event), x: event.clientX, y: event.clientY, fromX: event.clientX, fromY: event.clientY, rest: 0 };
      screen.tools.begin(pane, drag.kind, event);
    }
  });

  element.addEventListener("pointermove", (event) => {
    screen.hover(pane, event);
    if (!pointers.has(event.pointerId)) return;
    pointers.set(event.pointerId, event);
    if (drag.kind === "pinch") {
      if (pointers.size < 2) return; // one finger has left
      const now = spread(pointers);
      screen.go.zoom(pane, now.distance / drag.distance, now.x, now.y);
      screen.go.pan(pane, now.x - drag.x, now.y - drag.y);
      Object.assign(drag, now);
      return;
    }
    const dx = event.clientX - drag.x, dy = event.clientY - drag.y;
    Object.assign(drag, { x: event.clientX, y: event.clientY });
    move(event, dx, dy);
  });

  element.addEventListener("pointerup", (event) => finish(event, true));
  element.addEventListener("pointercancel", (event) => finish(event, false));
  element.addEventListener("pointerleave", () => screen.hover(pane, null));

  function kindOf(event) {
    if (event.button === 2) return "window";
    if (event.button === 1 || event.shiftKey) return "pan";
    if (event.pointerType === "touch" && screen.model.tool === "place") return "slices";
    return screen.tools.on(pane);
  }

  function move(event, dx, dy) {
    if (drag.kind === "window") screen.adjustWindow(dx * WINDOW_STEP, dy * WINDOW_STEP);
    else if (drag.kind === "pan") screen.go.pan(pane, dx, dy);
    else if (drag.kind === "slices") {
      drag.rest += dy;
      const steps = Math.trunc(drag.rest / FINGER);
      drag.rest -= steps * FINGER;
      if (steps) screen.go.scroll(pane.plane, -steps);
    } else screen.tools.drag(pane, drag.kind, event);
  }

  function finish(event, kept) {
    if (!pointers.delete(event.pointerId) || !drag || pointers.size) return;
    const still = Math.hypot(event.clientX - drag.fromX, event.clientY - drag.fromY) <= STILL;
    if (drag.kind !== "pinch") kept ? screen.tools.end(pane, drag.kind, event, still) : screen.tools.cancel(drag.kind);
    drag = null;
  }
}

function spread(pointers) {
  const [a, b] = [...pointers.values()];
  return {
    x: (a.clientX + b.clientX) / 2,
    y: (a.clientY + b.clientY) / 2,
    distance: Math.max(1, Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY)),
  };
}
