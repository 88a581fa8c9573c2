// Finished actions on their way to Python: each is sent until the scene says that it was seen.

const PATIENCE = 5000; // milliseconds until what was not seen is sent again, for the connection may have been away

export class Outbox {
  constructor(send, seen) {
    Object.assign(this, { send, last: seen, waiting: [], timer: 0 });
  }

  put(event) {
    this.waiting.push({ ...event, id: ++this.last });
    this.again();
  }

  /** The scene's number of the last event that was taken; what is newer was lost on its way and goes again. */
  seen(number) {
    this.last = Math.max(this.last, number);
    this.waiting = this.waiting.filter((event) => event.id > number);
  }

  again() {
    clearTimeout(this.timer);
    if (!this.waiting.length) return;
    this.timer = setTimeout(() => this.again(), PATIENCE);
    this.send(this.waiting);
  }

  close() {
    clearTimeout(this.timer);
  }
}
