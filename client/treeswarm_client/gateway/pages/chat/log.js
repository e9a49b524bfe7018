// Draws the messages of a conversation, with all that can be done with them.

import { el, plural, setText, updateChildren } from "../shared/dom.js";
import { copyText, drawMarkdown, drawPlain, drawVerbatim, Trips } from "./markdown/draw.js";
import { fitHeight, iconButton, textButton } from "./controls.js";
import { siblingsOf } from "./conversation.js";
import { figuresOf } from "./answer.js";

const TALLEST_EDIT_PX = 400;
// A failure, by HTTP status: what went wrong, before the gateway's own words.
const FAILURES = { 0: "", 400: "The gateway refused this request: ", 401: "", 413: "The conversation is too large: ", 429: "The gateway is busy: ", 503: "The swarm cannot answer now: " };

/** The messages.  `actions` has a function for each thing that a person can do with one. */
export class Log {
  constructor(home, actions) {
    this.home = home;
    this.actions = actions;
    this.conversation = null;
  }

  draw(conversation, branch) {
    this.conversation = conversation;
    updateChildren(this.home, branch, (message) => message.id, (message) => (message.role === "user" ? this.makeQuestion(message) : this.makeAnswer(message)), (element, message) => this.update(element, message));
  }

  /** Draw what is new of one message, if it is shown. */
  refresh(message) {
    const element = this.find(message);
    if (element) this.update(element, message);
  }

  find(message) {
    return [...this.home.children].find((element) => element.dataset.key === message.id);
  }

  update(element, message) {
    const siblings = siblingsOf(this.conversation, message);
    const at = siblings.indexOf(message);
    const turner = element.querySelector(".turner");
    turner.hidden = siblings.length < 2;
    setText(turner.querySelector("span"), `${at + 1} / ${siblings.length}`);
    const [back, on] = turner.querySelectorAll("button");
    back.disabled = at === 0;
    on.disabled = at === siblings.length - 1;
    if (message.role === "user") setText(element.querySelector(".said"), message.content);
    else this.updateAnswer(element, message);
  }

  makeTurner(message) {
    const turn = (step) => () => {
      const siblings = siblingsOf(this.conversation, message);
      const other = siblings[siblings.indexOf(message) + step];
      if (other) this.actions.choose(other, step);
    };
    return el("span", { class: "turner", role: "group", "aria-label": message.role === "user" ? "Versions of this question" : "Versions of this answer", hidden: "" }, iconButton("left", "Earlier version", turn(-1)), el("span"), iconButton("right", "Later version", turn(1)));
  }

  // -------------------------------------------------------------- questions

  makeQuestion(message) {
    const edit = iconButton("edit", "Edit the question", () => this.edit(element, message));
    const copy = iconButton("copy", "Copy the question", () => copyText(message.content, copy));
    const element = el("article", { class: "message question", "aria-label": "You" },
      el("div", { class: "said", dir: "auto" }), el("footer", { class: "tools" }, this.makeTurner(message), copy, edit));
    return element;
  }

