// The error map's areas: told apart by their pattern alone, and by colour-blind-safe colours as well.

import { FALSE_NEGATIVE, FALSE_POSITIVE, TRUE_POSITIVE, WRONG_ORGAN } from "./render.js";

export const ERRORS = [
  { kind: TRUE_POSITIVE, name: "Agrees", title: "true positive", colour: "#9fb4c4", draw: plain },
  { kind: FALSE_POSITIVE, name: "Too much", title: "false positive", colour: "#ff9a2e", draw: stripes },
  { kind: FALSE_NEGATIVE, name: "Missed", title: "false negative", colour: "#49b6ff", draw: dots },
  { kind: WRONG_ORGAN, name: "Other organ", title: "predicted as another organ", colour: "#f4f06a", draw: grid },
];

const TILE = 8; // CSS pixels

/** A canvas pattern of one error, sharp at `ratio` device pixels to a CSS pixel. */
export function pattern(context, error, ratio, opacity) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = Math.round(TILE * ratio);
  const pen = tile.getContext("2d");
  pen.scale(tile.width / TILE, tile.height / TILE);
  pen.fillStyle = pen.strokeStyle = error.colour;
  pen.lineWidth = 1.8;
  pen.globalAlpha = opacity;
  error.draw(pen);
  return context.createPattern(tile, "repeat");
}

function plain(pen) {
  pen.globalAlpha *= 0.55;
  pen.fillRect(0, 0, TILE, TILE);
}

function wash(pen) {
  const opacity = pen.globalAlpha;
  pen.globalAlpha = opacity * 0.4;
  pen.fillRect(0, 0, TILE, TILE);
  pen.globalAlpha = Math.min(1, opacity * 1.8);
}

function stripes(pen) {
  wash(pen);
  pen.beginPath();
  for (const shift of [-TILE, 0, TILE]) {
    pen.moveTo(shift - 1, TILE + 1);
    pen.lineTo(shift + TILE + 1, -1);
  }
  pen.stroke();
}

function dots(pen) {
  wash(pen);
  for (const [x, y] of [[2, 2], [6, 6]]) {
    pen.beginPath();
    pen.arc(x, y, 1.4, 0, 7);
    pen.fill();
  }
}

function grid(pen) {
  wash(pen);
  pen.lineWidth = 1.2;
  pen.strokeRect(0, 0, TILE, TILE);
  pen.strokeRect(TILE / 2, 0, 0, TILE);
}
