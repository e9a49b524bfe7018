// One generation's picture: its tree grows, the target walks through it, what it did not take falls away.

import { bars } from "./bars.js";
import { el, plural, say, svg } from "./dom.js";
import { grown, label } from "./layout.js";

// Faster pictures than this cannot be followed; rounds that come meanwhile are counted and not drawn.
const GROW_MS = 420;
const WALK_MS = 820;
const CALM_MS = 1000;
// Of a monospaced letter at the size of labels.
const LETTER_PX = 7.1;
const MOST_LETTERS = 14;
// Words stand beside their nodes where rows are so far apart.
const WORDS_PX = 12.5;
const EDGE = { left: 16, right: 16, top: 18, bottom: 18 };
// Small trees are not drawn out to the ends of the picture.
const FURTHEST = { x: 0.24, y: 30 };

const calm = matchMedia("(prefers-reduced-motion: reduce)");

export class Panel {
  constructor(generation) {
    this.generation = generation;
    this.latest = null;
    this.busy = null;
    this.tip = "";
    const figure = (name) => el("div", {}, el("dt", {}, name), el("dd"));
    this.numbers = { tokens: figure("tokens"), per: figure("a traversal"), ms: figure("a round"), nodes: figure("nodes") };
    this.chip = el("span", { class: "chip" });
    this.bars = svg("svg", { class: "bars", viewBox: "0 0 120 24", preserveAspectRatio: "none", "aria-hidden": "true" });
    this.canvas = svg("svg", { class: "tree", role: "img", "aria-label": "no tree yet" });
    this.hint = el("p", { class: "hint" });
    this.text = el("p", { class: "text" });
    this.element = el("article", { class: "plant", "aria-label": `Generation ${generation.id}`, "data-id": generation.id },
      el("header", {}, el("h3", {}, `#${generation.id}`), this.chip, this.bars, el("dl", {}, ...Object.values(this.numbers))),
      el("div", { class: "canvas" }, this.canvas, this.hint),
      el("div", { class: "said" }, this.text));
    this.resized = new ResizeObserver(() => this.picture && this.draw(this.picture, false));
    this.resized.observe(this.canvas);
    this.figures();
  }

  first(event) {
    this.tip = event.bonus ?? "";
  }

  round(event) {
    const picture = { round: event, tip: this.tip };
    this.tip = event.bonus ?? "";
    // A round without a tree, as the last one often is, wipes no tree away.
    if (!event.nodes && (this.latest ?? this.picture)?.round.nodes) return;
    this.latest = picture;
    if (!this.busy) this.show();
  }

  end() {
    this.figures();
  }

  leave() {
    clearTimeout(this.busy);
    this.resized.disconnect();
  }

  figures() {
    const one = this.generation;
    this.element.dataset.running = one.running;
    this.element.dataset.rounds = one.rounds;
    say(this.chip, one.state);
    say(this.numbers.tokens.lastChild, `${one.tokens}`);
    say(this.numbers.per.lastChild, one.perTraversal);
    say(this.numbers.ms.lastChild, one.roundMs);
    say(this.numbers.nodes.lastChild, one.rounds ? `${Math.round(one.drafted / one.rounds)}` : "–");
    bars(this.bars, one.history);
    const prompt = one.prompt === null ? "The prompt" : `A prompt of ${plural(one.prompt, "token")}`;
    say(this.hint, one.rounds || !one.running ? "" : one.traversals ? "The first tree is on its way." : `${prompt} is on its way.`);
    this.write();
  }

  /** What was said, round by round; dots where words are not told. */
  write() {
    const said = this.generation.said;
    const parts = said.map((round, i) => {
      const words = round.words.map((word) => word ?? "•").join("");
      const classes = `turn ${(this.generation.traversals - said.length + i) % 2 ? "odd" : ""} ${i === said.length - 1 ? "newest" : ""}`;
      return el("span", { class: classes }, words, el("span", { class: "own" }, round.bonus ?? "◆"));
    });
    this.text.replaceChildren(...parts);
    this.text.parentElement.scrollTop = this.text.parentElement.scrollHeight;
  }

