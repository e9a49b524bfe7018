// All generations: which of them have a large picture, and which a line.

import { el, keyed, plural, say, svg } from "./dom.js";
import { Panel } from "./panel.js";
import { bars } from "./bars.js";

// More pictures at once are too small to see anything.
const MOST_LARGE = { wide: 4, narrow: 2 };
// Lines of those that run, and of those that ended lately.
const MOST_LINES = 24;
const MOST_ENDED = 6;
// Ended pictures stay so long, and as long as nobody needs their place.
const STAYS_MS = 4000;
const HISTORY = 60;
const ROUNDS_OF_TEXT = 60;

const narrow = matchMedia("(max-width: 720px)");

/** What is known of one generation. */
class Generation {
  constructor(id, prompt) {
    Object.assign(this, { id, prompt, tokens: 0, traversals: 0, rounds: 0, drafted: 0, ms: 0, nodes: 0 });
    this.key = `${id}-${performance.now()}`; // a gateway that was started again counts from one
    this.history = [];
    this.said = [];
    this.finish = undefined;
    this.endedAt = null;
  }

  first(event) {
    this.tokens += 1;
    this.traversals += 1;
    this.firstMs = event.ms;
    this.said.push({ kept: 0, words: [], bonus: event.bonus });
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
    this.said.push({ kept: event.accepted.length, words: event.accepted.map((i) => event.words?.[i]), bonus: event.bonus });
    this.said.splice(0, this.said.length - ROUNDS_OF_TEXT);
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
    if (this.running) return this.traversals ? "growing" : "on its way";
    return { stop: "ended", length: "at its limit" }[this.finish] ?? "broken off";
  }
}

export class Forest {
  constructor(large, lines, idle) {
    Object.assign(this, { large, lines, idle });
    this.generations = new Map();
    this.panels = new Map();
    this.ended = [];
    this.due = false;
    narrow.addEventListener("change", () => this.arrange());
  }

  begin({ id, prompt }) {
    if (this.generations.has(id)) return;
    this.generations.set(id, new Generation(id, prompt));
    this.arrange();
  }

  first(event) {
    const generation = this.known(event.id);
    generation.first(event);
    this.panels.get(generation.key)?.first(event);
    this.later();
  }

  round(event) {
    const generation = this.known(event.id);
    generation.round(event);
    this.panels.get(generation.key)?.round(event);
    this.later();
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

  /** The connection was lost, and with it what became of them. */
  forget() {
    for (const id of [...this.generations.keys()]) this.end({ id, finish: null });
  }

  known(id) {
    if (!this.generations.has(id)) this.begin({ id, prompt: null });
    return this.generations.get(id);
  }

  /** Hundreds of rounds a second are drawn as often as anybody sees. */
  later() {
    if (this.due) return;
    this.due = true;
    setTimeout(() => {
      this.due = false;
      this.arrange();
    }, 200);
  }

  arrange() {
    const most = narrow.matches ? MOST_LARGE.narrow : MOST_LARGE.wide;
    const running = [...this.generations.values()];
    const now = performance.now();
    const needed = running.filter((generation) => !this.panels.has(generation.key));
    let shown = [...this.panels.values()].map((panel) => panel.generation);
    if (needed.length) shown = shown.filter((one) => one.running || now - one.endedAt < STAYS_MS);
    needed.sort((a, b) => b.nodes - a.nodes || a.id - b.id);
    const stale = shown.filter((one) => !one.running).sort((a, b) => a.endedAt - b.endedAt);
    while (shown.length && stale.length && shown.length + needed.length > most) shown.splice(shown.indexOf(stale.shift()), 1);
    shown = [...shown, ...needed].slice(0, most).sort((a, b) => a.id - b.id);
    this.ended = this.ended.slice(-MOST_ENDED - most);
    keyed(this.large, shown, (one) => one.key, (one) => this.plant(one), (_, one) => this.panels.get(one.key).figures());
    for (const [key, panel] of this.panels) {
      if (!shown.includes(panel.generation)) {
        panel.leave();
        this.panels.delete(key);
      }
    }
    this.large.dataset.count = shown.length;
    const unseen = (one) => !shown.includes(one);
    const others = [...running.filter(unseen), ...this.ended.filter(unseen).slice(-MOST_ENDED).reverse()];
    keyed(this.lines, others.slice(0, MOST_LINES), (one) => one.key, makeLine, updateLine);
    this.idle.hidden = shown.length + others.length > 0;
  }

  plant(generation) {
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
  say(line.querySelector(".per"), `${generation.perTraversal} a traversal`);
  say(line.querySelector(".tokens"), plural(generation.tokens, "token"));
  say(line.querySelector(".chip"), generation.state);
}
