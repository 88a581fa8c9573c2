// Arithmetic of pixels: grey values of HU, colours of labels, what is right and wrong, and the edges between labels.

export const TRUE_POSITIVE = 1;
export const FALSE_POSITIVE = 2;
export const FALSE_NEGATIVE = 3;
export const WRONG_ORGAN = 4; // a false positive of one organ and a false negative of another

/** Pixels (ABGR, as a Uint32Array sees them) for each of the 65536 HU of int16, through a window in HU. */
export function greyTable(width, centre, table = new Uint32Array(65536)) {
  const low = centre - width / 2;
  for (let i = 0; i < 65536; i++) {
    const grey = Math.max(0, Math.min(255, Math.round(((i - 32768 - low) / width) * 255)));
    table[i] = 0xff000000 | (grey << 16) | (grey << 8) | grey;
  }
  return table;
}

/** ABGR of "#rrggbb" with an opacity from 0 to 1. */
export function packed(colour, opacity) {
  const rgb = parseInt(colour.slice(1), 16);
  const alpha = Math.round(opacity * 255);
  return ((alpha << 24) | ((rgb & 255) << 16) | (rgb & 0xff00) | (rgb >> 16)) >>> 0;
}

/** Pixels for each label value; a hidden organ, and what is no organ, is clear. */
export function colourTable(organs, hidden, opacity) {
  const table = new Uint32Array(256);
  for (const organ of organs) if (!hidden.has(organ.value)) table[organ.value] = packed(organ.colour, opacity);
  return table;
}

export function paintGrey(values, table, pixels) {
  for (let i = 0; i < pixels.length; i++) pixels[i] = table[values[i] + 32768];
}

export function paintLabels(labels, table, pixels) {
  for (let i = 0; i < pixels.length; i++) pixels[i] = table[labels[i]];
}

/** Per voxel how the prediction stands to the reference, of the organs that are shown (`visible`, by label value). */
export function judge(prediction, reference, visible, out) {
  for (let i = 0; i < out.length; i++) {
    const said = visible[prediction[i]] ? prediction[i] : 0;
    const truth = visible[reference[i]] ? reference[i] : 0;
    if (said === truth) out[i] = said ? TRUE_POSITIVE : 0;
    else if (!truth) out[i] = FALSE_POSITIVE;
    else out[i] = said ? WRONG_ORGAN : FALSE_NEGATIVE;
  }
  return out;
}

/** The labels of organs that are shown; the others become background. */
export function onlyVisible(labels, visible, out) {
  for (let i = 0; i < out.length; i++) out[i] = visible[labels[i]] ? labels[i] : 0;
  return out;
}

/**
 * Edges of each label on a picture: by value a flat list of (across, fixed, from, to, side). `across` 1 is a line along a
 * row boundary, 0 along a column boundary; `side` says on which side of the line the label lies (1 after, -1 before).
 */
export function edges(labels, width, height) {
  const found = new Map();
  const add = (value, ...edge) => {
    if (!value) return;
    if (!found.has(value)) found.set(value, []);
    found.get(value).push(...edge);
  };
  const scan = (across, lines, length, step, stride) => {
    for (let fixed = 0; fixed <= lines; fixed++) {
      let from = 0, before = 0, after = 0;
      for (let k = 0; k <= length; k++) {
        const at = fixed * stride + k * step;
        let a = 0, b = 0;
        if (k < length) {
          a = fixed > 0 ? labels[at - stride] : 0;
          b = fixed < lines ? labels[at] : 0;
        }
        if (a === before && b === after) continue;
        if (before !== after) {
          add(before, across, fixed, from, k, -1);
          add(after, across, fixed, from, k, 1);
        }
        from = k;
        before = a;
        after = b;
      }
    }
  };
  scan(1, height, width, 1, width);
  scan(0, width, height, width, 1);
  return found;
}

/** Runs of one value along the rows of a picture, as a flat list of (row, from, to). */
export function runs(values, width, wanted) {
  const found = [];
  for (let i = 0; i < values.length; i++) {
    if (values[i] !== wanted) continue;
    const row = Math.floor(i / width), from = i - row * width;
    while (i + 1 < (row + 1) * width && values[i + 1] === wanted) i++;
    found.push(row, from, i - row * width + 1);
  }
  return found;
}