  show() {
    this.busy = null;
    if (!this.latest) return;
    if (document.hidden) {
      this.busy = setTimeout(() => this.show(), CALM_MS);
      return;
    }
    const picture = this.latest;
    this.latest = null;
    this.draw(picture, !calm.matches);
    if (calm.matches) {
      this.busy = setTimeout(() => this.show(), CALM_MS);
      return;
    }
    this.busy = setTimeout(() => {
      this.canvas.classList.add("walked");
      this.busy = setTimeout(() => this.show(), WALK_MS);
    }, GROW_MS);
  }

  draw(picture, moving) {
    this.picture = picture;
    const { round, tip } = picture;
    const tree = grown(round);
    tree.nodes[0].word = tip;
    const width = this.canvas.clientWidth || 600;
    const height = this.canvas.clientHeight || 260;
    const across = width - EDGE.left - EDGE.right;
    const high = height - EDGE.top - EDGE.bottom;
    // The last column needs room for its words too.
    const step = {
      x: Math.min(Math.max(90, FURTHEST.x * width), across / (tree.deepest + 0.6)),
      y: Math.min(FURTHEST.y, high / Math.max(1, tree.leaves - 1)),
    };
    const above = EDGE.top + (high - step.y * (tree.leaves - 1)) / 2;
    for (const node of tree.nodes) {
      node.x = EDGE.left + node.depth * step.x;
      node.y = above + node.row * step.y;
    }
    this.canvas.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.canvas.setAttribute("aria-label", `Round ${round.round}: ${plural(round.nodes, "node")} guessed, ${round.accepted.length} accepted, ${round.ms} ms`);
    this.canvas.dataset.nodes = round.nodes;
    this.canvas.dataset.accepted = round.accepted.length;
    this.canvas.classList.toggle("walked", !moving);
    this.canvas.classList.toggle("moving", moving);
    this.canvas.style.setProperty("--beat", `${(moving ? GROW_MS / 2 : 0) / Math.max(1, tree.deepest)}ms`);
    this.canvas.replaceChildren(...shapes(tree, step));
  }
}

/** Edges first, what was accepted above what was not, words above all. */
function shapes(tree, step) {
  const radius = Math.max(1.4, Math.min(4, step.y * 0.3, step.x * 0.3));
  const letters = Math.min(MOST_LETTERS, Math.floor((step.x - 26) / LETTER_PX));
  const roomy = step.y >= WORDS_PX;
  const drawn = { edges: [], kept: [], nodes: [], labels: [] };
  for (const node of tree.nodes) {
    const kinds = `${node.kind} ${node.kept ? "kept" : ""}`;
    const wide = Math.max(3.4, radius * 1.25); // once the target has been there
    const size = node.kind === "root" ? wide : radius;
    const shy = !roomy && node.kind !== "root";
    const short = letters > 0 && (roomy || node.kept) ? label(node.word, letters) : "";
    node.out = short && !shy ? node.x + size + 9 + short.length * LETTER_PX : node.x + size;
    const parent = tree.nodes[node.parent];
    if (parent) {
      const middle = (parent.out + node.x) / 2;
      const d = `M${parent.out} ${parent.y}C${middle} ${parent.y} ${middle} ${node.y} ${node.x} ${node.y}`;
      drawn[node.kept ? "kept" : "edges"].push(beaten(svg("path", { class: `edge ${kinds}`, d, pathLength: 1 }), node));
    }
    drawn.nodes.push(beaten(svg("circle", { class: `node ${kinds}`, cx: node.x, cy: node.y, r: size }), node, wide));
    if (short) {
      drawn.labels.push(beaten(svg("text", { class: `label ${kinds} ${shy ? "shy" : ""}`, x: node.x + (node.kept ? wide : size) + 5, y: node.y + (shy ? -6 : 4) }, short), node));
    }
  }
  return [...drawn.edges, ...drawn.kept, ...drawn.nodes, ...drawn.labels];
}

/** When it moves, and how large it becomes. */
function beaten(shape, node, wide) {
  shape.style.setProperty("--depth", node.depth);
  if (wide) shape.style.setProperty("--wide", `${wide}px`);
  return shape;
}
