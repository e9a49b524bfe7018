// The gateway's events, read with fetch: an EventSource could not send a key.

const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 15000;
// The gateway says something every 15 s.
const SILENCE_MS = 40000;
const KEPT = "treeswarm-key";

/**
 * Read events for ever.  `hear` gets each; `state` is told `live`, `connecting`, `waiting` with the seconds until the
 * next attempt, or `locked` with whether a key was refused.
 */
export class Feed {
  constructor(hear, state) {
    this.hear = hear;
    this.state = state;
    this.pause = FIRST_PAUSE_MS;
    this.wake = () => {};
    window.addEventListener("online", () => this.wake());
  }

  async run() {
    for (;;) {
      this.state("connecting");
      let why = "";
      try {
        const answer = await this.attempt();
        if (answer.status === 401) {
          const had = sessionStorage.getItem(KEPT) !== null;
          sessionStorage.removeItem(KEPT);
          this.state("locked", had);
          await this.asleep(null);
          continue;
        }
        why = answer.status === 429 ? "too many viewers" : answer.ok ? "" : `status ${answer.status}`;
        if (answer.ok) await this.read(answer.body);
      } catch (error) {
        why = ""; // what browsers say of lost connections helps nobody
      } finally {
        this.ending?.abort();
      }
      // All at once, the viewers of a gateway that comes back would be a crowd.
      await this.waiting(this.pause * (0.75 + Math.random() / 2), why);
      this.pause = Math.min(2 * this.pause, LONGEST_PAUSE_MS);
    }
  }

  unlock(key) {
    sessionStorage.setItem(KEPT, key);
    this.pause = FIRST_PAUSE_MS;
    this.wake();
  }

  async attempt() {
    this.ending = new AbortController();
    const key = sessionStorage.getItem(KEPT);
    const headers = { Accept: "text/event-stream", ...(key === null ? {} : { Authorization: `Bearer ${key}` }) };
    return fetch("events", { headers, cache: "no-store", signal: this.ending.signal });
  }

  async read(body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    this.state("live");
    for (;;) {
      const watchdog = setTimeout(() => this.ending.abort(), SILENCE_MS);
      const { value, done } = await reader.read().finally(() => clearTimeout(watchdog));
      if (done) return;
      this.pause = FIRST_PAUSE_MS;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (part.startsWith("data: ")) this.hear(JSON.parse(part.slice(6)));
      }
    }
  }

  async waiting(ms, why) {
    const end = performance.now() + ms;
    for (let left = ms; left > 0; left = end - performance.now()) {
      this.state("waiting", Math.ceil(left / 1000), why);
      if (await this.asleep(Math.min(left, 1000))) return;
    }
  }

  /** Whether it was woken. */
  asleep(ms) {
    return new Promise((resolve) => {
      const timer = ms === null ? null : setTimeout(() => resolve(false), ms);
      this.wake = () => {
        clearTimeout(timer);
        resolve(true);
      };
    });
  }
}
