// Draws a round's tree: it grows, the accepted path is marked, and the other nodes fade.

import { plural, svg } from "./dom.js";
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

/** A picture that shows the latest of the trees that it is given, one after the other. */
export class TreePicture {
  constructor() {
    this.element = svg("svg", { class: "tree", role: "img", "aria-label": "no tree yet" });
    this.shown = null;
    this.latest = null;
    this.busy = null;
    this.resized = new ResizeObserver(() => this.shown && this.draw(this.shown, false));
    this.resized.observe(this.element);
  }

  /** Show a round's tree below `tip`, the token before it, as soon as the present picture is over. */
  show(round, tip) {
    // A round without a tree, as the last one often is, does not replace a drawn tree.
    if (!round.nodes && (this.latest ?? this.shown)?.round.nodes) return;
    this.latest = { round, tip };
    if (!this.busy) this.play();
  }

  /** Show a round's tree at once and without motion. */
  hold(round, tip) {
    this.close();
    this.draw({ round, tip }, false);
  }

  clear() {
    this.close();
    this.shown = null;
    this.element.replaceChildren();
    this.element.setAttribute("aria-label", "no tree yet");
    delete this.element.dataset.nodes;
  }

  close() {
    clearTimeout(this.busy);
    this.busy = null;
    this.latest = null;
  }

  play() {
    this.busy = null;
    if (!this.latest) return;
    if (document.hidden) {
      this.busy = setTimeout(() => this.play(), CALM_MS);
      return;
    }
    const picture = this.latest;
    this.latest = null;
    this.draw(picture, !calm.matches);
    if (calm.matches) {
      this.busy = setTimeout(() => this.play(), CALM_MS);
      return;
    }
    this.busy = setTimeout(() => {
      this.element.classList.add("walked");
      this.busy = setTimeout(() => this.play(), WALK_MS);
    }, GROW_MS);
  }

  draw(picture, moving) {
    this.shown = picture;
    const { round, tip } = picture;
    const tree = layOut(round);
    tree.nodes[0].word = tip;
    const width = this.element.clientWidth || 600;
    const height = this.element.clientHeight || 260;
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
    this.element.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.element.setAttribute("aria-label", `Round ${round.round}: ${plural(round.nodes, "node")} drafted, ${round.accepted.length} accepted, ${round.ms} ms`);
    this.element.dataset.nodes = round.nodes;
    this.element.dataset.accepted = round.accepted.length;
    this.element.classList.toggle("walked", !moving);
    this.element.classList.toggle("moving", moving);
    this.element.style.setProperty("--beat", `${(moving ? GROW_MS / 2 : 0) / Math.max(1, tree.deepest)}ms`);
    this.element.replaceChildren(...makeShapes(tree, step));
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
