// Draws the list of conversations, and what can be done with the one that is shown.

import { byId, el, setText, updateChildren } from "../shared/dom.js";
import { icon, iconButton } from "./controls.js";
import { asJson, asMarkdown, fileName, titleOf } from "./conversation.js";

const DAY_MS = 86_400_000;

export class Sidebar {
  /** `actions` has `rename` and `remove`, which take the conversation that is shown. */
  constructor(actions) {
    this.conversation = null;
    this.tools = [
      iconButton("edit", "Rename the conversation", () => this.startRename()),
      iconButton("down", "Export as Markdown", () => download(fileName(this.conversation, "md"), asMarkdown(this.conversation), "text/markdown")),
      iconButton("copy", "Export as JSON", () => download(fileName(this.conversation, "json"), asJson(this.conversation), "application/json")),
      iconButton("trash", "Delete the conversation", () => actions.remove(this.conversation)),
    ];
    this.tools[2].replaceChildren(icon("braces"));
    byId("talk-tools").append(...this.tools);
    byId("new").prepend(icon("plus"));
    byId("rename").addEventListener("submit", (event) => {
      event.preventDefault();
      actions.rename(this.conversation, byId("new-title").value.trim());
      this.endRename();
    });
    byId("rename").addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      this.endRename();
    });
    byId("new-title").addEventListener("blur", ({ relatedTarget }) => byId("rename").contains(relatedTarget) || this.endRename(false));
  }

  /** Draw the list, in which `isBusy` says which conversations are being answered. */
  draw(conversations, current, isBusy) {
    if (this.conversation !== current) this.endRename(false);
    this.conversation = current;
    const isKept = conversations.includes(current);
    setText(byId("title"), isKept ? titleOf(current) : "");
    byId("title").parentElement.hidden = !isKept;
    const rows = withDays(conversations);
    updateChildren(byId("conversations"), rows, (row) => row.day ?? row.conversation.id, makeRow, (line, row) => {
      if (row.day) return;
      const link = line.firstChild;
      setText(link.lastChild, titleOf(row.conversation));
      line.classList.toggle("busy", isBusy(row.conversation));
      if (row.conversation === current) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    });
  }

  startRename() {
    byId("rename").hidden = false;
    byId("title").hidden = true;
    byId("new-title").value = titleOf(this.conversation);
    byId("new-title").select();
    byId("new-title").focus();
  }

  endRename(focus = true) {
    if (byId("rename").hidden) return;
    byId("rename").hidden = true;
    byId("title").hidden = false;
    if (focus) this.tools[0].focus();
  }
}

/** Return the rows of the list: conversations, and the day before the first one of each. */
function withDays(conversations) {
  const today = new Date().setHours(0, 0, 0, 0);
  const rows = [];
  let last = "";
  for (const conversation of conversations) {
    const days = Math.ceil((today - conversation.updated) / DAY_MS);
    const day = days <= 0 ? "Today" : days === 1 ? "Yesterday" : days <= 7 ? "This week" : new Date(conversation.updated).toLocaleDateString("en", { month: "long", year: "numeric" });
    if (day !== last) rows.push({ day });
    last = day;
    rows.push({ conversation });
  }
  return rows;
}

function makeRow(row) {
  if (row.day) return el("li", { class: "day" }, row.day);
  return el("li", {}, el("a", { href: `#${row.conversation.id}` }, el("span")));
}

/** Save a text as a file of the person's. */
function download(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], { type: `${type};charset=utf-8` }));
  el("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
