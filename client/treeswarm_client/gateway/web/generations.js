// Keeps all generations, and decides which get a large picture and which a line.

import { el, plural, setText, svg, updateChildren } from "../pages/shared/dom.js";
import { Panel } from "./panel.js";
import { bars } from "../pages/shared/bars.js";

// Number of large pictures at once: more would be too small.
const MOST_LARGE = { wide: 4, narrow: 2 };
// Number of lines for running generations, and for those that have ended.
const MOST_LINES = 24;
const MOST_ENDED = 6;
// An ended generation keeps its picture for this time, and longer if no other generation needs the place.
const STAYS_MS = 4000;
const HISTORY = 60;
const ROUNDS_OF_TEXT = 60;

const narrow = matchMedia("(max-width: 720px)");

/** What the page knows of one generation. */
class Generation {
  constructor(id, prompt) {
    Object.assign(this, { id, prompt, tokens: 0, traversals: 0, rounds: 0, drafted: 0, ms: 0, nodes: 0 });
    this.key = `${id}-${performance.now()}`; // a restarted gateway counts from one again
    this.history = [];
    this.turns = [];
    this.finish = undefined;
    this.endedAt = null;
  }

  first(event) {
    this.tokens += 1;
    this.traversals += 1;
    this.firstMs = event.ms;
    this.turns.push({ kept: 0, words: [], bonus: event.bonus });
  }

  round(event) {
    this.tokens += event.accepted.length + 1;
    this.traversals += 1;
    this.rounds += 1;
    this.drafted += event.nodes;
    this.nodes = event.nodes;
    this.ms += event.ms;
    this.history.push(event.accepted.length + 1);
    this.history.splice(0, this.history.length - HISTORY);
    this.turns.push({ kept: event.accepted.length, words: event.accepted.map((i) => event.words?.[i]), bonus: event.bonus });
    this.turns.splice(0, this.turns.length - ROUNDS_OF_TEXT);
  }

  get running() {
    return this.endedAt === null;
  }

  get perTraversal() {
    return this.traversals ? (this.tokens / this.traversals).toFixed(2) : "–";
  }

  get roundMs() {
    return this.rounds ? `${Math.round(this.ms / this.rounds)} ms` : "–";
  }

  get state() {
    if (this.running) return this.traversals ? "growing" : "prefill";
    return { stop: "ended", length: "at its limit" }[this.finish] ?? "aborted";
  }
}

export class GenerationList {
  constructor(large, lines, idle) {
    Object.assign(this, { large, lines, idle });
    this.generations = new Map();
    this.panels = new Map();
    this.ended = [];
    this.scheduled = false;
    narrow.addEventListener("change", () => this.arrange());
  }

  begin({ id, prompt }) {
    if (this.generations.has(id)) return;
    this.generations.set(id, new Generation(id, prompt));
    this.arrange();
  }

  first(event) {
    const generation = this.find(event.id);
    generation.first(event);
    this.panels.get(generation.key)?.first(event);
    this.arrangeSoon();
  }

  round(event) {
    const generation = this.find(event.id);
    generation.round(event);
    this.panels.get(generation.key)?.round(event);
    this.arrangeSoon();
  }

  end({ id, finish }) {
    const generation = this.generations.get(id);
    if (!generation) return;
    this.generations.delete(id);
    generation.finish = finish;
    generation.endedAt = performance.now();
    this.ended.push(generation);
    this.panels.get(generation.key)?.end();
    this.arrange();
  }

  /** End all generations: the connection was lost, and with it their outcome. */
  endAll() {
    for (const id of [...this.generations.keys()]) this.end({ id, finish: null });
  }

  find(id) {
    if (!this.generations.has(id)) this.begin({ id, prompt: null });
    return this.generations.get(id);
  }

  /** Draw at most five times per second, however many rounds there are. */
  arrangeSoon() {
    if (this.scheduled) return;
    this.scheduled = true;
    setTimeout(() => {
      this.scheduled = false;
      this.arrange();
    }, 200);
  }

  arrange() {
    const most = narrow.matches ? MOST_LARGE.narrow : MOST_LARGE.wide;
    const running = [...this.generations.values()];
    const now = performance.now();
    const needed = running.filter((generation) => !this.panels.has(generation.key));
    let pictured = [...this.panels.values()].map((panel) => panel.generation);
    if (needed.length) pictured = pictured.filter((generation) => generation.running || now - generation.endedAt < STAYS_MS);
    needed.sort((a, b) => b.nodes - a.nodes || a.id - b.id);
    const stale = pictured.filter((generation) => !generation.running).sort((a, b) => a.endedAt - b.endedAt);
    while (pictured.length && stale.length && pictured.length + needed.length > most) pictured.splice(pictured.indexOf(stale.shift()), 1);
    pictured = [...pictured, ...needed].slice(0, most).sort((a, b) => a.id - b.id);
    this.ended = this.ended.slice(-MOST_ENDED - most);
    updateChildren(this.large, pictured, (generation) => generation.key, (generation) => this.addPanel(generation), (_, generation) => this.panels.get(generation.key).drawNumbers());
    for (const [key, panel] of this.panels) {
      if (!pictured.includes(panel.generation)) {
        panel.close();
        this.panels.delete(key);
      }
    }
    this.large.dataset.count = pictured.length;
    const isUnpictured = (generation) => !pictured.includes(generation);
    const others = [...running.filter(isUnpictured), ...this.ended.filter(isUnpictured).slice(-MOST_ENDED).reverse()];
    updateChildren(this.lines, others.slice(0, MOST_LINES), (generation) => generation.key, makeLine, updateLine);
    this.idle.hidden = pictured.length + others.length > 0;
  }

  addPanel(generation) {
    const panel = new Panel(generation);
    this.panels.set(generation.key, panel);
    return panel.element;
  }
}

function makeLine(generation) {
  return el("li", {}, el("b", {}, `#${generation.id}`), svg("svg", { class: "bars", viewBox: "0 0 120 24", preserveAspectRatio: "none", "aria-hidden": "true" }), el("span", { class: "per" }), el("span", { class: "tokens" }), el("span", { class: "chip" }));
}

function updateLine(line, generation) {
  line.dataset.running = generation.running;
  bars(line.querySelector(".bars"), generation.history);
  setText(line.querySelector(".per"), `${generation.perTraversal} per traversal`);
  setText(line.querySelector(".tokens"), plural(generation.tokens, "token"));
  setText(line.querySelector(".chip"), generation.state);
}
