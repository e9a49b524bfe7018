// Counts tokens of all generations since the page was opened, and the speed of the last minute.

const WINDOW_S = 60;
// The speed is averaged over this time: a shorter one makes it jump, a longer one makes it lag.
const SPEED_S = 5;

export class Totals {
  constructor(now) {
    this.tokens = 0;
    this.traversals = 0;
    this.since = now;
    this.seconds = new Map();
  }

  /** Count the tokens of one traversal; `now` is in seconds. */
  add(tokens, now) {
    this.tokens += tokens;
    this.traversals += 1;
    const second = Math.floor(now);
    this.seconds.set(second, (this.seconds.get(second) ?? 0) + tokens);
    for (const old of this.seconds.keys()) if (old < second - WINDOW_S - 1) this.seconds.delete(old);
  }

  get perTraversal() {
    return this.traversals ? this.tokens / this.traversals : null;
  }

  /** Return the tokens of each of the last 60 whole seconds, the oldest first. */
  lastMinute(now) {
    const last = Math.floor(now) - 1;
    return Array.from({ length: WINDOW_S }, (_, i) => this.seconds.get(last - WINDOW_S + 1 + i) ?? 0);
  }

  /** Return the current speed in tokens per second. */
  speed(now) {
    const recent = this.lastMinute(now).slice(-SPEED_S);
    const whole = Math.max(1, Math.min(SPEED_S, Math.floor(now) - Math.floor(this.since)));
    return recent.slice(-whole).reduce((sum, tokens) => sum + tokens, 0) / whole;
  }
}

/** Return a line through values, as the points of an SVG polyline in a box. */
export function line(values, width, height) {
  const most = Math.max(1, ...values);
  return values.map((value, i) => `${((width * i) / (values.length - 1)).toFixed(1)},${(height - 2 - ((height - 4) * value) / most).toFixed(1)}`).join(" ");
}
