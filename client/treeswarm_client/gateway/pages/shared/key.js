// The API key of the gateway: kept for this tab only, and asked for in a dialog.

import { byId, setText } from "./dom.js";

const STORAGE_KEY = "treeswarm-key";

/** Return the header with the API key that was entered in this tab, or none. */
export function keyHeaders() {
  const key = sessionStorage.getItem(STORAGE_KEY);
  return key === null ? {} : { Authorization: `Bearer ${key}` };
}

/** Forget the key, and return whether there was one. */
export function forgetKey() {
  const hadKey = sessionStorage.getItem(STORAGE_KEY) !== null;
  sessionStorage.removeItem(STORAGE_KEY);
  return hadKey;
}

/** Ask for a key when called, with whether the last one was refused.  `onKey` is called when one was entered. */
export function keyDialog(onKey) {
  const dialog = byId("key-dialog");
  const input = byId("key-input");
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const key = input.value.trim();
    if (!/^[\x21-\x7e]+$/.test(key)) return setText(byId("key-error"), "A key has only letters, digits and punctuation, without spaces.");
    sessionStorage.setItem(STORAGE_KEY, key);
    dialog.close();
    return onKey();
  });
  byId("key-later").addEventListener("click", () => dialog.close());
  return (refused) => {
    setText(byId("key-error"), refused ? "That key was refused." : "");
    input.value = "";
    input.setAttribute("aria-invalid", refused);
    if (!dialog.open) dialog.showModal();
    input.focus();
  };
}
