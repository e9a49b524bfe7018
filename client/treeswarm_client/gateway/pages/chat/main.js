// The page to chat on: one conversation is shown, and each may have an answer under way.

import { byId, el, setText } from "../shared/dom.js";
import { Answering } from "./answer.js";
import { streamCompletion } from "./completion.js";
import { fitHeight, icon, setIcon } from "./controls.js";
import { addMessage, asMessages, branchOf, choose, makeConversation, removeMessage } from "./conversation.js";
import { Gateway } from "./gateway.js";
import { Log } from "./log.js";
import { COLOURS } from "./markdown/draw.js";
import { Panels } from "./panels.js";
import { asParameters, countChanged, SettingsForm, WrongSetting } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Store } from "./store.js";
import { TracePanel } from "./trace.js";

const TALLEST_PX = 240;
// The log follows an answer while its end is this near.
const NEAR_END_PX = 80;
const IDEAS = ["Why do trees branch?", "Write a haiku about a long chain of small machines.", "Explain speculative decoding to a gardener.", "def fibonacci(n):"];
const LEAVE_MS = 2000;
const onScreen = matchMedia("(pointer: coarse) and (hover: none)");
const CUT_OFF = { status: 0, message: "this page was closed or reloaded in the middle of the answer" };

class Chat {
  constructor() {
    this.running = new Map();
    this.leaves = false;
    this.accepted = new Set();
    this.frame = null;
    this.store = new Store({ onChange: () => this.reopen(), onFull: (isFull) => (byId("full").hidden = !isFull), isBusy: (id) => this.running.has(id) });
    for (const conversation of this.store.list()) markCutOff(conversation);
    this.log = new Log(byId("log"), this.actions());
    this.trace = new TracePanel(byId("trace"), (traversal) => this.mark(traversal));
    this.form = new SettingsForm(byId("settings"), (settings) => this.changeSettings(settings));
    this.panels = new Panels(this.store.view, (view) => (this.store.view = { ...this.store.view, ...view }));
    this.sidebar = new Sidebar({ rename: (...args) => this.rename(...args), remove: (...args) => this.remove(...args) });
    this.gateway = new Gateway((about) => this.learn(about));
    this.listen();
    this.open();
    this.gateway.look();
  }

