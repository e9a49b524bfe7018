// Follows the state of the gateway: whether it can be reached, whether it needs a key, and whether the swarm is complete.

import { byId, setText } from "../shared/dom.js";
import { forgetKey, keyDialog, keyHeaders } from "../shared/key.js";

// Seconds between two looks.  A stream of events would hold one of the few connections that a browser has per host.
const LOOK_MS = 10000;
const WORDS = { ready: "ready", waiting: "waiting for nodes", locked: "locked", lost: "not reachable" };

export class Gateway {
  /** `onAbout` is called with what the gateway says about itself, after every look that was answered. */
  constructor(onAbout) {
    this.onAbout = onAbout;
    this.about = null;
    this.timer = null;
    this.askForKey = keyDialog(() => this.look());
    byId("unlock").addEventListener("click", () => this.askForKey(false));
    document.addEventListener("visibilitychange", () => document.hidden || this.look());
    window.addEventListener("online", () => this.look());
  }

  async look() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => document.hidden || this.look(), LOOK_MS);
    try {
      const response = await fetch("about", { headers: keyHeaders(), cache: "no-store" });
      if (response.status === 401) return this.lock();
      if (!response.ok) throw new Error(`status ${response.status}`);
      this.about = await response.json();
    } catch {
      return this.show("lost", "The gateway cannot be reached. This page looks for it every ten seconds.");
    }
    this.show(this.about.why ? "waiting" : "ready", this.about.why);
    return this.onAbout(this.about);
  }

  /** Ask for a key, unless the person has just closed the dialog. */
  lock() {
    const refused = forgetKey();
    const isNew = byId("link").dataset.state !== "locked";
    this.show("locked", "");
    if (isNew || refused) this.askForKey(refused);
  }

  show(state, why) {
    const link = byId("link");
    link.dataset.state = state;
    setText(link, WORDS[state]);
    byId("unlock").hidden = state !== "locked";
    byId("alarm").hidden = !why;
    setText(byId("alarm"), why ? asSentence(why) : "");
  }
}

/** Return an error's words, which begin in lower case, as a sentence. */
export function asSentence(words) {
  const text = words.trim();
  return `${text.slice(0, 1).toUpperCase()}${text.slice(1)}${/[.!?…]$/.test(text) ? "" : "."}`;
}
