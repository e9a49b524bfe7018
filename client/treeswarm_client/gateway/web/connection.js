// The connection of a page to the gateway: its events, the key it may need, and the line that says how it is.

import { byId, setText } from "./dom.js";
import { Feed } from "./feed.js";

/** Pass every event to `handle`, and call `onState` with each new state of the connection.  Returns the feed. */
export function connect(handle, onState, events = "events") {
  const dialog = byId("key-dialog");
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
  }, events);

  function askForKey(refused) {
    setText(byId("key-error"), refused ? "That key was refused." : "");
    const input = byId("key-input");
    input.value = "";
    input.setAttribute("aria-invalid", refused);
    if (!dialog.open) dialog.showModal();
    input.focus();
  }

  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const key = byId("key-input").value.trim();
    if (!/^[\x21-\x7e]+$/.test(key)) return setText(byId("key-error"), "A key has only letters, digits and punctuation, without spaces.");
    dialog.close();
    return feed.unlock(key);
  });
  byId("key-later").addEventListener("click", () => dialog.close());
  byId("unlock").addEventListener("click", () => askForKey(false));
  feed.run();
  return feed;
}
