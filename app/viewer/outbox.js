// Finished actions on their way to Python: each is sent until the scene says that it was taken. Edits are a clinician's
// work: while the app does not answer they are kept in the browser's tab, also over a reload and a new viewer.

const PATIENCE = 5000; // milliseconds until what was not taken is sent again, for the connection may have been away
const SOON = 2500; // milliseconds in which an answer is to be expected

const unsaved = new Map(); // by the viewer's key, edits that were not taken; beside them a copy that survives a reload

export class Outbox {
  /** @param key of the viewer; @param send takes the list of all that waits; @param late called when an answer is overdue. */
  constructor(key, send, late) {
    Object.assign(this, { key, send, late, timer: 0, waiting: unsaved.get(key) ?? stored(key) });
  }

  put(event) {
    this.waiting.push({ ...event, id: unique(), at: Date.now() });
    this.keep();
    this.again();
    setTimeout(this.late, SOON);
  }

  /** Ids of events that were taken. */
  seen(ids) {
    const before = this.waiting.length;
    this.waiting = this.waiting.filter((event) => !ids.includes(event.id));
    if (this.waiting.length < before) this.keep();
  }

  again() {
    clearTimeout(this.timer);
    if (!this.waiting.length) return;
    this.timer = setTimeout(() => this.again(), PATIENCE);
    this.send(this.waiting);
  }

  edits() {
    return this.waiting.filter(({ kind }) => kind === "edit");
  }

  /** How many edits should have been answered by now. */
  overdue() {
    return this.edits().filter(({ at }) => Date.now() - at >= SOON).length;
  }

  keep() {
    const edits = this.edits();
    unsaved.set(this.key, edits);
    try {
      if (edits.length) sessionStorage.setItem(place(this.key), JSON.stringify(edits));
      else sessionStorage.removeItem(place(this.key));
    } catch {
      // The tab's store is full: they are in the page's memory still, and who leaves it is asked.
    }
  }

  close() {
    clearTimeout(this.timer);
  }
}

function stored(key) {
  try {
    return JSON.parse(sessionStorage.getItem(place(key)) ?? "[]");
  } catch {
    return []; // a browser that was told to store nothing
  }
}

const place = (key) => `surm unsaved ${key}`;
const unique = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
