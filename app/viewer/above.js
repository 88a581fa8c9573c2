// What moves above a picture: crosshair, brush, prompts, and a mask that is proposed.

import { EDITS } from "./model.js";
import { dashed } from "./overlay.js";
import { decode } from "./rle.js";

const ACCENT = "#58c7d9";
const INSIDE = "#7be08a", OUTSIDE = "#ff8f8f";

export function drawAbove(pane) {
  const { topPen: pen, top, model } = pane;
  pen.clearRect(0, 0, top.width, top.height);
  if (model.crosshair) crosshair(pane, pen);
  if (pane.plane !== "axial") return;
  if (model.prompt?.z === model.at[0]) prompts(pane, pen, model.prompt);
  if (model.proposal?.z === model.at[0]) proposal(pane, pen, model.proposal);
  if (EDITS.includes(model.tool) && model.hover?.voxel) brush(pane, pen, model.hover.voxel);
}

/** Lines through the crosshair's voxel, open around it so that nothing is covered there. */
function crosshair(pane, pen) {
  const { ratio, top } = pane;
  const [x, y] = pane.at(pane.model.at).map((value) => Math.round(value));
  const gap = 9 * ratio, line = Math.max(1, Math.round(ratio));
  pen.fillStyle = ACCENT;
  pen.globalAlpha = 0.55;
  pen.fillRect(0, y, Math.max(0, x - gap), line);
  pen.fillRect(x + gap, y, top.width, line);
  pen.fillRect(x, 0, line, Math.max(0, y - gap));
  pen.fillRect(x, y + gap, line, top.height);
  pen.globalAlpha = 1;
}

function brush(pane, pen, voxel) {
  const place = pane.place();
  const [x, y] = pane.at(voxel);
  const { tool, brush: diameter, organ } = pane.model;
  pen.lineWidth = 1.5 * pane.ratio;
  pen.strokeStyle = tool === "erase" ? "#fff" : pane.model.organOf(organ)?.colour ?? "#fff";
  pen.beginPath();
  pen.ellipse(x, y, (diameter / 2) * place.columnPx, (diameter / 2) * place.rowPx, 0, 0, 7);
  pen.stroke();
}

function prompts(pane, pen, { z, points, box }) {
  const { ratio } = pane;
  pen.lineWidth = 2 * ratio;
  if (box) {
    const [x0, y0, x1, y1] = box;
    const place = pane.place();
    const [left, top] = pane.at([z, y0, x0]), [right, bottom] = pane.at([z, y1, x1]);
    pen.strokeStyle = ACCENT;
    pen.strokeRect(left - place.columnPx / 2, top - place.rowPx / 2, right - left + place.columnPx, bottom - top + place.rowPx);
  }
  for (const [x, y, inside] of points) {
    const [column, row] = pane.at([z, y, x]);
    pen.fillStyle = inside ? INSIDE : OUTSIDE;
    pen.strokeStyle = "#0b0f12";
    pen.beginPath();
    pen.arc(column, row, 6.5 * ratio, 0, 7);
    pen.fill();
    pen.stroke();
    pen.fillStyle = "#0b0f12";
    pen.fillRect(column - 3.5 * ratio, row - ratio * 0.8, 7 * ratio, 1.6 * ratio);
    if (inside) pen.fillRect(column - ratio * 0.8, row - 3.5 * ratio, 1.6 * ratio, 7 * ratio);
  }
}

function proposal(pane, pen, proposed) {
  const { geometry, model } = pane;
  proposed.mask ??= decode(proposed.rle, geometry.width * geometry.height).map((value) => (value ? 1 : 0));
  dashed(pen, pane.place(), proposed.mask, geometry, model.organOf(proposed.value)?.colour ?? "#fff", pane.ratio);
}
