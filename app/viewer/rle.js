// The labels of one slice as text: base64 of little-endian uint32 pairs (value, run length). Twin of app/rle.py.

export function encode(labels) {
  const pairs = [];
  for (let start = 0; start < labels.length; ) {
    let end = start + 1;
    while (end < labels.length && labels[end] === labels[start]) end++;
    pairs.push(labels[start], end - start);
    start = end;
  }
  const bytes = new Uint8Array(Uint32Array.from(pairs).buffer);
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
}

export function decode(text, length) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const pairs = new Uint32Array(bytes.buffer);
  const labels = new Uint8Array(length);
  let at = 0;
  for (let i = 0; i < pairs.length; i += 2) labels.fill(pairs[i], at, (at += pairs[i + 1]));
  if (at !== length) throw new RangeError("the runs do not fill the slice");
  return labels;
}
