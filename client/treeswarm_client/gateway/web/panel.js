// Draws one generation: its draft tree grows, the accepted path is marked, and the other nodes fade.

import { bars } from "./bars.js";
import { el, plural, setText, svg } from "./dom.js";
import { label, layOut } from "./layout.js";

// Durations of the two phases of a picture: faster ones cannot be followed.  Rounds that come meanwhile are only counted.
const GROW_MS = 420;
const WALK_MS = 820;
// Time between two pictures without motion, or on a hidden page.
const CALM_MS = 1000;
// Width of a monospaced character in a label.
const LETTER_PX = 7.1;
const MAX_LABEL = 14;
// Labels stand beside all nodes if rows are at least this far apart.
const WORDS_PX = 12.5;
const EDGE = { left: 16, right: 16, top: 18, bottom: 18 };
// Largest steps between columns and rows, so that small trees are not stretched over the whole picture.
const FURTHEST = { x: 0.24, y: 30 };

const calm = matchMedia("(prefers-reduced-motion: reduce)");

export class Panel {
  constructor(generation) {
    this.generation = generation;
    this.latest = null;
    this.busy = null;
    this.tip = "";
    const figure = (name) => el("div", {}, el("dt", {}, name), el("dd"));
    this.numbers = { tokens: figure("tokens"), per: figure("per traversal"), ms: figure("per round"), nodes: figure("nodes") };
    this.chip = el("span", { class: "chip" });
    this.bars = svg("svg", { class: "bars", viewBox: "0 0 120 24", preserveAspectRatio: "none", "aria-hidden": "true" });
    this.canvas = svg("svg", { class: "tree", role: "img", "aria-label": "no tree yet" });
    this.hint = el("p", { class: "hint" });
    this.text = el("p", { class: "text" });
    this.element = el("article", { class: "panel", "aria-label": `Generation ${generation.id}`, "data-id": generation.id },
      el("header", {}, el("h3", {}, `#${generation.id}`), this.chip, this.bars, el("dl", {}, ...Object.values(this.numbers))),
      el("div", { class: "canvas" }, this.canvas, this.hint),
      el("div", { class: "said" }, this.text));
    this.resized = new ResizeObserver(() => this.picture && this.draw(this.picture, false));
    this.resized.observe(this.canvas);
    this.drawNumbers();
  }

  first(event) {
    this.tip = event.bonus ?? "";
  }

  round(event) {
    const picture = { round: event, tip: this.tip };
    this.tip = event.bonus ?? "";
    // A round without a tree, as the last one often is, does not replace a drawn tree.
    if (!event.nodes && (this.latest ?? this.picture)?.round.nodes) return;
    this.latest = picture;
    if (!this.busy) this.show();
  }

  end() {
    this.drawNumbers();
  }

  close() {
    clearTimeout(this.busy);
    this.resized.disconnect();
  }

  drawNumbers() {
    const generation = this.generation;
    this.element.dataset.running = generation.running;
    this.element.dataset.rounds = generation.rounds;
    setText(this.chip, generation.state);
    setText(this.numbers.tokens.lastChild, `${generation.tokens}`);
    setText(this.numbers.per.lastChild, generation.perTraversal);
    setText(this.numbers.ms.lastChild, generation.roundMs);
    setText(this.numbers.nodes.lastChild, generation.rounds ? `${Math.round(generation.drafted / generation.rounds)}` : "–");
    bars(this.bars, generation.history);
    const prompt = generation.prompt === null ? "The prompt" : `The prompt of ${plural(generation.prompt, "token")}`;
    setText(this.hint, generation.rounds || !generation.running ? "" : generation.traversals ? "Waiting for the first tree." : `${prompt} is being processed.`);
    this.writeText();
  }

  /** Write the text, round by round; dots stand for words that the gateway does not send. */
  writeText() {
    const turns = this.generation.turns;
    const parts = turns.map((round, i) => {
      const words = round.words.map((word) => word ?? "•").join("");
      const classes = `turn ${(this.generation.traversals - turns.length + i) % 2 ? "odd" : ""} ${i === turns.length - 1 ? "newest" : ""}`;
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
    const tree = layOut(round);
    tree.nodes[0].word = tip;
    const width = this.canvas.clientWidth || 600;
    const height = this.canvas.clientHeight || 260;
    const across = width - EDGE.left - EDGE.right;
    const high = height - EDGE.top - EDGE.bottom;
    // The last column also needs room for its labels.
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
    this.canvas.setAttribute("aria-label", `Round ${round.round}: ${plural(round.nodes, "node")} drafted, ${round.accepted.length} accepted, ${round.ms} ms`);
    this.canvas.dataset.nodes = round.nodes;
    this.canvas.dataset.accepted = round.accepted.length;
    this.canvas.classList.toggle("walked", !moving);
    this.canvas.classList.toggle("moving", moving);
    this.canvas.style.setProperty("--beat", `${(moving ? GROW_MS / 2 : 0) / Math.max(1, tree.deepest)}ms`);
    this.canvas.replaceChildren(...makeShapes(tree, step));
  }
}

/** Return the shapes in drawing order: edges, accepted edges, nodes, and labels on top. */
function makeShapes(tree, step) {
  const radius = Math.max(1.4, Math.min(4, step.y * 0.3, step.x * 0.3));
  const labelLength = Math.min(MAX_LABEL, Math.floor((step.x - 26) / LETTER_PX));
  const roomy = step.y >= WORDS_PX;
  const drawn = { edges: [], kept: [], nodes: [], labels: [] };
  for (const node of tree.nodes) {
    const kinds = `${node.kind} ${node.kept ? "kept" : ""}`;
    const wide = Math.max(3.4, radius * 1.25); // radius of an accepted node
    const size = node.kind === "root" ? wide : radius;
    const shy = !roomy && node.kind !== "root";
    const short = labelLength > 0 && (roomy || node.kept) ? label(node.word, labelLength) : "";
    node.out = short && !shy ? node.x + size + 9 + short.length * LETTER_PX : node.x + size;
    const parent = tree.nodes[node.parent];
    if (parent) {
      const middle = (parent.out + node.x) / 2;
      const d = `M${parent.out} ${parent.y}C${middle} ${parent.y} ${middle} ${node.y} ${node.x} ${node.y}`;
      drawn[node.kept ? "kept" : "edges"].push(animate(svg("path", { class: `edge ${kinds}`, d, pathLength: 1 }), node));
    }
    drawn.nodes.push(animate(svg("circle", { class: `node ${kinds}`, cx: node.x, cy: node.y, r: size }), node, wide));
    if (short) {
      drawn.labels.push(animate(svg("text", { class: `label ${kinds} ${shy ? "shy" : ""}`, x: node.x + (node.kept ? wide : size) + 5, y: node.y + (shy ? -6 : 4) }, short), node));
    }
  }
  return [...drawn.edges, ...drawn.kept, ...drawn.nodes, ...drawn.labels];
}

/** Set when a shape moves, and how large it becomes. */
function animate(shape, node, wide) {
  shape.style.setProperty("--depth", node.depth);
  if (wide) shape.style.setProperty("--wide", `${wide}px`);
  return shape;
}