  edit(element, message) {
    const area = el("textarea", { "aria-label": "Question", rows: 1, dir: "auto" });
    area.value = message.content;
    const end = () => {
      form.remove();
      element.classList.remove("editing");
    };
    const form = el("form", { class: "edit" }, area, el("p", { class: "hint-line" }, "The edited question begins another branch; this one is kept."),
      el("div", { class: "buttons" }, textButton("Cancel", () => leave(), { class: "quiet" }), el("button", { type: "submit" }, "Send")));
    const leave = () => {
      end();
      element.querySelector('[aria-label="Edit the question"]').focus();
    };
    area.addEventListener("input", () => fitHeight(area, TALLEST_EDIT_PX));
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        form.requestSubmit();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        leave();
      }
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!area.value.trim()) return;
      end();
      this.actions.edit(message, area.value);
    });
    element.classList.add("editing");
    element.querySelector(".said").after(form);
    fitHeight(area, TALLEST_EDIT_PX);
    area.focus();
  }

  // -------------------------------------------------------------- answers

  makeAnswer(message) {
    const copy = iconButton("copy", "Copy the answer", () => copyText(message.content, copy), { "data-action": "copy" });
    const thoughts = el("details", { class: "thoughts", hidden: "" }, el("summary", {}, el("span")), el("div", { class: "thought", dir: "auto" }));
    const element = el("article", { class: "message answer", "aria-label": "Answer" },
      thoughts,
      el("div", { class: "prose", dir: "auto" }),
      el("div", { class: "calls" }),
      el("div", { class: "notice", hidden: "" }),
      el("footer", { class: "tools" },
        this.makeTurner(message), copy,
        iconButton("redo", "Answer again", () => this.actions.regenerate(message), { "data-action": "redo" }),
        iconButton("resume", "Continue the answer", () => this.actions.resume(message), { "data-action": "resume" }),
        textButton("", () => this.actions.trace(message), { class: "figures", "data-action": "trace" })));
    element.querySelector(".prose").addEventListener("click", ({ target }) => {
      const trip = target.closest?.(".trip");
      if (trip && getSelection().isCollapsed) this.actions.traversal(message, Number(trip.dataset.trip));
    });
    return element;
  }

  updateAnswer(element, message) {
    const running = message.state === "running";
    const action = (name) => element.querySelector(`[data-action="${name}"]`);
    element.setAttribute("aria-busy", running);
    element.dataset.state = message.state;
    this.drawThoughts(element.querySelector(".thoughts"), message, running);
    this.drawContent(element.querySelector(".prose"), message, running);
    this.drawCalls(element.querySelector(".calls"), message, running);
    drawNotice(element.querySelector(".notice"), message, () => this.actions.retry(message));
    action("copy").hidden = running || !message.content;
    action("redo").hidden = running || Boolean(message.error && !message.content); // there it is "Try again"
    action("resume").hidden = running || !this.actions.canResume(message);
    const { tokens, speed, per } = figuresOf(message);
    action("trace").hidden = !tokens;
    setText(action("trace"), [tokens && `${tokens} ${tokens === "1" ? "token" : "tokens"}`, speed && `${speed} per second`, per && `${per} per traversal`].filter(Boolean).join(" · "));
    action("trace").title = "Show how this answer came";
  }

  drawContent(home, message, running) {
    const trips = new Trips(message.trips);
    home.hidden = !message.content && !(running && !message.reasoning);
    home.classList.toggle("running", running);
    home.classList.toggle("waiting", running && !message.content);
    if (message.form === "json") drawPlain(home, message.content, trips, "json");
    else if (message.form === "text") {
      home.classList.add("plain");
      const text = el("p");
      drawVerbatim(text, message.content, trips);
      home.replaceChildren(text);
    } else drawMarkdown(home, message.content, trips);
  }

  drawThoughts(home, message, running) {
    home.hidden = !message.reasoning;
    if (home.hidden) return;
    const thinks = running && !message.content;
    setText(home.querySelector("summary span"), thinks ? "Thinking" : `Thought for ${plural(message.reasoning.trim().split(/\s+/).length, "word")}`);
    home.classList.toggle("running", thinks);
    setText(home.querySelector(".thought"), message.reasoning.trim());
  }

  drawCalls(home, message, running) {
    const calls = message.calls ?? [];
    updateChildren(home, calls, (call) => calls.indexOf(call), (call) => this.makeCall(message, call), (card, call) => {
      setText(card.querySelector("h3 code"), call.name);
      setText(card.querySelector("pre code"), prettyJson(call.arguments));
      card.querySelector("textarea").readOnly = running || call.sent === true;
      card.classList.toggle("sent", call.sent === true);
    });
    const last = home.lastElementChild;
    if (!calls.length) return;
    let send = last.querySelector(".send-results");
    for (const card of home.children) if (card !== last) card.querySelector(".send-results")?.remove();
    if (!send) {
      send = textButton(calls.length > 1 ? "Send the results" : "Send the result", () => this.actions.sendResults(message), { class: "send-results" });
      last.append(send);
    }
    send.hidden = running || calls.every((call) => call.sent);
  }

  makeCall(message, call) {
    const id = `result-${message.id}-${message.calls.indexOf(call)}`;
    const area = el("textarea", { id, rows: 2, class: "mono", spellcheck: "false", placeholder: "What the tool returned" });
    area.value = call.result ?? "";
    area.addEventListener("input", () => {
      call.result = area.value;
      fitHeight(area, TALLEST_EDIT_PX);
    });
    return el("section", { class: "call", "aria-label": "Tool call" }, el("h3", {}, "Calls ", el("code")), el("pre", { tabindex: "0", "aria-label": "Arguments" }, el("code")), el("label", { for: id }, "Result"), area);
  }
}

function drawNotice(home, message, onRetry) {
  const text = noticeOf(message);
  home.hidden = !text;
  if (home.hidden || home.dataset.text === text) return;
  home.dataset.text = text;
  home.setAttribute("role", message.error ? "alert" : "note");
  home.replaceChildren(el("p", {}, text), ...(message.error ? [textButton("Try again", onRetry)] : []));
}

function noticeOf({ state, finish, error, content, calls }) {
  if (error) return `${FAILURES[error.status] ?? `The gateway failed with status ${error.status}: `}${error.message}`.replace(/^./, (first) => first.toUpperCase()).replace(/([^.!?…])$/, "$1.");
  if (state === "stopped") return content ? "Stopped." : "Stopped before the first word.";
  if (state === "done" && finish === "length") return "The answer is at its longest: see Settings, or continue.";
  if (state === "done" && !content && !calls?.length) return "The model ended its answer at once.";
  return "";
}

function prettyJson(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