  listen() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.answering) this.stop();
      else this.send(byId("message").value);
    });
    byId("message").addEventListener("input", () => this.arrangeComposer());
    byId("message").addEventListener("keydown", (event) => {
      // Keyboards on screens have no Shift+Enter.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || onScreen.matches) return;
      event.preventDefault();
      if (!this.answering) this.send(byId("message").value);
    });
    window.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || document.querySelector("dialog[open]") || this.panels.closeDrawer()) return;
      if (this.answering) this.stop();
    });
    // Streams fail before the page is gone; a download asks for the same, and leaves the page where it is.
    window.addEventListener("beforeunload", () => {
      this.leaves = true;
      setTimeout(() => (this.leaves = false), LEAVE_MS);
    });
    window.addEventListener("hashchange", () => {
      this.open();
      this.panels.closeDrawer();
      byId("message").focus();
    });
    // The address of a new conversation is the one that is left when it begins, so a click may change nothing.
    byId("new").addEventListener("click", () => location.hash === "#new" && window.dispatchEvent(new Event("hashchange")));
    byId("settings-button").append(icon("settings"), el("span", {}, "Settings"));
    byId("settings-button").addEventListener("click", () => this.panels.open("settings"));
    byId("colours").addEventListener("click", () => this.showColours(!this.hasColours));
    byId("scroller").addEventListener("scroll", () => (byId("newest").hidden = this.isNearEnd));
    byId("newest").addEventListener("click", () => this.scrollToEnd());
    byId("newest").prepend(icon("down"));
    byId("ideas").append(...IDEAS.map((idea) => {
      const button = el("button", { type: "button" }, idea);
      button.addEventListener("click", () => this.send(idea));
      return el("li", {}, button);
    }));
    document.querySelector(".swatches").append(...Array.from({ length: COLOURS }, (_, i) => el("i", { "data-colour": i })));
    this.showColours(this.store.view.colours ?? true);
  }

  actions() {
    return {
      choose: (message) => {
        choose(this.conversation, message);
        this.store.save(this.conversation);
        this.draw();
      },
      edit: (message, text) => this.send(text, message.parent),
      regenerate: (message) => this.answer(message.parent),
      retry: (message) => this.retry(message),
      resume: (message) => this.resume(message),
      canResume: (message) => this.canResume(message),
      sendResults: (message) => this.sendResults(message),
      trace: (message) => {
        this.trace.show(message);
        this.panels.open("trace");
      },
      traversal: (message, traversal) => {
        this.trace.show(message);
        this.trace.pinTraversal(traversal);
      },
    };
  }

  // -------------------------------------------------------------- conversations

  /** Show the conversation of the page's address, or a new one. */
  open() {
    const kept = this.store.conversations.get(location.hash.slice(1));
    if (kept && kept === this.conversation) return;
    this.conversation = kept ?? makeConversation(this.store.settings);
    this.form.show(this.conversation.settings);
    this.trace.show(null);
    this.draw();
    this.scrollToEnd();
  }

  /** Show what another tab has changed. */
  reopen() {
    const kept = this.store.conversations.get(this.conversation.id);
    if (kept) this.conversation = kept;
    this.draw();
  }

  rename(conversation, title) {
    conversation.title = title;
    this.store.save(conversation);
    this.draw();
  }

  async remove(conversation) {
    const dialog = byId("confirm");
    setText(byId("confirm-text"), "It is kept nowhere else, unless you have exported it.");
    dialog.returnValue = "no";
    dialog.showModal();
    await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
    if (dialog.returnValue !== "yes") return;
    this.running.get(conversation.id)?.controller.abort();
    this.store.remove(conversation);
    history.replaceState(null, "", "#new");
    this.open();
    this.announce("Conversation deleted.");
    byId("message").focus();
  }

  changeSettings(settings) {
    this.conversation.settings = { ...settings };
    this.store.settings = { ...settings };
    if (this.conversation.messages.length) this.store.save(this.conversation);
    this.arrangeComposer();
  }

  // -------------------------------------------------------------- questions and answers

  get answering() {
    return this.running.get(this.conversation.id) ?? null;
  }

  get isChat() {
    return this.gateway.about?.chat !== false && this.conversation.settings.format !== "text";
  }

  /** Send a question below `parent`, by default at the end. */
  send(text, parent = branchOf(this.conversation).at(-1)?.id ?? null) {
    if (!text.trim() || this.answering || !this.readSettings()) return;
    const question = addMessage(this.conversation, parent, { role: "user", content: text });
    if (text === byId("message").value) byId("message").value = "";
    this.answer(question.id);
    byId("message").focus();
  }

  /** Return the parameters of the settings, or show what is wrong with them and return null. */
  readSettings() {
    try {
      return asParameters(this.conversation.settings, this.accepted);
    } catch (error) {
      if (!(error instanceof WrongSetting)) throw error;
      this.panels.open("settings");
      this.form.point(error);
      return null;
    }
  }

  answer(parent) {
    const parameters = this.readSettings();
    if (this.answering || !parameters) return;
    const form = !this.isChat ? "text" : parameters.response_format ? "json" : "markdown";
    const message = addMessage(this.conversation, parent, { role: "assistant", form });
    this.stream(message, parameters, new Answering(message, this.isChat));
  }

  retry(message) {
    if (this.answering) return;
    if (!message.content && !message.reasoning && !message.calls) removeMessage(this.conversation, message);
    this.answer(message.parent);
  }

  canResume(message) {
    const isLast = branchOf(this.conversation).at(-1) === message;
    return isLast && message.form === "markdown" && Boolean(message.content) && !message.calls && this.accepted.has("continue_final_message") && (message.state !== "done" || message.finish === "length");
  }

  resume(message) {
    const parameters = this.readSettings();
    if (this.answering || !parameters) return;
    this.stream(message, { ...parameters, continue_final_message: true, add_generation_prompt: false }, new Answering(message, true, { resumes: true }));
  }

  sendResults(message) {
    if (this.answering) return;
    for (const call of message.calls) Object.assign(call, { result: call.result ?? "", sent: true });
    this.answer(message.id);
  }

  requestOf(message, parameters, resumes) {
    const { conversation } = this;
    const branch = branchOf(conversation, resumes ? null : message);
    const model = this.gateway.about?.model ?? "";
    if (!this.isChat) {
      const { response_format: _, tools: __, ...others } = parameters;
      return ["v1/completions", { model, prompt: branch.map((one) => one.content).join(""), ...others }];
    }
    return ["v1/chat/completions", { model, messages: asMessages(branch, conversation.settings.system ?? ""), ...parameters }];
  }

  async stream(message, parameters, answering) {
    const { conversation } = this;
    const [path, body] = this.requestOf(message, parameters, answering.resumes);
    this.running.set(conversation.id, answering);
    conversation.updated = Date.now();
    this.store.save(conversation);
    if (location.hash.slice(1) !== conversation.id) history.pushState(null, "", `#${conversation.id}`);
    this.trace.show(message);
    this.draw();
    this.scrollToEnd();
    this.announce("The model answers.");
    try {
      for await (const chunk of streamCompletion(path, body, answering.controller.signal)) {
        answering.controller.signal.throwIfAborted(); // chunks may be left of what was read before
        answering.take(chunk);
        this.store.save(conversation, true);
        this.drawSoon();
      }
      message.state = "done";
      this.announce(`Answer complete, ${message.tokens} tokens.`);
    } catch (error) {
      this.fail(message, error);
    } finally {
      this.running.delete(conversation.id);
      if (this.store.conversations.has(conversation.id)) this.store.save(conversation);
      const follows = this.isNearEnd;
      this.draw();
      if (follows && conversation === this.conversation) this.scrollToEnd();
    }
  }

  fail(message, error) {
    if (error.name === "AbortError") {
      message.state = "stopped";
      this.announce("Stopped.");
      return;
    }
    const { status = 0 } = error;
    if (error.status === undefined) console.error(error);
    message.state = message.content ? "lost" : "failed";
    message.error = this.leaves ? CUT_OFF : { status, message: error.message };
    this.gateway.look();
  }

  stop() {
    this.answering?.controller.abort();
    byId("message").focus();
  }

  // -------------------------------------------------------------- what is shown

  /** Take what the gateway says about itself. */
  learn(about) {
    this.accepted = new Set(about.parameters);
    setText(byId("model"), about.model);
    setText(byId("name"), about.model);
    document.title = `${about.model} · treeswarm`;
    this.form.draw(about);
    const facts = about.blocks ? [`${about.blocks} blocks on ${about.nodes} ${about.nodes === 1 ? "node" : "nodes"}`, `context ${about.context.toLocaleString("en")} tokens`, about.numerics, `draft ${about.draft.name}`] : [];
    setText(byId("facts"), facts.join(" · "));
    this.draw();
  }

  draw() {
    const branch = branchOf(this.conversation);
    byId("welcome").hidden = branch.length > 0;
    byId("log").hidden = !branch.length;
    this.log.draw(this.conversation, branch);
    this.sidebar.draw(this.store.list(), this.conversation, (conversation) => this.running.has(conversation.id));
    const shown = this.trace.message;
    const last = branch.findLast((message) => message.role === "assistant") ?? null;
    this.trace.show(branch.includes(shown) ? shown : last);
    this.arrangeComposer();
  }

  /** Draw the answer under way once per frame, and keep its end in sight if it was. */
  drawSoon() {
    if (this.frame !== null) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = null;
      if (!this.answering) return;
      const follows = this.isNearEnd;
      this.log.refresh(this.answering.message);
      if (this.trace.message === this.answering.message) this.trace.update();
      if (follows) this.scrollToEnd();
      byId("newest").hidden = this.isNearEnd;
    });
  }

  arrangeComposer() {
    const area = byId("message");
    fitHeight(area, TALLEST_PX);
    area.placeholder = this.isChat ? "Ask something" : "Begin a text";
    const changed = countChanged(this.conversation.settings);
    setText(byId("settings-button").lastChild, changed ? `Settings · ${changed}` : "Settings");
    const send = byId("send");
    if (this.answering) setIcon(send, "stop", "Stop");
    else setIcon(send, "send", "Send");
    send.classList.toggle("stop", Boolean(this.answering));
    send.disabled = !this.answering && !area.value.trim();
  }

  /** Mark the text that one traversal brought, in the answer whose trace is shown. */
  mark(traversal) {
    for (const marked of document.querySelectorAll(".trip.marked")) marked.classList.remove("marked");
    if (traversal === null || !this.trace.message) return;
    const pieces = this.log.find(this.trace.message)?.querySelectorAll(`[data-trip="${traversal}"]`) ?? [];
    for (const piece of pieces) piece.classList.add("marked");
    pieces[0]?.scrollIntoView({ block: "nearest" });
  }

  get hasColours() {
    return document.body.classList.contains("colours");
  }

  showColours(shown) {
    document.body.classList.toggle("colours", shown);
    byId("colours").setAttribute("aria-pressed", shown);
    this.store.view = { ...this.store.view, colours: shown };
  }

  get isNearEnd() {
    const home = byId("scroller");
    return home.scrollHeight - home.scrollTop - home.clientHeight < NEAR_END_PX;
  }

  scrollToEnd() {
    byId("scroller").scrollTop = byId("scroller").scrollHeight;
  }

  announce(text) {
    setText(byId("announce"), text);
  }
}

/** Mark answers that were under way when the page was closed: what came of them is kept. */
function markCutOff(conversation) {
  for (const message of conversation.messages) {
    if (message.state !== "running") continue;
    message.state = message.content ? "lost" : "failed";
    message.error = CUT_OFF;
  }
}

new Chat();
