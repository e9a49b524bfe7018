// The connection of the map to the gateway: its events, the key it may need, and the line that says how it is.

import { byId, setText } from "../pages/shared/dom.js";
import { keyDialog } from "../pages/shared/key.js";
import { Feed } from "./feed.js";

/** Pass every event to `handle`, and call `onState` with each new state of the connection. */
export function connect(handle, onState) {
  const askForKey = keyDialog(() => feed.unlock());
  const feed = new Feed(handle, (state, detail, reason) => {
    const link = byId("link");
    link.dataset.state = state;
    byId("unlock").hidden = state !== "locked";
    document.body.classList.toggle("stale", state !== "live");
    onState(state);
    if (state === "waiting") {
      // Screen readers announce the state once, not the count down.
      if (!link.textContent.startsWith("reconnecting")) setText(link, "reconnecting");
      link.dataset.rest = `${reason ? `${reason}, ` : ""}${detail} s`;
      return;
    }
    delete link.dataset.rest;
    setText(link, { live: "live", connecting: link.textContent === "reconnecting" ? "reconnecting" : "connecting", locked: "locked" }[state]);
    if (state === "locked") askForKey(detail);
  }, "events");
  byId("unlock").addEventListener("click", () => askForKey(false));
  feed.run();
}
