// Reads the gateway's events with fetch, because an EventSource cannot send an API key.

import { forgetKey, keyHeaders } from "../pages/shared/key.js";

const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 15000;
// The connection counts as lost after this time; the gateway sends something every 15 s.
const SILENCE_MS = 40000;

/**
 * Reads `events`, an address, forever and passes each to `onEvent`.  `onState` receives `live`, `connecting`, `waiting` with the seconds
 * until the next attempt and a reason, or `locked` with whether a key was refused.
 */
export class Feed {
  constructor(onEvent, onState, events) {
    this.onEvent = onEvent;
    this.onState = onState;
    this.events = events;
    this.pause = FIRST_PAUSE_MS;
    this.wake = () => {};
    window.addEventListener("online", () => this.wake());
  }

  async run() {
    for (;;) {
      this.onState("connecting");
      let reason = "";
      try {
        const response = await this.connect();
        if (response.status === 401) {
          this.onState("locked", forgetKey());
          await this.sleep(null);
          continue;
        }
        reason = response.status === 429 ? "too many viewers" : response.ok ? "" : `status ${response.status}`;
        if (response.ok) await this.read(response.body);
      } catch (error) {
        reason = ""; // browsers' texts for lost connections do not help users
      } finally {
        this.controller?.abort();
      }
      // The pause is random, so that not all viewers reconnect at the same moment when the gateway comes back.
      await this.countDown(this.pause * (0.75 + Math.random() / 2), reason);
      this.pause = Math.min(2 * this.pause, LONGEST_PAUSE_MS);
    }
  }

  /** Try again at once, with the key that was entered. */
  unlock() {
    this.pause = FIRST_PAUSE_MS;
    this.wake();
  }

  async connect() {
    this.controller = new AbortController();
    const headers = { Accept: "text/event-stream", ...keyHeaders() };
    return fetch(this.events, { headers, cache: "no-store", signal: this.controller.signal });
  }

  async read(body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    this.onState("live");
    for (;;) {
      const watchdog = setTimeout(() => this.controller.abort(), SILENCE_MS);
      const { value, done } = await reader.read().finally(() => clearTimeout(watchdog));
      if (done) return;
      this.pause = FIRST_PAUSE_MS;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (part.startsWith("data: ")) this.onEvent(JSON.parse(part.slice(6)));
      }
    }
  }

  async countDown(ms, reason) {
    const end = performance.now() + ms;
    for (let left = ms; left > 0; left = end - performance.now()) {
      this.onState("waiting", Math.ceil(left / 1000), reason);
      if (await this.sleep(Math.min(left, 1000))) return;
    }
  }

  /** Sleep, forever if `ms` is null, and return whether `wake` ended it. */
  sleep(ms) {
    return new Promise((resolve) => {
      const timer = ms === null ? null : setTimeout(() => resolve(false), ms);
      this.wake = () => {
        clearTimeout(timer);
        resolve(true);
      };
    });
  }
}
