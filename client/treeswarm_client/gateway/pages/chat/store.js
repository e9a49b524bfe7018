// Keeps conversations in this browser, one entry each, so that two tabs never overwrite each other's.

import { isConversation } from "./conversation.js";

const PREFIX = "treeswarm-chat-";
const SETTINGS = "treeswarm-chat-settings";
const VIEW = "treeswarm-chat-view";
// While an answer comes, it is written this often: what came is kept if the page is closed or the browser ends.
const WRITE_MS = 400;

export class Store {
  /**
   * `onChange` is called when another tab changed a conversation, and `onFull` with whether the browser has no more room.  What
   * `isBusy` says of a conversation's id, that it is being answered here, keeps other tabs' changes away from it.
   */
  constructor({ onChange, onFull, isBusy }) {
    Object.assign(this, { onFull, isBusy });
    this.conversations = new Map();
    this.waiting = new Map();
    for (let i = 0; i < localStorage.length; i += 1) this.read(localStorage.key(i));
    window.addEventListener("storage", ({ key }) => {
      if (key === null) this.conversations.clear();
      else if (!key.startsWith(PREFIX) || !this.read(key)) return;
      onChange();
    });
    window.addEventListener("pagehide", () => this.writeAll());
    document.addEventListener("visibilitychange", () => document.hidden && this.writeAll());
  }

  /** Read one entry, and return whether it is a conversation's. */
  read(key) {
    if (!key.startsWith(PREFIX) || key === SETTINGS || key === VIEW) return false;
    const id = key.slice(PREFIX.length);
    const conversation = parse(localStorage.getItem(key));
    if (this.isBusy(id)) return false;
    if (isConversation(conversation) && conversation.id === id) this.conversations.set(id, conversation);
    else this.conversations.delete(id);
    return true;
  }

  /** Return all conversations, the latest first. */
  list() {
    return [...this.conversations.values()].sort((a, b) => b.updated - a.updated);
  }

  /** Keep a conversation, at once or, while an answer comes, soon. */
  save(conversation, soon = false) {
    this.conversations.set(conversation.id, conversation);
    if (soon) {
      if (!this.waiting.has(conversation.id)) this.waiting.set(conversation.id, setTimeout(() => this.write(conversation), WRITE_MS));
    } else this.write(conversation);
  }

  write(conversation) {
    clearTimeout(this.waiting.get(conversation.id));
    this.waiting.delete(conversation.id);
    this.put(PREFIX + conversation.id, conversation);
  }

  writeAll() {
    for (const id of [...this.waiting.keys()]) this.write(this.conversations.get(id));
  }

  remove(conversation) {
    clearTimeout(this.waiting.get(conversation.id));
    this.waiting.delete(conversation.id);
    this.conversations.delete(conversation.id);
    localStorage.removeItem(PREFIX + conversation.id);
  }

  put(key, value) {
    try {
      localStorage.setItem(key, JSON.stringify(value));
      this.onFull(false);
    } catch {
      this.onFull(true);
    }
  }

  /** Settings of the next new conversation: those that were last used. */
  get settings() {
    return parse(localStorage.getItem(SETTINGS)) ?? {};
  }

  set settings(value) {
    this.put(SETTINGS, value);
  }

  /** What of the page is shown: which panels, and whether traversals have colours. */
  get view() {
    return parse(localStorage.getItem(VIEW)) ?? {};
  }

  set view(value) {
    this.put(VIEW, value);
  }
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
