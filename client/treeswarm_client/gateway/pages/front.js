// The first page of a gateway: the state of the swarm, a prompt to try, and programs to copy.

import { connect } from "../map/connection.js";
import { byId, el, setText, updateChildren } from "../map/dom.js";
import { keyHeaders } from "../map/feed.js";
import { drawAlarm, drawReplicas } from "../map/swarm.js";
import { Tiles } from "../map/tiles.js";
import { streamCompletion } from "./completion.js";
import { makeSnippets } from "./snippets.js";

const MAX_NEW_TOKENS = 160;
const TEXT_PROMPT = "def main(";

const base = new URL("v1", document.baseURI).href;
const tiles = new Tiles();
const state = { about: null, kind: "chat", snippet: 0, running: null, touched: false };

// ---------------------------------------------------------------- the swarm

function handle(event) {
  if (event.kind === "overview") {
    tiles.drawSwarm(event);
    drawAlarm(event);
    drawStrip(event);
    if (!state.about?.ready) loadAbout();
  } else if (event.kind === "waiting") {
    byId("alarm").hidden = false;
    setText(byId("alarm"), event.why);
  } else if (event.kind === "first") tiles.add(1);
  else if (event.kind === "round") tiles.add(event.accepted.length + 1);
}

function drawStrip(overview) {
  const served = overview.models[0]?.classes[0];
  const strip = byId("strip");
  strip.parentElement.hidden = !served;
  if (!served) return;
  strip.style.setProperty("--blocks", served.replicas.length);
  strip.parentElement.classList.toggle("fine", served.replicas.length > 40);
  drawReplicas(strip, served);
}

async function loadAbout() {
  const response = await fetch("about", { headers: keyHeaders(), cache: "no-store" });
  if (!response.ok) return;
  const first = state.about === null;
  state.about = await response.json();
  const { about } = state;
  setText(byId("name"), about.model);
  document.title = `${about.model} · treeswarm`;
  setText(byId("facts"), about.ready ? [`${about.blocks} blocks`, `context ${about.context.toLocaleString("en")} tokens`, about.numerics, `draft ${about.draft.name}`].join(" · ") : "");
  if (about.ready && !about.chat) choose("text");
  if (first || about.ready) drawSnippets();
}

// ---------------------------------------------------------------- programs to copy

function drawSnippets() {
  const { about } = state;
  if (about === null) return;
  const snippets = makeSnippets({ base, model: about.model, chat: about.chat ?? true, locked: about.locked });
  updateChildren(byId("snippet-tabs"), snippets, (snippet) => snippet.name, (snippet) => {
    const tab = el("button", { type: "button" }, snippet.name);
    tab.addEventListener("click", () => {
      state.snippet = snippets.indexOf(snippet);
      drawSnippets();
    });
    return tab;
  }, (tab, snippet) => tab.setAttribute("aria-pressed", snippets.indexOf(snippet) === state.snippet));
  setText(byId("base"), base);
  setText(byId("snippet"), snippets[state.snippet].code);
}

byId("copy").addEventListener("click", async () => {
  const button = byId("copy");
  try {
    await navigator.clipboard.writeText(byId("snippet").textContent);
    setText(button, "Copied");
  } catch {
    getSelection().selectAllChildren(byId("snippet")); // without TLS, browsers have no clipboard
    setText(button, "Selected");
  }
  setTimeout(() => setText(button, "Copy"), 1500);
});

// ---------------------------------------------------------------- a prompt

function choose(kind) {
  state.kind = kind;
  for (const tab of document.querySelectorAll("[data-kind]")) tab.setAttribute("aria-pressed", tab.dataset.kind === kind);
  if (!state.touched) byId("prompt").value = kind === "chat" ? byId("prompt").defaultValue : TEXT_PROMPT;
}

for (const tab of document.querySelectorAll("[data-kind]")) tab.addEventListener("click", () => choose(tab.dataset.kind));
byId("prompt").addEventListener("input", () => (state.touched = true));
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("try").requestSubmit();
});

byId("try").addEventListener("submit", (event) => {
  event.preventDefault();
  if (state.running) state.running.abort();
  else if (byId("prompt").value.trim()) run(byId("prompt").value);
});

async function run(prompt) {
  const answer = byId("answer");
  const trouble = byId("trouble");
  const timer = new Timer();
  state.running = new AbortController();
  setText(byId("send"), "Stop");
  trouble.hidden = true;
  answer.hidden = false;
  answer.dataset.running = true;
  answer.replaceChildren(...(state.kind === "text" ? [el("span", { class: "asked" }, prompt)] : []));
  setText(byId("figures"), "waiting for the first token");
  const about = state.about ?? {};
  const common = { model: about.model, max_tokens: MAX_NEW_TOKENS, temperature: 0 };
  const [path, body] = state.kind === "chat" ? ["v1/chat/completions", { ...common, messages: [{ role: "user", content: prompt }] }] : ["v1/completions", { ...common, prompt }];
  try {
    for await (const chunk of streamCompletion(path, body, state.running.signal)) {
      const text = chunk.choices[0]?.delta?.content ?? chunk.choices[0]?.text ?? "";
      if (text) answer.append(text);
      if (chunk.choices.length && !chunk.choices[0].finish_reason && chunk.choices[0].delta?.role === undefined) timer.add();
      if (chunk.usage) timer.tokens = chunk.usage.completion_tokens;
      setText(byId("figures"), timer.words());
      answer.scrollTop = answer.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      trouble.hidden = false;
      setText(trouble, error.status === 401 ? "This gateway needs a key: enter it above." : error.message);
    }
  } finally {
    state.running = null;
    delete answer.dataset.running;
    answer.hidden = !answer.textContent;
    setText(byId("figures"), timer.words());
    setText(byId("send"), "Send");
  }
}

/** Measures an answer: its tokens, the time to the first one, and the speed after it. */
class Timer {
  constructor() {
    this.began = performance.now();
    this.tokens = 0;
  }

  add() {
    this.last = performance.now();
    this.first ??= this.last;
    this.tokens += 1;
  }

  words() {
    if (!this.tokens) return "";
    const words = [`${this.tokens} tokens`];
    const seconds = (this.last - this.first) / 1000;
    if (this.tokens > 1 && seconds > 0) words.push(`${((this.tokens - 1) / seconds).toFixed(1)} tokens/s`);
    words.push(`first after ${((this.first - this.began) / 1000).toFixed(2)} s`);
    return words.join(" · ");
  }
}

connect(handle, (connection) => {
  if (connection === "live") loadAbout();
}, "map/events");
